"""`fuse-siblings`: lowered layers that read the same input become one call of the operator, which reads it once.

    (q, …) = op(x, [Wq], …);  (k, …) = op(x, [Wk], …)     →     (q, k, …) = op(x, [Wq, Wk], …)

The operator takes lists: `op(x, weights, biases, As, Bs, scales, p, seed)`, and returns the outputs in their order first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from passes.base import PassResult, Region

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
            group = groups.setdefault((node.args[0], node.args[6]), [])
            if not group or _defined_before(node, group[0], order):
                group.append(node)
    count = 0
    for group in groups.values():
        for chunk in (group[start : start + MOST] for start in range(0, len(group), MOST)):
            if len(chunk) > 1:
                _join(graph, chunk)
                count += len(chunk)
    return count


def _defined_before(node: fx.Node, first: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether all that a call reads, but its seed, is there at an earlier call."""
    read = cast("list[fx.Node]", [])
    fx.map_arg(node.args[:6], read.append)
    return all(order[each] < order[first] for each in read)


def _join(graph: fx.Graph, calls: list[fx.Node]) -> None:
    first = calls[0]
    x, p, seed = first.args[0], first.args[6], first.args[7]
    lists = [[each for call in calls for each in cast("Iterable[Any]", call.args[index])] for index in range(1, 6)]
    with graph.inserting_before(first):
        joined = graph.call_function(cast(Any, first.target), (x, *lists, p, seed))
    joined.meta.update(first.meta)
    offset = 0
    for call in calls:
        size = len(cast("list[Any]", call.args[1]))
        for user in list(call.users):
            user.args = (joined, offset + cast(int, user.args[1]))
        offset += size
    for call in calls:
        unused = call.args[7]
        graph.erase_node(call)
        if isinstance(unused, fx.Node) and not unused.users:
            graph.erase_node(unused)
