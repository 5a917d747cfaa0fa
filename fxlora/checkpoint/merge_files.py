"""`merge_checkpoint`: adapters folded into a checkpoint, from files to files, without building the model.

Base weights are read, folded and written one after another. Layers are matched by name; shapes must fit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fxlora._passes import FACTOR_A, FACTOR_B, BranchSpec, MergeError, deltas, did_you_mean, lookup
from fxlora.checkpoint import rounding
from fxlora.checkpoint.adapter import adapter_file, keys_without_prefix, load_factor, refuse_base_weights
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.layout import (
    INDEX_FILE,
    copy_companions,
    read_json,
    read_shards,
    refuse_adapter_directory,
    stays,
    write_index,
)
from fxlora.checkpoint.safetensors_io import METADATA, Entry, open_tensors, write_tensors
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError, ConfigError

Directories = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge_checkpoint` did.

    Attributes:
        out_dir: the new checkpoint.
        adapters: the adapters that were folded in.
        merged: names of the weights that were changed, sorted.
        tensors: number of all tensors written.
        bytes: size of all weights written.
        seconds: time that it took.
    """

    out_dir: Path
    adapters: tuple[Path, ...]
    merged: tuple[str, ...]
    tensors: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        adapters = "1 adapter" if len(self.adapters) == 1 else f"{len(self.adapters)} adapters"
        return (
            f"merged {adapters} into {len(self.merged)} of {self.tensors} weights; wrote {self.bytes / 1e6:,.1f} MB to "
            f"{self.out_dir} in {self.seconds:.2f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {
            "out_dir": str(self.out_dir),
            "adapters": [str(path) for path in self.adapters],
            "merged": list(self.merged),
            "tensors": self.tensors,
            "bytes": self.bytes,
            "seconds": self.seconds,
        }


def merge_checkpoint(
    base_dir: str | Path,
    adapter_dirs: Directories,
    out_dir: str | Path,
    *,
    weights: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
) -> MergeReport:
    """Fold saved adapters into the safetensors checkpoint of their base, each weight rounded once.

    `W' = W + Σ weight · scaling · B A`, summed in float64. The files and shards are those of the base; configuration,
    tokenizer and other files are copied.

    Args:
        base_dir: with `model.safetensors`, or shards and their index.
        adapter_dirs: one saved adapter or several; their order does not matter.
        out_dir: the new checkpoint, put in place as one. Files in it that are no model weights stay.
        weights: a factor for each adapter; 1 if None.
        out_dtype: of all floating-point weights; each one's own if None.

    Returns:
        What was merged, and how long it took.

    Raises:
        CheckpointError: when a file is missing or broken, an adapter's layer is not in the base, or shapes do not fit.
        MergeError: when a weight is quantized or tied, or would become NaN or infinite.
        ConfigError: when `weights` or `out_dtype` cannot be used.
        NotImplementedError: for adapters that are more than plain LoRA on linear layers.
        In all cases `out_dir` is as before.
    """
    start = time.perf_counter()
    base, out = Path(base_dir), Path(out_dir)
    rounding.check_out_dtype(out_dtype)
    directories = [adapter_dirs] if isinstance(adapter_dirs, (str, Path)) else list(adapter_dirs)
    if base.resolve() == out.resolve():
        raise CheckpointError(f"out_dir '{out_dir}' is the base itself; write the merged checkpoint somewhere else")
    refuse_adapter_directory(out)
    shards, index_metadata = read_shards(base)
    entries = {name: entry for shard in shards.values() for name, entry in shard.items()}
    config = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    updates: dict[str, list[_Update]] = {}
    for adapter in _read_adapters(directories, weights):
        for update in _updates(adapter, entries):
            updates.setdefault(update.spec.site, []).append(update)
    for name in updates:
        rounding.check_foldable(entries[name].torch_dtype, name)
        _check_not_tied(name, entries[name], config)
    written = {name: _written_as(name, entry, out_dtype) for name, entry in entries.items()}
    with staged(out, keep=stays) as staging:
        copy_companions(base, staging, excluded=out)
        if config and out_dtype is not None:
            (staging / "config.json").write_text(_config_text(config, out_dtype), encoding="utf-8")
        for shard in shards:
            _merge_shard(base / shard, staging / shard, updates, written, out_dtype)
        size = sum(entry.nbytes for entry in written.values())
        if (base / INDEX_FILE).is_file():
            write_index(staging, shards, {**index_metadata, "total_size": size})
    seconds = time.perf_counter() - start
    paths = tuple(Path(directory) for directory in directories)
    return MergeReport(out, paths, tuple(sorted(updates)), len(entries), size, seconds)


