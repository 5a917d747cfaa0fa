"""Which implementation computes the low-rank terms: Triton's kernels, ATen's products, or torch's own operations.

By device, dtype and shape, from an estimate of launches, memory traffic and arithmetic: see `choose`. The reasons have the
figures. `fxlora.ops.autotune` measures instead.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch

LARGEST_RANK = 64
"""What a program of a kernel holds of the factors; above it the products are bound by arithmetic, and cuBLAS is faster."""

MOST_ROWS = 65_535 * 32
"""CUDA's limit to a grid's second axis, on which kernels have blocks of at least 32 rows."""

_LAUNCH = 3e-6
"""Seconds of a kernel that does nothing; this and what follows as on an H100."""

_BANDWIDTH = 2e12
"""Bytes a second that a kernel that reads or writes activations reaches."""

_PRODUCTS_RATE = 6e14
"""Operations a second of cuBLAS in 16 bits."""

_KERNELS_RATE = 1.5e14
"""Likewise of the kernels, whose products are as narrow as the rank."""

_HOST = 2.5e-4
"""Seconds that the host takes to launch what is behind a layer with a branch, forward and backward; with torch's own
operations it takes a third. Machines differ by a factor of three."""

_LADDER = (1, 128, 512, 2048, 8192, 32768)
"""Numbers of rows for which a report has figures where they are not known."""

Implementation = Literal["kernels", "products", "composed"]

NAMES: dict[Implementation, str] = {
    "kernels": "Triton's kernels",
    "products": "ATen's products",
    "composed": "torch's own operations",
}

SHORT_NAMES: dict[Implementation, str] = {"kernels": "kernels", "products": "ATen", "composed": "torch"}


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes the low-rank terms, and why."""

    how: Implementation
    reason: str

    @property
    def kernels(self) -> bool:
        """Whether Triton's kernels do."""
        return self.how == "kernels"


@dataclass(frozen=True, slots=True)
class Shape:
    """Linear layers that share an input.

    Attributes:
        columns: features of the input.
        outputs: features of each layer's output.
        ranks: of each layer's branch.
        drops: whether the branches' inputs are dropped.
    """

    columns: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    drops: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the low-rank terms cost, forward and backward, with float32 factors and 16-bit activations.

    Attributes:
        flop: operations of the products.
        launches: of kernels.
        bytes: read and written.
        seconds: all in all.
    """

    flop: float
    launches: int
    bytes: float
    seconds: float


def estimate(shape: Shape, rows: int, kernels: bool) -> Estimate:
    """Estimate the low-rank terms of a call with so many rows; what the layers themselves cost is not in it."""
    K, N, r, count = shape.columns, sum(shape.outputs), sum(shape.ranks), len(shape.ranks)
    flop = 6.0 * rows * sum(rank * (shape.columns + out) for rank, out in zip(shape.ranks, shape.outputs, strict=True))
    factors = r * K + sum(rank * out for rank, out in zip(shape.ranks, shape.outputs, strict=True))
    if kernels:
        # x for xA, each y, each dy once for both its products, x for dA, dx; factors read as they are, gradients written
        activations, launches = 3 * K + 2 * N, 7 + count
        padded = flop * max(1.0, 16 * count / r)
        seconds = max(padded / _KERNELS_RATE, (2.0 * rows * activations + 16.0 * factors) / _BANDWIDTH)
    else:
        # each dy twice; casts of A, of B in both passes, and of both gradients unless cuBLAS writes them in float32
        activations, launches = 3 * K + 3 * N, 10 if count == 1 else 7 * count + 6
        if shape.drops:
            activations, launches = activations + count * 9 * K, launches + 6 * count
        factors *= 2
        seconds = flop / _PRODUCTS_RATE + (2.0 * rows * activations + 16.0 * factors) / _BANDWIDTH
    return Estimate(flop, launches, 2.0 * rows * activations + 16.0 * factors, seconds + launches * _LAUNCH)


@functools.cache
def _triton_works() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels can run on a device: a GPU of compute capability 8.0 or later, or the interpreter."""
    if not _triton_works():
        return False
    if device.type != "cuda":
        return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.version.hip is None


def composes(device: torch.device) -> bool:
    """Whether layers and branches are best left to torch's own operations: on CPUs, see `fxlora.ops.composed`."""
    return device.type == "cpu"


