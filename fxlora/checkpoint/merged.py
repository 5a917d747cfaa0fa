"""`export_merged`: the deployable checkpoint of a live model, adapters folded in, under the original names.

The model is read, never changed. `merge_files` does the same without a model.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlora._passes import (
    SAVED,
    BranchSpec,
    Instance,
    Loss,
    MergeError,
    Region,
    Tied,
    base_weight,
    changes,
    check_sharing,
    foldable,
)
from fxlora.checkpoint.adapter import base_name
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.layout import (
    WEIGHTS_FILE,
    copy_companions,
    parse_size,
    refuse_adapter_directory,
    split,
    stays,
    write_index,
)
from fxlora.checkpoint.manifest import write_manifest
from fxlora.checkpoint.rounding import check_foldable, check_out_dtype, convert
from fxlora.checkpoint.safetensors_io import Entry, check_plain, save_tensors
from fxlora.errors import AdapterError, CheckpointError
from fxlora.host.saved_modules import running_copies, set_untied, unties
from fxlora.host.untying import check_tied, names_of_their_own
from fxlora.model import LoraModel
from fxlora.registered import factor_names
from fxlora.rounding import RoundingReport


def export_merged(
    model: LoraModel,
    directory: str | Path,
    *,
    max_shard_size: int | str = "50GB",
    adapter_names: Sequence[str] | None = None,
    out_dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    base_dir: str | Path | None = None,
    tied: Tied = "refuse",
) -> Path:
    """Write the checkpoint that `merge_and_unload` followed by saving would give; the model stays as it is.

    Weights have the names and dtypes of the original model, each merged one rounded once. For a transformers model the
    result loads with `from_pretrained`. A weight that the model declares as tied is written once, as transformers does;
    other weights with several names are written under each, so that a strict `load_state_dict` finds them all. Files
    in the directory that are no model weights stay.

    Args:
        model: what `lora_transform` returned.
        directory: where to write; put in place as one.
        max_shard_size: bytes, or a text such as `"5GB"`: more is split into several files with an index.
        adapter_names: which adapters to fold in; the active ones if None. Those that are merged already always are.
        out_dtype: of all floating-point weights; each one's own if None.
        tokenizer: anything whose `save_pretrained` writes the files to put beside the weights.
        base_dir: where to copy files from that belong beside the weights (tokenizer, chat template, licence). By
            default the directory that the model was loaded from, unless a tokenizer is given.
        tied: as in `merge_and_unload`: what to do where a target's weight belongs to other layers too.

    Returns:
        The directory.

    Raises:
        AdapterError: for an unknown adapter.
        MergeError: when a target's weight is shared with another layer, quantized, or would not be finite.
        CheckpointError: when a weight has no data, or the directory cannot be written. In all cases nothing is changed.
    """
    if not isinstance(model, LoraModel):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(f"export_merged takes what lora_transform returned, not a {type(model).__name__}")
    max_bytes = parse_size(max_shard_size)
    check_out_dtype(out_dtype)
    check_tied(tied)
    tied = model._lora.tied if tied == "refuse" else tied
    companions = _companions(model, base_dir, tokenizer)
    refuse_adapter_directory(directory)
    tensors, untied = _merged_state(model, adapter_names, out_dtype, tied)
    tensors = _in_checkpoint_format(model, tensors)
    with staged(directory, keep=stays) as staging:
        if companions is not None:
            copy_companions(companions, staging, excluded=Path(directory))
        copies = running_copies(model._lora.adapters[name] for name in _folded_adapters(model, adapter_names))
        untied = untied or unties(model, {saved.module: model.get_submodule(saved.path) for saved in copies})
        _write_configs(model, staging, tensors.values(), untied)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _write_weights(model, staging, tensors, max_bytes)
        write_manifest(staging)
    return Path(directory)


def _companions(model: nn.Module, base_dir: str | Path | None, tokenizer: Any) -> Path | None:
    if base_dir is not None:
        if not Path(base_dir).is_dir():
            raise CheckpointError(f"base_dir '{base_dir}' is not a directory")
        return Path(base_dir)
    name = base_name(model)
    return Path(name) if tokenizer is None and name is not None and Path(name).is_dir() else None


# ---- tensors ----


def _merged_state(
    model: LoraModel, names: Sequence[str] | None, dtype: torch.dtype | None, tied: Tied
) -> tuple[dict[str, Tensor], bool]:
    """The state dict of the merged model: no factors, no second name of a tied weight; and whether one was untied."""
    specs, whole = _specs(model, names), Region(model._sites_graph(), (Instance("", model),))
    own = names_of_their_own(whole, specs) if tied == "untie" else dict[str, str]()
    if tied != "untie":
        check_sharing(whole, specs, tied)
    merged = _folded(model, specs, dtype)
    factors = {id(model.get_parameter(name)) for name in factor_names(model._lora.adapters.values())}
    # by identity, since a layer may have several names
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for_all = {parameters[path]: value for path, value in merged.items() if path not in own}
    by_name = {name: for_all[key] for name, key in parameters.items() if key in for_all}
    by_name.update({name: merged[path] for name, path in own.items()})
    state: dict[str, Any] = model.state_dict()
    state = {name: value for name, value in state.items() if parameters.get(name) not in factors}
    trained = _from_copies(model, names)
    by_name = {name: tensor for name, tensor in by_name.items() if name not in trained}
    untrained = _with_original_biases(model, names)
    state = {name: {**trained, **untrained}.get(name, value) for name, value in state.items() if not _is_copy(name)}
    left_out = {name for name, source in _tied_names(model, state).items() if own.keys().isdisjoint((name, source))}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in left_out:
            continue
        if not isinstance(value, Tensor):
            raise NotImplementedError(
                f"'{name}' in the state dict is a {type(value).__name__}, which cannot be written yet"
            )
        check_plain(value, f"'{name}'")
        try:
            result[name] = by_name[name] if name in by_name else convert(value, dtype)
        except MergeError as error:
            raise MergeError(f"'{name}': {error}") from error
    return result, bool(own)


def _is_copy(name: str) -> bool:
    return SAVED in name.split(".")


def _from_copies(model: LoraModel, names: Sequence[str] | None) -> dict[str, Tensor]:
    """What the trained copies of whole modules put in these modules' places, by name."""
    copies = running_copies(model._lora.adapters[name] for name in _folded_adapters(model, names))
    aliases = list(model.named_modules(remove_duplicate=False))
    return {
        f"{alias}.{key}": value
        for saved in copies
        for alias, module in aliases
        if module is model.get_submodule(saved.module)
        for key, value in model.get_submodule(saved.path).state_dict().items()
    }