def _merge_shard(
    source: Path,
    destination: Path,
    updates: Mapping[str, Sequence[_Update]],
    written: Mapping[str, Entry],
    dtype: torch.dtype | None,
) -> None:
    with open_tensors(source) as file:

        def load(name: str) -> Tensor:
            tensor = file.load(name)
            summands = (deltas(each.spec, tensor, each.factors)["weight"] for each in updates.get(name, ()))
            try:
                return (
                    rounding.fold_into(tensor, summands, dtype) if name in updates else rounding.convert(tensor, dtype)
                )
            except MergeError as error:
                raise MergeError(f"{source}: '{name}': {error}; nothing was written") from error

        metadata = {**METADATA, **file.metadata}
        write_tensors(destination, {name: written[name] for name in file.entries}, load, metadata)


def _written_as(name: str, entry: Entry, dtype: torch.dtype | None) -> Entry:
    if entry.torch_dtype is None:
        raise CheckpointError(f"the base's '{name}' is {entry.dtype}, a dtype that torch does not have")
    changes = dtype is not None and entry.torch_dtype in rounding.PLAIN_DTYPES
    return Entry.of(torch.empty(entry.shape, device="meta"), dtype) if changes else entry


def _config_text(config: dict[str, Any], dtype: torch.dtype) -> str:
    """`config.json` with another dtype, also in the configurations of parts."""

    def changed(values: dict[str, Any]) -> dict[str, Any]:
        name = str(dtype).removeprefix("torch.")
        return {
            key: changed(cast("dict[str, Any]", value))
            if isinstance(value, dict)
            else name
            if key in ("dtype", "torch_dtype") and isinstance(value, str)
            else value
            for key, value in values.items()
        }

    return json.dumps(changed(config), indent=2, sort_keys=True) + "\n"


def _check_not_tied(name: str, entry: Entry, config: Mapping[str, Any]) -> None:
    """Refuse to change an output layer that its model ties to the embeddings when it loads."""
    if config.get("tie_word_embeddings") and entry.shape[:1] == (config.get("vocab_size"),):
        raise MergeError(
            f"'{name}' is tied to the embeddings (tie_word_embeddings in config.json), which a merge would change too; "
            "untie them first, or leave this layer out of the targets"
        )


# ---- adapters ----


@dataclass(frozen=True, slots=True)
class _Adapter:
    """A saved adapter: its configuration, and the factors by layer name, as the file has them."""

    path: Path
    config: LoraConfig
    weight: float
    factors: dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class _Update:
    """The branch to fold into one weight; `spec.site` is the weight's name in the base's files."""

    spec: BranchSpec
    factors: dict[str, Tensor]


def _read_adapters(directories: Sequence[str | Path], weights: Sequence[float] | None) -> list[_Adapter]:
    """All adapters, in an order that does not depend on the caller's."""
    if not directories:
        raise ConfigError("`adapter_dirs` is empty; name at least one saved adapter")
    factors = [1.0] * len(directories) if weights is None else list(weights)
    if len(factors) != len(directories) or not all(math.isfinite(factor) for factor in factors):
        raise ConfigError(
            f"`weights` should be {len(directories)} finite numbers, one for each adapter, not {weights!r}"
        )
    pairs = sorted((os.path.realpath(path), factor) for path, factor in zip(directories, factors, strict=True))
    return [_read_adapter(Path(path), factor) for path, factor in pairs]


def _read_adapter(directory: Path, weight: float) -> _Adapter:
    config = LoraConfig.from_pretrained(directory)
    factors: dict[str, dict[str, Tensor]] = {}
    with open_tensors(adapter_file(directory)) as file:
        for name, key in keys_without_prefix(file).items():
            refuse_base_weights(file.path, name)
            for container in (FACTOR_A, FACTOR_B):
                site = f".{name}".removesuffix(f".{container}.weight").removeprefix(".")
                if site != name:
                    factors.setdefault(site, {})[container] = load_factor(file, key)
                    break
            else:
                raise NotImplementedError(
                    f"{file.path}: '{key}' is no factor of a linear layer; only plain LoRA on linear layers is merged yet"
                )
    try:
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG_NAME}: {error}") from error
    for name, used in {
        "layer_replication": config.layer_replication,
        "modules_to_save": config.modules_to_save,
        "bias": config.bias != "none",
    }.items():
        if used:
            raise NotImplementedError(
                f"{directory / CONFIG_NAME}: `{name}` is not merged from files yet; load the model and use export_merged"
            )
    adapter = _Adapter(directory, config, weight, factors)
    for site in factors:
        _check_rank(adapter, site)
    return adapter


def _check_rank(adapter: _Adapter, site: str) -> None:
    factors = adapter.factors[site]
    for container in (FACTOR_A, FACTOR_B):
        if container not in factors:
            raise CheckpointError(f"{adapter_file(adapter.path)}: '{site}' has no {container}; save the adapter again")
    a, b = (tuple(factors[container].shape) for container in (FACTOR_A, FACTOR_B))
    if len(a) != 2 or len(b) != 2:
        raise NotImplementedError(
            f"{adapter_file(adapter.path)}: '{site}' has factors of shapes {a} and {b}; only linear layers are merged yet"
        )
    rank = lookup(adapter.config.rank_pattern, site, adapter.config.r)
    if not a[0] == b[1] == rank:
        raise CheckpointError(
            f"{adapter_file(adapter.path)}: '{site}' has factors of shapes {a} and {b}, and {CONFIG_NAME} says rank "
            f"{rank}; the two files do not belong together"
        )


