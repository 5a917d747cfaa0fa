"""`note-layouts`: say of each tensor of an exported graph where the rows of the batch lie in it.

A whole graph has operations between the input and a layer: an attention may put time in front of the batch, or flatten
both into one dimension. Where an export's symbolic shapes tell, the layout is noted in the node's metadata, for forms in
which rows have adapters of their own (see `passes.rows`). Nothing else of the graph changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from passes.base import PassResult, Region
from passes.rows import LAYOUT, Layout

aten = torch.ops.aten

_RESHAPES = (
    *("view", "reshape", "flatten", torch.reshape, torch.flatten),
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
)


@dataclass(frozen=True)
class NoteLayouts:
    """Note the layout of every tensor whose shape the capture knows."""

    name: ClassVar[str] = "note-layouts"

    def run(self, region: Region) -> PassResult:
        """Note; a graph without shapes is left alone. The rows are the first dimension of the first tensor input."""
        shapes = {node: _sizes(node) for node in region.graph.nodes}
        inputs = [shapes[node] for node in region.graph.nodes if node.op == "placeholder" and shapes[node]]
        if not inputs:
            return PassResult(False)
        rows = inputs[0][0]
        for node, sizes in shapes.items():
            if sizes and node.op not in ("get_attr", "output"):
                node.meta[LAYOUT] = _layout(node, sizes, rows, shapes)
        return PassResult(True)


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a tensor: numbers, or expressions of symbols."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    sizes = cast("tuple[Any, ...]", tuple(value.shape))
    return tuple(size if isinstance(size, int) else size.node.expr for size in sizes)


def _layout(node: fx.Node, sizes: tuple[Any, ...], rows: Any, shapes: dict[fx.Node, tuple[Any, ...]]) -> Layout:
    dims = [dim for dim, size in enumerate(sizes) if size == rows]
    if len(dims) == 1:
        return "dim", dims[0]
    for source in node.all_input_nodes:
        found: Layout = source.meta.get(LAYOUT, ("unknown", 0))
        before = shapes[source]
        if found[0] == "unknown" or not before:
            continue
        if node.target in _RESHAPES and source is node.args[0]:
            return _reshaped(found, before, sizes)
        if len(before) == len(sizes) and before[found[1]] == sizes[found[1]]:
            return found
    return "unknown", 0


def _reshaped(found: Layout, before: tuple[Any, ...], after: tuple[Any, ...]) -> Layout:
    """The layout after a reshape that joins dimensions: of those before, which end up in one, and where in it."""
    kind, place = found
    start, dim = 0, 0
    while start < len(before) and dim < len(after):
        end, size = start + 1, before[start]
        while size != after[dim] and end < len(before):
            size, end = size * before[end], end + 1
        if size != after[dim]:
            return "unknown", 0
        if start <= place < end:
            if end == start + 1:
                return kind, dim
            if kind == "inner" or (kind == "outer" and place != start):
                return "unknown", 0
            if place == start:
                return "outer", dim
            return ("inner", dim) if kind == "dim" and place == end - 1 else ("unknown", 0)
        start, dim = end, dim + 1
    return "unknown", 0
