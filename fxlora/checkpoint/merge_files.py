"""`merge_checkpoint`: adapters folded into a checkpoint, from files to files, without building the model.

Base weights are read, folded and written one after another. What an adapter changes: `fxlora.checkpoint.changes`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fxlora._passes import MergeError
from fxlora.checkpoint import rounding
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.changes import Change, find_changes
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
from fxlora.checkpoint.saved import SavedAdapter, read_saved
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

    `W' = W + Σ weight · ΔW`, summed in float64, with the ΔW of each layer's kind and variant. Saved modules and trained
    biases take the place of the base's tensors. The files and shards are those of the base; configuration, tokenizer
    and other files are copied.

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
        MergeError: when a weight is quantized or tied, cannot hold an update, or would become NaN or infinite; when names
            and shapes do not tell what a tensor is for, so that only a live model can be merged (`export_merged`).
        ConfigError: when `weights` or `out_dtype` cannot be used.
        NotImplementedError: for adapters with a feature that is not supported yet.
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
    where = {name: base / shard for shard, names in shards.items() for name in names}
    changes = find_changes(_read_adapters(directories, weights), entries, lambda name: _load(where[name], name))
    for name, change in changes.items():
        if change.updates or change.biases:
            rounding.check_foldable(entries[name].torch_dtype, name)
        _check_not_tied(name, entries[name], config)
    written = {name: _written_as(name, entry, out_dtype) for name, entry in entries.items()}
    with staged(out, keep=stays) as staging:
        copy_companions(base, staging, excluded=out)
        if config and out_dtype is not None:
            (staging / "config.json").write_text(_config_text(config, out_dtype), encoding="utf-8")
        for shard in shards:
            _merge_shard(base / shard, staging / shard, changes, written, out_dtype)
        size = sum(entry.nbytes for entry in written.values())
        if (base / INDEX_FILE).is_file():
            write_index(staging, shards, {**index_metadata, "total_size": size})
    seconds = time.perf_counter() - start
    paths = tuple(Path(directory) for directory in directories)
    return MergeReport(out, paths, tuple(sorted(changes)), len(entries), size, seconds)


def _load(shard: Path, name: str) -> Tensor:
    with open_tensors(shard) as file:
        return file.load(name).clone()


def _merge_shard(
    source: Path,
    destination: Path,
    changes: Mapping[str, Change],
    written: Mapping[str, Entry],
    dtype: torch.dtype | None,
) -> None:
    with open_tensors(source) as file:

        def load(name: str) -> Tensor:
            tensor = file.load(name)
            try:
                return changes[name].apply(tensor, dtype) if name in changes else rounding.convert(tensor, dtype)
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
    if config.get("tie_word_embeddings") and len(entry.shape) > 1 and entry.shape[:1] == (config.get("vocab_size"),):
        raise MergeError(
            f"'{name}' is tied to the embeddings (tie_word_embeddings in config.json), which a merge would change too; "
            "untie them first, or leave this layer out of the targets"
        )


def _read_adapters(directories: Sequence[str | Path], weights: Sequence[float] | None) -> list[SavedAdapter]:
    """All adapters, in an order that does not depend on the caller's."""
    if not directories:
        raise ConfigError("`adapter_dirs` is empty; name at least one saved adapter")
    factors = [1.0] * len(directories) if weights is None else list(weights)
    if len(factors) != len(directories) or not all(math.isfinite(factor) for factor in factors):
        raise ConfigError(
            f"`weights` should be {len(directories)} finite numbers, one for each adapter, not {weights!r}"
        )
    pairs = sorted((os.path.realpath(path), factor) for path, factor in zip(directories, factors, strict=True))
    return [read_saved(Path(path), factor) for path, factor in pairs]
