"""Dropout whose mask is never kept: a function of a seed, made anew in the backward pass.

A seed is an int64 tensor of one element on the device of the input, drawn in the graph (`draw_seed`), so that torch's
generator decides it and recomputation under gradient checkpointing meets the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxlora.ops.choice import MOST_ROWS, has_kernels

RESOLUTION = 1 << 32
"""Kernels round a probability to a multiple of its inverse."""

COARSE_RESOLUTION = 1 << 16
"""Likewise where there are no kernels, or too many rows for them."""


SEEDS = 2**62
"""How many seeds there are."""


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, `(1,)` int64."""
    return torch.randint(0, SEEDS, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """How many of `RESOLUTION` numbers are dropped."""
    return min(round(p * RESOLUTION), RESOLUTION - 1)


def dropped(x: Tensor, p: float, seed: Tensor, sibling: int) -> Tensor:
    """`x (rows, features)` with entries dropped and the others scaled, by the mask of one of several siblings."""
    if has_kernels(x.device) and x.shape[0] <= MOST_ROWS:
        from fxlora.ops.launch import drop

        return drop(x, p, seed, sibling)
    drops = round(p * COARSE_RESOLUTION)
    if drops >= COARSE_RESOLUTION:
        return torch.zeros_like(x)
    generator = torch.Generator(x.device)
    generator.manual_seed(int(seed) + sibling)
    # four 16-bit numbers of each draw: `bernoulli_` makes one number for each entry, which takes four times as long
    numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    numbers = numbers.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    return torch.where(numbers >= drops - (1 << 15), x, 0.0).mul_(1 / (1 - drops / COARSE_RESOLUTION))
