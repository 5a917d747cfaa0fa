"""Which node of one graph is which of another, by dataflow and never by names.

Nodes that compute the same from the same inputs are found by interning what they compute. From these anchors the
match spreads to users and arguments, best supported pairs first. It knows nothing of models; `diff` calls it.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, fx

from fxlora._passes import lora_meta

_MOST_USERS = 8
"""Pairs are formed among alike users of a node only up to this many, so that hubs do not make the time quadratic."""
_RIVAL, _OTHER_OPERATION = 0.6, 100.0
"""What a pair loses for having rivals, and for differing in its operation: such pairs are taken only at the end."""
_BEYOND = 0.75
"""What an input counts that agrees beyond a node that was put between."""


@dataclass(eq=False, slots=True)
class Matching:
    """Pairs of nodes of two graphs, both ways.

    Attributes:
        forth: from the first graph's nodes to the second's.
        back: from the second graph's nodes to the first's.
        values: of the nodes of both: equal numbers where equal things are computed of equal inputs.
    """

    forth: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    back: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    values: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])

    def agree(self, p: object, q: object) -> bool:
        """Whether an argument of the first graph and one of the second are the same."""
        if isinstance(p, fx.Node) and isinstance(q, fx.Node):
            return self.forth.get(p) is q or self.values[p] == self.values[q]
        return not isinstance(p, fx.Node) and not isinstance(q, fx.Node)

    def mirrored(self) -> Matching:
        """The same, from the second graph to the first."""
        return Matching(self.back, self.forth, self.values)


@dataclass(eq=False, slots=True)
class Facts:
    """A graph's nodes with what the match asks of them."""

    order: dict[fx.Node, int]
    labels: dict[fx.Node, tuple[Any, ...]]
    inputs: dict[fx.Node, list[fx.Node]]
    bases: dict[fx.Node, fx.Node]
    """From the result of a site with branches to the base's own output there."""
    results: dict[fx.Node, fx.Node]
    """The other way."""
    sites: set[str]

    @classmethod
    def of(cls, graph: fx.Graph, *, by_position: bool) -> Facts:
        """Read a graph. `by_position`: inputs are known by their position, not by the names of arguments."""
        nodes = list(graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        position = {node: index for index, node in enumerate(placeholders)}
        labels = {node: _label(node, position[node] if by_position and node in position else None) for node in nodes}
        metas = [meta for meta in map(lora_meta, nodes) if meta is not None]
        bases = base_outputs(graph)
        return cls(
            {node: i for i, node in enumerate(nodes)},
            labels,
            {node: inputs_of(node) for node in nodes},
            bases,
            {base: result for result, base in bases.items()},
            {meta.site for meta in metas},
        )


def base_outputs(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """From each site's result, the last of its nodes of role `y`, to the base's own output."""
    found: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        meta = lora_meta(node)
        if meta is None or meta.role != "y" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        base = found.pop(node.args[0], node.args[0])
        found[node], last[base] = base, node
    return {node: base for node, base in found.items() if last[base] is node}


def match(a: fx.Graph, b: fx.Graph) -> Matching:
    """Find which node is which. `match(b, a)` is the mirror of `match(a, b)`.

    Args:
        a: a graph; not changed.
        b: another.
    """
    inputs = [sum(node.op == "placeholder" for node in graph.nodes) for graph in (a, b)]
    first, second = (Facts.of(graph, by_position=inputs[0] == inputs[1]) for graph in (a, b))
    keys = [(len(facts.order), [repr(label) for label in facts.labels.values()]) for facts in (first, second)]
    if keys[1] < keys[0]:
        return _Matcher(second, first).run().mirrored()
    return _Matcher(first, second).run()


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, in their order, each as often as it is one."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda each: found.append(each))
    return found


def constants(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a node that are no nodes, with the places of those that are."""
    return (_constant(node.args), _constant(node.kwargs))


def _constant(value: object) -> Any:
    if isinstance(value, fx.Node):
        return "node"
    if isinstance(value, (list, tuple)):
        return ("sequence", *(_constant(each) for each in cast("list[object]", value)))
    if isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        return ("dict", *((str(key), _constant(each)) for key, each in items))
    if isinstance(value, slice):
        return ("slice", *(_constant(each) for each in (value.start, value.stop, value.step)))
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype))
    return (type(value).__name__, repr(value))


def _label(node: fx.Node, position: int | None) -> tuple[Any, ...]:
    if node.op == "output":
        return ("output",)
    target = position if position is not None else node.target
    what = target if isinstance(target, (str, int)) else f"{getattr(target, '__module__', '')}.{target_text(target)}"
    return (node.op, what, constants(node))


def target_text(target: object) -> str:
    """A call's target as text without addresses."""
    text = str(target)
    return str(getattr(target, "__qualname__", getattr(target, "__name__", ""))) if " at 0x" in text else text


class _Matcher:
    def __init__(self, a: Facts, b: Facts) -> None:
        self._a, self._b = a, b
        self._result = Matching()
        self._heap: list[tuple[float, int, int, fx.Node, fx.Node]] = []
        self._rivals: tuple[dict[fx.Node, set[fx.Node]], dict[fx.Node, set[fx.Node]]] = ({}, {})

    def run(self) -> Matching:
        self._intern()
        anchors = list(self._anchors())
        for p, q in anchors:
            self._take(p, q)
        for p, q in anchors:
            self._propose_around(p, q)
        while self._heap:
            priority, _, _, p, q = heapq.heappop(self._heap)
            if p in self._result.forth or q in self._result.back:
                continue
            now = self._priority(p, q)
            if now is None:
                continue
            if -now > priority + 1e-9:
                self._push(p, q, now)
                continue
            self._take(p, q)
            self._propose_around(p, q)
        return self._result

    def _intern(self) -> None:
        """Give equal numbers to nodes of equal operation, constants and inputs, transitively."""
        numbers: dict[tuple[Any, ...], int] = {}
        values = self._result.values
        for facts in (self._a, self._b):
            for node in facts.order:
                key = (facts.labels[node], tuple(values[each] for each in facts.inputs[node]))
                values[node] = numbers.setdefault(key, len(numbers))

    def _anchors(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        alike: dict[int, tuple[list[fx.Node], list[fx.Node]]] = {}
        for side, facts in enumerate((self._a, self._b)):
            for node in facts.order:
                if node.op != "output":
                    alike.setdefault(self._result.values[node], ([], []))[side].append(node)
        for one, other in alike.values():
            if len(one) == len(other):
                yield from zip(one, other, strict=True)
            elif one and other and len(one) * len(other) > _MOST_USERS**2:
                yield from zip(one, other, strict=False)
            else:
                for p in one:
                    for q in other:
                        self._propose(p, q)
        yield next(reversed(self._a.order)), next(reversed(self._b.order))

    def _take(self, p: fx.Node, q: fx.Node) -> None:
        self._result.forth[p], self._result.back[q] = q, p
        for mine, theirs, node in ((0, 1, p), (1, 0, q)):
            for other in self._rivals[mine].pop(node, ()):
                self._rivals[theirs].get(other, set()).discard(node)

    def _propose_around(self, p: fx.Node, q: fx.Node) -> None:
        for one, other in zip(self._a.inputs[p], self._b.inputs[q], strict=False):
            self._propose(one, other)
        groups: dict[tuple[Any, ...], tuple[list[fx.Node], list[fx.Node]]] = {}
        sides = ((p, self._a, self._result.forth), (q, self._b, self._result.back))
        for side, (node, facts, done) in enumerate(sides):
            for user, place in _users(node, facts, done):
                groups.setdefault((facts.labels[user], place), ([], []))[side].append(user)
                groups.setdefault(("any", place), ([], []))[side].append(user)
        for one, other in groups.values():
            if len(one) <= _MOST_USERS and len(other) <= _MOST_USERS:
                for each in one:
                    for candidate in other:
                        self._propose(each, candidate)

    def _propose(self, p: fx.Node, q: fx.Node) -> None:
        if p in self._result.forth or q in self._result.back:
            return
        self._rivals[0].setdefault(p, set()).add(q)
        self._rivals[1].setdefault(q, set()).add(p)
        priority = self._priority(p, q)
        if priority is None:
            self._rivals[0][p].discard(q)
            self._rivals[1][q].discard(p)
        else:
            self._push(p, q, priority)

    def _push(self, p: fx.Node, q: fx.Node, priority: float) -> None:
        i, j = self._a.order[p], self._b.order[q]
        heapq.heappush(self._heap, (-priority, i + j, i, p, q))

    def _priority(self, p: fx.Node, q: fx.Node) -> float | None:
        """How well a pair is supported by what is matched around it; None if it cannot be one."""
        if p.op != q.op and (p.op.startswith("call") != q.op.startswith("call")):
            return None
        if (lora_meta(p) is None) != (lora_meta(q) is None) or "placeholder" in (p.op, q.op):
            return None
        if not self._of_one_site(p, q):
            return None
        agreeing, conflicting = self._around(p, q)
        users = self._users_agreeing(p, q)
        same = self._a.labels[p] == self._b.labels[q]
        fewest = max(len(self._a.inputs[p]), len(self._b.inputs[q]))
        if p.target == q.target and agreeing and users:
            fewest = 0
        if not same and fewest and (agreeing < fewest or not agreeing):
            return None
        if not agreeing and not users:
            return None if self._result.values[p] != self._result.values[q] else 1.0
        rivals = max(len(self._rivals[0].get(p, ())), len(self._rivals[1].get(q, ()))) > 1
        return agreeing + users - 0.5 * conflicting - _RIVAL * rivals - (0 if same else _OTHER_OPERATION)

    def _of_one_site(self, p: fx.Node, q: fx.Node) -> bool:
        """False for branches' nodes of two sites that both graphs have, or of two roles."""
        one, other = lora_meta(p), lora_meta(q)
        if one is None or other is None:
            return True
        known = one.site in self._b.sites or other.site in self._a.sites
        return one.role == other.role and (not known or (one.site, one.call) == (other.site, other.call))

    def _around(self, p: fx.Node, q: fx.Node) -> tuple[float, int]:
        """How many inputs agree, those beyond an inserted node for a part; how many cannot."""
        agreeing, conflicting = 0.0, 0
        for one, other in zip(self._a.inputs[p], self._b.inputs[q], strict=False):
            if self._result.agree(one, other):
                agreeing += 1
            elif self._agree_beyond(one, other):
                agreeing += _BEYOND
            elif one in self._result.forth or other in self._result.back:
                conflicting += 1
        return agreeing, conflicting

    def _agree_beyond(self, one: fx.Node, other: fx.Node) -> bool:
        beyond = _beyond(one, self._a, self._result.forth), _beyond(other, self._b, self._result.back)
        return any(self._result.agree(p, other) for p in beyond[0]) or any(
            self._result.agree(one, q) for q in beyond[1]
        )

    def _users_agreeing(self, p: fx.Node, q: fx.Node) -> int:
        count = 0
        for user in list(p.users)[:_MOST_USERS]:
            other = self._result.forth.get(user)
            if other is not None and set(_places(self._a.inputs[user], p)) & set(_places(self._b.inputs[other], q)):
                count += 1
        return min(count, 2)


def _beyond(node: fx.Node, facts: Facts, done: Container[fx.Node]) -> list[fx.Node]:
    """What a node stands for if it was put between: the base's output of a site, the inputs of a node without a match."""
    if node in facts.bases:
        return [facts.bases[node]]
    return [] if node in done else facts.inputs[node]


def _users(node: fx.Node, facts: Facts, done: Container[fx.Node]) -> Iterator[tuple[fx.Node, int]]:
    """Users of a node without a match, and those of what may have been put between, each with the place of use."""
    between = [facts.results[node]] if node in facts.results else []
    if len(node.users) <= _MOST_USERS:
        between += [user for user in node.users if user not in done and lora_meta(user) is None]
    for source in (node, *between):
        for user in source.users:
            if user not in done:
                for place in _places(facts.inputs[user], source):
                    yield user, place


def _places(inputs: list[fx.Node], node: fx.Node) -> list[int]:
    return [index for index, each in enumerate(inputs) if each is node]
