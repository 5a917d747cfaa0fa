"""`fuse-siblings`: lowered layers that read the same input become one call of the operator, which reads it once.

    (q, …) = op(x, [Wq], …);  (k, …) = op(x, [Wk], …)     →     (q, k, …) = op(x, [Wq, Wk], …)

The operator takes lists: `op(x, weights, biases, As, Bs, scales, p, seed)`, and returns the outputs in their order first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from passes.base import PassResult, Region
from passes.spans import spans

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
        count = fuse_siblings(region.graph, self.target, region.resolve)
        return PassResult(bool(count), f"{count} layers share a call")


def fuse_siblings(graph: fx.Graph, target: object, module_of: Callable[[str], object] | None = None) -> int:
    """Join calls of an operator on one input, and return how many layers share a call now.

    Args:
        graph: changed in place.
        target: the operator.
        module_of: see `passes.spans.spans`.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    span_of = spans(graph, module_of)
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is target:
            group = groups.setdefault((node.args[0], node.args[6], has_bias(node), span_of[node]), [])
            if not group or all(_can_move(each) for each in _read_later(node, group[0], order)):
                group.append(node)
    count = 0
    for group in groups.values():
        for chunk in (group[start : start + MOST] for start in range(0, len(group), MOST)):
            if len(chunk) > 1:
                _join(graph, chunk, order)
                count += len(chunk)
    return count


def has_bias(call: fx.Node) -> bool:
    """Whether the layers of a call have biases; of one call all have, or none: torch has gradients for such lists only."""
    return any(bias is not None for bias in cast("list[Any]", call.args[2]))


def _read_later(call: fx.Node, first: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """What a call reads, but its seed, that is not there yet at an earlier call."""
    read = cast("list[fx.Node]", [])
    fx.map_arg(call.args[:6], read.append)
    return [each for each in dict.fromkeys(read) if order[each] > order[first]]


def _can_move(node: fx.Node) -> bool:
    """Whether a node reads nothing but the model's own tensors."""
    return node.op in ("get_attr", "call_module") and not node.all_input_nodes


def _join(graph: fx.Graph, calls: list[fx.Node], order: dict[fx.Node, int]) -> None:
    first = calls[0]
    for call in calls[1:]:
        for node in _read_later(call, first, order):
            first.prepend(node)
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
