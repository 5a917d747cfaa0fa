"""`fuse-siblings`: lowered layers that read the same input become one call of the operator, which reads it once.

    (q, …) = op(x, [Wq], …);  (k, …) = op(x, [Wk], …)     →     (q, k, …) = op(x, [Wq, Wk], …)

The operator takes lists: `op(x, weights, biases, As, Bs, scales, p, seed)`, and returns the outputs in their order first.
Behind the scales it may have further lists, with an entry for each layer, in place of `p` and `seed`. What computes an
argument, as the ratios of DoRA are computed from weights and factors, moves to the first call with it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import fx

from passes.base import PassResult, Region
from passes.spans import spans

MOST = 3
"""Layers that one call takes: query, key and value."""

_RANDOM = ("drop", "rand", "bernoulli", "normal", "poisson", "multinomial", "exponential")
"""In names of operations that draw numbers: their order is kept."""


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
            _erase_unread_outputs(graph, node)
            rate = None if isinstance(node.args[6], Sequence) else node.args[6]
            group = groups.setdefault((node.args[0], rate, has_bias(node), span_of[node]), [])
            earlier = _made_later(node, group[0], order) if group else []
            if all(_can_move(each, group[0], span_of[each] == span_of[node]) for each in earlier):
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


def has_bias(call: fx.Node) -> bool:
    """Whether the layers of a call have biases; of one call all have, or none: torch has gradients for such lists only."""
    return any(bias is not None for bias in cast("list[Any]", call.args[2]))


def _made_later(call: fx.Node, first: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """What a call needs, but its seed, that is not there yet at an earlier call, in order."""
    read = cast("list[fx.Node]", [])
    arguments = [each for index, each in enumerate(call.args) if index < 6 or isinstance(each, Sequence)]
    fx.map_arg(cast(Any, arguments), read.append)
    found: set[fx.Node] = set()
    while read:
        node = read.pop()
        if order[node] > order[first] and node not in found:
            found.add(node)
            read += node.all_input_nodes
    return sorted(found, key=order.__getitem__)


def _can_move(node: fx.Node, first: fx.Node, same_span: bool) -> bool:
    """Whether a node gives the same before a call: it needs no result of it, and draws no numbers."""
    if node.op in ("get_attr", "call_module"):
        return not node.all_input_nodes
    name = str(getattr(node.target, "__name__", node.target))
    is_random = any(word in name for word in _RANDOM)
    return same_span and first not in node.all_input_nodes and not is_random


def _join(graph: fx.Graph, calls: list[fx.Node], order: dict[fx.Node, int]) -> None:
    first = calls[0]
    for call in calls[1:]:
        for node in _made_later(call, first, order):
            first.prepend(node)
            order[node] = order[first]
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
