"""A whole fine-tune with the optimized model, our canonical graph and peft: do the loss curves lie on each other?

Run: python -m benchmarks.loss_curves [--device cuda] [--steps 200] [--only plain] [--json FILE] [--plot FILE]

All runs start from the same adapter, bit for bit, and see the same batches in the same order. Rounding alone separates
curves in time, so yardsticks are measured, by which peft differs from itself; a difference is put over the largest:
- reordered: the rows of each batch reversed, and transformers' other way to compute attention. Only the order of sums changes.
- autocast, on a 16-bit base: the model as `Trainer(bf16=True)` calls it. peft otherwise computes its float32 adapters in
  float32, while autocast, like ours, multiplies 16-bit copies of them. It does not change a Llama's base: its products are
  in 16 bits already, and norms, softmax and the loss are in float32 by transformers' own casts.
- reseeded, with dropout: another seed. Every implementation draws other masks, beside which roundings are nothing.

On a CPU this is the demo (SmolLM2 on Shakespeare) where it is installed, on a GPU 1.2 billion random weights in bfloat16 on
the bytes of Python's standard library. Times are of whole steps, with the optimizer. The file is written after each run.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import model_shapes
from benchmarks.curve_table import YARDSTICKS, Run, compare, lines, summarised
from benchmarks.isolated import Isolated, VariantFailed
from benchmarks.plots import draw_curves
from benchmarks.report import environment, save
from benchmarks.run_settings import LANGUAGE_SHAPE, Shared, add_plot, language_options, shared_values
from benchmarks.variants import Adapter, Variant, callable_of, trained_by_name, with_adapter
from fxlora.demo import shakespeare, smollm2
from fxlora.demo.training import train

# Each list starts with the run that the others are compared with, and the yardsticks come next.
PLAIN = (
    "peft fp32 eager", "peft fp32 eager reordered", "peft fp32 eager autocast", "fxlora fp32 canonical eager",
    "fxlora fp32 eager", "fxlora fp32", "peft fp32",
)  # fmt: skip
WITH_DROPOUT = (
    "peft fp32 dropout eager", "peft fp32 dropout eager reseeded", "fxlora fp32 canonical dropout eager",
    "fxlora fp32 dropout eager", "fxlora fp32 dropout",
)  # fmt: skip
LISTS = {"plain": PLAIN, "dropout": WITH_DROPOUT}
RATES = {"smollm2": 2e-3}  # the demo's, whose 30 steps are few
# What LoRA is usually trained with. At 2e-3 random weights train chaotically: on 4 layers of a quarter of the widths in
# bfloat16, another order of sums changed 200 losses by 4e-2 on average, and by 3e-4 at 2e-4. Both fell from 6.9 to 4.2-4.3.
RATE = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Shared):
    """What is the same for all runs.

    Attributes:
        rate: the highest learning rate.
    """

    rate: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.sizes}, float32 adapters of r {self.rank}, {self.steps} steps of AdamW, rate {self.rate:g}"
            f"{self.clock_note}"
        )


class FineTune:
    """One run in its process."""

    def __init__(self, words: str, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        names = words.split()
        self._is_reordered, self._seed = "reordered" in names, 5 if "reseeded" in names else 4
        self._settings = settings
        variant = Variant.parse(" ".join(name for name in names if name not in YARDSTICKS))
        dtype = getattr(torch, settings.dtype)
        model = model_shapes.build(settings.shape, settings.layers, settings.shrink, settings.device, dtype, head=True)
        if self._is_reordered:
            model.set_attn_implementation("eager")
        adapter = Adapter(settings.rank, model_shapes.targets(model), random=False)
        model = with_adapter(model, variant, adapter)
        self._digest = _digest(model)
        if "autocast" in names:
            # As transformers' Trainer does it, at each forward: left on between steps, it would keep old copies of factors.
            model.forward = torch.autocast(settings.device, dtype)(model.forward)
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
        batch, _ = self._settings.tokens
        for tokens in shakespeare.batches(_blocks(self._settings), batch, self._settings.steps):
            yield (tokens.flip(0) if self._is_reordered else tokens).to(self._settings.device)


def _blocks(settings: Settings) -> Tensor:
    """Token ids, (n, length): of Shakespeare's plays for the demo's model, else bytes of Python's own modules."""
    _, length = settings.tokens
    path = model_shapes.demo_directory() if settings.shape == "smollm2" and settings.shrink == 1 else None
    if path is not None:
        return shakespeare.token_blocks(smollm2.load_tokenizer(path), shakespeare.load_shakespeare()[0], length)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    content = b"".join(file.read_bytes() for file in files)
    return torch.tensor(list(content[: len(content) // length * length])).view(-1, length)


def _digest(model: nn.Module) -> str:
    """Of all trained values, with their names."""
    found = hashlib.sha256()
    for name, parameter in sorted(trained_by_name(model).items()):
        found.update(f"{name}{tuple(parameter.shape)}".encode())
        found.update(parameter.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def words_of(which: str, settings: Settings, eager: bool = False) -> list[str]:
    """The runs of one of `LISTS`.

    Args:
        which: its key.
        settings: of the runs; autocast changes nothing that is asked of it on a float32 base.
        eager: whether to leave out the compiled runs.
    """
    words = [each for each in LISTS[which] if "eager" in each or not eager]
    return [each for each in words if "autocast" not in each or settings.dtype != "float32"]


def runs(
    words: Sequence[str], settings: Settings, after_run: Callable[[list[Run]], None] = lambda found: None
) -> list[Run]:
    """One after the other, each compared with the first.

    Args:
        words: of each run.
        settings: of all.
        after_run: called with the runs made so far, so that a benchmark that is cut off leaves what it has.
    """
    # On a GPU the processes start together, which takes long; on a CPU that would disturb the run that is measured.
    started = {each: Isolated(FineTune, each, settings) for each in words} if settings.device == "cuda" else {}
    found: list[Run] = []
    try:
        for each in words:
            run, process = Run(each), started.get(each) or Isolated(FineTune, each, settings)
            try:
                run.losses, run.ms_of_steps, run.adapter = process.call("run", timeout=3600.0)
            except VariantFailed as error:
                run.reason = str(error)
            process.close()
            found.append(run)
            compare(found)
            said = run.reason or f"loss {run.losses[0]:.4f} to {run.last_quarter:.4f}, {run.ms:.1f} ms"
            print(f"  {each:40} {said}", flush=True)
            after_run(found)
    finally:
        for process in started.values():
            process.release()
    return found


def settings_of(options: argparse.Namespace) -> Settings:
    """The options, with what is usual on the device for those that were not given."""
    small = options.device == "cpu"
    shape = options.shape or ("smollm2" if small else LANGUAGE_SHAPE)
    is_demo = shape == "smollm2" and model_shapes.demo_directory() is not None
    shared = shared_values(
        options,
        shape=shape,
        layers=30 if is_demo else model_shapes.SHAPES[shape].layers,
        tokens=(2, 64) if small else (4, 1024),
        steps=30 if small else 200,
    )
    return Settings(**shared, rate=options.rate or RATES.get(shape, RATE))


def main() -> None:
    """Train, print the tables, write what was asked for."""
    parser = language_options(
        __doc__ or "", steps="by default 200 on a GPU, and 30 on a CPU, as in the demo", lists=LISTS,
        only="runs without dropout, or with it",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, help="by default 2e-3 for the demo's model, else 2e-4")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled runs")
    add_plot(parser)
    options = parser.parse_args()
    settings = settings_of(options)
    about = environment(settings.device, settings.threads)
    print(f"{about}\n{settings}", flush=True)
    found: list[Run] = []

    def keep(newer: list[Run]) -> None:
        if options.json:
            save(options.json, "loss_curves", about, settings, summarised(found + newer))

    for which in [options.only] if options.only else LISTS:
        group = runs(words_of(which, settings, options.eager), settings, keep)
        print("\n".join(lines(group, settings.steps)))
        found += group
    if options.plot:
        draw_curves(summarised(found), f"{settings}\n{about}", options.plot)


if __name__ == "__main__":
    main()
