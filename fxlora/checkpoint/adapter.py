"""Adapters on disk: peft's two files, written as one and read strictly.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors`, whose keys are
`base_model.model.<layer>.lora_A.weight` and `….lora_B.weight`; the adapter's name is not part of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from fxlora._passes import FACTOR_A, FACTOR_B, TOKENS, BranchSpec, base_weight, did_you_mean, part_path, part_shapes
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.safetensors_io import Entry, TensorFile, check_plain, open_tensors, save_tensors
from fxlora.compound import ATTENTION_WEIGHTS, OUT_PROJ, compound_of
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError
from fxlora.factors import Factors, place
from fxlora.host.files import BASE_LAYER, copies_of_biases, extras, tensor_at
from fxlora.model import LoraModel
from fxlora.plan import Plan

log = logging.getLogger("fxlora")

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
"""What peft's wrappers put before each key."""

KEYS = {FACTOR_A: f"{FACTOR_A}.weight", FACTOR_B: f"{FACTOR_B}.weight", TOKENS: f"token_adapter.{TOKENS}"}
"""Keys of parts whose names in files are others than their own."""

FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")


# ---- writing ----


def save_adapters(
    model: LoraModel, directory: Path, names: Iterable[str], state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write adapters as peft does: "default" into the directory itself, any other into a directory of its name there.

    All files of a call are put in place as one. Whatever else the directory holds stays.

    Args:
        model: the transformed model.
        directory: created if need be.
        names: of adapters that the model has.
        state_dict: where to take the factors from, by the model's parameter names, with or without the prefixes of
            torch.compile and DDP; the model itself if None.

    Raises:
        CheckpointError: when a tensor is missing or has no data, or the directory cannot be written. Nothing is
            changed then.
    """
    contents = {name: _contents(model, model._lora.adapters[name], state_dict) for name in names}
    with staged(directory, keep=lambda _: True) as staging:
        for name, (config, tensors) in contents.items():
            to = staging if name == "default" else staging / name
            to.mkdir(exist_ok=True)
            save_tensors(to / WEIGHTS_NAME, tensors)
            (to / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")


def _contents(
    model: LoraModel, plan: Plan, state_dict: Mapping[str, Tensor] | None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors by key of one adapter's files."""
    tensors: dict[str, Tensor] = {}
    names = _names_in_files(model, plan)
    for spec in plan.branches:
        for part, shape in part_shapes(spec).items():
            path = f"{spec.owner}.{part_path(part, spec.adapter)}"
            tensor = model.get_parameter(path) if state_dict is None else _find(state_dict, path)
            check_plain(tensor, f"'{path}'")
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"'{path}' has shape {tuple(tensor.shape)}, and the adapter's configuration says {shape}; is it a "
                    "shard? Gather the whole tensors and pass them as state_dict"
                )
            if not bool(tensor.isfinite().all()):
                log.warning("saving adapter '%s': '%s' has NaN or infinite entries", plan.adapter, path)
            tensors[_key(names[spec.site], part)] = tensor
    for extra in extras(plan):
        tensor = tensor_at(model, extra.path) if state_dict is None else _find(state_dict, extra.path)
        check_plain(tensor, f"'{extra.path}'")
        tensors[KEY_PREFIX + extra.key] = tensor
    return _config(model, plan.config), tensors


def _names_in_files(model: nn.Module, plan: Plan) -> dict[str, str]:
    """By site, the name under which files keep its factors.

    A layer has its own name. A bare parameter has its module's; of several in one module peft wraps the first ones more
    deeply, one `base_layer` for each that follows. The output projection of an attention that is a target itself is
    inside of its wrapper.
    """
    names: dict[str, str] = {}
    in_module: dict[str, list[str]] = {}
    sites = {spec.site for spec in plan.branches}
    for spec in plan.branches:
        attention = compound_of(model, spec.site)
        inside = attention is not None and any(f"{attention}.{name}" in sites for name in ATTENTION_WEIGHTS)
        if spec.is_parameter:
            in_module.setdefault(spec.site.rpartition(".")[0], []).append(spec.site)
        elif inside and attention is not None:
            names[spec.site] = ".".join(part for part in (attention, BASE_LAYER, OUT_PROJ) if part)
        else:
            names[spec.site] = spec.site
    for module, parameters in in_module.items():
        registered = list(model.get_submodule(module)._parameters)
        parameters.sort(key=lambda site: registered.index(site.rpartition(".")[2]))
        for depth, site in enumerate(reversed(parameters)):
            names[site] = ".".join(part for part in (module, *[BASE_LAYER] * depth) if part)
    return names


