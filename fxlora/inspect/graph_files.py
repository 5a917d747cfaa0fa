"""Graphs of `to_networkx` as files, and in a few lines for people."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx

from fxlora.errors import GraphError
from fxlora.inspect.networkx_graph import NetworkxGraph


def write_graph(graph: NetworkxGraph, path: str | Path) -> Path:
    """Write a graph of `to_networkx`; the same graph gives the same bytes.

    Args:
        graph: flat or of modules.
        path: ends in `.graphml` (Gephi, yEd, Cytoscape, igraph), or in `.json` for the node-link form that
            `networkx.node_link_graph(data, edges="edges")` and d3 read.

    Returns:
        The path.

    Raises:
        GraphError: for another suffix.
    """
    path = Path(path)
    if path.suffix == ".json":
        text = json.dumps(node_link(graph), ensure_ascii=False, separators=(",", ":")) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")
    elif path.suffix == ".graphml":
        buffer = io.BytesIO()
        nx.write_graphml_xml(graph, buffer)
        path.write_bytes(buffer.getvalue())
    else:
        raise GraphError(f"'{path.name}' should end in .graphml or .json, which says what to write")
    return path


def node_link(graph: NetworkxGraph) -> dict[str, Any]:
    """The graph as networkx's node-link data, in the graph's own order."""
    edges = graph.edges(keys=True, data=True)
    return {
        "directed": True,
        "multigraph": True,
        "graph": dict(graph.graph),
        "nodes": [{"id": node, **facts} for node, facts in graph.nodes(data=True)],
        "edges": [{"source": a, "target": b, "key": key, **facts} for a, b, key, facts in edges],
    }


def describe_graph(graph: NetworkxGraph) -> str:
    """What a graph is made of: a line of totals, then the nodes of each role, or the modules, with their numbers."""
    totals = f"{graph.number_of_nodes():,} nodes, {graph.number_of_edges():,} edges"
    facts = [each for _, each in graph.nodes(data=True)]
    if graph.graph["level"] == "modules":
        columns = ("nodes", "sites", "parameters", "trainable", "flops")
        rows = [("module", *columns)]
        rows += [(node, *(_number(each[key]) for key in columns)) for node, each in graph.nodes(data=True)]
        return "\n".join([totals, "", *_table(rows)])
    sites = {each["site"] for each in facts if each.get("adapter")}
    calls = sum(1 for each in facts if each["role"] == "base" and "site" in each)
    roles = Counter(str(each["role"]) for each in facts)
    flops: Counter[str] = Counter()
    for each in facts:
        flops[str(each["role"])] += each.get("flops", 0)
    rows = [("role", "nodes", "FLOPs" if any(flops.values()) else "")]
    rows += [(role, _number(count), _number(flops[role])) for role, count in roles.most_common()]
    return "\n".join([f"{totals}; {calls} calls of layers, {len(sites)} layers with LoRA", "", *_table(rows)])


def _number(value: int) -> str:
    return f"{value:,}" if value else ""


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
