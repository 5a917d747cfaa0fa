"""`recompute`: an operator whose input is what a norm gave keeps the norm's own input, and makes its input anew from it.

    n = rsqrt(mean(h²) + ε);  x = w · (h · n);  y = op(x, …)     →     y = op(x, …, source=h, row_scale=n, column_scale=w)

The norm keeps h and n for its backward pass in any case; a frozen layer would not keep x. Found are products of one tensor
with a factor for each row and one for each column, whatever the norm is, through casts; and calls of `rms_norm`, for which
n is computed beside.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.operands import MULTIPLY, arg

_CASTS = ("to", "type_as", "float", "double", "half", "bfloat16")


@dataclass(frozen=True, slots=True)
class Scaled:
    """`source · row_scale · column_scale`, the last None for ones."""

    source: fx.Node
    row_scale: fx.Node
    column_scale: fx.Node | None


def recompute(graph: fx.Graph, operators: Collection[object]) -> int:
    """Let operators keep the sources of their inputs, and return for how many there are such.

    Args:
        graph: of Dynamo, whose nodes have example values; changed in place.
        operators: their first argument is the input; they take the keywords of the example above.
    """
    count = 0
    for node in graph.nodes:
        if node.target in operators and (found := _normed(node.args[0]) or scaled(node.args[0])) is not None:
            node.kwargs = {
                **node.kwargs, "source": found.source, "row_scale": found.row_scale, "column_scale": found.column_scale,
            }  # fmt: skip
            count += 1
    return count


def _normed(x: fx.Node) -> Scaled | None:
    """The parts of a call of `rms_norm` over the last dimension, with new nodes for the scale; None for any other node."""
    if x.target not in (F.rms_norm, torch.rms_norm):
        return None
    h, shape, weight, eps = (
        arg(x, place, name) for place, name in enumerate(("input", "normalized_shape", "weight", "eps"))
    )
    value, example = _example(x), _example(h)
    if value is None or example is None or len(shape) != 1 or not isinstance(eps, float):
        return None
    if value.dim() < 2 or value.dtype in (torch.float16, torch.float64) or example.dtype != value.dtype:
        return None
    with x.graph.inserting_before(x):
        wide = x.graph.call_method("to", (h, torch.float32))
        mean = x.graph.call_method("mean", (x.graph.call_method("pow", (wide, 2)), -1, True))
        row_scale = x.graph.call_function(torch.rsqrt, (x.graph.call_function(operator.add, (mean, eps)),))
    return Scaled(h, row_scale, weight)


def scaled(x: fx.Node) -> Scaled | None:
    """What a value is a scaled form of, None if it is not one.

    A source has the shape and the dtype of the value. In float16 there is none: what is multiplied with the scales alone,
    without the source that they make small, may be too large for it.
    """
    value = _example(x)
    if value is None or value.dim() < 2 or value.dtype == torch.float16 or _is_one(value.shape[-1]):
        return None
    rows: list[fx.Node] = []
    columns: list[fx.Node] = []
    source = x
    while (step := _step(source, value)) is not None:
        source, factor = step
        if factor is not None:
            (columns if cast(Tensor, _example(factor)).dim() == 1 else rows).append(factor)
    found = _example(source)
    if len(rows) != 1 or len(columns) > 1 or found is None or found.dtype != value.dtype:
        return None
    return Scaled(source, rows[0], columns[0] if columns else None)


def _step(node: fx.Node, value: Tensor) -> tuple[fx.Node, fx.Node | None] | None:
    """The tensor that a node casts or scales, and the scale; None for any other node."""
    if node.op == "call_method" and node.target in _CASTS:
        below = node.args[0]
        return (below, None) if isinstance(below, fx.Node) and _is_floating(_example(below)) else None
    if node.op != "call_function" or node.target not in MULTIPLY or len(node.args) != 2 or node.kwargs:
        return None
    for tensor, factor in (node.args, node.args[::-1]):
        if isinstance(tensor, fx.Node) and isinstance(factor, fx.Node) and _scales(_example(factor), value):
            example = _example(tensor)
            return (tensor, factor) if example is not None and example.shape == value.shape else None
    return None


def _scales(factor: Tensor | None, value: Tensor) -> bool:
    """Whether a factor has one number for each column, or one for each row."""
    if not _is_floating(factor):
        return False
    shape = cast(Tensor, factor).shape
    return len(shape) == 1 and not _is_one(shape[0]) or len(shape) == value.dim() and _is_one(shape[-1])


def _is_floating(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point()


def _is_one(size: Any) -> bool:
    """Whether a size is 1, of those that are no symbols."""
    return isinstance(size, int) and size == 1


def _example(node: fx.Node) -> Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None
