"""`fuse-norms`: the norms of DoRA's weights, a dozen operations each, become one operator that reads the weight once.

    y = op(x, [W], …, [m / norm]),  norm = row_norms(W, A, B, scale, ‖W‖²)     →     norm = norms(W, A, B, scale, ‖W‖²)

It follows `lower`. A region has the norm in one call; Dynamo puts the operations of that function in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from passes.branches.dora import magnitude_ratio, row_norms

_ANY = object()
_W, _A, _B, _SCALE, _SQUARED = (object() for _ in range(5))
_OPERANDS = (_W, _A, _B, _SCALE, _SQUARED)

_a, _b, _s = ("to", ("detach", _A), _ANY), ("to", ("detach", _B), _ANY), ("detach", _SCALE)
_ALONG = ("to", ("matmul", ("detach", _W), ("t", _a)), _ANY)
_GRAM = ("to", ("matmul", _a, ("t", _a)), _ANY)
_CROSS = ("mul", ("mul", 2, _s), ("sum", ("mul", _ALONG, _b), -1))
_OWN = ("mul", ("pow", _s, 2), ("sum", ("mul", ("matmul", _b, _GRAM), _b), -1))
_NORM = ("sqrt", ("clamp", ("add", ("add", _SQUARED, _CROSS), _OWN), 0))
"""`passes.branches.dora.row_norms` as Dynamo has it: names of operations and their arguments."""

_DIVIDED = ("truediv", ("flatten", _ANY), ("where", ("eq", _ANY, 0), 1, _ANY))
"""Likewise `magnitude_ratio`."""

_COMMUTATIVE = ("add", "mul", "eq")
_OTHER_NAMES = {"div": "truediv", "true_divide": "truediv", "radd": "add", "rmul": "mul"}
"""Versions of Dynamo write operators as functions of `operator` or of torch, and as methods."""


def fuse_norms(graph: fx.Graph, layers: object, norms: object) -> int:
    """Replace the norms of all lowered layers with DoRA, and return how many there were.

    Args:
        graph: changed in place.
        layers: the operator of lowered layers: `layers(x, weights, biases, As, Bs, scales, ratios, …)`.
        norms: called with W, A, B, the scale and the squared norms of W, the factors as they are below casts.
    """
    count = 0
    for call in [node for node in graph.nodes if node.target is layers]:
        weights, ratios = (cast("Sequence[fx.Node]", call.args[index]) for index in (1, 6))
        for weight, ratio in zip(weights, ratios, strict=True):
            norm = _norm(ratio)
            operands = None if norm is None else _operands(norm)
            if norm is None or operands is None or not _is_same(operands[0], weight):
                continue
            with graph.inserting_before(norm):
                fused = graph.call_function(cast(Any, norms), operands)
            fused.meta.update(norm.meta)
            norm.replace_all_uses_with(fused)
            _erase_unused(graph, norm)
            count += 1
    return count


def _norm(ratio: fx.Node) -> fx.Node | None:
    """The norm by which a magnitude is divided."""
    if ratio.target is magnitude_ratio:
        return cast(fx.Node, ratio.args[1])
    if not _matches(_DIVIDED, ratio, {}):
        return None
    compared, _, norm = cast("tuple[fx.Node, int, fx.Node]", cast(fx.Node, ratio.args[1]).args)
    return norm if norm in compared.args else None


def _operands(norm: fx.Node) -> tuple[fx.Node, ...] | None:
    """W, A, B, the scale and the squared norms of W, None if the norm is made in another way."""
    if norm.target is row_norms:
        found = cast("tuple[fx.Node, ...]", norm.args)
    else:
        values: dict[object, fx.Node] = {}
        if not _matches(_NORM, norm, values):
            return None
        found = tuple(values[operand] for operand in _OPERANDS)
    W, A, B, scale, squared = found
    return W, _below_casts(A), _below_casts(B), scale, squared


def _matches(pattern: object, value: object, found: dict[object, fx.Node]) -> bool:
    """Whether a value is what a pattern has: an operation, one and the same operand, or a number."""
    if pattern is _ANY:
        return True
    if pattern in _OPERANDS:
        return isinstance(value, fx.Node) and found.setdefault(pattern, value) is value
    if not isinstance(pattern, tuple):
        return not isinstance(value, fx.Node) and value == pattern
    name, *arguments = cast("tuple[Any, ...]", pattern)
    if not isinstance(value, fx.Node) or value.op not in ("call_function", "call_method") or _name(value) != name:
        return False
    own = [*value.args, *value.kwargs.values()]
    orders = [own, own[::-1]] if name in _COMMUTATIVE else [own]
    for order in orders:
        tried = dict(found)
        if len(own) == len(arguments) and all(_matches(*pair, tried) for pair in zip(arguments, order, strict=True)):
            found.update(tried)
            return True
    return False


def _name(node: fx.Node) -> str:
    """What an operation does, however it is written."""
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    return _OTHER_NAMES.get(name, name)


def _below_casts(node: fx.Node) -> fx.Node:
    while node.op == "call_method" and node.target == "to" and isinstance(node.args[1], (fx.Node, torch.dtype)):
        node = cast(fx.Node, node.args[0])
    return node


def _is_same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are one, or read the same attribute."""
    return one is other or one.op == other.op == "get_attr" and one.target == other.target


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase an operation that nothing reads, and those that it alone read."""
    waiting, erased = [node], cast("set[fx.Node]", set())
    while waiting:
        each = waiting.pop()
        if each.users or each in erased or each.op not in ("call_function", "call_method", "get_attr"):
            continue
        waiting += each.all_input_nodes
        graph.erase_node(each)
        erased.add(each)
