"""`draw`: a picture of a graph, from top to bottom, with the inserted nodes in colour. Needs the extra `viz`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import networkx as nx
from torch import fx

from fxlora._passes import lora_meta, target_name

_BASE, _LORA, _EDGE = "#dfe7f1", "#ffd9a8", "#7a8594"


def draw(graph: fx.Graph, path: str | Path, title: str = "") -> Path:
    """Draw a small graph into a file; the suffix decides the format (`.svg`, `.png`, `.pdf`).

    Args:
        graph: the graph; more than about sixty nodes are unreadable.
        path: the file to write.
        title: a line above the picture.

    Returns:
        The path.

    Raises:
        ImportError: when matplotlib is missing; says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fxlora[viz]'") from error
    from matplotlib.figure import Figure

    positions = layout(graph)
    width = 1 + max(x for x, _ in positions.values()) - min(x for x, _ in positions.values())
    height = 1 + max(y for _, y in positions.values())
    with matplotlib.rc_context({"svg.hashsalt": "fxlora", "svg.fonttype": "none"}):
        figure = Figure(figsize=(1.7 * width + 0.4, 0.6 * height + 0.5))
        axes = cast(Any, figure.add_axes((0, 0, 1, 1)))
        axes.set_axis_off()
        axes.set_title(title, y=0.96)
        boxes: dict[fx.Node, Any] = {}
        for node, (x, y) in positions.items():
            colour = _BASE if lora_meta(node) is None else _LORA
            style = dict(boxstyle="round,pad=0.35", facecolor=colour, edgecolor=_EDGE)
            boxes[node] = axes.text(x, -y, _label(node), ha="center", va="center", fontsize=9, bbox=style)
        for source, node in _network(graph).edges:
            ends = dict(patchA=boxes[source].get_bbox_patch(), patchB=boxes[node].get_bbox_patch())
            arrow = dict(arrowstyle="-|>", color=_EDGE, shrinkA=0, shrinkB=1, **ends)
            (x0, y0), (x1, y1) = positions[source], positions[node]
            axes.annotate("", xy=(x1, -y1), xytext=(x0, -y0), arrowprops=arrow)
        low = min(x for x, _ in positions.values())
        axes.set_xlim(low - 0.75, low + width - 0.25)
        axes.set_ylim(-height + 0.3, 0.8)
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None, dpi=120)
    return Path(path)


def layout(graph: fx.Graph) -> dict[fx.Node, tuple[float, float]]:
    """(x, y) of every node that is drawn: y is the length of the longest path to it.

    The base's nodes stand in the first columns, each below its inputs, the branch right of them, and its factors at
    the right edge. Casts are left out, since they do nothing where the dtypes agree.
    """
    network = _network(graph)
    rows: dict[fx.Node, int] = {}
    for node in nx.topological_sort(network):
        rows[node] = 1 + max((rows[source] for source in network.predecessors(node)), default=-1)
    for node in network:  # a factor stands in the row of its user
        if _column(node) == _FACTORS:
            rows[node] = min(rows[user] for user in network.successors(node))
    positions: dict[fx.Node, tuple[float, float]] = {}
    for row in sorted(set(rows.values())):
        taken = -1e9
        members = [node for node in network if rows[node] == row]
        for node in sorted(members, key=_column):
            above = [positions[source][0] for source in network.predecessors(node) if source in positions]
            wish = sum(above) / len(above) if above and _column(node) == 0 else _column(node)
            wish = min(above) if above and _is_sum(node) else wish
            taken = max(wish, taken + 1)
            positions[node] = (taken, row)
    return positions


_FACTORS = 2


def _network(graph: fx.Graph) -> nx.DiGraph[fx.Node]:
    """The graph's nodes without casts, with edges from inputs to users."""
    network: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in graph.nodes:
        if not _is_cast(node):
            network.add_node(node)
            network.add_edges_from((_source(each), node) for each in node.all_input_nodes)
    return network


def _is_cast(node: fx.Node) -> bool:
    meta = lora_meta(node)
    return meta is not None and (meta.role == "dtype" or node.op == "call_method")


def _source(node: fx.Node) -> fx.Node:
    while _is_cast(node):
        node = node.all_input_nodes[0]
    return node


def _is_sum(node: fx.Node) -> bool:
    meta = lora_meta(node)
    return meta is not None and meta.role == "y"


def _column(node: fx.Node) -> int:
    meta = lora_meta(node)
    if meta is None or meta.role == "y":
        return 0
    return _FACTORS if meta.role in ("A", "B", "lora_scaling") else 1


def _label(node: fx.Node) -> str:
    meta = lora_meta(node)
    if meta is not None and meta.role in ("y", "s"):
        return "+" if meta.role == "y" else "×"
    if meta is not None and node.op == "call_function":
        return f"linear ({'·A' if meta.role == 'a' else '·B'})"
    if meta is not None:
        part, adapter = str(node.target).removesuffix(".weight").split(".")[-2:]
        return f"{part}.{adapter}"
    if node.op in ("output", "placeholder"):
        return node.op if node.op == "output" else str(node.target)
    return node.target if isinstance(node.target, str) else target_name(node)
