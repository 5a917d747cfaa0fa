"""What `merge_checkpoint` is going to do, as data: each tensor of the merged checkpoint, and what it is made from.

Planning reads headers, configurations and adapters, and no data of the base. `fxlora.checkpoint.merge_files` carries a
plan out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from fxlora._passes import MergeError, Tied
from fxlora.checkpoint import rounding
from fxlora.checkpoint.base_view import BaseView, view_base
from fxlora.checkpoint.changes import Change, find_changes
from fxlora.checkpoint.file_changes import in_files
from fxlora.checkpoint.file_ranges import Stamp, stamp_of
from fxlora.checkpoint.layout import INDEX_FILE, WEIGHTS_FILE, read_json, read_shards, split
from fxlora.checkpoint.quantized import CONFIG_FILE, without_quantization
from fxlora.checkpoint.safetensors_io import METADATA, Entry, FileLayout, Header, read_header
from fxlora.checkpoint.saved import SavedAdapter
from fxlora.checkpoint.sources import Source
from fxlora.checkpoint.ties import has_head, says_untied
from fxlora.errors import CheckpointError, ConfigError


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
        new_fields: what in it differs from the base's, with None for what is left out.
        stamps: what tells that the base's files are still the same, by their paths.
        left_out: names of other files of the base that do not belong to the result.
    """

    base: Path
    adapters: tuple[Path, ...]
    outputs: tuple[Output, ...]
    metadata: dict[str, dict[str, str]]
    index: dict[str, Any] | None
    config: dict[str, Any] | None
    new_fields: dict[str, Any]
    stamps: dict[Path, Stamp]
    left_out: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of all weights."""
        return sum(output.entry.nbytes for output in self.outputs)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that the adapters change, sorted."""
        return tuple(sorted(output.name for output in self.outputs if output.change is not None))

    def layouts(self) -> dict[str, FileLayout]:
        """Where everything is in each file."""
        return {
            shard: FileLayout.of({output.name: output.entry for output in outputs}, self.metadata[shard])
            for shard, outputs in self.shards().items()
        }

    def shards(self) -> dict[str, list[Output]]:
        """The outputs by file, each in the order of the plan."""
        result: dict[str, list[Output]] = {}
        for output in self.outputs:
            result.setdefault(output.shard, []).append(output)
        return result


def plan_merge(
    base: Path,
    adapters: Sequence[SavedAdapter],
    *,
    out_dtype: torch.dtype | None = None,
    tied: Tied = "refuse",
    dequantize: bool = False,
    max_shard_bytes: int | None = None,
) -> MergePlan:
    """Plan the merge of adapters into a base.

    Args:
        base: directory of the checkpoint.
        adapters: in the order in which they are summed.
        out_dtype: of all floating-point weights; each one's own if None.
        tied: what to do where a weight that a model ties is changed at one end only, or differently.
        dequantize: whether to decode quantized weights, all of them.
        max_shard_bytes: of weights in a file; files as the base has them if None.

    Raises:
        CheckpointError: when a file is missing or broken, an adapter's layer is not in the base, or shapes do not fit.
        MergeError: when a weight is quantized or tied, or what a tensor is for cannot be told.
        ConfigError: when an adapter's weight in the merge is not 1 and it replaces tensors, or `out_dtype` is for a
            quantized base.
    """
    shards, index = read_shards(base)
    stamps = {base / shard: stamp_of(base / shard) for shard in shards}
    sources, headers = read_sources(base, shards)
    config = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    view = view_base(sources, config, adapters, dequantize=dequantize, out_dtype=out_dtype)
    if out_dtype is not None and view.quantized.formats and view.written is None:
        raise ConfigError(
            f"`out_dtype` is {out_dtype}, and quantized weights and their scales have dtypes of their own; pass "
            f"dequantize=True too, or no out_dtype. {view.quantized.count}"
        )
    result = in_files(find_changes(adapters, view), view, tied)
    for name, change in result.changes.items():
        entry = view.entries[name]
        if change.folds:
            rounding.check_foldable(entry.torch_dtype, name)
        if all(name not in family.ends for family in view.families):
            _check_not_tied(name, entry, config)
    starts = {**view.sources, **{name: view.sources[start] for name, start in result.added.items()}}
    outputs = tuple(
        Output(name, _written_as(source, out_dtype or view.written), source, result.changes.get(name), source.path.name)
        for shard in shards
        for name, source in starts.items()
        if source.path.name == shard
    )
    metadata = {shard: {**METADATA, **header.metadata} for shard, header in headers.items()}
    if max_shard_bytes is not None:
        outputs = _divided(outputs, max_shard_bytes)
        texts = next(iter(metadata.values()))
        metadata = {output.shard: texts for output in outputs}
    new_config = _new_config(config, view, out_dtype, untied=result.untied)
    kept = {output.shard for output in outputs}
    return MergePlan(
        base=base,
        adapters=tuple(adapter.directory for adapter in adapters),
        outputs=outputs,
        metadata={shard: texts for shard, texts in metadata.items() if shard in kept},
        index=_new_index(index, outputs) if _needs_index(base, kept, max_shard_bytes) else None,
        config=new_config,
        new_fields=_differences(config, new_config or config),
        stamps=stamps,
        left_out=(CONFIG_FILE,) if view.written is not None else (),
    )


