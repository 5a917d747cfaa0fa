"""What a picture of a graph of `to_networkx` shows: boxes and arrows, few enough to be read.

Knows nothing of how they are drawn; `dot` writes them as DOT and as SVG.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import networkx as nx

from fxlora.errors import GraphError
from fxlora.inspect.networkx_graph import NetworkxGraph
from fxlora.inspect.queries import find_node

Collapse = Literal["auto", "modules"] | None
Colour = Literal["base", "lora", "end"]

MOST_BOXES = 60
"""More than these are unreadable: modules are collapsed until there are no more."""


@dataclass(frozen=True, slots=True)
class Box:
    """A node or a module: its lines of text, what it is, and the module in whose frame it stands."""

    lines: tuple[str, ...]
    colour: Colour
    frame: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """Boxes by id, in the order in which they are computed, and the number of values on each arrow."""

    boxes: dict[str, Box]
    arrows: dict[tuple[str, str], int]


def picture_of(graph: NetworkxGraph, around: str | None, depth: int, collapse: Collapse) -> Picture:
    """Choose what is drawn; arguments as for `to_dot`."""
    if graph.graph.get("level") != "flat":
        raise GraphError("a picture is made from a flat graph: to_networkx(model), whose modules it collapses itself")
    if collapse not in ("auto", "modules", None):
        raise GraphError(f"`collapse` should be 'auto', 'modules' or None, not {collapse!r}")
    if depth < 0:
        raise GraphError(f"`depth` is a number of arrows from '{around}', and cannot be {depth}")
    chosen = None if around is None else _centres(graph, around)
    if collapse == "modules" or (collapse == "auto" and around is None):
        drawn, owner = _collapsed(graph)
        centres = None if chosen is None else {owner[node] for node in chosen}
    else:
        drawn, centres = _nodes(graph), chosen
    return drawn if centres is None else _near(drawn, centres, depth)


def _centres(graph: NetworkxGraph, name: str) -> set[str]:
    """The nodes that a name means: one by its id, all of a layer, or all in a module."""
    if name in graph:
        return {name}
    nodes = graph.nodes(data=True)
    found = {node for node, facts in nodes if facts.get("site") == name}
    found = found or {node for node, facts in nodes if f"{facts['module']}.".startswith(f"{name}.")}
    return found or {find_node(graph, name)}


def _nodes(graph: NetworkxGraph) -> Picture:
    boxes = {
        node: Box(_node_lines(facts), _colour(facts), str(facts["module"])) for node, facts in graph.nodes(data=True)
    }
    arrows: dict[tuple[str, str], int] = {}
    for source, target in graph.edges():
        arrows[source, target] = arrows.get((source, target), 0) + 1
    return Picture(boxes, arrows)


def _colour(facts: dict[str, str | int]) -> Colour:
    if facts["role"] in ("input", "output"):
        return "end"
    return "base" if facts["role"] in ("base", "parameter", "buffer") else "lora"


def _node_lines(facts: dict[str, str | int]) -> tuple[str, ...]:
    target = str(facts["target"])
    what = target if facts["op"] in ("placeholder", "call_method", "output") else short_target(target, str(facts["op"]))
    role = str(facts["role"])
    adapter = f" ({facts['adapter']})" if "adapter" in facts else ""
    first = what if role in ("base", "parameter", "buffer", "input", "output") else f"{role}: {what}{adapter}"
    size = f"{facts['dtype']} {facts['shape']}" if "shape" in facts else ""
    return (first, size) if size else (first,)


def short_target(target: str, op: str) -> str:
    """The end of a target: `aten.linear.default` and `torch._C._nn.linear` are `linear`."""
    if op == "call_function":
        parts = target.split(".")
        return parts[1] if parts[0] == "aten" and len(parts) > 1 else parts[-1]
    return ".".join(target.split(".")[-2:])


def _collapsed(graph: NetworkxGraph) -> tuple[Picture, dict[str, str]]:
    """A box for each module, as deep in the tree as there is room for, and the box of each node."""
    facts = dict(graph.nodes(data=True))
    deepest = max((str(each["module"]).count(".") + 1 for each in facts.values()), default=1)
    owner: dict[str, str] = {}
    for depth in range(deepest, 0, -1):
        owner = {node: _box_of(node, each, depth) for node, each in facts.items()}
        if len(set(owner.values())) <= MOST_BOXES:
            break
    members: dict[str, list[str]] = {}
    for node, box in owner.items():
        members.setdefault(box, []).append(node)
    boxes = {box: _module_box(box, [facts[node] for node in nodes]) for box, nodes in members.items()}
    arrows: dict[tuple[str, str], int] = {}
    for source, target in graph.edges():
        ends = owner[source], owner[target]
        if ends[0] != ends[1]:
            arrows[ends] = arrows.get(ends, 0) + 1
    return Picture(boxes, arrows), owner


def _box_of(node: str, facts: dict[str, str | int], depth: int) -> str:
    if facts["role"] in ("input", "output") and not facts["module"]:
        return node
    return ".".join(str(facts["module"]).split(".")[:depth]) or "(model)"


def _module_box(name: str, facts: list[dict[str, str | int]]) -> Box:
    if len(facts) == 1 and facts[0]["role"] in ("input", "output"):
        return Box(_node_lines(facts[0]), "end")
    lines = [name, f"{len(facts)} node{'s' * (len(facts) > 1)}"]
    adapters = dict.fromkeys(str(each["adapter"]) for each in facts if "adapter" in each)
    sites = {each["site"] for each in facts if "adapter" in each}
    if sites:
        at = "" if len(sites) == 1 else f" at {len(sites)} layers"
        lines.append(f"LoRA {', '.join(adapters)}{at}")
    return Box(tuple(lines), "lora" if sites else "base")


def _near(drawn: Picture, centres: set[str], depth: int) -> Picture:
    """What is at most so many arrows from the centres, along or against them."""
    flow = nx.Graph(list(drawn.arrows))
    flow.add_nodes_from(drawn.boxes)
    near = set(centres)
    for _ in range(depth):
        near |= {each for box in near for each in flow[box]}
    boxes = {box: each for box, each in drawn.boxes.items() if box in near}
    return Picture(boxes, {ends: count for ends, count in drawn.arrows.items() if near.issuperset(ends)})
