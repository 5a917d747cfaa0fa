"""The table of `benchmarks.train_step`: figures of variants beside their floor and the goals, as data and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.report import table
from benchmarks.variants import DTYPES, Variant

GOAL, DORA_GOAL, DROPOUT_GOAL, MEMORY_GOAL = 1.05, 1.10, 1.02, 1.08
HEADER = ("variant", "ms", "× frozen", "by round", "goal", "× peft's best", "memory", "× frozen", "goal")


@dataclass(slots=True)
class Row:
    """What a variant gave.

    Attributes:
        variant: its words.
        rounds: seconds of each step, by round.
        peak: bytes held at the peak of a step above what is held before it.
        prepared: seconds until the first steps were done, compiling included.
        reason: why there are no figures; empty where there are.
    """

    variant: Variant
    rounds: list[list[float]] = field(default_factory=list[list[float]])
    peak: int = 0
    prepared: float = 0.0
    reason: str = ""

    @property
    def medians(self) -> list[float]:
        """Seconds of a step, by round."""
        return [statistics.median(each) for each in self.rounds]

    def over(self, other: Row) -> list[float]:
        """What it took over another variant in the same rounds."""
        return [ours / theirs for ours, theirs in zip(self.medians, other.medians, strict=True)]


def summarised(rows: Sequence[Row], with_goals: bool) -> list[dict[str, Any]]:
    """The figures of each row as plain data.

    Args:
        rows: of any modes, each mode with its frozen row.
        with_goals: whether they are of the shape that the goals are for.
    """
    by_variant = {row.variant: row for row in rows if not row.reason}
    return [_summary(row, by_variant) | (_goals(row, by_variant) if with_goals else {}) for row in rows]


def _summary(row: Row, rows: dict[Variant, Row]) -> dict[str, Any]:
    variant = row.variant
    data: dict[str, Any] = {"variant": variant.label, "mode": variant.mode, "reason": row.reason}
    if row.reason:
        return data
    data |= {"ms": 1e3 * statistics.median(row.medians), "peak_bytes": row.peak, "prepared_s": row.prepared}
    data |= {"ms_of_steps": [[round(1e3 * value, 4) for value in each] for each in row.rounds]}
    if floor := rows.get(Variant("frozen", eager=variant.eager)):
        ratios = row.over(floor)
        data |= {"over": statistics.median(ratios), "over_by_round": ratios}
        if floor.peak:  # CUDA graphs hold their memory between steps
            data["memory_over"] = row.peak / floor.peak
    peers = [replace(variant, name="peft", dtype=dtype) for dtype in DTYPES]
    if variant.name == "fxlora" and not variant.canonical and any(peer in rows for peer in peers):
        data |= {"over_peft": max(statistics.median(row.over(rows[peer])) for peer in peers if peer in rows)}
    return data


def _goals(row: Row, rows: dict[Variant, Row]) -> dict[str, float]:
    variant = row.variant
    if row.reason or variant.name != "fxlora" or variant.canonical or variant.normed:
        return {}
    plain = rows.get(replace(variant, dropout=False))
    if variant.dropout and plain:
        found = {"over_without_dropout": statistics.median(row.over(plain)), "dropout_goal": DROPOUT_GOAL}
    elif variant.dropout:
        found = {}
    else:
        found = {"goal": DORA_GOAL if variant.dora else GOAL}
    return found if variant.dora else found | {"memory_goal": MEMORY_GOAL}


def lines(summaries: Iterable[dict[str, Any]]) -> list[str]:
    """Tables in Markdown, one for each mode, without columns that say nothing; goals are marked as met or missed.

    Args:
        summaries: from `summarised`, or from a file of results.
    """
    modes: dict[str, list[dict[str, Any]]] = {}
    for data in summaries:
        modes.setdefault(data["mode"], []).append(data)
    found: list[str] = []
    for mode, group in modes.items():
        rows = [_cells(data) for data in group]
        shown = [column for column in range(len(HEADER)) if any(row[column] for row in rows)]
        header, *rows = [[row[column] for column in shown] for row in (HEADER, *rows)]
        found += ["", f"### {mode.capitalize()}", "", *table(header, rows)]
    return found


def _cells(data: dict[str, Any]) -> tuple[str, ...]:
    if data["reason"]:
        return (data["variant"], data["reason"], *[""] * (len(HEADER) - 2))
    ratios = data.get("over_by_round", [])
    spread = f"{min(ratios):.3f}–{max(ratios):.3f}" if ratios else ""
    goal = _goal(data.get("over"), data.get("goal"))
    if "dropout_goal" in data:
        part = data["over_without_dropout"]
        goal = f"{part:.3f} × without: {_goal(part, data['dropout_goal'])}"
    return (
        data["variant"], f"{data['ms']:.2f}", _ratio(data.get("over")), spread, goal, _ratio(data.get("over_peft")),
        _size(data["peak_bytes"]) if data["peak_bytes"] else "", _ratio(data.get("memory_over")),
        _goal(data.get("memory_over"), data.get("memory_goal")),
    )  # fmt: skip


def _size(value: int) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _goal(value: float | None, goal: float | None) -> str:
    if value is None or goal is None:
        return ""
    return f"≤ {goal:.2f} {'met' if value <= goal else 'MISSED'}"
