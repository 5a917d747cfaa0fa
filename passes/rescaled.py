"""DoRA's branch in a graph: what it adds to a layer's output y is `(ratio - 1) · (y - bias) + ratio · s`.

A region has it in two calls. Dynamo puts the operations of these functions in their place: there it is found by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from passes.branches.dora import magnitude_ratio, rescale, without_bias
from passes.operands import ADD, MULTIPLY, SUBTRACT


@dataclass(frozen=True, slots=True)
class Rescaled:
    """A scaled branch and the ratio that multiplies it and its layer.

    Attributes:
        s: the scaled branch.
        ratio: a factor for each feature, `(out,)`.
        reader: the node that reads the layer's output.
        inner: the nodes that make what is added of the output, s and the ratio, users first.
    """

    s: fx.Node
    ratio: fx.Node
    reader: fx.Node
    inner: tuple[fx.Node, ...]


def rescaled(added: fx.Node, y: fx.Node, bias: fx.Node | str | None) -> Rescaled | None:
    """Read what is added to the output of a linear layer; None if it is no branch of DoRA's.

    Args:
        added: what is added.
        y: the layer's output.
        bias: the layer's, a node or a path.
    """
    return _called(added, y, bias) if added.target is rescale else _inlined(added, y, bias)


def _called(added: fx.Node, y: fx.Node, bias: fx.Node | str | None) -> Rescaled | None:
    s, base, ratio, channels = cast("tuple[fx.Node, fx.Node, fx.Node, int]", added.args)
    if channels != -1 or base.target is not without_bias or ratio.target is not magnitude_ratio:
        return None
    below, removed, _ = base.args
    same = not isinstance(bias, fx.Node) if removed is None else bias in (removed, cast(fx.Node, removed).target)
    if below is not y or not same:
        return None
    inner = (added, base, *([removed] if isinstance(removed, fx.Node) and removed is not bias else []))
    return Rescaled(s, ratio, base, inner)


def _inlined(added: fx.Node, y: fx.Node, bias: fx.Node | str | None) -> Rescaled | None:
    for moved, scaled in _orders(added, ADD):
        for less_one, base in _orders(moved, MULTIPLY):
            for factor, s in _orders(scaled, MULTIPLY):
                removal = _removal(base, y, bias)
                difference, casts = _below_view(less_one)
                ratio, other_casts = _below_view(factor)
                if removal is None or not casts or not other_casts or not _is_one_less(difference, ratio):
                    continue
                reader = removal[0] if removal else moved
                inner = (added, moved, scaled, *removal, *casts, difference, *other_casts)
                return Rescaled(s, ratio, reader, inner)
    return None


def _orders(node: fx.Node, targets: tuple[Any, ...]) -> list[tuple[fx.Node, fx.Node]]:
    """The operands of a sum or product in both orders; nothing for any other node."""
    if node.target not in targets or len(node.args) != 2 or node.kwargs:
        return []
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return []
    return [(first, second), (second, first)]


def _removal(base: fx.Node, y: fx.Node, bias: fx.Node | str | None) -> tuple[fx.Node, ...] | None:
    """The nodes that take a layer's bias from its output, None if `base` is another value."""
    if bias is None:
        return () if base is y else None
    if base.target not in SUBTRACT or len(base.args) != 2 or base.kwargs or base.args[0] is not y:
        return None
    view = base.args[1]
    return (base, view) if isinstance(view, fx.Node) and _is_view(view) and view.args[0] is bias else None


def _below_view(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What is below a view as a vector of a cast, and the nodes of both; none if it has another form."""
    cast_node = node.args[0] if _is_view(node) else None
    if not isinstance(cast_node, fx.Node) or cast_node.op != "call_method" or cast_node.target != "to":
        return node, ()
    below = cast_node.args[0]
    return (below, (node, cast_node)) if isinstance(below, fx.Node) and len(cast_node.args) == 2 else (node, ())


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "view" and node.args[1:] == (-1,)


def _is_one_less(difference: fx.Node, ratio: fx.Node) -> bool:
    """Whether a value is a vector less one."""
    value = ratio.meta.get("example_value")
    is_vector = isinstance(value, torch.Tensor) and value.dim() == 1
    return is_vector and difference.target in SUBTRACT and difference.args == (ratio, 1) and not difference.kwargs
