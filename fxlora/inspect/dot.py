"""`to_dot` and `to_svg`: a readable picture of a graph of `to_networkx`, as text that needs no other program."""

from __future__ import annotations

import json
from html import escape

from fxlora.inspect.boxes import Box, Collapse, Picture, picture_of
from fxlora.inspect.networkx_graph import NetworkxGraph

_COLOURS = {"base": "#dfe7f1", "lora": "#ffd9a8", "end": "#ffffff"}
_LINE = "#7a8594"


def to_dot(graph: NetworkxGraph, *, around: str | None = None, depth: int = 2, collapse: Collapse = "auto") -> str:
    """A picture as DOT, for graphviz and what else reads it. LoRA's boxes are orange.

    Args:
        graph: a flat graph of `to_networkx`.
        around: draw only what is near this: a node's id, or the qualified name of a layer or module.
        depth: how many arrows away from `around`, along or against them.
        collapse: `"modules"` makes one box of each module, as deep in the tree as 60 boxes allow; None draws every node,
            in a frame for each module. `"auto"` collapses a whole graph, and not a neighbourhood.

    Returns:
        The text, the same for the same graph.

    Raises:
        GraphError: when nothing is called `around`; with close matches.
    """
    picture = picture_of(graph, around, depth, collapse)
    lines = [
        "digraph fxlora {",
        f'  node [shape=box, style="rounded,filled", fontname="sans-serif", fontsize=10, color="{_LINE}"];',
        f'  edge [color="{_LINE}", fontname="sans-serif", fontsize=9];',
    ]
    frames: dict[str, list[str]] = {}
    for name, box in picture.boxes.items():
        frames.setdefault(box.frame, []).append(name)
    for number, (frame, names) in enumerate(frames.items()):
        margin = "    " if frame else "  "
        if frame:
            lines += [f"  subgraph cluster_{number} {{", f'    label={_quoted(frame)}; color="{_LINE}"; fontsize=10;']
        lines += [margin + _dot_box(name, picture.boxes[name]) for name in names]
        lines += ["  }"] if frame else []
    for (source, target), count in picture.arrows.items():
        label = f" [label={count}]" if count > 1 else ""
        lines.append(f"  {_quoted(source)} -> {_quoted(target)}{label};")
    return "\n".join([*lines, "}", ""])


def _dot_box(name: str, box: Box) -> str:
    return f'{_quoted(name)} [label={_quoted(chr(10).join(box.lines))}, fillcolor="{_COLOURS[box.colour]}"];'


def _quoted(text: str) -> str:
    """A DOT string, which escapes as JSON does for what occurs here."""
    return json.dumps(text, ensure_ascii=False)


_CHARACTER, _TEXT_LINE, _GAP, _ROW_GAP = 6.2, 13, 18, 34


def to_svg(graph: NetworkxGraph, *, around: str | None = None, depth: int = 2, collapse: Collapse = "auto") -> str:
    """The same picture as SVG, from top to bottom in the order of computation; arguments as for `to_dot`."""
    picture = picture_of(graph, around, depth, collapse)
    places = _places(picture)
    width = max((x + w / 2 for x, _, w, _ in places.values()), default=0) + _GAP
    height = max((y + h for _, y, _, h in places.values()), default=0) + _GAP
    size = f'width="{width:.0f}" height="{height:.0f}"'
    font = 'font-family="sans-serif" font-size="10" text-anchor="middle"'
    tip = f'<path d="M0 0 8 4 0 8z" fill="{_LINE}"/>'
    marker = 'id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        f"<defs><marker {marker}>{tip}</marker></defs>",
    ]
    for source, target in picture.arrows:
        (x0, y0, _, h0), (x1, y1, _, h1) = places[source], places[target]
        start, end = (y0 + h0, y1) if y1 > y0 else (y0, y1 + h1)
        bend = (start + end) / 2
        path = f"M{x0:.0f} {start:.0f}C{x0:.0f} {bend:.0f} {x1:.0f} {bend:.0f} {x1:.0f} {end:.0f}"
        lines.append(f'<path d="{path}" fill="none" stroke="{_LINE}" marker-end="url(#arrow)"/>')
    for name, box in picture.boxes.items():
        lines += _svg_box(name, box, *places[name])
    return "\n".join([*lines, "</svg>", ""])


def _svg_box(name: str, box: Box, x: float, y: float, width: float, height: float) -> list[str]:
    texts = [
        f'<text x="{x:.0f}" y="{y + _TEXT_LINE * (index + 1):.0f}">{escape(line)}</text>'
        for index, line in enumerate(box.lines)
    ]
    rectangle = f'x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="5"'
    fill = f'fill="{_COLOURS[box.colour]}" stroke="{_LINE}"'
    return [f"<g><title>{escape(name)}</title><rect {rectangle} {fill}/>", *texts, "</g>"]


def _places(picture: Picture) -> dict[str, tuple[float, float, float, float]]:
    """(middle, top, width, height) of each box: a row below all boxes that lead to it, as near below them as can be."""
    order = {name: index for index, name in enumerate(picture.boxes)}
    above: dict[str, list[str]] = {name: [] for name in order}
    for source, target in picture.arrows:
        if order[source] < order[target]:  # modules that call each other make cycles
            above[target].append(source)
    rows: dict[str, int] = {}
    for name in order:
        rows[name] = 1 + max((rows[each] for each in above[name]), default=-1)
    places: dict[str, tuple[float, float, float, float]] = {}
    top: float = _GAP
    for row in range(max(rows.values(), default=-1) + 1):
        names = [name for name in order if rows[name] == row]
        wish = {name: _mean([places[each][0] for each in above[name]]) for name in names}
        left: float = _GAP
        tallest = 0.0
        for name in sorted(names, key=lambda each: wish[each]):
            lines = picture.boxes[name].lines
            width, height = _CHARACTER * max(map(len, lines)) + 14, _TEXT_LINE * len(lines) + 7.0
            middle = max(left + width / 2, wish[name])
            places[name] = middle, top, width, height
            left, tallest = middle + width / 2 + _GAP, max(tallest, height)
        top += tallest + _ROW_GAP
    return places


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