# ---- matching ----


def _updates(adapter: _Adapter, entries: Mapping[str, Entry]) -> list[_Update]:
    """The branches of one adapter, each with the weight that it belongs to.

    Raises:
        CheckpointError: when a layer is not found, or found under several names, or a shape does not fit.
        MergeError: when a square weight may be stored either way round.
    """
    names = _match(adapter, entries)
    straight: dict[str, bool] = {}
    transposed: dict[str, bool] = {}
    for site, name in names.items():
        a, b = adapter.factors[site][FACTOR_A], adapter.factors[site][FACTOR_B]
        shape = entries[name].shape
        straight[site] = shape == (b.shape[0], a.shape[1])
        transposed[site] = shape == (a.shape[1], b.shape[0])
        if not straight[site] and not transposed[site]:
            raise CheckpointError(
                f"{adapter_file(adapter.path)}: the factors of '{site}' make an update of shape "
                f"{(b.shape[0], a.shape[1])}, and '{name}' has shape {shape}; the adapter is for another model"
            )
    flag = adapter.config.fan_in_fan_out
    # A file has one flag for all layers, and in a model with both layouts it is that of whichever came last.
    certain = {transposed[site] for site in names if straight[site] != transposed[site]}
    updates: list[_Update] = []
    for site, name in names.items():
        if straight[site] and transposed[site] and not certain <= {flag}:
            raise MergeError(
                f"'{name}' is square, and whether it is stored (in, out) cannot be told: fan_in_fan_out is {flag} in "
                f"{adapter.path / CONFIG_NAME}, but other layers say otherwise. Load the model and use export_merged"
            )
        spec = _spec(adapter, site, name, flag if straight[site] and transposed[site] else transposed[site])
        updates.append(_Update(spec, adapter.factors[site]))
    return updates


def _spec(adapter: _Adapter, site: str, name: str, transposed: bool) -> BranchSpec:
    (r, in_features), (out_features, _) = (adapter.factors[site][part].shape for part in (FACTOR_A, FACTOR_B))
    alpha = lookup(adapter.config.alpha_pattern, site, adapter.config.lora_alpha)
    scaling = adapter.config.scaling(r, alpha) * adapter.weight
    return BranchSpec(name, str(adapter.path), "linear", in_features, out_features, transposed, r, scaling)


def _match(adapter: _Adapter, entries: Mapping[str, Entry]) -> dict[str, str]:
    """By layer of the adapter, the name of its weight in the base."""
    names: dict[str, str] = {}
    prefixes: dict[tuple[str, str], str] = {}
    for site in adapter.factors:
        wanted, names[site] = _find(adapter, site, entries)
        common = min(len(wanted), len(names[site]))
        prefixes.setdefault((wanted[:-common], names[site][:-common]), site)
    if len(prefixes) > 1:
        a, b = list(prefixes.values())[:2]
        raise CheckpointError(
            f"{adapter_file(adapter.path)}: '{a}' would be '{names[a]}' in the base and '{b}' would be '{names[b]}': "
            "names differ in more than a common prefix; the adapter is for another model"
        )
    return names


def _find(adapter: _Adapter, site: str, entries: Mapping[str, Entry]) -> tuple[str, str]:
    """(name looked for, name found) of a layer's weight: the same, or the only one that has it as its ending."""
    candidates = [*_parameters(adapter.config, site), f"{site}.weight".lstrip(".")]
    for wanted in candidates:
        if wanted in entries:
            return wanted, wanted
    for wanted in candidates:
        found = [
            name for name in entries if name.endswith(f".{wanted}") or ("." in name and wanted.endswith(f".{name}"))
        ]
        if len(found) == 1:
            return wanted, found[0]
        if found:
            raise CheckpointError(
                f"{adapter_file(adapter.path)}: '{site}' may be any of {', '.join(map(repr, sorted(found)[:3]))} in the "
                "base; rename the adapter's keys to the base's names"
            )
    raise CheckpointError(
        f"{adapter_file(adapter.path)}: the base has no '{candidates[-1]}'.{did_you_mean(candidates[-1], entries)} The "
        "adapter is for another model, or the layer's weight is tied to another one and has none in the files"
    )


def _parameters(config: LoraConfig, site: str) -> Iterable[str]:
    """Full names of bare parameters of the module `site` that are targets."""
    for target in config.target_parameters or ():
        name = f"{site}.{target.rpartition('.')[2]}".lstrip(".")
        if name == target or name.endswith(f".{target}"):
            yield name
