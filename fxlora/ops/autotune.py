"""Measured choice between implementations: each kind of call is timed once, on random data, and remembered.

Switched on for the whole process by `fxlora.optimize(model, autotune=True)` or by the option `autotune` of the backend. A kind
is the device, the dtype, the number of rows up to the next power of two, the layers' sizes and ranks, and whether there is
dropout. Rows are known at a call, so there the choice is made: at the first of its kind.
"""

from __future__ import annotations

import functools
import logging
import math
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportUnknownVariableType]
)

from fxlora.ops import choice, tuning_file
from fxlora.ops.choice import Implementation, Shape
from fxlora.ops.tuning_file import Times

log = logging.getLogger("fxlora")

_on = False

_found: dict[Kind, Times] = {}

_read: set[str] = set()
"""Devices whose files have been read."""

_lock = threading.Lock()

_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Kind:
    """Calls that have one choice.

    Attributes:
        device: its name.
        dtype: of the input.
        rows: a power of two: as many or fewer, but more than half.
        shape: of the layers.
    """

    device: str
    dtype: torch.dtype
    rows: int
    shape: Shape

    def __str__(self) -> str:
        """As in files."""
        outputs, ranks = ("+".join(map(str, each)) for each in (self.shape.outputs, self.shape.ranks))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {self.rows} x {self.shape.columns} -> {outputs} r {ranks}{' dropout' * self.shape.drops}"


def switch(on: bool) -> None:
    """Measure from now on, or take what the cost model says."""
    global _on
    _on = on


def is_on() -> bool:
    """Whether choices are measured."""
    return _on


def forget() -> None:
    """Forget what was measured; files stay."""
    with _lock:
        _found.clear()
        _read.clear()


def measured_choice(device: torch.device, dtype: torch.dtype, rows: int, shape: Shape) -> Implementation | None:
    """The fastest implementation for a call.

    Args:
        device: of the input.
        dtype: of the input.
        rows: of the input.
        shape: of the layers.

    Returns:
        Of `kernels` and `products` on a GPU, of `composed` and `products` on a CPU. None where nothing can be compared, and
        where nothing is known yet while a CUDA graph is captured, in which no measurement belongs.
    """
    candidates = _candidates(device, dtype, shape, rows) if _on and rows else ()
    if len(candidates) < 2:
        return None
    kind = Kind(name_of(device), dtype, 1 << (rows - 1).bit_length(), shape)
    times = _found.get(kind)
    if times is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        times = _measured(kind, device, rows, candidates)
    return min(candidates, key=lambda how: times.get(how, math.inf))


def can_measure(device: torch.device, dtype: torch.dtype, shape: Shape) -> bool:
    """Whether choices are measured, and there are some for these layers."""
    return _on and len(_candidates(device, dtype, shape)) > 1


def known(device: torch.device, dtype: torch.dtype, shape: Shape) -> dict[Kind, Times]:
    """What was measured for layers, in microseconds, fewest rows first."""
    name = name_of(device)
    with _lock:
        _load(name)
        found = {
            kind: times
            for kind, times in _found.items()
            if (kind.device, kind.dtype, kind.shape) == (name, dtype, shape)
            and len(times) > 1  # compared, and not given up
        }
    return dict(sorted(found.items(), key=lambda each: each[0].rows))


def _candidates(
    device: torch.device, dtype: torch.dtype, shape: Shape, rows: int | None = None
) -> tuple[Implementation, ...]:
    if choice.composes(device):
        return ("composed", "products")
    return ("kernels", "products") if choice.kernels_apply(device, dtype, shape, rows) else ("products",)


def _measured(kind: Kind, device: torch.device, rows: int, candidates: tuple[Implementation, ...]) -> Times:
    with _lock:  # a second thread waits for the first one's figures
        _load(kind.device)
        times = _found.get(kind)
        if times is None:
            try:
                times = _time_all(kind, device, rows, candidates)
            except torch.OutOfMemoryError:
                log.warning("%s: too little memory to measure, the cost model chooses", kind)
                times = {choice.chosen(device, kind.dtype, rows, kind.shape): 0.0}
            else:
                tuning_file.add(kind.device, {str(kind): times})
            _found[kind] = times
    return times


def _load(device: str) -> None:
    """Read the file of a device, once."""
    if device in _read:
        return
    _read.add(device)
    for text, times in tuning_file.read(device).items():
        kind = _parsed(device, text)
        if kind is not None and set(times) in ({"kernels", "products"}, {"composed", "products"}):
            _found.setdefault(kind, times)


