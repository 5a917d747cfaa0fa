"""Questions to a graph of `to_networkx`: what leads to an adapter, what must be passed, what lies between.

Each is a few lines over networkx, with node ids in the graph's own order, and errors that know what was meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

from fxlora._passes import did_you_mean
from fxlora.errors import GraphError
from fxlora.inspect.networkx_graph import NetworkxGraph

_ROOT = object()


@dataclass(frozen=True, slots=True)
class GraphRegion:
    """The part of a graph between two nodes.

    Attributes:
        nodes: ids of all nodes on a path from the one to the other, both included.
        inputs: ids of the nodes outside of it whose results it reads.
        outputs: ids of its nodes whose results are read outside of it; the last node if none is.
    """

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def paths_to(graph: NetworkxGraph, adapter_or_site: str) -> dict[str, list[str]]:
    """A shortest path from an input to each branch of an adapter, or of a site.

    Args:
        graph: a flat graph of `to_networkx`.
        adapter_or_site: an adapter's name, the qualified name of a layer, or a node's id.

    Returns:
        For the last node of each branch the ids of the nodes from an input to it; an empty list where no input leads to
        it. For a layer without a branch, the path to its call.

    Raises:
        GraphError: when nothing has that name; with close matches.
    """
    ends = _ends(graph, adapter_or_site)
    inputs = {node for node, facts in graph.nodes(data=True) if facts.get("role") == "input"}
    paths = nx.multi_source_dijkstra_path(graph, inputs) if inputs else {}
    return {end: paths.get(end, []) for end in ends}


def _ends(graph: NetworkxGraph, name: str) -> list[str]:
    facts = dict(graph.nodes(data=True))
    last = [
        node for node, each in facts.items() if each.get("last") and name in (each.get("adapter"), each.get("site"))
    ]
    calls = [node for node, each in facts.items() if each.get("role") == "base" and each.get("site") == name]
    if last or calls or name in graph:
        return last or ([name] if name in graph else calls)
    known = [str(each[key]) for each in facts.values() for key in ("adapter", "site") if each.get(key)]
    raise GraphError(f"no adapter, layer or node is called '{name}'.{did_you_mean(name, [*known, *graph])}")


def find_node(graph: NetworkxGraph, name: str) -> str:
    """The id of a node, given as such, or as the qualified name of a layer, of which the call is meant.

    Raises:
        GraphError: when there is none, or several; with close matches.
    """
    if name in graph:
        return name
    found = [n for n, each in graph.nodes(data=True) if each.get("role") == "base" and each.get("site") == name]
    found = found or [n for n, each in graph.nodes(data=True) if each.get("qualified_name") == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise GraphError(f"'{name}' is {len(found)} nodes; name one: {', '.join(found[:5])}")
    known = [str(each["site"]) for _, each in graph.nodes(data=True) if each.get("site")]
    raise GraphError(f"no node or layer is called '{name}'.{did_you_mean(name, [*graph, *known])}")


def dominators(graph: NetworkxGraph, node: str) -> list[str]:
    """The nodes that every path from the inputs to a node passes, the nearest to the inputs first, the node last.

    Args:
        graph: a flat graph of `to_networkx`.
        node: a node's id, or the qualified name of a layer.

    Raises:
        GraphError: when there is no such node, or no input leads to it.
    """
    target = find_node(graph, node)
    flow = nx.DiGraph(graph)
    flow.add_edges_from((_ROOT, each) for each, facts in graph.nodes(data=True) if facts.get("role") == "input")
    above = nx.immediate_dominators(flow, _ROOT) if _ROOT in flow else {}
    if target not in above:
        raise GraphError(f"no input leads to '{target}', so that nothing lies on all paths to it")
    found: list[str] = []
    while target is not _ROOT:
        found.insert(0, target)
        target = above[target]
    return found


def region_between(graph: NetworkxGraph, first: str, last: str) -> GraphRegion:
    """What lies between two nodes.

    Args:
        graph: a flat graph of `to_networkx`.
        first: a node's id, or the qualified name of a layer.
        last: likewise, of a node that `first` leads to.

    Raises:
        GraphError: when there is no such node, or no path from the one to the other.
    """
    start, end = find_node(graph, first), find_node(graph, last)
    inside = ({start} | nx.descendants(graph, start)) & ({end} | nx.ancestors(graph, end))
    if not inside:
        raise GraphError(
            f"no path leads from '{start}' to '{end}'"
            + (f"; there is one from '{end}' to '{start}'" if nx.has_path(graph, end, start) else "")
        )
    inputs = {source for node in inside for source in graph.predecessors(node)} - inside
    outputs = {node for node in inside if not inside.issuperset(graph.successors(node))}
    return GraphRegion(_ordered(graph, inside), _ordered(graph, inputs), _ordered(graph, outputs or {end}))


def _ordered(graph: NetworkxGraph, nodes: Iterable[str]) -> tuple[str, ...]:
    chosen = set(nodes)
    return tuple(node for node in graph if node in chosen)


def sites_reachable(graph: NetworkxGraph, parameter: str) -> list[str]:
    """Names of the layers whose calls a parameter has a part in, or comes before.

    Args:
        graph: a flat graph of `to_networkx`.
        parameter: its qualified name.

    Raises:
        GraphError: when no node holds a parameter of that name; with close matches.
    """
    holders = {
        node: str(facts["parameters"]).split() for node, facts in graph.nodes(data=True) if facts.get("parameters")
    }
    starts = [node for node, names in holders.items() if parameter in names]
    if not starts:
        known = [name for names in holders.values() for name in names]
        raise GraphError(f"no node reads a parameter '{parameter}'.{did_you_mean(parameter, known)}")
    reached = set(starts).union(*(nx.descendants(graph, node) for node in starts))
    return list(
        dict.fromkeys(
            str(graph.nodes[node]["site"]) for node in graph if node in reached and "site" in graph.nodes[node]
        )
    )
