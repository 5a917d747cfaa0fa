"""Adapters on disk: peft's `adapter_config.json` and `adapter_model.safetensors`, key names exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlora._passes import FACTOR_A, FACTOR_B, KINDS, BranchSpec, base_weight, did_you_mean
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.tensors import read_tensors, write_tensors
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import AdapterError, CheckpointError
from fxlora.factors import Factors, place
from fxlora.model import LoraModel
from fxlora.plan import Plan

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before every key: the path of the user's model in its wrappers."""


def save_adapters(
    model: LoraModel, directory: Path, names: Sequence[str], state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write adapters, "default" into `directory` and the others into folders below it, all as one step.

    Args:
        model: the transformed model.
        directory: other files in it stay.
        names: adapters of the model.
        state_dict: where the tensors are taken from, by parameter name; the model itself if None.

    Raises:
        CheckpointError: when a tensor is missing or on the meta device, or the directory cannot be written.
    """
    plans = [model._lora.adapters[name] for name in names]
    contents = {plan.adapter: _to_disk(model, plan, state_dict) for plan in plans}
    with staged(directory) as staging:
        for plan in plans:
            folder = staging if plan.adapter == "default" else staging / plan.adapter
            folder.mkdir(exist_ok=True)
            write_tensors(folder / WEIGHTS_NAME, contents[plan.adapter])
            (folder / CONFIG_NAME).write_text(_config_on_disk(model, plan).to_json(), encoding="utf-8")


def _config_on_disk(model: LoraModel, plan: Plan) -> LoraConfig:
    config = plan.config
    name, module = model._lora.base_class
    mapping = {"base_model_class": name, "parent_library": module} if config.task_type is None else None
    path = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    return config.replace(inference_mode=True, auto_mapping=mapping, base_model_name_or_path=path)


def _to_disk(model: LoraModel, plan: Plan, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    available = _without_wrappers(state_dict) if state_dict is not None else dict(model.named_parameters())
    keys = disk_keys(plan.branches)
    result: dict[str, Tensor] = {}
    for spec in plan.branches:
        for container in KINDS[spec.kind].params(spec):
            name = f"{spec.owner}.{container}.{spec.adapter}.weight"
            if name not in available:
                raise CheckpointError(f"cannot save adapter '{plan.adapter}': there is no '{name}' in the state dict")
            if available[name].is_meta:
                raise CheckpointError(f"cannot save adapter '{plan.adapter}': '{name}' is on the meta device")
            result[PREFIX + keys[spec.site, container]] = available[name].detach().cpu()
    return result


def _without_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of `torch.compile` and DistributedDataParallel."""
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state_dict.items()}


def disk_keys(branches: Sequence[BranchSpec]) -> dict[tuple[str, str], str]:
    """The key of each factor in a file, without `PREFIX`: `<site>.lora_A.weight`.

    A bare parameter's factors are filed under the module that holds it, as peft does.

    Raises:
        NotImplementedError: when two parameters of one module have factors.
    """
    keys: dict[tuple[str, str], str] = {}
    for spec in branches:
        owner = spec.site.rpartition(".")[0] if spec.is_parameter else spec.site
        for container in KINDS[spec.kind].params(spec):
            keys[spec.site, container] = f"{owner}.{container}.weight".lstrip(".")
    if len(set(keys.values())) < len(keys):
        twice = next(key for key in keys.values() if list(keys.values()).count(key) > 1)
        raise NotImplementedError(
            f"'{twice}': two parameters of one module cannot be saved yet; give them two adapters"
        )
    return keys


def read_adapter(directory: Path, model: nn.Module, plan: Plan) -> Factors:
    """Read the factors that a plan needs, and refuse a file that holds anything else.

    Args:
        directory: with `adapter_model.safetensors`.
        model: the model that they are for; decides dtype and device of each factor.
        plan: from the `adapter_config.json` beside it.

    Returns:
        By site and container, float tensors of the plan's shapes.

    Raises:
        CheckpointError: for a missing, broken or pickled file, unknown, missing or misshapen tensors, and NaN or
            infinite values; names the file and the key.
    """
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        pickled = directory / "adapter_model.bin"
        hint = f"; {pickled.name} is pickled and is not read: save it again as safetensors" if pickled.exists() else ""
        raise CheckpointError(f"{path} does not exist{hint}")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(path).items()}
    keys = disk_keys(plan.branches)
    _check_keys(path, list(tensors), list(keys.values()))
    factors: Factors = {}
    for spec in plan.branches:
        weight = base_weight(model, spec.site)[1]
        if weight.is_meta:
            raise CheckpointError(
                f"{path}: the model is on the meta device; give it real weights, then load the adapter"
            )
        for container, shape in KINDS[spec.kind].params(spec).items():
            key = keys[spec.site, container]
            _check_tensor(path, key, tensors[key], shape)
            placed = place(tensors[key], weight, plan.config.autocast_adapter_dtype)
            factors.setdefault(spec.site, {})[container] = placed
    return factors


def _check_keys(path: Path, found: list[str], wanted: list[str]) -> None:
    for key in found:
        if key not in wanted:
            raise CheckpointError(f"{path}: '{key}' {_why_unknown(key)}.{did_you_mean(key, wanted)}")
    for key in wanted:
        if key not in found:
            raise CheckpointError(
                f"{path}: '{key}' is missing, though adapter_config.json makes it a target; the two files do not belong "
                f"together, or to this model.{did_you_mean(key, found)}"
            )


def _why_unknown(key: str) -> str:
    if ".base_layer." in key:
        return "would overwrite a weight of the base model, which an adapter must not do"
    known = ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B", "token_adapter", "lora_B.bias")
    for name in known:
        if name in key:
            return f"belongs to a feature that is not supported yet ({name})"
    return "belongs to no target of adapter_config.json in this model"


def _check_tensor(path: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{path}: '{key}' has shape {tuple(tensor.shape)}, this model needs {shape}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path}: '{key}' has dtype {tensor.dtype}, a factor must be floating point")
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: '{key}' has NaN or infinite entries; the adapter is broken")


def read_factors(directory: Path) -> tuple[LoraConfig, dict[str, dict[str, Tensor]]]:
    """The configuration and factors of a saved adapter without a model: by site, then by container.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    config = LoraConfig.from_pretrained(directory)
    config.validate()
    if config.target_parameters:
        raise NotImplementedError(f"{directory}: target_parameters are not supported in a merge from files yet")
    path = directory / WEIGHTS_NAME
    sites: dict[str, dict[str, Any]] = {}
    for name, tensor in read_tensors(path).items():
        site, _, container = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if container not in (FACTOR_A, FACTOR_B) or not name.endswith(".weight"):
            raise CheckpointError(f"{path}: '{name}' {_why_unknown(name)}")
        _check_tensor(path, name, tensor, tuple(tensor.shape))
        sites.setdefault(site, {})[container] = tensor
    for site, parts in sites.items():
        if len(parts) != 2 or parts[FACTOR_A].dim() != 2 or parts[FACTOR_A].shape[0] != parts[FACTOR_B].shape[1]:
            raise CheckpointError(f"{path}: '{site}' has no pair of factors that fit each other")
    if not sites:
        raise AdapterError(f"{path} holds no factors")
    return config, sites