def _parsed(device: str, text: str) -> Kind | None:
    """The kind that a text of a file stands for, None if it is none."""
    try:
        dtype, rows, _, columns, _, outputs, _, ranks, *drops = text.split(" ")
        sizes, branches = (tuple(int(size) for size in each.split("+")) for each in (outputs, ranks))
        kind = Kind(
            device, getattr(torch, dtype), int(rows), Shape(int(columns), sizes, branches, drops == ["dropout"])
        )
    except (ValueError, AttributeError):
        return None
    return kind if isinstance(kind.dtype, torch.dtype) and str(kind) == text else None  # pyright: ignore[reportUnnecessaryIsInstance]


def _time_all(kind: Kind, device: torch.device, rows: int, candidates: tuple[Implementation, ...]) -> Times:
    """Microseconds of each, on random data: no generator, graph or mode of the caller's is touched."""
    generators = [device] if device.type == "cuda" else []
    with _disable_current_modes(), torch.inference_mode(False), torch.random.fork_rng(generators):
        steps = {how: _step(how, kind, device, rows) for how in candidates}
        return {how: round(_timed(step, device), 2) for how, step in steps.items()}


def _step(how: Implementation, kind: Kind, device: torch.device, rows: int) -> Callable[[], object]:
    """Forward and backward: on a GPU of the low-rank terms alone, on a CPU of the layers too, which one way lies within."""
    from fxlora.ops import aten

    shape, p = kind.shape, 0.1 if kind.shape.drops else 0.0
    x, dys = (
        _random(device, kind.dtype, rows, shape.columns),
        [_random(device, kind.dtype, rows, out) for out in shape.outputs],
    )
    As = [_random(device, torch.float32, rank, shape.columns) for rank in shape.ranks]
    Bs = [_random(device, torch.float32, out, rank) for out, rank in zip(shape.outputs, shape.ranks, strict=True)]
    scales = [torch.ones((), device=device) for _ in shape.ranks]
    if device.type == "cpu":
        weights = [_random(device, kind.dtype, out, shape.columns) for out in shape.outputs]
        return _whole_step(how, x, weights, As, Bs, scales, p, dys)
    seed = torch.ones(1, dtype=torch.int64, device=device) if p else None
    if how == "kernels":
        from fxlora.ops import launch

        use = launch
    else:
        use = aten
    ranks = list(shape.ranks)

    def step() -> None:
        A = use.prepare(As, kind.dtype)
        xs = use.shrink(x, A, ranks, scales, p, seed)
        for part, B in zip(xs.split(ranks, 1), Bs, strict=True):
            use.expand(part, B, None)
        dxa, partials = use.reduce(dys, xs, Bs, scales)
        use.finish(use.outer(dxa, x, ranks, p, seed, torch.float32), partials, p, torch.float32, torch.float32)
        use.input_gradient(dxa, A, ranks, p, seed)

    return step


def _whole_step(
    how: Implementation, x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor],
    p: float, dys: list[Tensor],
) -> Callable[[], object]:  # fmt: skip
    from fxlora.ops.composed import is_few, of_few_rows, of_many_rows
    from fxlora.ops.eager import Linears
    from fxlora.ops.mask import draw_seed

    leaves = [each.requires_grad_() for each in (x, *As, *Bs)]
    biases, dropout = [None] * len(weights), nn.Dropout(p) if p else None

    def forward() -> tuple[Tensor, ...]:
        if how == "composed":
            each = list(zip(weights, biases, As, Bs, scales, strict=True))
            if is_few(x):
                return tuple(of_few_rows(x, *arguments, dropout, None) for arguments in each)
            return tuple(of_many_rows(x, *arguments, p) for arguments in each)
        seed = draw_seed(x.device) if p else None
        return cast("tuple[Tensor, ...]", Linears.apply(x, p, seed, *weights, *biases, *As, *Bs, *scales))

    def step() -> None:
        with torch.enable_grad():
            torch.autograd.grad(forward(), leaves, dys)

    return step


def _random(device: torch.device, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(size, device=device).to(dtype)


def _timed(step: Callable[[], object], device: torch.device) -> float:
    """Microseconds: the median of some rounds, after a first one in which kernels are compiled."""
    step()
    measure = _on_gpu if device.type == "cuda" else _on_cpu
    return statistics.median(measure(step) for _ in range(_ROUNDS))


def _on_cpu(step: Callable[[], object]) -> float:
    count, start = 0, time.perf_counter()
    while True:
        step()
        count += 1
        spent = time.perf_counter() - start
        if spent > 1e-3:
            return 1e6 * spent / count


def _on_gpu(step: Callable[[], object], count: int = 5) -> float:
    """Time of the device, as in a CUDA graph: the host fills the queue while the device waits."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(5_000_000)
    begin.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / count


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _processor() -> str:
    try:
        lines: Iterator[str] = iter(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        lines = iter(())
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def name_of(device: torch.device) -> str:
    """What figures are for."""
    if device.type == "cuda":
        return _gpu_name(device.index or 0)
    return f"{_processor()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
