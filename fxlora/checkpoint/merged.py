"""Merged checkpoints: `export_merged` from a live model, `merge_checkpoint` from files to files."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fxlora._passes import (
    CONTAINERS,
    FACTOR_A,
    FACTOR_B,
    KINDS,
    PARAMETERS,
    BranchSpec,
    Instance,
    MergeError,
    Region,
    base_weight,
    check_not_shared,
    did_you_mean,
    factors,
    fold,
    lookup,
    round_once,
)
from fxlora.checkpoint.adapter import read_factors
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.tensors import read_header, write_tensors
from fxlora.errors import CheckpointError
from fxlora.model import LoraModel

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_WEIGHT_FILES = ("model*.safetensors", INDEX_NAME)
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "*.model")


def export_merged(
    model: LoraModel,
    directory: str | Path,
    *,
    adapter_names: Sequence[str] | None = None,
    max_shard_size: int = 50_000_000_000,
    out_dtype: torch.dtype | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write the model with adapters folded in, as a checkpoint without any trace of LoRA. The model is not changed.

    Args:
        model: a transformed model.
        directory: gets `model.safetensors` (or shards and an index) under the original model's names; for
            transformers' models also their configuration, and tokenizer files from the directory that the model was
            loaded from. Other files in it stay.
        adapter_names: which adapters to fold; the active ones if None.
        max_shard_size: largest size of one file in bytes.
        out_dtype: dtype of all floating-point tensors; each tensor's own if None. Merged weights are rounded once.
        tokenizer: saved too, if given.

    Returns:
        The directory.

    Raises:
        AdapterError: for an unknown adapter.
        MergeError: when a target's weight is shared with another layer, or would not be finite.
        CheckpointError: when the directory cannot be written. Nothing is left behind then.
    """
    state = model._lora
    names = list(state.active if adapter_names is None else adapter_names)
    model._check_known(names)
    merged = _merged_weights(model, [spec for name in names for spec in state.adapters[name].branches], out_dtype)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not _is_lora(name)}
    tensors.update(state.originals)
    tensors.update(merged)
    for alias in _tied_aliases(model, tensors):
        del tensors[alias]
    if out_dtype is not None:
        tensors = {n: t.to(out_dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    target = Path(directory)
    with staged(target, replaced=_WEIGHT_FILES) as staging:
        _write_shards(staging, {name: tensor.cpu() for name, tensor in tensors.items()}, max_shard_size)
        _write_configuration(model, staging, out_dtype, tokenizer)
    return target


def _merged_weights(model: LoraModel, specs: Sequence[BranchSpec], dtype: torch.dtype | None) -> dict[str, Tensor]:
    by_site: dict[str, list[BranchSpec]] = {}
    for spec in specs:
        by_site.setdefault(spec.site, []).append(spec)
    check_not_shared(Region(model._sites_graph(), (Instance("", model),)), list(by_site))
    result: dict[str, Tensor] = {}
    for site, branches in by_site.items():
        path, parameter = base_weight(model, site)
        weight = model._lora.originals.get(path, parameter.detach())
        result[path] = _fold(site, weight, [(spec, factors(model, spec)) for spec in branches], dtype or weight.dtype)
    return result


Part = tuple[BranchSpec, dict[str, Tensor]]
"""One adapter's branch at a site, and its factors."""


def _fold(site: str, weight: Tensor, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """The merged weight, rounded once to `dtype`."""
    deltas = [KINDS[spec.kind].delta(spec, tensors) for spec, tensors in parts]
    try:
        return fold(weight, deltas) if dtype == weight.dtype else round_once(fold(weight.double(), deltas), dtype)
    except MergeError as error:
        raise MergeError(f"'{site}': {error}; the adapter is broken or its scaling too large") from error


def _is_lora(name: str) -> bool:
    return any(part in CONTAINERS or part == PARAMETERS for part in name.split("."))


def _tied_aliases(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """All names but the first of each tensor that has several, as transformers leaves them out of its files.

    Where transformers names the tied ends, those are left out, whichever comes first.
    """
    tied = getattr(model, "_tied_weights_keys", None) or ()
    by_tensor: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        by_tensor.setdefault(key, []).append(name)
    aliases: list[str] = []
    for names in by_tensor.values():
        first = next((name for name in names if name not in tied), names[0])
        aliases += [name for name in names if name != first]
    return aliases


def _write_shards(directory: Path, tensors: dict[str, Tensor], largest: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > largest:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(directory / WEIGHTS_NAME, shards[0])
        return
    names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(directory / name, shard)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configuration(model: LoraModel, directory: Path, out_dtype: torch.dtype | None, tokenizer: Any) -> None:
    """The configuration files of a transformers model, and its tokenizer's."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return
    source = Path(getattr(config, "name_or_path", "") or "/nonexistent")
    if source.is_dir():
        for pattern in _TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copy2(file, directory / file.name)
    config = copy.deepcopy(config)
    config.architectures = [model._lora.base_class[0]]
    config.dtype = out_dtype or getattr(model, "dtype", None) or config.dtype
    config.save_pretrained(directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge from files did.

    Attributes:
        out: the new checkpoint.
        merged: number of weights with an update.
        tensors: number of all tensors.
        bytes: size of all tensors.
        seconds: wall time.
    """

    out: str
    merged: int
    tensors: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One sentence."""
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        return (
            f"merged {self.merged} of {self.tensors} tensors, {self.bytes / 1e6:.1f} MB in {self.seconds:.2f} s "
            f"({rate:.0f} MB/s), into {self.out}"
        )


def merge_checkpoint(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
) -> MergeReport:
    """Fold adapters into a checkpoint, from files to files, one shard at a time, without building the model.

    Each weight is the base's plus the sum of all updates in float64, rounded once. Files keep their names, so shards
    stay as they are, and all other files (configuration, tokenizer, …) are copied.

    Args:
        base: directory with `model.safetensors`, or shards and their index.
        adapters: one or more directories that `save_pretrained` or peft wrote.
        out: the new checkpoint; must not be the base.
        weights: a factor on each adapter's update; 1 if None.

    Returns:
        What was done.

    Raises:
        CheckpointError: for a file that cannot be read, or an adapter that does not fit the base.
        MergeError: when a merged weight would not be finite. Nothing is written then.
    """
    start = time.perf_counter()
    base, out = Path(base), Path(out)
    paths = [Path(adapters)] if isinstance(adapters, (str, Path)) else [Path(each) for each in adapters]
    shares = [1.0] * len(paths) if weights is None else list(weights)
    if len(shares) != len(paths):
        raise CheckpointError(f"{len(paths)} adapters need as many weights, not {len(shares)}")
    if out.resolve() == base.resolve():
        raise CheckpointError(f"{out} is the base itself; give another directory")
    shards = {file: read_header(file) for file in _shard_files(base)}
    updates = _updates(shards, paths, shares)
    tensors = size = 0
    with staged(out, replaced=_WEIGHT_FILES) as staging:
        for file in (path for path in base.iterdir() if path.is_file() and path not in shards):
            shutil.copy2(file, staging / file.name)
        for file in shards:
            merged = dict(_merge_shard(file, updates))
            write_tensors(staging / file.name, merged)
            tensors += len(merged)
            size += sum(tensor.nbytes for tensor in merged.values())
    return MergeReport(str(out), len(updates), tensors, size, time.perf_counter() - start)


def _shard_files(base: Path) -> list[Path]:
    index = base / INDEX_NAME
    if not index.is_file():
        if not (base / WEIGHTS_NAME).is_file():
            raise CheckpointError(f"{base} has no {WEIGHTS_NAME} and no {INDEX_NAME}")
        return [base / WEIGHTS_NAME]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: '{name}' is not the name of a file in that directory")
    return [base / name for name in names]


def _updates(
    shards: Mapping[Path, Mapping[str, Any]], adapters: list[Path], weights: list[float]
) -> dict[str, list[Part]]:
    """For each weight of the base that changes, what is added to it."""
    shapes = {name: tuple(entry["shape"]) for header in shards.values() for name, entry in header.items()}
    updates: dict[str, list[Part]] = {}
    for path, factor in zip(adapters, weights, strict=True):
        config, sites = read_factors(path)
        for site, parts in sites.items():
            name = _weight_name(site, shapes, path)
            r = parts[FACTOR_A].shape[0]
            alpha = lookup(config.alpha_pattern, site, config.lora_alpha)
            sizes = (parts[FACTOR_A].shape[1], parts[FACTOR_B].shape[0])
            transposed = config.fan_in_fan_out
            if shapes[name] != (sizes if transposed else sizes[::-1]):
                raise CheckpointError(
                    f"{path}: '{site}' has factors for {sizes[::-1]}, the base's weight is {shapes[name]}"
                )
            spec = BranchSpec(site, "", "linear", *sizes, transposed, r, factor * config.scaling(r, alpha))
            updates.setdefault(name, []).append((spec, parts))
    return updates


def _weight_name(site: str, shapes: Mapping[str, object], adapter: Path) -> str:
    """The base's name of a site's weight: the same, or the only one that differs by a prefix alone."""
    name = f"{site}.weight"
    if name in shapes:
        return name
    found = [each for each in shapes if each.endswith(f".{name}") or name.endswith(f".{each}")]
    if len(found) != 1:
        what = "matches several weights of the base" if found else "is not in the base (a tied weight, perhaps)"
        raise CheckpointError(f"{adapter}: '{name}' {what}.{did_you_mean(name, shapes)}")
    return found[0]


def _merge_shard(file: Path, updates: Mapping[str, list[Part]]) -> Iterator[tuple[str, Tensor]]:
    with safetensors.safe_open(file, "pt") as source:
        for name in source.keys():  # noqa: SIM118 (no mapping)
            weight = source.get_tensor(name)
            yield name, _fold(name, weight, updates[name], weight.dtype) if name in updates else weight
