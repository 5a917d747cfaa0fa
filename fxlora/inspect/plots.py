"""`plot_rank_spectrum` and `plot_update_norms`: what `fxlora.inspect.spectra` measures, to look at. Needs the extra `viz`.

Figures are made without pyplot, so that no window opens and nothing global changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fxlora.errors import ConfigError
from fxlora.inspect.spectra import Spectra, Spectrum, UpdateNorms, by_module, place, spectra, update_norms
from fxlora.inspect.updates import Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
_COLOURS, _MISSING, _LINE = "viridis", "#e4e4e4", "#ff5a4d"
_CELL = 0.17
"""Inches of one block along an axis."""
_LABELS = 16
"""Blocks that have a number written, at most."""


def plot_rank_spectrum(
    source: Source | Spectra, adapter: str | None = None, *, save: str | Path | None = None
) -> Figure:
    """Draw the singular values of `s·BA` at all layers: a panel for each module, a column for each block.

    Colours are shares of the layer's largest singular value. A line marks the effective rank: where it is near the top, a
    higher rank may learn more; where it is low, a lower rank would do. Layers without the adapter stay grey.

    Args:
        source: as for `fxlora.spectra`, or what it returned.
        adapter: which of a model's adapters; the active one if None.
        save: a file to write, `.svg` or `.png`.

    Returns:
        The figure.

    Raises:
        ConfigError: for a file of another kind.
        ImportError: when matplotlib is missing; says how to install it.
    """
    _check(save)
    figure_class = _figure_class()
    found = source if isinstance(source, Spectra) else spectra(source, adapter)
    modules = by_module(found.sites)
    blocks = _blocks([each.site for each in found.sites])
    columns = min(len(modules), max(1, min(3, math.ceil(48 / max(16, len(blocks))))))
    rows = math.ceil(len(modules) / columns)
    width = max(2.2, _CELL * 0.75 * len(blocks))
    figure = figure_class(figsize=(columns * (width + 0.5) + 1.2, rows * 1.75 + 0.7), layout="constrained")
    panels = cast(Any, figure.subplots(rows, columns, squeeze=False)).ravel()
    image: Any = None
    for axes, label, members in zip(panels, _labels(list(modules)), modules.values(), strict=False):
        in_blocks = place(members[0].site)[0] is not None
        image = _spectrum_panel(axes, label, members, [each for each in blocks if (each is not None) == in_blocks])
    for axes in panels[len(modules) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=list(panels), fraction=0.05, pad=0.02)
    bar.set_label("share of the layer's largest", fontsize=8)
    figure.suptitle(f"Singular values of s·BA, {found.subject}; the line is the effective rank", fontsize=11)
    _write(figure, save)
    return figure


def plot_update_norms(
    source: Source | UpdateNorms,
    adapter: str | None = None,
    *,
    base: str | Path | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw how far an adapter moves each weight: a row for each module, a column for each block.

    Layers without the adapter, and those whose norm is not known, are hatched.

    Args:
        source: as for `fxlora.update_norms`, or what it returned.
        adapter: which of a model's adapters; the active one if None.
        base: for the directory of an adapter: that of the base model, for relative norms.
        save: a file to write, `.svg` or `.png`.

    Returns:
        The figure.

    Raises:
        ConfigError: for a file of another kind.
        ImportError: when matplotlib is missing; says how to install it.
    """
    _check(save)
    figure_class = _figure_class()
    found = source if isinstance(source, UpdateNorms) else update_norms(source, adapter, base=base)
    blocks = _blocks([each.site for each in found.sites])
    modules = list(by_module(found.sites))
    rows = {module: row for row, module in enumerate(modules)}
    cells = [[math.nan] * len(blocks) for _ in modules]
    for each in found.sites:
        block, module = place(each.site)
        value = found.value(each)
        cells[rows[module]][blocks.index(block)] = math.nan if value is None else value * (100 if found.relative else 1)
    labels = _labels(modules)
    size = (max(4.0, _CELL * len(blocks)) + 0.08 * max(map(len, labels)) + 1.4, max(1.2, 0.27 * len(modules)) + 1.2)
    figure = figure_class(figsize=size, layout="constrained")
    axes = cast(Any, figure.add_subplot())
    image = _cells(axes, cells, max((value for row in cells for value in row if not math.isnan(value)), default=0.0))
    axes.set_yticks(range(len(modules)), labels, fontsize=9)
    _number(axes, blocks)
    what = "‖s·BA‖ / ‖W‖ in %" if found.relative else "‖s·BA‖"
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).set_label(what)
    largest = found.largest()[0]
    top = f"largest: {found.shown(found.value(largest) or 0.0)} at {largest.site}"
    figure.suptitle(f"Update of each weight, {found.subject}\n{top}", fontsize=11)
    _write(figure, save)
    return figure


