"""Pictures of benchmarks' results: of a file that `--json` wrote, or of the figures themselves.

Run: python -m benchmarks.plots RESULTS.json PICTURE.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.curve_table import is_yardstick

COLOURS = {"frozen": "#9aa0a6", "fxlora": "#1a73e8", "canonical": "#8ab4f8", "peft": "#e8710a"}
OTHER = "#5f6368"


def draw_steps(summaries: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of time and memory over the frozen model's, one row of pictures for each mode.

    Args:
        summaries: the rows of `benchmarks.train_step`.
        title: stands above.
        path: of an SVG, PNG or PDF file.
    """
    plt = _pyplot()
    shown = [data for data in summaries if "over" in data]
    modes = list(dict.fromkeys(data["mode"] for data in shown))
    height = 1.2 + 0.27 * len(shown) + 0.6 * len(modes)
    figure, grid = plt.subplots(len(modes), 2, figsize=(11, height), squeeze=False, sharey="row", layout="constrained")
    for pair, mode in zip(grid, modes, strict=True):
        rows = [data for data in shown if data["mode"] == mode]
        for axes, key, goal, what in zip(
            pair, ("over", "memory_over"), (1.05, 1.08), ("time", "memory at its peak"), strict=True
        ):
            values = [data.get(key, 0.0) for data in rows]  # CUDA graphs hold their memory
            bars = axes.barh(
                [data["variant"] for data in rows], values, color=[_colour(data["variant"]) for data in rows]
            )
            axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=8)
            if any("memory_goal" in data for data in rows):
                axes.axvline(goal, color="#188038", linewidth=1, linestyle="--", label=f"goal {goal:g}")
                axes.legend(fontsize=7, loc="lower right")
            axes.set_xlim(0, max(values) * 1.12 or 1)
            axes.set_title(f"{mode}: {what} / frozen", fontsize=9)
            axes.tick_params(labelsize=8)
        pair[0].invert_yaxis()
    _finish(plt, figure, title, path)


def draw_curves(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Loss curves above each other, and below them their differences to the first.

    Args:
        rows: those of `benchmarks.loss_curves`.
        title: stands above.
        path: of an SVG, PNG or PDF file.
    """
    plt = _pyplot()
    shown = [row for row in rows if not row["reason"]]
    groups = [[row for row in shown if ("dropout" in row["run"].split()) == dropout] for dropout in (False, True)]
    groups = [group for group in groups if group]
    size = (max(9, 6 * len(groups)), 6)
    figure, grid = plt.subplots(2, len(groups), figsize=size, squeeze=False, sharex=True, layout="constrained")
    for group, losses, differences in zip(groups, *grid, strict=True):
        reference = group[0]
        for row in group:
            style = "--" if is_yardstick(row["run"]) else "-"
            steps = range(1, len(row["losses"]) + 1)
            drawn = losses.plot(steps, row["losses"], style, linewidth=1, label=row["run"])[0]
            if row["reference"]:
                values = [abs(a - b) for a, b in zip(row["losses"], reference["losses"], strict=True)]
                differences.plot(steps, values, style, color=drawn.get_color(), linewidth=0.8)
        losses.set_ylabel("loss")
        losses.legend(fontsize=7)
        differences.set(yscale="log", xlabel="step", ylabel=f"|difference to {reference['run']}|")
        for axes in (losses, differences):
            axes.tick_params(labelsize=8)
            axes.yaxis.label.set_size(8)
    _finish(plt, figure, title, path)


def title_of(data: dict[str, Any]) -> str:
    """What was measured, where and when, of a file of results."""
    versions = [f"{name} {version}" for name, version in data["versions"].items()]
    return f"{data['measured']}\n{', '.join([data['machine'], *versions, data['date']])}"


def _colour(variant: str) -> str:
    words = variant.split()
    return COLOURS["canonical"] if "canonical" in words else COLOURS.get(words[0], OTHER)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("a picture needs matplotlib: pip install matplotlib; or copy the JSON file to where it is installed")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fxlora"  # the same file for the same figures
    from matplotlib import pyplot

    return pyplot


def _finish(plt: Any, figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    plt.close(figure)


DRAWERS = {"train_step": draw_steps, "loss_curves": draw_curves, "adapter_inference": draw_steps}


def main() -> None:
    """Draw a file of results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    data = json.loads(options.results.read_text(encoding="utf-8"))
    DRAWERS[data["benchmark"]](data["rows"], title_of(data), options.picture)


if __name__ == "__main__":
    main()
