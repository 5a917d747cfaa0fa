"""`diff`: what is another in a second graph or model: inserted, removed, rewired, changed nodes, grouped by site.

Nothing is run and nothing is changed; the models may be on the meta device. Weights' values are not looked at:
`compare` does that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor, fx, nn

from fxlora._passes import SELF_CALL, lora_meta, resolve, target_name
from fxlora.inspect.counterparts import Pair, Side, paired_regions
from fxlora.inspect.matching import Matching, constants, inputs_of, match, target_text
from fxlora.rendering import Rendered, Section, json_data

What = Literal["inserted", "removed", "rewired", "changed"]
_SIGNS: dict[What, str] = {"inserted": "+", "removed": "-", "rewired": "~", "changed": "!"}


@dataclass(frozen=True, slots=True)
class NodeChange:
    """One node that differs, in one graph.

    Attributes:
        what: `inserted` and `removed`: only in the second, only in the first graph; `rewired`: the same operation with
            other arguments; `changed`: the same arguments, with another operation, constant, or shape of what it reads.
        before: the node's name in the first graph; empty if it is inserted.
        after: the node's name in the second graph; empty if it is removed.
        operation: what the node does, in a word.
        detail: what is another.
        site: the call site that it belongs to, else the module; empty where neither is known.
        role: its role in a branch; empty for nodes of the base.
        region: which of a model's graphs, for models that have several.
    """

    what: What
    before: str
    after: str
    operation: str
    detail: str
    site: str
    role: str = ""
    region: str = ""


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites that differ alike, and what differs at each."""

    pattern: str
    sites: tuple[str, ...]
    counts: dict[What, int]
    operations: dict[str, int]

    def __str__(self) -> str:
        """One line: `24 sites: +4 nodes each`."""
        counts = [f"{_SIGNS[what]}{number} {what}" for what, number in self.counts.items()]
        each = " each" if len(self.sites) > 1 else ""
        what = ", ".join(f"{name}×{number}" if number > 1 else name for name, number in self.operations.items())
        where = f"{len(self.sites)} sites" if len(self.sites) > 1 else "1 site"
        return f"{where}: {', '.join(counts)}{each}  {self.pattern or '(no site)'}  [{what}]"


