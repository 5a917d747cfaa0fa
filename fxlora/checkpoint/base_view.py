"""The tensors of a base as the models see them that adapters were trained on.

A model in memory can have names that its files have not: layers that are there twice, experts in one parameter, a head
with the weight of the embeddings. This is where files and models are brought together; matching and planning ask nothing
else of a base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxlora._passes import MergeError
from fxlora.checkpoint import rounding
from fxlora.checkpoint.adapter import repeats
from fxlora.checkpoint.buffers import bytes_of
from fxlora.checkpoint.file_ranges import Files
from fxlora.checkpoint.fused_experts import Fused, fused_experts
from fxlora.checkpoint.quantized import Quantized, find_quantized
from fxlora.checkpoint.replicated import Replication, find_replication
from fxlora.checkpoint.safetensors_io import Entry
from fxlora.checkpoint.saved import SavedAdapter
from fxlora.checkpoint.sources import Source
from fxlora.checkpoint.ties import Family, find_families
from fxlora.errors import CheckpointError

_COMPARED = 1 << 24
"""Bytes that are compared at a time."""


@dataclass(frozen=True, slots=True)
class BaseView:
    """A base as adapters name it.

    Attributes:
        sources: the tensors of the merged checkpoint by name, as long as nothing is untied.
        entries: of these and of all that a model makes of them.
        fused: parameters of experts.
        families: tied weights.
        quantized: what is quantized.
        replication: the new order of its layers; None if it is the base's.
        written: in which dtype decoded weights are written; None if none are decoded.
    """

    sources: dict[str, Source]
    entries: dict[str, Entry]
    fused: dict[str, Fused]
    families: tuple[Family, ...]
    quantized: Quantized
    replication: Replication | None
    written: torch.dtype | None

    def check_changeable(self, name: str) -> None:
        """Refuse to change a weight that is quantized, and not decoded.

        Raises:
            MergeError: naming the weight, its format and the remedy.
        """
        if self.written is None:
            pieces = [piece.name for piece in self.fused[name].pieces] if name in self.fused else [name]
            for piece in pieces:
                if piece in self.quantized.formats:
                    raise self.quantized.refuse(piece)

    def load(self, name: str) -> Tensor:
        """A tensor as the model would have it."""
        if name in self.fused:
            fused = self.fused[name]
            value = torch.empty(fused.entry.shape, dtype=fused.entry.torch_dtype)
            for piece in fused.pieces:
                piece.of(value).copy_(self.load(piece.name))
            return value
        if name not in self.sources:
            name = next(family.stored[0] for family in self.families if name in family.ends)
        source = self.sources[name]
        if source.decoder is None:
            return read_rows(source, 0, source.entry.shape[0] if source.entry.shape else 1).reshape(source.entry.shape)
        return rounding.convert(source.decoder.rows(source, read_rows, 0, source.decoder.shape[0]), self.written)

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors of the files have the same bytes; they are compared in parts."""
        first, second = self.sources[one], self.sources[other]
        if (first.entry, first.decoder) != (second.entry, second.decoder):
            return False
        rows = first.entry.shape[0]
        step = max(1, rows * _COMPARED // max(1, first.entry.nbytes))
        parts = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        return all(repeats(read_rows(first, *part), read_rows(second, *part)) for part in parts)


def read_rows(source: Source, start: int, stop: int) -> Tensor:
    """Rows of a tensor as its file has them, for what planning must know: see `sources.Read`."""
    with Files() as files:
        return rows_of(files, source, start, stop)


def rows_of(files: Files, source: Source, start: int, stop: int) -> Tensor:
    """The same, from files that are open."""
    dtype, shape = source.entry.torch_dtype, source.entry.shape or (1,)
    if dtype is None:
        raise CheckpointError(
            f"{source.path}: '{source.name}' is {source.entry.dtype}, a dtype that torch does not have"
        )
    rows = torch.empty(stop - start, *shape[1:], dtype=dtype)
    if rows.numel():
        files.read_into(source.path, source.start + start * (rows.nbytes // rows.shape[0]), bytes_of(rows))
    return rows


def view_base(
    sources: Mapping[str, Source],
    config: Mapping[str, Any],
    adapters: Iterable[SavedAdapter],
    *,
    dequantize: bool,
    out_dtype: torch.dtype | None,
) -> BaseView:
    """See a base as the models that adapters were trained on.

    Args:
        sources: its tensors by name.
        config: its `config.json`, empty if there is none.
        adapters: those that are merged.
        dequantize: whether to decode quantized weights.
        out_dtype: of decoded weights; if None what the checkpoint says, or bfloat16.

    Raises:
        CheckpointError: when what describes a quantized weight or a replication cannot be understood.
        MergeError: when weights cannot be decoded, or adapters have different layers.
    """
    quantized = find_quantized(sources, config, read_rows)
    plain, written = dict(sources), None
    if dequantize and quantized.formats:
        quantized.check_decodable()
        written = out_dtype or quantized.dtype or torch.bfloat16
        plain = {
            name: replace(source, decoder=quantized.decoders.get(name))
            for name, source in sources.items()
            if name not in quantized.companions
        }
    replication = _replication(plain, adapters)
    if replication is not None:
        plain = replication.renamed(plain)
        formats = replication.renamed(quantized.formats)
        quantized = replace(quantized, formats=formats)
    entries = {name: _entry(source, written) for name, source in plain.items()}
    if written is None:
        entries.update({name: Entry("U8", (0, 0)) for name in quantized.formats if name not in entries})
    families = tuple(find_families(entries, config))
    fused = fused_experts(entries)
    entries.update({name: each.entry for name, each in fused.items()})
    entries.update({end: entries[family.stored[0]] for family in families for end in family.ends if end not in entries})
    return BaseView(plain, entries, fused, families, quantized, replication, written)


def _entry(source: Source, written: torch.dtype | None) -> Entry:
    if source.decoder is None:
        return source.entry
    return Entry.of(torch.empty(source.decoder.shape, device="meta"), written)


def _replication(names: Iterable[str], adapters: Iterable[SavedAdapter]) -> Replication | None:
    adapters = list(adapters)
    wanted = {tuple(map(tuple, adapter.config.layer_replication or ())): adapter for adapter in adapters}
    if len(wanted) > 1:
        raise MergeError(
            f"{' and '.join(str(each.directory) for each in wanted.values())} have different layer_replication, and so "
            "other layers; merge them one by one into bases of their own"
        )
    for ranges, adapter in wanted.items():
        return find_replication(names, ranges, str(adapter.directory)) if ranges else None
    return None
