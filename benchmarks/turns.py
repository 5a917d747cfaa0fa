"""Variants that are measured in turns, each in a process of its own: what all benchmarks of models share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.isolated import Isolated, VariantFailed
from benchmarks.run_settings import Settings
from benchmarks.step_table import Row
from benchmarks.variants import Variant

WARM_UP = 3


class Timed:
    """One variant in its process: steps of it, timed.

    Between its turns what it holds lies in the host's memory, so that a card has room for any number of variants.

    Args:
        settings: of the run.
        step: what is timed.
        held: parameters, buffers and inputs.
    """

    def __init__(self, settings: Settings, step: Callable[[], None], held: Iterable[Tensor] = ()) -> None:
        self._cuda, self._step = settings.device == "cuda", step
        self._held = list({id(each): each for each in held if each.device.type == settings.device}.values())
        self._clock = time.process_time if settings.clock == "processor" else time.perf_counter

    def warm_up(self) -> float:
        """Compile, and run some steps; the seconds that it took."""
        start = time.perf_counter()
        for _ in range(WARM_UP):
            self._step()
        self._synchronize()
        return time.perf_counter() - start

    def measure(self, steps: int) -> list[float]:
        """Seconds of each of some steps, after those that are not counted: they get memory again."""
        self._move("cuda")
        for _ in range(WARM_UP if self._cuda else 1):
            self._step()
        self._synchronize()
        times = self._cuda_times(steps) if self._cuda else [self._cpu_time() for _ in range(steps)]
        self._release()
        return times

    def peak(self) -> int:
        """Bytes at the peak of a step above what is held before it."""
        if not self._cuda:
            return _cpu_peak(self._step)
        self._step()
        self._synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._step()
        self._synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        self._release()
        return peak

    def profile(self) -> str:
        """A table of the kernels of a step."""
        from torch.profiler import ProfilerActivity, profile

        self._move("cuda")
        kind = "cuda" if self._cuda else "cpu"
        with profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU]) as run:
            self._step()
            self._synchronize()
        self._release()
        return run.key_averages().table(sort_by=f"{kind}_time_total", row_limit=60, max_name_column_width=90)

    def _cuda_times(self, steps: int) -> list[float]:
        """Of steps that follow one another without waiting for the device, as in training."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 2)]
        marks[0].record()
        for mark in marks[1:]:
            self._step()
            mark.record()
        marks[-1].synchronize()
        # of the first the device waits for the host
        return [1e-3 * one.elapsed_time(two) for one, two in itertools.pairwise(marks[1:])]

    def _cpu_time(self) -> float:
        start = self._clock()
        self._step()
        return self._clock() - start

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _release(self) -> None:
        """Give memory to the processes of the other variants."""
        self._move("cpu")
        if self._cuda:
            torch.cuda.empty_cache()

    def _move(self, device: str) -> None:
        if self._cuda:
            for each in self._held:
                each.data = each.data.to(device)


def _cpu_peak(step: Callable[[], None]) -> int:
    """As `torch.cuda.max_memory_allocated`, from what the profiler writes down of every allocation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = run.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def measured(
    variants: list[Variant],
    factory: Callable[..., Timed],
    settings: Settings,
    *args: Any,
    profiles: Path | None = None,
    jobs: int = 1,
    after_round: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """A row for each variant of one mode; those that fail have the reason.

    Args:
        variants: with their floor among them.
        factory: makes what is measured, in the variant's process, from the variant, the settings and `args`.
        settings: of all.
        args: for the factory.
        profiles: a folder for tables of kernels.
        jobs: how many variants are compiled at a time.
        after_round: called with the rows as they are then, so that a run that is cut off leaves what it has.
    """
    rows = [Row(variant) for variant in variants]
    steppers = [Isolated(factory, variant, settings, *args) for variant in variants]

    def prepare(row: Row, stepper: Isolated) -> None:
        with _reason_in(row):
            row.prepared = stepper.call("warm_up")
            row.peak = stepper.call("peak")
        print(f"  {row.variant!s:28} {row.reason or f'ready in {row.prepared:.1f} s'}", flush=True)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(prepare, rows, steppers))
        turns = list(zip(rows, steppers, strict=True))
        for number in range(settings.rounds):
            # Back and forth: on a shared host it matters which variant was measured just before.
            for row, stepper in reversed(turns) if number % 2 else turns:
                if not row.reason:
                    with _reason_in(row):
                        row.rounds.append(stepper.call("measure", settings.steps))
            after_round(rows)
        for row, stepper in turns:
            if profiles and not row.reason:
                profiles.mkdir(parents=True, exist_ok=True)
                with _reason_in(row):
                    Path(profiles, f"{str(row.variant).replace(' ', '_')}.txt").write_text(stepper.call("profile"))
    finally:
        for stepper in steppers:
            stepper.release()
        for stepper in steppers:
            stepper.close()
    return rows


@contextmanager
def _reason_in(row: Row) -> Iterator[None]:
    try:
        yield
    except VariantFailed as error:
        row.reason = str(error)
