"""The table of `benchmarks.loss_curves`: loss curves beside a reference and its yardsticks, as data and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.report import table

# What makes a run a yardstick: a word for what is changed, which is nothing that a user of the reference would mind.
YARDSTICKS = ("reordered", "autocast", "reseeded")
WARM_UP = 10  # steps whose times are not counted: the first compile


@dataclass(slots=True)
class Run:
    """What a run gave.

    Attributes:
        run: its words.
        losses: of each step, in nats.
        ms_of_steps: milliseconds of each.
        adapter: a digest of the factors that it started from.
        reason: why it has no figures; empty where it has.
        reference: the run that it is compared with.
        largest: difference of its losses to that run's.
        mean: difference.
    """

    run: str
    losses: list[float] = field(default_factory=list[float])
    ms_of_steps: list[float] = field(default_factory=list[float])
    adapter: str = ""
    reason: str = ""
    reference: str = ""
    largest: float = 0.0
    mean: float = 0.0

    @property
    def ms(self) -> float:
        """The median of a step."""
        return statistics.median(self.ms_of_steps[min(WARM_UP, len(self.ms_of_steps) // 2) :])

    @property
    def last_quarter(self) -> float:
        """The mean of the last quarter of the losses: where the curve ends, without the noise of single batches."""
        return statistics.mean(self.losses[-max(1, len(self.losses) // 4) :])


def is_yardstick(words: str) -> bool:
    """Whether the others' differences are measured by those of a run of these words."""
    return not set(YARDSTICKS).isdisjoint(words.split())


def compare(found: Sequence[Run]) -> None:
    """Fill in each run's differences to the first; one that started from another adapter gets that as its reason."""
    reference, *others = found
    for run in others:
        if run.reason or reference.reason:
            continue
        if run.adapter != reference.adapter:
            run.reason = f"did not start from the same adapter as '{reference.run}'"
            continue
        differences = [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]
        run.reference, run.largest, run.mean = reference.run, max(differences), statistics.mean(differences)


def summarised(found: Sequence[Run]) -> list[dict[str, Any]]:
    """Plain data of each run, with what is made from its fields."""
    return [asdict(run) | ({} if run.reason else {"ms": run.ms, "last_quarter": run.last_quarter}) for run in found]


def lines(found: Sequence[Run], steps: int) -> list[str]:
    """A table in Markdown of one list of runs.

    Args:
        found: the reference, then the yardsticks and the others.
        steps: how many were made.
    """
    shown = sorted({1, *(max(1, steps * part // 4) for part in range(1, 5))})
    header = (
        "run", *(f"loss at {step}" for step in shown), "mean of the last quarter", "its Δ", "largest Δ", "mean Δ",
        "÷ yardstick's", "ms", "× first's",
    )  # fmt: skip
    yardstick = max((run.mean for run in found if is_yardstick(run.run)), default=0.0)
    return ["", *table(header, [_cells(run, found[0], yardstick, shown) for run in found])]


def _cells(run: Run, reference: Run, yardstick: float, shown: list[int]) -> tuple[str, ...]:
    if run.reason:
        return (run.run, run.reason, *[""] * (len(shown) + 6))
    losses = [f"{run.losses[step - 1]:.4f}" for step in shown]
    away = largest = mean = part = ""
    if run.reference:
        away = f"{run.last_quarter - reference.last_quarter:+.1e}"
        largest, mean = f"{run.largest:.1e}", f"{run.mean:.1e}"
        part = f"{run.mean / yardstick:.2f}" if yardstick and not is_yardstick(run.run) else ""
    ratio = "" if reference.reason else f"{run.ms / reference.ms:.3f}"
    return (run.run, *losses, f"{run.last_quarter:.4f}", away, largest, mean, part, f"{run.ms:.1f}", ratio)
