"""What adapters a model has, where they are, and which of them run, trained or merged: plain data, for people and tests.

The fields are those of peft's `TunerLayerStatus` and `TunerModelStatus`. A value is `"irregular"` where layers or
parameters of one adapter differ, such as after a `requires_grad_` by hand on one of its factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

from fxlora._passes import BranchSpec, has_factors, part_path, part_shapes
from fxlora.errors import AdapterError
from fxlora.rendering import Rendered, Section, aligned, json_data

if TYPE_CHECKING:
    from fxlora.model import LoraModel

Irregular = Literal["irregular"]

_TYPES = {"linear": "lora.Linear", "embedding": "lora.Embedding", "tied": "lora.Linear"}
"""peft's names for layers with adapters, by kind; convolutions have their dimensions in the name."""


class _Status(Rendered):
    """Shown as a table of its fields."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return json_data(asdict(cast(Any, self)))

    def __str__(self) -> str:
        return "\n".join(aligned(self._rows()))

    def sections(self) -> list[Section]:
        """The fields and their values."""
        return [Section(rows=tuple(self._rows()))]

    def _rows(self) -> list[tuple[str, str]]:
        values = ((each.name, getattr(self, each.name)) for each in fields(cast(Any, self)))
        return [(name.replace("_", " "), _text(value)) for name, value in values if value is not None]


def _text(value: object) -> str:
    """A field's value without Python's brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(each)}" for key, each in cast("Mapping[str, object]", value).items())
    if isinstance(value, list):
        return ", ".join(map(_text, cast("list[object]", value))) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True, slots=True)
class LayerStatus(_Status):
    """The adapters of one layer, bare parameter or module that is trained whole.

    Attributes:
        name: its qualified name in the model, which `get_submodule` takes for a layer. peft puts `model.` before it.
        module_type: what peft calls it, such as `lora.Linear`.
        enabled: whether adapters are in use at all.
        active_adapters: names of the adapters in use in the model; this layer need not have all of them.
        merged_adapters: names of its adapters that are folded into the weight.
        requires_grad: by adapter, whether its parameters here require gradients.
        available_adapters: sorted names of the adapters that it has.
        devices: by adapter, the sorted types of the devices that its parameters are on.
        quantization_backend: always None: quantized layers are refused.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass(frozen=True, slots=True)
class ModelStatus(_Status):
    """The adapters of a model as a whole.

    Attributes:
        base_model_type: name of the original model's class.
        adapter_model_type: `LoraModel`.
        peft_types: `LORA` for each adapter.
        trainable_params: number of entries that require gradients.
        total_params: number of all entries.
        num_adapter_layers: number of layers that have an adapter.
        enabled: whether adapters are in use.
        active_adapters: names of the adapters in use.
        merged_adapters: sorted names of the adapters that are folded into the weights.
        requires_grad: by adapter, whether its parameters require gradients.
        available_adapters: sorted names of all adapters.
        devices: by adapter, the sorted types of the devices that its parameters are on.
        quantization_backend: always None.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """The adapters of each layer, in the order of the model's modules; bare parameters come last.

    Args:
        model: a transformed model.

    Raises:
        AdapterError: when the model is not transformed, or has no adapter left.
    """
    lora = _transformed(model)
    paths = _paths(lora)
    order = {name: index for index, (name, _) in enumerate(lora.named_modules())}
    return [
        _of_layer(lora, *layer, paths[layer])
        for layer in sorted(paths, key=lambda each: order.get(each[0], len(order)))
    ]


def get_model_status(model: nn.Module) -> ModelStatus:
    """The adapters of a model as a whole.

    Args:
        model: a transformed model.

    Raises:
        AdapterError: as `get_layer_status`.
    """
    lora = _transformed(model)
    layers, state = get_layer_status(model), lora._lora
    trainable, total = lora.get_nb_trainable_parameters()
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & {*layer.available_adapters} - {*layer.merged_adapters} for layer in layers)
    adapters = [name for layer in layers for name in layer.requires_grad]
    flags: dict[str, list[bool | Irregular]] = {name: [] for name in adapters}
    for layer in layers:
        for name, flag in layer.requires_grad.items():
            flags[name].append(flag)
    devices = {name: {each for layer in layers for each in layer.devices.get(name, ())} for name in adapters}
    return ModelStatus(
        base_model_type=state.base_class[0],
        adapter_model_type="LoraModel",
        peft_types={name: "LORA" for name in state.adapters},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=state.enabled,
        active_adapters=list(state.active),
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={name: _common(each) for name, each in flags.items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={name: sorted(each) for name, each in devices.items()},
    )


def _transformed(model: nn.Module) -> LoraModel:
    from fxlora.model import LoraModel

    if not isinstance(model, LoraModel):
        raise AdapterError(f"this {type(model).__name__} has no adapters; lora_transform gives it one")
    if not model._lora.adapters:
        raise AdapterError(
            "no adapter is left in this model; add_adapter gives it one, unload() gives the plain model back"
        )
    return model


def _paths(model: LoraModel) -> dict[tuple[str, str], dict[str, list[str]]]:
    """By layer (name, type) and adapter: where the adapter's parameters are."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, plan in model._lora.adapters.items():
        for spec in plan.branches:
            own = found.setdefault((spec.site, _type(spec)), {}).setdefault(name, [])
            own += [f"{spec.owner}.{part_path(part, name)}" for part in part_shapes(spec)]
        for saved in plan.saved:
            own = found.setdefault((saved.module, "ModulesToSaveWrapper"), {}).setdefault(name, [])
            own += [f"{saved.path}.{parameter}" for parameter in saved.parameters]
    return found


def _type(spec: BranchSpec) -> str:
    if not has_factors(spec):
        return "TrainableTokensLayer"
    if spec.is_parameter:
        return "lora.ParamWrapper"
    if spec.kind == "conv":
        return f"lora.Conv{len(spec.option('kernel_size'))}d"
    return _TYPES.get(spec.kind, f"lora.{spec.kind.capitalize()}")


def _of_layer(model: LoraModel, name: str, module_type: str, paths: dict[str, list[str]]) -> LayerStatus:
    state = model._lora
    parameters = {adapter: [model.get_parameter(path) for path in own] for adapter, own in paths.items()}
    foldable = module_type != "ModulesToSaveWrapper"  # copies run in a module's place, and are never folded
    return LayerStatus(
        name=name,
        module_type=module_type,
        enabled=state.enabled,
        active_adapters=list(state.active),
        merged_adapters=[adapter for adapter in state.merged if adapter in paths and foldable],
        requires_grad={adapter: _common([p.requires_grad for p in own]) for adapter, own in parameters.items()},
        available_adapters=sorted(paths),
        devices={adapter: sorted({p.device.type for p in own}) for adapter, own in parameters.items()},
    )


def _common(values: Iterable[bool | Irregular]) -> bool | Irregular:
    different = set(values)
    return different.pop() if len(different) == 1 else "irregular"


__all__ = ["LayerStatus", "ModelStatus", "get_layer_status", "get_model_status"]
