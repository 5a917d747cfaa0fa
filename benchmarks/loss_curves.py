"""A whole fine-tune with the optimized model, with our canonical graph and with peft: do the loss curves lie on each other?

Run: python -m benchmarks.loss_curves [--device cuda] [--steps 200] [--only plain] [--json FILE] [--plot FILE]

All runs start from the same adapter, bit for bit, and see the same batches in the same order. Rounding alone separates
curves in time, so a yardstick is measured: peft again with the rows of each batch reversed and transformers' other way to
compute attention, which changes nothing but the order of sums. With dropout every implementation draws other masks; there the yardstick is peft with another seed. On a CPU
this is the demo (SmolLM2 on Shakespeare) where it is installed, on a GPU 1.2 billion random weights in bfloat16 on the
bytes of Python's standard library. Times are of whole steps, with the optimizer.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import model_shapes
from benchmarks.isolated import Isolated, VariantFailed
from benchmarks.plots import draw_curves
from benchmarks.report import environment, save, table
from benchmarks.variants import Adapter, Variant, callable_of, with_adapter
from fxlora.demo import shakespeare, smollm2
from fxlora.demo.training import train

# Each list starts with the run that the others are compared with, and the yardstick comes next.
PLAIN = (
    "peft fp32 eager", "peft fp32 eager reordered", "fxlora fp32 canonical eager", "fxlora fp32 eager", "fxlora fp32", "peft fp32",
)  # fmt: skip
WITH_DROPOUT = (
    "peft fp32 dropout eager", "peft fp32 dropout eager reseeded", "fxlora fp32 canonical dropout eager",
    "fxlora fp32 dropout eager", "fxlora fp32 dropout",
)  # fmt: skip
LISTS = {"plain": PLAIN, "dropout": WITH_DROPOUT}
WARM_UP = 10  # steps whose times are not counted: the first compile


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for all runs.

    Attributes:
        shape: a key of `model_shapes.SHAPES`.
        device: `cuda` or `cpu`.
        dtype: of the base's weights and the activations.
        layers: how many.
        tokens: batch and length.
        rank: of the adapters.
        steps: of the optimizer.
        rate: the highest learning rate.
        threads: of a CPU.
        clock: `wall`, or `processor` for the time that the process had a processor.
    """

    shape: str
    device: str
    dtype: str
    layers: int
    tokens: tuple[int, int]
    rank: int
    steps: int
    rate: float
    threads: int
    clock: str = "wall"

    def __str__(self) -> str:
        """One line."""
        batch, length = self.tokens
        clock = ", processor time" if self.clock == "processor" else ""
        return (
            f"{self.shape}, {self.layers} layers, {batch} x {length} tokens, {self.dtype} base, float32 adapters of r "
            f"{self.rank}, {self.steps} steps of AdamW, rate {self.rate:g}{clock}"
        )


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