# ---- parts ----


def _spectrum_panel(axes: Any, label: str, members: Sequence[Spectrum], blocks: list[int | None]) -> Any:
    most = max(each.rank for each in members)
    cells = [[math.nan] * len(blocks) for _ in range(most)]
    used = [math.nan] * len(blocks)
    for each in members:
        column = blocks.index(place(each.site)[0])
        used[column] = each.effective_rank
        for row, value in enumerate(each.values):
            cells[row][column] = value / each.values[0] if each.values[0] else 0.0
    image = _cells(axes, cells, 1.0)
    axes.invert_yaxis()
    axes.plot(range(len(blocks)), [value - 0.5 for value in used], color=_LINE, linewidth=1.5, marker=".", markersize=3)
    axes.set_title(label, fontsize=9)
    ranks = sorted({1, max(1, most // 2), most})
    axes.set_yticks([rank - 1 for rank in ranks], [str(rank) for rank in ranks], fontsize=8)
    axes.set_ylabel("index", fontsize=8)
    _number(axes, blocks)
    return image


def _cells(axes: Any, cells: list[list[float]], largest: float) -> Any:
    """A grid of colours from 0 to the largest value; what is not a number shows the hatched ground."""
    axes.set_facecolor(_MISSING)
    axes.patch.set(hatch="////", edgecolor="white")
    return axes.imshow(cells, cmap=_COLOURS, vmin=0.0, vmax=largest or 1.0, aspect="auto", interpolation="nearest")


def _number(axes: Any, blocks: list[int | None]) -> None:
    step = math.ceil(len(blocks) / _LABELS)
    shown = [at for at, block in enumerate(blocks) if block is None or at % step == 0]
    axes.set_xticks(shown, ["none" if blocks[at] is None else str(blocks[at]) for at in shown], fontsize=8)
    axes.set_xlabel("block", fontsize=8)


def _blocks(sites: Sequence[str]) -> list[int | None]:
    """All blocks up to the last that has the adapter, and None at the end if there are layers outside of blocks."""
    numbers = [place(site)[0] for site in sites]
    last = max((number for number in numbers if number is not None), default=-1)
    return [*range(last + 1), *([None] if None in numbers else [])]


def _labels(modules: list[str]) -> list[str]:
    """The modules' names, less what the names of all modules in blocks begin with."""
    parts = [module.split(".") for module in modules if "*" in module.split(".")]
    common = 0
    while parts and all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    prefix = ".".join(parts[0][:common]) + "." if common else ""
    return [module.removeprefix(prefix) for module in modules]


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fxlora[viz]'") from error
    return Figure


def _check(path: str | Path | None) -> None:
    if path is not None and Path(path).suffix not in FORMATS:
        raise ConfigError(f"'{path}' should end in {' or '.join(FORMATS)}, which says what kind of picture to write")


def _write(figure: Figure, path: str | Path | None) -> None:
    """The same figure gives the same bytes."""
    if path is None:
        return
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fxlora", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None, dpi=120)
