"""Each kernel alone, beside cuBLAS and beside the time in which a device only moves its bytes. Needs a GPU.

Run: python -m benchmarks.kernel_times [--rows 8192] [--rank 16] [--sweep] [--json FILE]. Random data; medians of CUDA graphs.
`--sweep` tries block sizes, warps and stages for each kernel instead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench_cudagraph

from fxlora.ops import aten, launch

SHAPES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
"""Features of the input, and of the outputs of the layers that share it: Llama-3-8B's."""


def measured(function: Callable[[], Any]) -> float:
    """Microseconds on the device."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        return 1e3 * do_bench_cudagraph(function, rep=40, return_mode="median")


def bandwidth() -> float:
    """Bytes that the device copies in a microsecond, read and written."""
    data = torch.randn(2**28, device="cuda")
    return 2 * data.nbytes / measured(lambda: data.clone())


@dataclass
class Case:
    """A kernel on a shape: the bytes it must move, ours and cuBLAS's way."""

    kernel: str
    layers: str
    size: int
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    setting: str = ""


def cases(rows: int, rank: int, dtype: torch.dtype) -> list[Case]:
    """All kernels on all shapes."""
    found: list[Case] = []
    for name, (columns, outputs) in SHAPES.items():
        found += _cases_of(name, rows, columns, outputs, rank, dtype)
    return [*found, *_swiglu_cases(rows, 14336, rank, dtype)]


def _swiglu_cases(rows: int, columns: int, rank: int, dtype: torch.dtype) -> list[Case]:
    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    g, u, dh = (random(rows, columns) for _ in range(3))
    xs, dxd = random(rows, 2 * rank), random(rows, rank)
    Bg, Bu, Ad = (
        random(columns, rank, dtype=dtype),
        random(columns, rank, dtype=dtype),
        random(rank, columns, dtype=dtype),
    )
    scales, seed = [torch.tensor(2.0, device="cuda")] * 3, torch.tensor([12345], device="cuda")
    found: list[Case] = []
    for p, end in ((0.0, ""), (0.1, "_drop")):
        found += [
            Case(
                f"swiglu{end}", "14336", 3 * g.nbytes,
                lambda p=p: launch.swiglu_forward(g, u, xs, Bg, Bu, Ad, scales[0], p, seed),
                lambda: torch.nn.functional.silu(g) * u, f"swiglu{end}",
            ),
            Case(
                f"swiglu_backward{end}", "14336", 5 * g.nbytes,
                lambda p=p: launch.swiglu_backward(dh, g, u, xs, Bg, Bu, Ad, dxd, scales[:2], p, seed, dtype),
                lambda: torch.ops.aten.silu_backward(dh * u, g), f"swiglu_backward{end}",
            ),
        ]  # fmt: skip
    return found


def _cases_of(
    name: str, rows: int, columns: int, outputs: tuple[int, ...], rank: int, dtype: torch.dtype
) -> list[Case]:
    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    x, ranks = random(rows, columns), [rank] * len(outputs)
    As, Bs = (
        [random(rank, columns, dtype=dtype) for _ in outputs],
        [random(size, rank, dtype=dtype) for size in outputs],
    )
    dys = [random(rows, size) for size in outputs]
    scales = [torch.tensor(2.0, device="cuda") for _ in outputs]
    seed = torch.tensor([12345], device="cuda")
    A = aten.prepare(As, x.dtype)
    xs = aten.shrink(x, A, ranks, scales, 0.0, None)
    first = xs[:, :rank]
    large = sum(dy.nbytes for dy in dys)
    found = [
        Case("prepare", name, A.nbytes, lambda: launch.prepare(As, x.dtype), lambda: aten.prepare(As, x.dtype)),
        Case(
            "reduce", name, large, lambda: launch.reduce(dys, xs, Bs, scales),
            lambda: aten.reduce(dys, xs, Bs, scales),
            "reduce" if rank <= 32 else "reduce_wide",
        ),
        Case(
            "expand", name, large, lambda: [launch.expand(first, B, None) for B in Bs],
            lambda: [first @ B.to(x.dtype).t() for B in Bs], "expand",
        ),
    ]  # fmt: skip
    for p, end in ((0.0, ""), (0.1, "_drop")):
        found += [
            Case(
                f"shrink{end}", name, x.nbytes, lambda p=p: launch.shrink(x, A, ranks, scales, p, seed),
                lambda p=p: aten.shrink(x, A, ranks, scales, p, seed), f"shrink{end}",
            ),
            Case(
                f"input_gradient{end}", name, x.nbytes, lambda p=p: launch.input_gradient(xs, A, ranks, p, seed),
                lambda: xs @ A, f"input_gradient{end}",
            ),
            Case(
                f"outer{end}", name, x.nbytes, lambda p=p: launch.outer(xs, x, ranks, p, seed, torch.float32),
                lambda: xs.t() @ x, f"outer{end}",
            ),
        ]  # fmt: skip
    return found


def sweep(chosen: list[Case], speed: float) -> list[dict[str, object]]:
    """The best settings of each kernel on each shape."""
    results: list[dict[str, object]] = []
    for case in chosen:
        if not case.setting:
            continue
        default = launch.CONFIG[case.setting]
        times: dict[tuple[int, int, int, int], float] = {}
        stages = (1,) if case.setting.startswith(("expand", "input")) else (2, 3, 4)
        settings = itertools.product((32, 64, 128), (64, 128), (4, 8), stages)
        for setting in settings:
            launch.CONFIG[case.setting] = setting
            with contextlib.suppress(Exception):  # a setting that does not fit
                times[setting] = measured(case.ours)
        launch.CONFIG[case.setting] = default
        best = sorted(times, key=times.__getitem__)[:5]
        text = ", ".join(f"{each} {times[each]:.0f}" for each in best)
        print(
            f"{case.kernel:20} {case.layers:10} bound {case.size / speed:5.0f} {default} {times.get(default, 0):.0f}: {text}",
            flush=True,
        )
        results.append({"kernel": case.kernel, "layers": case.layers, "times": {str(k): v for k, v in times.items()}})
    return results


def table(chosen: list[Case], speed: float) -> list[dict[str, object]]:
    """Each kernel at its settings, beside cuBLAS."""
    print(f"{'kernel':20} {'layers':10} {'bound':>7} {'ours':>7} {'cuBLAS':>7}")
    results: list[dict[str, object]] = []
    for case in chosen:
        bound, ours, theirs = case.size / speed, measured(case.ours), measured(case.theirs)
        results.append({"kernel": case.kernel, "layers": case.layers, "bound": bound, "ours": ours, "cublas": theirs})
        print(f"{case.kernel:20} {case.layers:10} {bound:7.0f} {ours:7.0f} {theirs:7.0f}", flush=True)
    return results


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the factors")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of kernels; default all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    speed = bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, copies {speed / 1e6:.2f} TB/s; {options.rows} rows, rank {options.rank}, microseconds"
    )
    chosen = cases(options.rows, options.rank, getattr(torch, options.dtype))
    chosen = [case for case in chosen if not options.only or case.kernel in options.only]
    results = sweep(chosen, speed) if options.sweep else table(chosen, speed)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
