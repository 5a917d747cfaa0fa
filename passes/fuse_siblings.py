"""`fuse-siblings`: lowered layers that read the same input become one call of the operator, which reads it once.

    (q, …) = op(x, [Wq], …);  (k, …) = op(x, [Wk], …)     →     (q, k, …) = op(x, [Wq, Wk], …)

The operator takes lists: `op(x, weights, biases, As, Bs, scales, p, seed)`, and returns the outputs in their order first.
Behind the scales it may have further lists, with an entry for each layer, in place of `p` and `seed`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from passes.base import PassResult, Region, target_name

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
"""Functions of `operator` that change their first argument."""

MOST = 3
"""Layers that one call takes: query, key and value."""


@dataclass(frozen=True)
class FuseSiblings:
    """Join calls of the operator on one input.

    Attributes:
        target: the operator.
    """

    name: ClassVar[str] = "fuse-siblings"
    target: Any

    def run(self, region: Region) -> PassResult:
        """Join what can be joined."""
        count = fuse_siblings(region.graph, self.target)
        return PassResult(bool(count), f"{count} layers share a call")


def fuse_siblings(graph: fx.Graph, target: object) -> int:
    """Join calls of `target` on one input, and return how many layers share a call now."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    groups: dict[tuple[object, object], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is target:
            _erase_unread_outputs(graph, node)
            rate = None if isinstance(node.args[6], Sequence) else node.args[6]
            group = groups.setdefault((node.args[0], rate), [])
            if not group or _can_move(node, group[0], order):
                group.append(node)
    count = 0
    for group in groups.values():
        for chunk in _chunks(group):
            if len(chunk) > 1:
                _join(graph, chunk, order)
                count += sum(map(_size, chunk))
    return count


def _chunks(calls: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """The calls in sequence, no more layers together than one call takes."""
    chunk: list[fx.Node] = []
    for call in calls:
        if chunk and sum(map(_size, chunk)) + _size(call) > MOST:
            yield chunk
            chunk = []
        chunk.append(call)
    yield chunk


def _size(call: fx.Node) -> int:
    """The number of layers in a call."""
    return len(cast("Sequence[Any]", call.args[1]))


def _erase_unread_outputs(graph: fx.Graph, call: fx.Node) -> None:
    """Erase readers of outputs that nothing reads, as a tracer leaves them."""
    for user in list(call.users):
        if user.target is operator.getitem and not user.users:
            graph.erase_node(user)


def _can_move(node: fx.Node, first: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether all that a call reads, but its seed, is there at an earlier call, or can be read there, and is the same."""
    x = cast(fx.Node, node.args[0])
    between = [user for user in x.users if order[first] < order[user] < order[node]]
    there = all(each.op == "get_attr" or order[each] < order[first] for each in _read(node))
    return there and not any(user.args[:1] == (x,) and _in_place(user) for user in between)


def _read(node: fx.Node) -> list[fx.Node]:
    read: list[fx.Node] = []
    arguments = [each for index, each in enumerate(node.args) if index < 6 or isinstance(each, Sequence)]
    fx.map_arg(cast(Any, arguments), lambda each: read.append(each) or each)
    return read


def _in_place(node: fx.Node) -> bool:
    name = target_name(node).removeprefix(".").partition(".")[0]
    return name.endswith("_") or name in _IN_PLACE


def _join(graph: fx.Graph, calls: list[fx.Node], order: dict[fx.Node, int]) -> None:
    first = calls[0]
    for each in [each for call in calls[1:] for each in _read(call) if order[each] > order[first]]:
        first.prepend(each)
        order[each] = order[first]
    arguments = [
        [each for call in calls for each in cast("Sequence[Any]", call.args[index])]
        if isinstance(own, Sequence)
        else own
        for index, own in enumerate(first.args)
    ]
    with graph.inserting_before(first):
        joined = graph.call_function(cast(Any, first.target), tuple(cast("list[Any]", arguments)))
    joined.meta.update(first.meta)
    offset = 0
    for call in calls:
        for user in list(call.users):
            user.args = (joined, offset + cast(int, user.args[1]))
        offset += _size(call)
    for call in calls:
        unused = call.args[-1]
        graph.erase_node(call)
        if isinstance(unused, fx.Node) and not unused.users:
            graph.erase_node(unused)
