"""One base with several adapters from the same files, in fxlora, in peft and in float64: what tests/oracle compares.

A `Setup` has the files; a `Side` is one library with all adapters loaded, the first active. `Exact` knows neither
library's code: it runs the base in float64 with `W + Σ gate s B A` in place of each adapted W.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import peft.optimizers
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxlora
from fxlora import LoraConfig, LoraModel, lora_transform
from tests.models.checks import tensors
from tests.oracle.cases import Case
from tests.oracle.parity import WEIGHTS, quietly, shift_in_place, shifted, updated

BASE = "__base__"


class Setup:
    """A case's model, and adapters for it in files.

    Args:
        folder: where the files are written.
        case: the model, its call, and fields of the configuration that all adapters have.
        adapters: more fields, by adapter.
        others: likewise for adapters that are written below `others/`, and not loaded.
    """

    def __init__(
        self,
        folder: Path,
        case: Case,
        adapters: Mapping[str, dict[str, Any]],
        others: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.folder, self.case = folder, case
        self._models: dict[str, LoraModel] = {}
        self.cases = {name: self._with(more) for name, more in adapters.items()}
        for name, own in self.cases.items():
            self._write(name, own)
        for name, more in (others or {}).items():
            self._write(f"others/{name}", self._with(more))

    def _with(self, fields: dict[str, Any]) -> Case:
        return replace(self.case, config={**self.case.config, **fields})

    def _write(self, name: str, case: Case) -> None:
        torch.manual_seed(5)
        model = lora_transform(
            case.model(), LoraConfig(**case.settings), capture=case.captures[-1], example_inputs=case.batch()
        )
        path = self.folder / name
        if case.other_factors:  # files may keep them in peft's shapes, where a shift has no meaning of ours
            shift_in_place(model, name)
        model.save_pretrained(path, save_embedding_layers=False)
        if not case.other_factors:
            initial = {f"{name}: {key}": value for key, value in load_file(path / WEIGHTS).items()}
            values = {key.removeprefix(f"{name}: "): value for key, value in shifted(initial).items()}
            save_file(values, path / WEIGHTS)

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return list(self.cases)

    @functools.cached_property
    def exact(self) -> Exact:
        """The float64 reference."""
        return Exact(self)

    def ours(self, capture: Any) -> Ours:
        """Our library."""
        return Ours(self, copy.deepcopy(self._transformed(capture)))

    def _transformed(self, capture: Any) -> LoraModel:
        if capture not in self._models:
            self._models[capture] = loaded(self, self.case.model(), capture).eval()
        return self._models[capture]

    @quietly
    def theirs(self, only: str = "") -> Theirs:
        """peft, with all adapters or with one."""
        first, *others = [only] if only else self.names
        model = peft.PeftModel.from_pretrained(
            self.case.model(), str(self.folder / first), adapter_name=first, is_trainable=True
        )
        for name in others:
            model.load_adapter(str(self.folder / name), name)
        model.set_adapter(first)
        return Theirs(self, model.eval())


def loaded(setup: Setup, model: nn.Module, capture: Any) -> LoraModel:
    """A model with the adapters of a setup."""
    first, *others = setup.names
    result = lora_transform(
        model, setup.folder / first, capture=capture, adapter_name=first, example_inputs=setup.case.batch(),
        is_trainable=True,
    )  # fmt: skip
    for name in others:
        result.load_adapter(setup.folder / name, name)
    return result


class Side:
    """One library: a model whose methods are called, and what differs in how that is spelled."""

    config: Any
    library: Any
    optimizers: Any

    def __init__(self, setup: Setup, model: Any) -> None:
        self.setup, self.model = setup, model

    def outputs(self, model: Any = None, **call: Any) -> list[Tensor]:
        """What a model gives for the case's batch, without gradients; this side's model if None."""
        with torch.no_grad():
            return [value.clone() for value in tensors((model or self.model)(**self.setup.case.batch(), **call))]

    def seen(self, **more: Any) -> dict[str, Any]:
        """Outputs, the active adapters, and which tensors are trained."""
        return {
            "outputs": self.outputs(),
            "active": sorted(self.model.active_adapters),
            "trained": self.trained(),
            **more,
        }

    def tensors(self, adapter: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What an adapter's file would hold."""
        raise NotImplementedError

    def trained(self) -> dict[str, bool]:
        """By adapter and key of its file, whether the tensor requires gradients."""
        parameters = dict(self.model.named_parameters())
        flags = {
            name: torch.full_like(value, float(name in parameters and parameters[name].requires_grad))
            for name, value in self.model.state_dict(keep_vars=True).items()
        }
        return {
            f"{adapter}: {key}": bool(flag.any())
            for adapter in self.model.peft_config
            for key, flag in self.tensors(adapter, flags).items()
        }

    def several(self, names: list[str]) -> None:
        """Activate several adapters."""
        raise NotImplementedError

    def set_scale(self, adapter: str, factor: float) -> None:
        """Set an adapter's scale."""
        raise NotImplementedError

    def multiply_scale(self, factor: float) -> None:
        """Multiply the scale of the active adapters."""
        raise NotImplementedError

    def divide_scale(self, factor: float | None = None) -> None:
        """Divide it, or reset it."""
        raise NotImplementedError

    def rescaled(self, factor: float) -> Any:
        """A context with other scales."""
        raise NotImplementedError

    def hotswap(self, path: Path, adapter: str) -> None:
        """Exchange an adapter."""
        raise NotImplementedError

    def make_room(self, r: int) -> None:
        """Prepare for adapters of higher ranks."""
        raise NotImplementedError

    def layer_status(self) -> list[dict[str, Any]]:
        """`get_layer_status`, by the names of the plain model."""
        found = [asdict(layer) for layer in self.model.get_layer_status()]
        return [{**layer, "name": layer["name"].removeprefix("model.")} for layer in found]