def _key(name: str, part: str) -> str:
    """The key of a part in a file: `.weight` follows the name of a matrix that peft keeps in a module."""
    return KEY_PREFIX + ".".join(piece for piece in (name, KEYS.get(part, part)) if piece)


def _find(state_dict: Mapping[str, Tensor], path: str) -> Tensor:
    """A parameter in a state dict that may have been taken from a wrapped model."""
    for prefix in ("", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."):
        if prefix + path in state_dict:
            return state_dict[prefix + path]
    raise CheckpointError(f"state_dict has no '{path}'.{did_you_mean(path, state_dict)}")


def _config(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """What `adapter_config.json` says: as peft, which adds how to load the base."""
    assert isinstance(model, LoraModel)
    config = config.replace(inference_mode=True)
    if config.task_type is None:
        name, module = model._lora.base_class
        config = config.replace(auto_mapping={"base_model_class": name, "parent_library": module})
    if config.base_model_name_or_path is None:
        config = config.replace(base_model_name_or_path=base_name(model))
    return config


def base_name(model: nn.Module) -> str | None:
    """Where a transformers model came from: a directory or a name on the hub; None if it does not say."""
    for owner, attribute in ((getattr(model, "config", None), "_name_or_path"), (model, "name_or_path")):
        name = getattr(owner, attribute, None)
        if isinstance(name, str) and name:
            return name
    return None


# ---- reading ----


def read_adapter(directory: Path, model: nn.Module, plan: Plan) -> Factors:
    """Read the factors of a saved adapter, exactly those that a plan asks for.

    Args:
        directory: with `adapter_model.safetensors`.
        model: the model that they are for; gives devices and dtypes.
        plan: the branches, planned from the adapter's own configuration.

    Returns:
        By site, the parts of each branch.

    Raises:
        CheckpointError: when the file is missing, pickled or corrupt; when a key is unknown or missing; when a tensor
            has another shape than planned, is not floating point, or has NaN or infinite entries; when the file has
            base weights; when the model is on the meta device.
    """
    weights = {spec.site: _real_weight(model, spec.site) for spec in plan.branches}
    names = _names_in_files(model, plan)
    with open_tensors(adapter_file(directory)) as file:
        keys = keys_without_prefix(file)
        expected = {_key(names[spec.site], part): spec for spec in plan.branches for part in part_shapes(spec)}
        others = extras(plan)
        keys = {name: key for name, key in keys.items() if name not in copies_of_biases(plan)}
        wanted = {key.removeprefix(KEY_PREFIX) for key in expected} | {extra.key for extra in others}
        _check_keys(file.path, keys, wanted, plan)
        factors: Factors = {}
        for spec in plan.branches:
            for part, shape in part_shapes(spec).items():
                key = keys[_key(names[spec.site], part).removeprefix(KEY_PREFIX)]
                _check_shape(file, key, shape, spec)
                tensor = load_factor(file, key)
                # An empty slice is placed, to learn the dtype: a trained factor must not go through the base's.
                like = place(tensor[:0], weights[spec.site], plan.config.autocast_adapter_dtype)
                factors.setdefault(spec.site, {})[part] = tensor.to(like)
        for extra in others:
            value = _load_extra(file, keys[extra.key], extra.like, tensor_at(model, extra.like))
            factors.setdefault(extra.owner, {})[extra.name] = value
    return factors


def _load_extra(file: TensorFile, key: str, path: str, like: Tensor) -> Tensor:
    """A tensor of a module that is saved whole, or a bias, in the model's dtype."""
    if like.is_meta:
        raise CheckpointError(_ON_META.format(path))
    entry = file.entries[key]
    if entry.shape != tuple(like.shape):
        raise CheckpointError(
            f"{file.path}: '{key}' has shape {entry.shape}, and '{path}' in the model {tuple(like.shape)}; the adapter "
            "is for another model"
        )
    if like.is_floating_point():
        return load_factor(file, key).to(like)
    tensor = file.load(key).clone()
    if tensor.dtype != like.dtype:
        raise CheckpointError(f"{file.path}: '{key}' is {entry.dtype}, and '{path}' in the model {like.dtype}")
    return tensor.to(like)


def adapter_file(directory: Path) -> Path:
    """The weights file of a saved adapter.

    Raises:
        CheckpointError: when there is none; says so if the adapter is pickled.
    """
    path = directory / WEIGHTS_NAME
    if path.is_file():
        return path
    if (directory / PICKLED_NAME).is_file():
        raise CheckpointError(
            f"{directory / PICKLED_NAME} is a pickle, which can run code when it is read, and is refused; load it where "
            f"you trust it and save its tensors with safetensors as {WEIGHTS_NAME}"
        )
    raise CheckpointError(f"{path} does not exist: '{directory}' holds no adapter weights")


def keys_without_prefix(file: TensorFile) -> dict[str, str]:
    """Keys of an adapter file by what is left of them without `base_model.model.`.

    Raises:
        CheckpointError: when a key is there with and without the prefix.
    """
    keys: dict[str, str] = {}
    for key in file.entries:
        other = keys.setdefault(key.removeprefix(KEY_PREFIX), key)
        if other != key:
            raise CheckpointError(f"{file.path}: '{other}' and '{key}' mean the same tensor; remove one of them")
    return keys


def refuse_base_weights(path: Path, key: str) -> None:
    """Refuse keys of peft's wrapped layers: an adapter never overwrites a base weight.

    Raises:
        CheckpointError: for a weight or bias of the base.
        NotImplementedError: for the factors of a second parameter of one module.
    """
    if ".base_layer.lora_" in key:
        raise NotImplementedError(
            f"{path}: '{key}' belongs to the second of several targeted parameters of one module (or of a multi-head "
            "attention), which is not supported yet"
        )
    if ".base_layer." in key:
        raise CheckpointError(
            f"{path}: '{key}' is a weight of the base model, which loading an adapter must not change; save the adapter "
            "again without it (in peft: save_pretrained(…, save_embedding_layers=False) and bias='none')"
        )


def load_factor(file: TensorFile, key: str) -> Tensor:
    """A factor as the file has it, in memory of its own, checked to be floating point and finite.

    Raises:
        CheckpointError: otherwise.
    """
    _check_dtype(file.path, key, file.entries[key])
    tensor = file.load(key).clone()
    if not bool(tensor.isfinite().all()):
        what = "NaN" if bool(tensor.isnan().any()) else "infinite"
        raise CheckpointError(
            f"{file.path}: '{key}' has {what} entries, so the adapter is broken; use an earlier checkpoint of it"
        )
    return tensor


_ON_META = (
    "an adapter cannot be loaded into a model on the meta device ('{}' is there): load the base's real weights first, "
    "or lora_transform the meta model with a LoraConfig and load the adapter later"
)


def _real_weight(model: nn.Module, site: str) -> Tensor:
    path, weight = base_weight(model, site)
    if weight.is_meta:
        raise CheckpointError(_ON_META.format(path))
    return weight


def _check_keys(path: Path, keys: Mapping[str, str], expected: set[str], plan: Plan) -> None:
    for key in keys:
        if key not in expected:
            refuse_base_weights(path, key)
    unknown = [key for key in keys if key not in expected]
    missing = sorted(expected - set(keys))
    if unknown:
        raise CheckpointError(
            f"{path}: '{keys[unknown[0]]}'{_more(unknown)} belongs to no target of this model and configuration."
            f"{did_you_mean(unknown[0], missing or expected)} Load the adapter into the model it was trained for, or "
            "remove the key"
        )
    if missing:
        raise CheckpointError(
            f"{path} lacks '{KEY_PREFIX}{missing[0]}'{_more(missing)}: the configuration makes {len(plan.branches)} layers "
            "of this model targets. Load the adapter into the model it was trained for, or correct its target_modules"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more keys)" if len(names) > 1 else ""


def _check_shape(file: TensorFile, key: str, shape: tuple[int, ...], spec: BranchSpec) -> None:
    found = file.entries[key].shape
    if found != shape:
        raise CheckpointError(
            f"{file.path}: '{key}' has shape {found}, and '{spec.site}' with rank {spec.r} needs {shape}; the adapter is "
            "for another model, or its configuration has another rank"
        )


def _check_dtype(path: Path, key: str, entry: Entry) -> None:
    if entry.dtype not in FACTOR_DTYPES:
        allowed = ", ".join(FACTOR_DTYPES)
        raise CheckpointError(f"{path}: '{key}' is {entry.dtype}, and a factor must be one of {allowed}; convert it")