class FineTune:
    """One run in its process."""

    def __init__(self, words: str, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        names = words.split()
        self._is_reordered, self._seed = "reordered" in names, 5 if "reseeded" in names else 4
        self._settings = settings
        variant = Variant.parse(" ".join(name for name in names if name not in ("reordered", "reseeded")))
        dtype = getattr(torch, settings.dtype)
        model = model_shapes.build(settings.shape, settings.layers, 1, settings.device, dtype, head=True)
        if self._is_reordered:
            model.set_attn_implementation("eager")
        adapter = Adapter(settings.rank, model_shapes.targets(model), random=False)
        model = with_adapter(model, variant, adapter)
        self._digest = _digest(model)
        self._call: Any = callable_of(model, variant)

    def run(self) -> tuple[list[float], list[float], str]:
        """Losses, milliseconds of each step, and the digest of the factors at the start."""
        clock = time.process_time if self._settings.clock == "processor" else time.perf_counter
        moments = [clock()]
        torch.manual_seed(self._seed)
        losses = train(
            self._call, self._batches(), steps=self._settings.steps, lr=self._settings.rate,
            on_step=lambda step, loss: moments.append(clock()),
        )  # fmt: skip
        return losses, [round(1e3 * (end - start), 3) for start, end in itertools.pairwise(moments)], self._digest

    def _batches(self) -> Iterator[Tensor]:
        batch, length = self._settings.tokens
        for tokens in shakespeare.batches(_blocks(self._settings.shape, length), batch, self._settings.steps):
            yield (tokens.flip(0) if self._is_reordered else tokens).to(self._settings.device)


def _blocks(shape: str, length: int) -> Tensor:
    """Token ids, (n, length): of Shakespeare's plays for the demo's model, else bytes of Python's own modules."""
    path = model_shapes.demo_directory() if shape == "smollm2" else None
    if path is not None:
        return shakespeare.token_blocks(smollm2.load_tokenizer(path), shakespeare.load_shakespeare()[0], length)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    content = b"".join(file.read_bytes() for file in files)
    return torch.tensor(list(content[: len(content) // length * length])).view(-1, length)


def _digest(model: nn.Module) -> str:
    """Of all trained values, by their names without peft's prefix."""
    found = hashlib.sha256()
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(named):
        found.update(f"{name}{tuple(named[name].shape)}".encode())
        found.update(named[name].detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def runs(words: Iterable[str], settings: Settings) -> list[Run]:
    """One after the other, each compared with the first."""
    words = list(words)
    # On a GPU the processes start together, which takes long; on a CPU that would disturb the run that is measured.
    started = {each: Isolated(FineTune, each, settings) for each in words} if settings.device == "cuda" else {}
    found: list[Run] = []
    for each in words:
        run, process = Run(each), started.get(each) or Isolated(FineTune, each, settings)
        try:
            run.losses, run.ms_of_steps, run.adapter = process.call("run", timeout=3600.0)
        except VariantFailed as error:
            run.reason = str(error)
        process.close()
        found.append(run)
        print(
            f"  {each:40} {run.reason or f'loss {run.losses[0]:.4f} to {run.losses[-1]:.4f}, {run.ms:.1f} ms'}",
            flush=True,
        )
    compare(found)
    return found


def compare(found: list[Run]) -> None:
    """Fill in each run's differences to the first.

    Raises:
        ValueError: two runs did not start from the same adapter.
    """
    reference, *others = found
    for run in others:
        if run.reason or reference.reason:
            continue
        if run.adapter != reference.adapter:
            raise ValueError(f"'{run.run}' and '{reference.run}' did not start from the same adapter")
        differences = [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]
        run.reference, run.largest, run.mean = reference.run, max(differences), statistics.mean(differences)


def lines(found: list[Run], steps: int) -> list[str]:
    """A table in Markdown of one list of runs.

    Args:
        found: the reference, the yardstick, and the others.
        steps: how many were made.
    """
    shown = sorted({1, *(max(1, steps * part // 4) for part in range(1, 5))})
    header = ("run", *(f"loss at {step}" for step in shown), "largest Δ", "mean Δ", "÷ yardstick's", "ms", "× first's")
    return ["", *table(header, [_cells(run, found, shown) for run in found])]


def _cells(run: Run, found: list[Run], shown: list[int]) -> tuple[str, ...]:
    reference, yardstick, *_ = found
    if run.reason:
        return (run.run, run.reason, *[""] * (len(shown) + 4))
    differences = ["", "", ""]
    if run.reference:
        part = f"{run.mean / yardstick.mean:.2f}" if yardstick.mean and run is not yardstick else ""
        differences = [f"{run.largest:.1e}", f"{run.mean:.1e}", part]
    ratio = "" if reference.reason else f"{run.ms / reference.ms:.3f}"
    return (run.run, *(f"{run.losses[step - 1]:.4f}" for step in shown), *differences, f"{run.ms:.1f}", ratio)


def settings_of(options: argparse.Namespace) -> Settings:
    """The options, with what is usual on the device for those that were not given."""
    small = options.device == "cpu"
    shape = options.shape or ("smollm2" if small else "llama-3.2-1b")
    is_demo = shape == "smollm2" and model_shapes.demo_directory() is not None
    return Settings(
        shape=shape,
        device=options.device,
        dtype=options.dtype or ("float32" if small else "bfloat16"),
        layers=options.layers or (30 if is_demo else model_shapes.SHAPES[shape].layers),
        tokens=tuple(options.tokens or ((2, 64) if small else (4, 1024))),
        rank=options.rank,
        steps=options.steps or (30 if small else 200),
        rate=options.rate,
        threads=options.threads,
        clock=options.clock,
    )


def main() -> None:
    """Train, print the tables, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=[name for name in model_shapes.SHAPES if name != "vit-l"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the base: bfloat16, the default on a GPU, or float32, the default on a CPU")
    parser.add_argument("--layers", type=int, help="by default all")
    parser.add_argument("--tokens", type=int, nargs=2, help="batch and length")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, help="by default 200 on a GPU, and 30 on a CPU, as in the demo")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="as in benchmarks.train_step")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled runs")
    parser.add_argument("--only", choices=LISTS, help="runs without dropout, or with it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="picture of the curves; needs matplotlib")
    options = parser.parse_args()
    settings = settings_of(options)
    about = environment(settings.device, settings.threads)
    print(f"{about}\n{settings}", flush=True)
    found: list[Run] = []
    for words in [LISTS[options.only]] if options.only else LISTS.values():
        group = runs([each for each in words if "eager" in each or not options.eager], settings)
        print("\n".join(lines(group, settings.steps)))
        found += group
    rows = [asdict(run) | ({} if run.reason else {"ms": run.ms}) for run in found]
    if options.json:
        save(options.json, "loss_curves", about, settings, rows)
    if options.plot:
        draw_curves(rows, f"{settings}\n{about}", options.plot)


if __name__ == "__main__":
    main()