class Ours(Side):
    """fxlora."""

    config = LoraConfig
    library = fxlora
    optimizers = fxlora

    def tensors(self, adapter: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(
                folder, selected_adapters=[adapter], state_dict=state_dict, save_embedding_layers=False
            )
            return load_file(next(Path(folder).rglob(WEIGHTS)))

    def several(self, names: list[str]) -> None:
        self.model.set_adapter(names)

    def set_scale(self, adapter: str, factor: float) -> None:
        self.model.set_scale(adapter, factor)

    def multiply_scale(self, factor: float) -> None:
        self.model.scale_adapter(factor)

    def divide_scale(self, factor: float | None = None) -> None:
        self.model.unscale_adapter(factor)

    def rescaled(self, factor: float) -> Any:
        return fxlora.rescale_adapter_scale(self.model, factor)

    def hotswap(self, path: Path, adapter: str) -> None:
        self.model.hotswap_adapter(path, adapter)

    def make_room(self, r: int) -> None:
        self.model.use_slots(r=r)


class Theirs(Side):
    """peft."""

    config = peft.LoraConfig
    library = peft
    optimizers = peft.optimizers

    @quietly
    def tensors(self, adapter: str, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        found = peft.get_peft_model_state_dict(self.model, state_dict, adapter, save_embedding_layers=False)
        return {key: value.detach().clone().contiguous() for key, value in found.items()}

    def several(self, names: list[str]) -> None:
        self.model.base_model.set_adapter(names)

    def _layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def set_scale(self, adapter: str, factor: float) -> None:
        for layer in self._layers():
            layer.set_scale(adapter, factor)

    def multiply_scale(self, factor: float) -> None:
        for layer in self._layers():
            layer.scale_layer(factor)

    def divide_scale(self, factor: float | None = None) -> None:
        for layer in self._layers():
            layer.unscale_layer(factor)

    def rescaled(self, factor: float) -> Any:
        return peft.helpers.rescale_adapter_scale(self.model, factor)

    def hotswap(self, path: Path, adapter: str) -> None:
        hotswap.hotswap_adapter(self.model, str(path), adapter_name=adapter)

    def make_room(self, r: int) -> None:
        hotswap.prepare_model_for_compiled_hotswap(self.model, target_rank=r)


class Exact:
    """The base in float64 with updated weights.

    Attributes:
        factors: float64 leaves that require gradients, by our names, of all adapters.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        model = loaded(setup, setup.case.model(), setup.case.captures[-1])
        self.factors = {
            name: parameter.detach().double().requires_grad_()
            for name, parameter in model.named_parameters()
            if "lora_" in name
        }
        self.base = setup.case.model().double()
        wide = setup.case.batch().items()
        self.batch = {name: value.double() if value.is_floating_point() else value for name, value in wide}

    def weights(self, gates: Mapping[str, float]) -> dict[str, Tensor]:
        """Adapted tensors of the base by name, with each adapter's update times its gate."""
        total: dict[str, Tensor] = {}
        for adapter, gate in gates.items():
            for name, moved in updated(self.base, self.factors, self.setup.cases[adapter], adapter).items():
                plain = self.base.get_parameter(name)
                total[name] = total.get(name, plain) + gate * (moved - plain)
        return total

    def outputs(self, gates: Mapping[str, float], weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Outputs with these gates, or with these weights."""
        values = self.weights(gates) if weights is None else dict(weights)
        base = copy.deepcopy(self.base)  # where a module has two names, the call leaves it without its parameters
        return tensors(torch.func.functional_call(base, values, (), self.batch))

    def rows(self, names: Sequence[str]) -> list[Tensor]:
        """Outputs where each row has an adapter of its own: those of the whole batch with each, and its rows of them."""
        return picked({name: self.outputs({} if name == BASE else {name: 1.0}) for name in dict.fromkeys(names)}, names)

    def of_file(self, path: Path, config: dict[str, Any]) -> list[Tensor]:
        """Outputs with an adapter from a directory alone."""
        case = replace(self.setup.case, config={**self.setup.case.config, **config})
        values = {
            f"{key.removeprefix('base_model.model.').removesuffix('.weight')}.default.weight": value.double()
            for key, value in load_file(path / WEIGHTS).items()
        }
        return self.outputs({}, updated(self.base, values, case))

    def gradients(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of all factors that have any, for the weighting that `weighted` has."""
        found = torch.autograd.grad(weighted(outputs), list(self.factors.values()), allow_unused=True)
        return {name: value for name, value in zip(self.factors, found, strict=True) if value is not None}


def picked(alone: Mapping[str, Sequence[Tensor]], names: Sequence[str]) -> list[Tensor]:
    """Each row from the outputs of its adapter."""
    count = len(alone[names[0]])
    return [torch.stack([alone[name][each][row] for row, name in enumerate(names)]) for each in range(count)]


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar that depends on all entries of outputs."""
    generator = torch.Generator().manual_seed(11)
    parts = [(out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum() for out in outputs]
    return torch.stack(parts).sum()


def gradients(model: nn.Module, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of the parameters that require any, by name."""
    model.zero_grad()
    weighted(outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