def waits_for_host(device: torch.device, layers: int, multiplications: float) -> bool:
    """Whether a compiled graph without CUDA graphs takes the host longer to launch, with operators, than the device to run.

    Then torch's own operations are faster: more of them, but launched by compiled code.

    Args:
        device: of the graph.
        layers: with branches.
        multiplications: of all linear layers in one direction, summed over tokens.
    """
    return device.type == "cuda" and 4 * multiplications / _PRODUCTS_RATE < layers * _HOST


def choose(device: torch.device, dtype: torch.dtype, rows: int | None, shape: Shape) -> Choice:
    """Choose what an operator computes its low-rank terms with.

    Args:
        device: of the input.
        dtype: of the input.
        rows: of the input: tokens. None if they are not known yet; the reason then says how the choice goes by them.
        shape: of the layers.
    """
    excluded = _excluded(device, dtype, rows, shape)
    if excluded is not None:
        return Choice("products", excluded)
    if rows is None:
        return _over_rows(shape)
    how = "kernels" if _kernels_pay(shape, rows) else "products"
    ranks = " and ".join(map(str, sorted(set(shape.ranks))))
    return Choice(how, f"rank {ranks} at {rows:,} rows: {_figures(shape, rows)}")


def foreseen(device: torch.device, dtype: torch.dtype, shape: Shape) -> Choice:
    """What calls will do, before there are any: for reports."""
    if composes(device):
        return Choice("composed", "on a CPU the call of an operator costs more than it saves")
    return choose(device, dtype, None, shape)


@functools.lru_cache(4096)
def chosen(device: torch.device, dtype: torch.dtype, rows: int, shape: Shape) -> Implementation:
    """What `choose` says, without its reason."""
    return choose(device, dtype, rows, shape).how


def _excluded(device: torch.device, dtype: torch.dtype, rows: int | None, shape: Shape) -> str | None:
    """Why no kernels come into question, if they do not."""
    if not has_kernels(device):
        return f"no Triton kernels on {device.type}"
    if rows == 0:
        return "an empty batch"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} activations: only 16-bit ones have kernels"
    if len(shape.outputs) > 3:
        return f"{len(shape.outputs)} layers share an input: the kernels take up to 3"
    if rows is not None and rows > MOST_ROWS:
        return f"{rows:,} rows: the kernels take up to {MOST_ROWS:,}"
    if max(shape.ranks) > LARGEST_RANK:
        rows = rows or 512
        flop = estimate(shape, rows, False).flop
        times = ", ".join(
            f"{name} {flop / rate * 1e6:,.0f} us"
            for name, rate in (("kernels", _KERNELS_RATE), ("cuBLAS", _PRODUCTS_RATE))
        )
        return f"rank {max(shape.ranks)} is above {LARGEST_RANK}: {_scaled(flop, 'FLOP')} at {rows:,} rows would take {times}"
    return None


def kernels_apply(device: torch.device, dtype: torch.dtype, shape: Shape, rows: int | None = None) -> bool:
    """Whether there are kernels for layers, and for so many rows if they are known, whether they pay or not."""
    return _excluded(device, dtype, rows, shape) is None


def _kernels_pay(shape: Shape, rows: int) -> bool:
    return estimate(shape, rows, True).seconds <= estimate(shape, rows, False).seconds


def _over_rows(shape: Shape) -> Choice:
    """The choice for each number of rows of a ladder, in one reason."""
    pay = {rows: _kernels_pay(shape, rows) for rows in _LADDER}
    how: Implementation = "kernels" if sum(pay.values()) * 2 >= len(pay) else "products"
    others = [f"{rows:,}" for rows, kernels in pay.items() if kernels != (how == "kernels")]
    figures = "; ".join(f"{rows:,} rows: {_figures(shape, rows)}" for rows in (512, 8192))
    by_rows = "whatever the number of rows, which a call knows" if not others else (
        f"but {NAMES['products' if how == 'kernels' else 'kernels']} at {', '.join(others)} rows, which a call knows"
    )  # fmt: skip
    return Choice(how, f"{by_rows}; {figures}")


def _figures(shape: Shape, rows: int) -> str:
    kernels, products = (estimate(shape, rows, each) for each in (True, False))
    return f"{_scaled(kernels.flop, 'FLOP')}, about {_cost(kernels)} by kernels, {_cost(products)} by ATen"


def _cost(found: Estimate) -> str:
    return f"{found.seconds * 1e6:,.0f} us ({_scaled(found.bytes, 'B')}, {found.launches} launches)"


def _scaled(number: float, unit: str) -> str:
    prefix, size = next((each for each in (("G", 1e9), ("M", 1e6)) if number >= each[1]), ("k", 1e3))
    return f"{number / size:.3g} {prefix}{unit}"
