"""What the benchmarks of whole models are asked for: options of the command line, and what is usual on each device."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import model_shapes
from benchmarks.variants import MODES

GPU_SHAPE = "llama-3-8b"
LANGUAGE_SHAPE = "llama-3.2-1b"
"""For benchmarks that need a model's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all benchmarks of whole models are asked for; the same for all that one run measures.

    Attributes:
        shape: a key of `model_shapes.SHAPES`.
        device: `cuda` or `cpu`.
        dtype: of the base's weights and the activations.
        layers: how many.
        shrink: a divisor of all widths.
        tokens: batch and length.
        rank: of the adapters.
        steps: of each variant, in a round where there are rounds.
        threads: of a CPU.
        clock: of a CPU's steps: `wall`, or `processor` for the time that the process had a processor.
    """

    shape: str
    device: str
    dtype: str
    layers: int
    shrink: int
    tokens: tuple[int, int]
    rank: int
    steps: int
    threads: int
    clock: str = "wall"

    @property
    def sizes(self) -> str:
        """Of the model and its inputs, in words."""
        size = f", widths / {self.shrink}" if self.shrink > 1 else ""
        batch, length = self.tokens
        return f"{self.shape}{size}, {self.layers} layers, {batch} x {length} tokens, {self.dtype} base"

    @property
    def clock_note(self) -> str:
        """What to say of the clock."""
        return ", processor time" if self.clock == "processor" else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Shared):
    """Of the benchmarks whose variants take turns.

    Attributes:
        rounds: how often the variants take turns.
        compile_mode: of `torch.compile`; empty for its default.
    """

    rounds: int
    compile_mode: str = ""

    @property
    def for_compile(self) -> dict[str, str]:
        """Keywords of `torch.compile`."""
        return {"mode": self.compile_mode} if self.compile_mode else {}

    @property
    def is_reference(self) -> bool:
        """Whether the goals are for this."""
        sizes = (self.shape, self.device, self.shrink, self.tokens, self.rank)
        return sizes == ("llama-3-8b", "cuda", 1, (4, 2048), 16)

    def __str__(self) -> str:
        """One line."""
        mode = f", compiled with {self.compile_mode}" if self.compile_mode else ""
        return f"{self.sizes}, r {self.rank}, {self.rounds} rounds of {self.steps} steps{mode}{self.clock_note}"


def shared_options(
    description: str, *, gpu_shape: str, steps: str, shapes: Iterable[str] = model_shapes.SHAPES
) -> argparse.ArgumentParser:
    """A parser of the options for `Shared` and for the files to write.

    Args:
        description: its first line is shown by `--help`.
        gpu_shape: the shape that is taken on a GPU by default, for the help.
        steps: help on how many.
        shapes: that can be asked for.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--shape", choices=shapes, help=f"default: {gpu_shape} on a GPU, smollm2 on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the base: bfloat16, the default on a GPU, or float32, the default on a CPU")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, help="divisor of all widths, by default 1 on a GPU")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, help="batch and length")
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall",
        help="on a CPU: processor time is changed less by other work on the machine; right with one thread",
    )  # fmt: skip
    parser.add_argument("--json", type=Path)
    return parser


def language_options(description: str, *, steps: str, lists: Iterable[str], only: str) -> argparse.ArgumentParser:
    """`shared_options` of a benchmark with lists of variants of a language model, of which one can be asked for.

    Args:
        description: as there.
        steps: as there.
        lists: names of the lists.
        only: help on which.
    """
    shapes = [name for name in model_shapes.SHAPES if name != "vit-l"]
    parser = shared_options(description, gpu_shape=LANGUAGE_SHAPE, steps=steps, shapes=shapes)
    parser.add_argument("--only", choices=lists, help=only)
    return parser


def add_plot(parser: argparse.ArgumentParser) -> None:
    """The option of a benchmark that draws its results."""
    parser.add_argument("--plot", type=Path, help="picture of the results; needs matplotlib")


def shared_values(
    options: argparse.Namespace, *, shape: str, layers: int, tokens: tuple[int, int], steps: int
) -> dict[str, Any]:
    """The fields of `Shared`: the options, with a benchmark's own choice for those that were not given.

    Args:
        options: from a parser of `shared_options`.
        shape: the model's; chosen by the caller, since the other choices depend on it.
        layers: how many.
        tokens: batch and length.
        steps: how many.
    """
    small = options.device == "cpu"
    return dict(
        shape=shape,
        device=options.device,
        dtype=options.dtype or ("float32" if small else "bfloat16"),
        layers=options.layers or layers,
        shrink=options.shrink or (model_shapes.SHAPES[shape].shrink if small else 1),
        tokens=tuple(options.tokens or tokens),
        rank=options.rank,
        steps=options.steps or steps,
        threads=options.threads,
        clock=options.clock,
    )


def read_options(description: str) -> argparse.Namespace:
    """From the command line, of a benchmark whose variants take turns.

    Args:
        description: its first line is shown by `--help`.
    """
    parser = shared_options(description, gpu_shape=GPU_SHAPE, steps="in a round, by default 20 on a GPU and 5 on a CPU")
    parser.add_argument("variants", nargs="*", help="words of benchmarks/variants.py, such as 'peft bf16 dropout'")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="variants that are compiled at a time")
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each variant")
    parser.add_argument("--compile-mode", help="of torch.compile, such as reduce-overhead")
    add_plot(parser)
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """The options, with what is usual on the device for those that were not given."""
    small = options.device == "cpu"
    name = options.shape or ("smollm2" if small else GPU_SHAPE)
    shape = model_shapes.SHAPES[name]
    shared = shared_values(
        options,
        shape=name,
        layers=min(shape.layers, 4) if small else shape.layers,
        tokens=shape.small_tokens if small else shape.tokens,
        steps=5 if small else 20,
    )
    return Settings(**shared, rounds=options.rounds, compile_mode=options.compile_mode or "")
