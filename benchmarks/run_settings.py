"""What the benchmarks of whole models are asked for: options of the command line, and what is usual on each device."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import model_shapes
from benchmarks.variants import MODES


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
        compile_mode: of `torch.compile`; empty for its default.
        clock: of a CPU's steps: `wall`, or `processor` for the time that the process had a processor.
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
    compile_mode: str = ""
    clock: str = "wall"

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
        size = f", widths / {self.shrink}" if self.shrink > 1 else ""
        batch, length = self.tokens
        mode = f", compiled with {self.compile_mode}" if self.compile_mode else ""
        mode += ", processor time" if self.clock == "processor" else ""
        return (
            f"{self.shape}{size}, {self.layers} layers, {batch} x {length} tokens, {self.dtype} base, r {self.rank}, "
            f"{self.rounds} rounds of {self.steps} steps{mode}"
        )


def read_options(description: str) -> argparse.Namespace:
    """From the command line.

    Args:
        description: its first line is shown by `--help`.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
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
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall",
        help="on a CPU: processor time is changed less by other work on the machine; right with one thread",
    )  # fmt: skip
    parser.add_argument("--compile-mode", help="of torch.compile, such as reduce-overhead")
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
        compile_mode=options.compile_mode or "",
        clock=options.clock,
    )
