"""`draw`: a picture of a graph, from top to bottom, with the inserted nodes in colour. Needs the extra `viz`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import networkx as nx
from torch import fx

from fxlora._passes import lora_meta

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
        figure = Figure(figsize=(2.4 * width + 0.6, 0.75 * height + 0.5))
        axes = cast(Any, figure.add_axes((0, 0, 1, 1)))
        axes.set_axis_off()
        axes.set_title(title, y=0.97)
        for node in graph.nodes:
            for source in node.all_input_nodes:
                _arrow(axes, positions[source], positions[node])
        for node, (x, y) in positions.items():
            colour = _BASE if lora_meta(node) is None else _LORA
            box = dict(boxstyle="round,pad=0.35", facecolor=colour, edgecolor=_EDGE)
            axes.text(x, -y, _label(node), ha="center", va="center", fontsize=9, bbox=box)
        low = min(x for x, _ in positions.values())
        axes.set_xlim(low - 0.75, low + width - 0.25)
        axes.set_ylim(-height + 0.3, 0.8)
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None, dpi=120)
    return Path(path)


def layout(graph: fx.Graph) -> dict[fx.Node, tuple[float, float]]:
    """(x, y) of every node: y is the length of the longest path to it, x spreads the nodes of a row.

    A node stands below the middle of its inputs as far as its row allows; the base's nodes stand left of the branch's.
    """
    network: nx.DiGraph[fx.Node] = nx.DiGraph()
    network.add_nodes_from(graph.nodes)
    network.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    rows: dict[fx.Node, int] = {}
    for node in nx.topological_sort(network):
        rows[node] = 1 + max((rows[source] for source in network.predecessors(node)), default=-1)
    for node in reversed(list(graph.nodes)):  # a constant stands right above its first user
        if not node.all_input_nodes and node.op != "placeholder" and node.users:
            rows[node] = min(rows[user] for user in node.users) - 1
    shift = min(rows.values())
    positions: dict[fx.Node, tuple[float, float]] = {}
    for row in sorted(set(rows.values())):
        members = [node for node in graph.nodes if rows[node] == row]
        wish = {node: _wish(node, positions) for node in members}
        members.sort(key=lambda node: wish[node])
        taken = -1e9
        for node in members:
            taken = max(wish[node], taken + 1)
            positions[node] = (taken, row - shift)
    return positions


def _wish(node: fx.Node, positions: dict[fx.Node, tuple[float, float]]) -> float:
    above = [positions[source][0] for source in node.all_input_nodes if source in positions]
    side = 0.0 if lora_meta(node) is None else 1.0
    return sum(above) / len(above) if above and lora_meta(node) is None else max([*above, side])


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = dict(arrowstyle="-|>", color=_EDGE, shrinkA=10, shrinkB=11, connectionstyle="arc3,rad=0.0")
    axes.annotate("", xy=(end[0], -end[1]), xytext=(start[0], -start[1]), arrowprops=style)


def _label(node: fx.Node) -> str:
    meta = lora_meta(node)
    if meta is not None and meta.role == "y":
        return "cast" if node.op == "call_method" else "+"
    if node.op in ("call_function", "call_method") and meta is not None:
        name = getattr(node.target, "__name__", str(node.target))
        return {"getattr": "dtype", "mul": "×", "to": "cast"}.get(name, name)
    if node.op == "output":
        return "output"
    if node.op == "placeholder":
        return str(node.target)
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