@dataclass(frozen=True, slots=True)
class GraphDiff(Rendered):
    """What differs between two graphs or models.

    Attributes:
        changes: each change once for each site that has it, in the order of the graphs.
        equal: number of nodes that are the same in both.
    """

    changes: tuple[NodeChange, ...]
    equal: int

    @property
    def is_empty(self) -> bool:
        """Whether there is no difference."""
        return not self.changes

    def of(self, what: What) -> list[NodeChange]:
        """The changes of one kind."""
        return [change for change in self.changes if change.what == what]

    @property
    def inserted(self) -> list[NodeChange]:
        """Nodes that only the second has."""
        return self.of("inserted")

    @property
    def removed(self) -> list[NodeChange]:
        """Nodes that only the first has."""
        return self.of("removed")

    @property
    def rewired(self) -> list[NodeChange]:
        """Nodes with other arguments."""
        return self.of("rewired")

    @property
    def changed(self) -> list[NodeChange]:
        """Nodes with another operation, constant or shape."""
        return self.of("changed")

    def groups(self) -> list[SiteGroup]:
        """The changes by site; sites that differ only in the numbers in their names, and differ alike, as one."""
        by_site: dict[tuple[str, str], list[NodeChange]] = {}
        for change in self.changes:
            by_site.setdefault((change.region, change.site), []).append(change)
        alike: dict[tuple[Any, ...], list[str]] = {}
        first: dict[tuple[Any, ...], list[NodeChange]] = {}
        for (region, site), changes in by_site.items():
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site)
            counted = Counter((change.what, change.operation, change.role) for change in changes)
            key = (region, pattern, tuple(sorted(counted.items())))
            alike.setdefault(key, []).append(site)
            first.setdefault(key, changes)
        return [
            SiteGroup(
                _pattern(sites),
                tuple(sites),
                {what: n for what in _SIGNS if (n := sum(change.what == what for change in first[key]))},
                dict(Counter(change.operation for change in first[key])),
            )
            for key, sites in alike.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All changes and groups, for JSON."""
        figures = {
            "is_empty": self.is_empty,
            "equal": self.equal,
            **{what: len(self.of(what)) for what in _SIGNS},
            "groups": [asdict(group) for group in self.groups()],
            "changes": [asdict(change) for change in self.changes],
        }
        return json_data(figures)

    def summary(self) -> str:
        """The totals in a sentence."""
        if self.is_empty:
            return f"no difference: {self.equal:,} nodes are the same"
        counts = ", ".join(f"{len(self.of(what)):,} {what}" for what in _SIGNS if self.of(what))
        return f"{counts}; {self.equal:,} nodes are the same"

    def __str__(self) -> str:
        """A line for each group of sites, the details of what is rewired or changed, and the totals."""
        if self.is_empty:
            return self.summary()
        return "\n".join([*map(str, self.groups()), *self._details(), self.summary()])

    def _details(self) -> list[str]:
        """What is rewired or changed, alike things once."""
        details = Counter(
            f"  {_SIGNS[change.what]} {change.operation}: {_general(change)}"
            for change in self.changes
            if change.what in ("rewired", "changed")
        )
        shown = [f"{line}" + (f"  ({n} times)" if n > 1 else "") for line, n in details.most_common(_MOST_DETAILS)]
        more = [f"  and {len(details) - _MOST_DETAILS} more kinds"] if len(details) > _MOST_DETAILS else []
        return [*shown, *more]

    def sections(self) -> list[Section]:
        """The groups as a table, the details, and the totals."""
        rows = [
            (
                group.pattern or "(no site)",
                str(len(group.sites)),
                *(str(group.counts.get(what, "")) for what in _SIGNS),
                ", ".join(group.operations),
            )
            for group in self.groups()
        ]
        header = ("site", "sites", *_SIGNS, "operations")
        numbers = tuple(range(1, 2 + len(_SIGNS)))
        lines = (*self._details(), self.summary())
        return [Section(header=header, rows=tuple(rows), right=numbers, lines=lines)]


_MOST_DETAILS = 12


def _pattern(sites: list[str]) -> str:
    """The sites' names as one, with a star for each part in which they differ."""
    columns = zip(*(site.split(".") for site in sites), strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def _general(change: NodeChange) -> str:
    """The detail without what differs from layer to layer."""
    text = re.sub(r"(?<=\.)\d+(?=\.)", "*", change.detail)
    return re.sub(r"_\d+(?=[_ ),]|$)", "", text) if change.what == "rewired" else text


def diff(a: object, b: object) -> GraphDiff:
    """Say what differs from one graph or model to another, whatever the nodes are called.

    Args:
        a: an `fx.Graph`, an `fx.GraphModule`, a model (with LoRA or without), or regions, such as a stage's.
        b: another. Two graphs are matched as they are; of two models each graph is matched with the one that stands for
            the same modules, where the model without LoRA has the plain call.

    Returns:
        The difference. `diff(b, a)` is its mirror.

    Raises:
        ConfigError: when one is a whole graph and the other a model without one.

    Example:
        >>> import torch
        >>> import fxlora
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> one = fxlora.lora_transform(make(), fxlora.LoraConfig(target_modules=["0"]))
        >>> two = fxlora.lora_transform(make(), fxlora.LoraConfig(target_modules=["0", "2"]))
        >>> fxlora.diff(one, two).summary()
        '12 inserted, 1 rewired; 16 nodes are the same'
    """
    return diff_of(paired_regions(a, b))


def diff_of(pairs: Iterable[Pair]) -> GraphDiff:
    """The difference between graphs in pairs."""
    changes: list[NodeChange] = []
    equal = 0
    for pair in pairs:
        matching = match(pair.a.graph, pair.b.graph)
        for name in pair.names:
            sides = pair.a.of(name), pair.b.of(name)
            found = [_at(change, name) for change in _changes(matching, *sides, pair.mode)]
            changes += found
            equal += len(list(pair.b.graph.nodes)) - sum(change.what != "removed" for change in found)
    return GraphDiff(tuple(changes), equal)


def _at(change: NodeChange, name: str) -> NodeChange:
    return replace(change, site=".".join(part for part in (name, change.site) if part)) if name else change


def _changes(matching: Matching, a: Side, b: Side, mode: str) -> Iterator[NodeChange]:
    for q in b.graph.nodes:
        p = matching.back.get(q)
        if p is None:
            yield _change("inserted", None, q, _right(q), mode)
            continue
        rewired = _rewired(matching, p, q)
        difference = _difference(p, q, rewired, a, b)
        if difference is not None:
            change = _change(difference[0], p, q, difference[1], mode)
            yield replace(change, site=site_of_change(p, q, rewired))
    for p in a.graph.nodes:
        if p not in matching.forth:
            yield _change("removed", p, None, _right(p), mode)


def _change(what: What, p: fx.Node | None, q: fx.Node | None, detail: str, mode: str) -> NodeChange:
    node = cast(fx.Node, p if q is None else q)
    meta = lora_meta(node)
    role = meta.role if meta else ""
    names = [each.name if each is not None else "" for each in (p, q)]
    return NodeChange(what, names[0], names[1], target_name(node), detail, site_of(node), role, mode)


def site_of(node: fx.Node) -> str:
    """The call site of an inserted node, else the module that a node is from; empty if neither is known."""
    meta = lora_meta(node)
    if meta is not None:
        return meta.site
    if node.op in ("call_module", "get_attr"):
        target = cast(str, node.target)
        return "" if target == SELF_CALL else target if node.op == "call_module" else target.rpartition(".")[0]
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    last = list(stack.values())[-1]
    path = str(cast("tuple[object, ...]", last)[0] if isinstance(last, tuple) else last)
    return re.sub(r"^L\['self'\]\.?", "", path)


def site_of_change(p: fx.Node, q: fx.Node, rewired: Iterable[tuple[fx.Node, fx.Node]]) -> str:
    """The site that a difference between two nodes belongs to.

    Args:
        p: a node of the first graph.
        q: its match.
        rewired: the inputs in which they differ; for nodes of the base, a branch's result among them tells the site.
    """
    if lora_meta(p) is None and lora_meta(q) is None:
        sites = [meta.site for pair in rewired for node in pair if (meta := lora_meta(node)) is not None]
        if sites:
            return sites[0]
    return site_of(q) or site_of(p)


def _rewired(matching: Matching, p: fx.Node, q: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The inputs of two nodes that do not match each other, where they have equally many."""
    inputs = inputs_of(p), inputs_of(q)
    if len(inputs[0]) != len(inputs[1]):
        return []
    return [(one, other) for one, other in zip(*inputs, strict=True) if not matching.agree(one, other)]


def _difference(
    p: fx.Node, q: fx.Node, rewired: list[tuple[fx.Node, fx.Node]], a: Side, b: Side
) -> tuple[Literal["rewired", "changed"], str] | None:
    """What is another between two matched nodes; None if nothing is."""
    if p.op != q.op or (p.op not in ("placeholder", "output") and target_text(p.target) != target_text(q.target)):
        return "changed", f"{_right(p)} → {_right(q)}"
    inputs = inputs_of(p), inputs_of(q)
    if rewired:
        one, other = rewired[0]
        index = list(zip(*inputs, strict=True)).index((one, other))
        return "rewired", f"input {index}: {one.name} → {other.name}"
    if constants(p) != constants(q):
        what = "rewired" if len(inputs[0]) != len(inputs[1]) else "changed"
        return what, f"{_right(p)} → {_right(q)}"
    if a.module is None or b.module is None:
        return None
    facts = _facts(p, a.module), _facts(q, b.module)
    return ("changed", f"{p.target}: {facts[0]} → {facts[1]}") if facts[0] != facts[1] else None


def _facts(node: fx.Node, module: nn.Module) -> str:
    """What is known of a module or tensor that a node reads, but its values."""
    if node.op not in ("call_module", "get_attr"):
        return ""
    try:
        value = resolve(module, cast(str, node.target))
    except AttributeError:
        return "missing"
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, nn.Module):
        cls = getattr(type(value), "_site_base", type(value))
        own = {name: f"{tuple(each.shape)} {each.dtype}" for name, each in value.named_parameters(recurse=False)}
        own = {name: text for name, text in own.items() if node.target != SELF_CALL or name in ("weight", "bias")}
        return f"{cls.__name__}({value.extra_repr()}) {own or ''}".strip()
    return type(value).__name__


def _right(node: fx.Node) -> str:
    """A node's operation and arguments, shortly."""
    if node.op in ("placeholder", "output"):
        return node.op
    if node.op == "get_attr":
        return f"self.{node.target}"
    arguments = [*map(_text, node.args), *(f"{name}={_text(value)}" for name, value in node.kwargs.items())]
    name = f"self.{node.target}" if node.op == "call_module" else target_name(node)
    return f"{name}({', '.join(arguments)})"


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(each) for each in cast('Sequence[object]', value))}]"
    return value.name if isinstance(value, fx.Node) else str(value)[:60]
