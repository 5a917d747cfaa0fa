"""One linear layer with its branch over many shapes: the operator beside peft's arithmetic, compiled. Needs a GPU.

Run: python -m benchmarks.linear_shapes [--dropout 0.1] [--dtype float32] [--json FILE]

Forward and backward in a CUDA graph, so that the device's time alone counts; bfloat16 activations and weights. peft's
arithmetic is `linear(x, W) + linear(linear(dropout(x), A), B) * s` under `torch.compile`, with factors in bfloat16, which is
its fastest setting; ours has factors of `--dtype`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench_cudagraph

from benchmarks.report import environment, save
from fxlora.ops import lora_linear_siblings
from fxlora.ops.choice import Shape, choose

SIZES = (
    (576, 576),
    (576, 1536),
    (1536, 576),
    (2048, 2048),
    (4096, 1024),
    (4096, 4096),
    (4096, 14336),
    (14336, 4096),
    (8192, 8192),
)
CASES = (
    *itertools.product(SIZES, (128, 1024, 4096), (16,)),
    *itertools.product(SIZES[3:6], (512, 8192), (4, 64, 256)),
    *itertools.product(SIZES[3:6], (32768,), (16,)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for all shapes: the probability of dropout, and the dtype of our factors."""

    dropout: float
    dtype: str

    def __str__(self) -> str:
        """One line."""
        return f"dropout {self.dropout:g}, factors {self.dtype}, peft's in bfloat16 and compiled; microseconds"


def theirs(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, p: float) -> torch.Tensor:
    """The forward of a linear layer in peft."""
    return F.linear(x, W) + F.linear(F.linear(F.dropout(x, p), A), B) * 2.0


def measured(
    function: Callable[..., Any], x: torch.Tensor, factors: tuple[torch.Tensor, ...], gradient: torch.Tensor
) -> float:
    """Microseconds of forward and backward."""

    def step() -> None:
        torch.autograd.grad(function(), (x, *factors), gradient)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        return 1e3 * do_bench_cudagraph(step, rep=30, return_mode="median")


def case(columns: int, outputs: int, rows: int, rank: int, p: float, dtype: torch.dtype) -> dict[str, Any]:
    """Both ways on one shape."""
    torch._dynamo.reset()
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5
    gradient = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)
    scale, seed = torch.tensor(2.0, device="cuda"), torch.tensor([1], device="cuda") if p else None
    A, B = (torch.randn(size, device="cuda", dtype=dtype) * 0.01 for size in ((rank, columns), (outputs, rank)))
    narrow = tuple(each.bfloat16().requires_grad_() for each in (A, B))
    wide = tuple(each.requires_grad_() for each in (A, B))
    compiled = torch.compile(theirs, dynamic=False)
    peft = measured(lambda: compiled(x, W, *narrow, p), x, narrow, gradient)
    ours = measured(
        lambda: lora_linear_siblings(x, [W], [None], [wide[0]], [wide[1]], [scale], p, seed)[0], x, wide, gradient
    )
    again = measured(lambda: compiled(x, W, *narrow, p), x, narrow, gradient)
    frozen = measured(lambda: F.linear(x, W), x, (), gradient)
    kernels = choose(x.device, x.dtype, rows, Shape(columns, (outputs,), (rank,), p > 0)).kernels
    return {
        "in": columns, "out": outputs, "tokens": rows, "r": rank, "frozen": frozen, "fxlora": ours, "peft": min(peft, again),
        "ratio": ours / min(peft, again), "kernels": kernels,
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32", help="of our factors")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings, about = Settings(options.dropout, options.dtype), environment("cuda", 1)
    print(f"{about}\n{settings}")
    print(f"{'in':>6} {'out':>6} {'tokens':>7} {'r':>4} {'frozen':>8} {'fxlora':>8} {'peft':>8} {'fxlora/peft':>12}")
    results: list[dict[str, Any]] = []
    for (columns, outputs), rows, rank in CASES:
        row = case(columns, outputs, rows, rank, options.dropout, getattr(torch, options.dtype))
        results.append(row)
        name = "kernels" if row["kernels"] else "ATen"
        print(
            f"{columns:6} {outputs:6} {rows:7} {rank:4} {row['frozen']:8.0f} {row['fxlora']:8.0f} {row['peft']:8.0f} "
            f"{row['ratio']:12.3f} {name}",
            flush=True,
        )
    slower = [row for row in results if row["ratio"] > 1.0]
    print(f"{len(results)} shapes, slower on {len(slower)}")
    if options.json:
        save(options.json, "linear_shapes", about, settings, results)


if __name__ == "__main__":
    main()