def _with_original_biases(model: LoraModel, names: Sequence[str] | None) -> dict[str, Tensor]:
    """The biases that an adapter trains which is not folded in, as they were before."""
    state = model._lora
    others = [plan for name, plan in state.adapters.items() if name not in _folded_adapters(model, names)]
    return {path: state.biases[path] for plan in others for path in plan.biases}


def _folded_adapters(model: LoraModel, names: Sequence[str] | None) -> list[str]:
    state = model._lora
    chosen = [names] if isinstance(names, str) else list(state.active if names is None else names)
    model._check_known(chosen)
    return sorted({*state.merged, *chosen})


def _specs(model: LoraModel, names: Sequence[str] | None) -> list[BranchSpec]:
    """The branches to fold, in the order in which `merge_adapter` sums them."""
    return [spec for adapter in _folded_adapters(model, names) for spec in model._lora.adapters[adapter].branches]


def _folded(model: LoraModel, specs: Iterable[BranchSpec], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Merged weights by path, from original weights where adapters are merged already."""
    result: dict[str, Tensor] = {}
    losses: dict[str, Loss] = {}
    for site, branches in foldable(specs).items():
        path, weight = base_weight(model, site)
        check_plain(weight, f"'{path}'")
        check_foldable(weight.dtype, path)
        for change in changes(model, site, branches, model._lora.originals, dtype):
            losses[change.path] = Loss.sample(change.before.numel())
            result[change.path] = change.fold(losses[change.path])
    RoundingReport.of(losses, {path: (value.dtype, value.numel()) for path, value in result.items()}).warn()
    return result


def _tied_names(model: nn.Module, state: dict[str, Any]) -> dict[str, str]:
    """Names that transformers ties to another one when it loads, and that one, as far as they are tied now."""
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: source
        for name, source in declared.items()
        if name in state and source in state and _same_memory(state[name], state[source])
    }


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _in_checkpoint_format(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes as in checkpoints, where transformers keeps them otherwise in memory (fused experts, say)."""
    if "transformers" not in sys.modules:
        return tensors
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return tensors
    ignored: set[str] = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return revert_weight_conversion(model, {name: value for name, value in tensors.items() if name not in ignored})


# ---- files ----


def _write_configs(model: LoraModel, directory: Path, tensors: Iterable[Tensor], untied: bool) -> None:
    """`config.json` and `generation_config.json` of a transformers model, with the original's class name."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if hasattr(config, "save_pretrained"):
        dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
        config.architectures = [model._lora.base_class[0]]
        config.dtype = str(dtype).removeprefix("torch.") if dtype else None
        if untied:
            set_untied(config)
        config.save_pretrained(directory)
    generation_config: Any = getattr(model, "generation_config", None)
    if hasattr(generation_config, "save_pretrained"):
        generation_config.save_pretrained(directory)


def _write_weights(model: nn.Module, directory: Path, tensors: dict[str, Tensor], max_bytes: int) -> None:
    entries = {name: Entry.of(tensor) for name, tensor in tensors.items()}
    shards = split(entries, max_bytes)
    for shard, names in shards.items():
        save_tensors(directory / shard, {name: tensors[name] for name in names})
    if list(shards) != [WEIGHTS_FILE]:
        total = {
            "total_size": sum(entry.nbytes for entry in entries.values()),
            "total_parameters": sum(entry.num_entries for entry in entries.values()),
        }
        write_index(directory, shards, total)