def read_sources(base: Path, shards: Mapping[str, Mapping[str, Entry]]) -> tuple[dict[str, Source], dict[str, Header]]:
    """The tensors of a checkpoint by name, and the headers of its files, whose tensors are known."""
    headers = {shard: read_header(base / shard) for shard in shards}
    sources = {
        name: Source(base / shard, name, entry, headers[shard].offsets[name].start)
        for shard, held in shards.items()
        for name, entry in held.items()
    }
    return sources, headers


def _divided(outputs: Iterable[Output], max_bytes: int) -> tuple[Output, ...]:
    """Outputs in files of a chosen size, in the order that they have."""
    by_name = {output.name: output for output in outputs}
    shards = split({name: output.entry for name, output in by_name.items()}, max_bytes)
    return tuple(replace(by_name[name], shard=shard) for shard, names in shards.items() for name in names)


def _needs_index(base: Path, shards: set[str], max_bytes: int | None) -> bool:
    return shards != {WEIGHTS_FILE} if max_bytes is not None else (base / INDEX_FILE).is_file()


def _new_index(index: Mapping[str, Any], outputs: Iterable[Output]) -> dict[str, Any]:
    entries = [output.entry for output in outputs]
    result = {**index, "total_size": sum(entry.nbytes for entry in entries)}
    if "total_parameters" in index:
        result["total_parameters"] = sum(entry.num_entries for entry in entries)
    return result


def _new_config(
    config: dict[str, Any], view: BaseView, out_dtype: torch.dtype | None, *, untied: bool
) -> dict[str, Any] | None:
    """What `config.json` is to hold; None if it stays as it is, or there is none."""
    result = config
    if view.replication is not None:
        result = view.replication.configured(result)
    if view.written is not None:
        result = without_quantization(result)
    if out_dtype is not None or view.written is not None:
        result = _with_dtype(result, out_dtype or view.written or torch.bfloat16)
    if untied:
        result = says_untied(result)
    return result if config and result != config else None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    names = [*new, *(name for name in old if name not in new)]
    return {name: new.get(name) for name in names if name not in new or new[name] != old.get(name)}


def _written_as(source: Source, dtype: torch.dtype | None) -> Entry:
    entry = source.entry
    if source.decoder is not None:
        return Entry.of(torch.empty(source.decoder.shape, device="meta"), dtype)
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
    ties = config.get("tie_word_embeddings") and has_head(config, otherwise=True)
    if ties and len(entry.shape) > 1 and entry.shape[:1] == (config.get("vocab_size"),):
        raise MergeError(
            f"'{name}' is tied to the embeddings (tie_word_embeddings in config.json), which a merge would change too; "
            "untie them first, or leave this layer out of the targets"
        )
