"""A training step with LoRA beside the frozen model's and peers': time and memory, compiled and eager.

Run: python -m benchmarks.train_step [VARIANT ...] [--shape llama-3-8b] [--device cuda] [--mode compiled] [--json FILE]

A step is forward and backward, without the optimizer. "frozen" is forward and backward to the input only: the floor. Every
variant has a process of its own; they take turns, some steps each, so that all see the machine in the same states. A ratio
is the median over the rounds of what a variant and its floor took in the same round. Memory is the peak above what is held
before a step. Without VARIANT: the whole table, with those peers of `benchmarks.peers` that are installed. On a CPU: a few minutes, in small
sizes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import model_shapes
from benchmarks.isolated import Isolated, VariantFailed
from benchmarks.plots import draw_steps
from benchmarks.report import environment, save
from benchmarks.step_table import Row, lines, summarised
from benchmarks.variants import MODES, Adapter, Variant, callable_of, parse_all, trained, with_adapter

GPU_VARIANTS = (
    "fxlora fp32", "fxlora bf16", "fxlora fp32 dropout", "fxlora bf16 dropout", "fxlora fp32 dora", "fxlora bf16 dora",
    "fxlora fp32 canonical", "fxlora bf16 canonical",
    "peft fp32", "peft bf16", "peft fp32 dropout", "peft bf16 dropout", "peft fp32 dora", "peft bf16 dora",
    "liger bf16", "axolotl fp32", "axolotl-liger fp32", "unsloth fp32", "torchtune bf16",
)  # fmt: skip
CPU_VARIANTS = (
    "fxlora fp32",
    "fxlora fp32 dropout",
    "fxlora fp32 dora",
    "peft fp32",
    "peft fp32 dropout",
    "peft fp32 dora",
)
WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for all variants of a run.

    Attributes:
        shape: a key of `model_shapes.SHAPES`.
        device: `cuda` or `cpu`.
        dtype: of the base's weights and the activations.
        layers: how many.
        shrink: a divisor of all widths.
        tokens: batch and length.
        rank: of the adapters.
        rounds: how often the variants take turns.
        steps: of each variant in a round.
        threads: of a CPU.
    """

    shape: str
    device: str
    dtype: str
    layers: int
    shrink: int
    tokens: tuple[int, int]
    rank: int
    rounds: int
    steps: int
    threads: int

    @property
    def is_reference(self) -> bool:
        """Whether the goals are for this."""
        sizes = (self.shape, self.device, self.shrink, self.tokens, self.rank)
        return sizes == ("llama-3-8b", "cuda", 1, (4, 2048), 16)

    def __str__(self) -> str:
        """One line."""
        size = f", widths / {self.shrink}" if self.shrink > 1 else ""
        batch, length = self.tokens
        return (
            f"{self.shape}{size}, {self.layers} layers, {batch} x {length} tokens, {self.dtype} base, r {self.rank}, "
            f"{self.rounds} rounds of {self.steps} steps"
        )


