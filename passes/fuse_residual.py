"""`fuse-residual`: what is added to the output of an operator becomes its first summand.

    y = op(x, …);  h = r + y     →     h = op(x, …, residual=r)

It follows `fuse-siblings` and `fuse-swiglu`. The sum is then no pass over memory of its own, and what follows, a norm as a
rule, reads one tensor and not two.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, cast

from torch import Tensor, fx

from passes.operands import ADD
from passes.spans import spans


def fuse_residual(graph: fx.Graph, operators: Collection[object], single: Collection[object]) -> int:
    """Fuse all such sums, and return how many there were.

    Args:
        graph: of Dynamo, whose nodes have example values; changed in place.
        operators: take the keyword `residual`; their first output is that of their last layer.
        single: those of them that have an output for each layer, and take a residual with one layer only.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    span_of = spans(graph)
    count = 0
    for call in list(graph.nodes):
        if call.target not in operators or call.target in single and len(cast("Sequence[Any]", call.args[1])) != 1:
            continue
        found = _sum(call)
        if found is None:
            continue
        y, total, residual = found
        if order[residual] > order[call] or span_of[call] != span_of[total]:
            continue
        call.kwargs = {**call.kwargs, "residual": residual}
        total.replace_all_uses_with(y)
        y.meta["example_value"] = total.meta["example_value"]
        graph.erase_node(total)
        count += 1
    return count


def _sum(call: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The output of a call, the sum that alone reads it, and the other summand: alike in shape and dtype."""
    outputs = [user for user in call.users if user.target is operator.getitem and user.args[1] == 0]
    if len(outputs) != 1 or len(outputs[0].users) != 1:
        return None
    y = outputs[0]
    total = next(iter(y.users))
    if total.op != "call_function" or total.target not in ADD or len(total.args) != 2 or total.kwargs:
        return None
    residual = total.args[0] if total.args[1] is y else total.args[1]
    if not isinstance(residual, fx.Node) or residual is y:
        return None
    examples = [each.meta.get("example_value") for each in (y, total, residual)]
    if not all(isinstance(each, Tensor) for each in examples):
        return None
    own, one, other = cast("list[Tensor]", examples)
    alike = own.shape == one.shape == other.shape and own.dtype == one.dtype == other.dtype
    return (y, total, residual) if alike else None
