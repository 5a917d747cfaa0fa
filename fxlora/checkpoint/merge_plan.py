"""What `merge_checkpoint` is going to do, as data: each tensor of the merged checkpoint, and what it is made from.

Planning reads headers, configurations and adapters, and no data of the base. `fxlora.checkpoint.merge_files` carries a
plan out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fxlora._passes import MergeError
from fxlora.checkpoint import rounding
from fxlora.checkpoint.changes import Change, find_changes
from fxlora.checkpoint.layout import INDEX_FILE, read_json, read_shards
from fxlora.checkpoint.safetensors_io import METADATA, Entry, open_tensors
from fxlora.checkpoint.saved import SavedAdapter
from fxlora.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the base.

    Attributes:
        path: the file.
        name: in that file.
        entry: its dtype and shape there.
    """

    path: Path
    name: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of the merged checkpoint.

    Attributes:
        name: in the merged checkpoint.
        entry: its dtype and shape there.
        source: the tensor of the base that it starts from. Several outputs may start from one.
        change: what is done to it; None if only its dtype may differ.
        shard: name of the file that it is written to.
    """

    name: str
    entry: Entry
    source: Source
    change: Change | None
    shard: str


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merged checkpoint that is not written yet.

    Attributes:
        base: directory of the base.
        adapters: directories of the adapters.
        outputs: all tensors, shard by shard.
        metadata: texts for the header of each shard.
        index: metadata for the index; None if there is to be none.
        config: what `config.json` is to hold; None if it stays as it is.
    """

    base: Path
    adapters: tuple[Path, ...]
    outputs: tuple[Output, ...]
    metadata: dict[str, dict[str, str]]
    index: dict[str, Any] | None
    config: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Size of all weights."""
        return sum(output.entry.nbytes for output in self.outputs)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that the adapters change, sorted."""
        return tuple(sorted(output.name for output in self.outputs if output.change is not None))

    def shards(self) -> dict[str, list[Output]]:
        """The outputs by file, each in the order of the plan."""
        result: dict[str, list[Output]] = {}
        for output in self.outputs:
            result.setdefault(output.shard, []).append(output)
        return result


def plan_merge(base: Path, adapters: Sequence[SavedAdapter], *, out_dtype: torch.dtype | None = None) -> MergePlan:
    """Plan the merge of adapters into a base.

    Args:
        base: directory of the checkpoint.
        adapters: in the order in which they are summed.
        out_dtype: of all floating-point weights; each one's own if None.

    Raises:
        CheckpointError: when a file is missing or broken, an adapter's layer is not in the base, or shapes do not fit.
        MergeError: when a weight is quantized or tied, or what a tensor is for cannot be told.
        ConfigError: when an adapter's weight in the merge is not 1 and it replaces tensors.
    """
    shards, index = read_shards(base)
    sources = {
        name: Source(base / shard, name, entry) for shard, held in shards.items() for name, entry in held.items()
    }
    entries = {name: source.entry for name, source in sources.items()}
    config = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    changes = find_changes(adapters, entries, lambda name: _load(sources[name]))
    for name, change in changes.items():
        if change.updates or change.biases:
            rounding.check_foldable(entries[name].torch_dtype, name)
        _check_not_tied(name, entries[name], config)
    outputs = tuple(
        Output(name, _written_as(sources[name], out_dtype), sources[name], changes.get(name), shard)
        for shard, names in shards.items()
        for name in names
    )
    size = sum(output.entry.nbytes for output in outputs)
    return MergePlan(
        base=base,
        adapters=tuple(adapter.directory for adapter in adapters),
        outputs=outputs,
        metadata={shard: {**METADATA, **_metadata(base / shard)} for shard in shards},
        index={**index, "total_size": size} if (base / INDEX_FILE).is_file() else None,
        config=_with_dtype(config, out_dtype) if config and out_dtype is not None else None,
    )


def _load(source: Source) -> Tensor:
    with open_tensors(source.path) as file:
        return file.load(source.name).clone()


def _metadata(path: Path) -> dict[str, str]:
    with open_tensors(path) as file:
        return file.metadata


def _written_as(source: Source, dtype: torch.dtype | None) -> Entry:
    entry = source.entry
    if entry.torch_dtype is None:
        raise CheckpointError(f"the base's '{source.name}' is {entry.dtype}, a dtype that torch does not have")
    changes = dtype is not None and entry.torch_dtype in rounding.PLAIN_DTYPES
    return Entry.of(torch.empty(entry.shape, device="meta"), dtype) if changes else entry


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A `config.json` with another dtype, also in the configurations of parts."""
    name = str(dtype).removeprefix("torch.")

    def changed() -> Iterator[tuple[str, Any]]:
        for key, value in config.items():
            if isinstance(value, dict):
                yield key, _with_dtype(cast("dict[str, Any]", value), dtype)
            else:
                yield key, name if key in ("dtype", "torch_dtype") and isinstance(value, str) else value

    return dict(changed())


def _check_not_tied(name: str, entry: Entry, config: Mapping[str, Any]) -> None:
    """Refuse to change an output layer that its model ties to the embeddings when it loads."""
    if config.get("tie_word_embeddings") and len(entry.shape) > 1 and entry.shape[:1] == (config.get("vocab_size"),):
        raise MergeError(
            f"'{name}' is tied to the embeddings (tie_word_embeddings in config.json), which a merge would change too; "
            "untie them first, or leave this layer out of the targets"
        )