class Stepper:
    """One variant in its process: steps of it, timed."""

    def __init__(self, variant: Variant, settings: Settings, adapter_parameters: tuple[str, ...]) -> None:
        torch.set_num_threads(settings.threads)
        self._cuda = settings.device == "cuda"
        dtype = getattr(torch, settings.dtype)
        model = model_shapes.build(settings.shape, settings.layers, settings.shrink, settings.device, dtype)
        inputs = model_shapes.inputs(model, settings.tokens, settings.device, dtype)
        adapter = Adapter(settings.rank, model_shapes.targets(model), adapter_parameters)
        model = with_adapter(model, variant, adapter).train()
        call, parameters = callable_of(model, variant), [*trained(model), *inputs.values()]
        gradient: torch.Tensor | None = None

        def step() -> None:
            nonlocal gradient
            output = call(**inputs).last_hidden_state
            gradient = torch.randn_like(output) if gradient is None else gradient
            output.backward(gradient)
            for parameter in parameters:
                parameter.grad = None

        self._step = step

    def warm_up(self) -> float:
        """Compile, and run some steps; the seconds that it took."""
        start = time.perf_counter()
        for _ in range(WARM_UP):
            self._step()
        self._synchronize()
        return time.perf_counter() - start

    def measure(self, steps: int) -> list[float]:
        """Seconds of each of some steps, after those that are not counted: they get memory again."""
        for _ in range(WARM_UP if self._cuda else 1):
            self._step()
        self._synchronize()
        times = [self._cuda_time() if self._cuda else self._cpu_time() for _ in range(steps)]
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

        kind = "cuda" if self._cuda else "cpu"
        with profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU]) as run:
            self._step()
            self._synchronize()
        return run.key_averages().table(sort_by=f"{kind}_time_total", row_limit=60, max_name_column_width=90)

    def _cuda_time(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._step()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    def _cpu_time(self) -> float:
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _release(self) -> None:
        """Give cached memory to the processes of the other variants."""
        if self._cuda:
            torch.cuda.empty_cache()


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
    settings: Settings,
    profiles: Path | None = None,
    jobs: int = 1,
    after_round: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """A row for each variant of one mode; those that fail have the reason.

    Args:
        variants: with their floor among them.
        settings: of all.
        profiles: a folder for tables of kernels.
        jobs: how many variants are compiled at a time.
        after_round: called with the rows as they are then, so that a run that is cut off leaves what it has.
    """
    parameters = model_shapes.SHAPES[settings.shape].parameters
    rows = [Row(variant) for variant in variants]
    steppers = [Isolated(Stepper, variant, settings, parameters) for variant in variants]

    def prepare(row: Row, stepper: Isolated) -> None:
        with _reason_in(row):
            row.prepared = stepper.call("warm_up")
            row.peak = stepper.call("peak")
        print(f"  {row.variant!s:28} {row.reason or f'ready in {row.prepared:.1f} s'}", flush=True)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(prepare, rows, steppers))
        for _ in range(settings.rounds):
            for row, stepper in zip(rows, steppers, strict=True):
                if not row.reason:
                    with _reason_in(row):
                        row.rounds.append(stepper.call("measure", settings.steps))
            after_round(rows)
        for row, stepper in zip(rows, steppers, strict=True):
            if profiles and not row.reason:
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


def options() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("variants", nargs="*", help="words of benchmarks/variants.py, such as 'peft bf16 dropout'")
    parser.add_argument("--shape", choices=model_shapes.SHAPES, help="default: llama-3-8b on a GPU, smollm2 on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the base: bfloat16, the default on a GPU, or float32, the default on a CPU")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, help="divisor of all widths, by default 1 on a GPU")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, help="batch and length")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, help="in a round, by default 20 on a GPU and 5 on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--jobs", type=int, default=1, help="variants that are compiled at a time")
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each variant")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="picture of the ratios; needs matplotlib")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """The options, with what is usual on the device for those that were not given."""
    small = options.device == "cpu"
    name = options.shape or ("smollm2" if small else "llama-3-8b")
    shape = model_shapes.SHAPES[name]
    return Settings(
        shape=name,
        device=options.device,
        dtype=options.dtype or ("float32" if small else "bfloat16"),
        layers=options.layers or (min(shape.layers, 4) if small else shape.layers),
        shrink=options.shrink or (shape.shrink if small else 1),
        tokens=tuple(options.tokens or (shape.small_tokens if small else shape.tokens)),
        rank=options.rank,
        rounds=options.rounds,
        steps=options.steps or (5 if small else 20),
        threads=options.threads,
    )


def main() -> None:
    """Measure, print a table, write what was asked for."""
    asked = options()
    settings = settings_of(asked)
    texts = asked.variants or (CPU_VARIANTS if settings.dtype == "float32" else GPU_VARIANTS)
    about = environment(settings.device, settings.threads)
    print(f"{about}\n{settings}", flush=True)
    rows: list[Row] = []

    def keep(newer: list[Row]) -> None:
        if asked.json:
            save(asked.json, "train_step", about, settings, summarised(rows + newer, settings.is_reference))

    for mode in asked.mode:
        if variants := parse_all(texts, [mode]):
            rows += measured(variants, settings, asked.profile, asked.jobs, keep)
    summaries = summarised(rows, settings.is_reference)
    print("\n".join(lines(summaries)))
    if asked.plot:
        draw_steps(summaries, f"{settings}\n{about}", asked.plot)


if __name__ == "__main__":
    main()
