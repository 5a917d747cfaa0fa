"""A linear layer and its branch in torch's own operations: what pays on a CPU, where an operator costs more than it saves.

Autograd differentiates it, and Inductor compiles it, as any model. Kept for the backward pass is what the operators keep, and
in training with dropout the dropped x of each branch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fxlora.ops.mask import draw_seed, dropped

_FEW_ROWS = 32
"""Up to here calls cost more than products."""

_FEW_ENTRIES = 1024
"""Of the product with A: up to here, and with few rows, 16-bit products take longer than float32 ones of cast rows."""

_ROWS_OF_OWN_MASK = 256
"""From here on a mask of `fxlora.ops.mask`, made twice, costs less than that of `dropout`, kept."""


def is_few(x: Tensor) -> bool:
    """Whether `of_few_rows` pays; not while tracing, where a number of rows would become a condition of what is compiled."""
    return not torch.compiler.is_compiling() and x.numel() <= _FEW_ROWS * x.shape[-1]


def of_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, dropout: nn.Module | None,
    layer: nn.Module | None,
) -> Tensor:  # fmt: skip
    """The layer with its branch in as few calls as can be, right for whatever the canonical graph is right for."""
    y = F.linear(x, weight, bias) if layer is None else layer(x)
    if dropout is not None:
        x = dropout(x)
    if A.dtype == B.dtype == x.dtype == y.dtype:
        return torch.add(y, F.linear(F.linear(x, A) * scale, B))
    dtype = A.dtype if is_narrow(x.dtype, x.shape[:-1].numel(), A) else x.dtype
    xs = F.linear(x.to(dtype), A.to(dtype)) * scale
    return torch.add(y, F.linear(xs, B.to(dtype))).to(y.dtype)


def of_many_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, p: float
) -> Tensor:
    """`x Wᵀ + b + scale · drop(x) Aᵀ Bᵀ` in x's dtype, the second term added in the epilogue of its last product.

    Args:
        x: `(…, K)`.
        weight: `(N, K)`, in x's dtype.
        bias: `(N,)`, or None.
        A: `(r, K)`, of any floating dtype.
        B: `(N, r)`.
        scale: 0-dim.
        p: the probability of dropping an entry of the branch's input.
    """
    rows = x.flatten(0, -2)
    low = _dropped(rows, p) if p else rows
    xs = F.linear(low, A.to(x.dtype)) * scale
    y = F.linear(rows, weight, bias).addmm_(xs, B.to(x.dtype).t())
    return y.view(*x.shape[:-1], weight.shape[0])


def is_narrow(dtype: torch.dtype, rows: int, A: Tensor) -> bool:
    """Whether a branch of few rows of a dtype is best computed in that of its factor A `(r, K)`."""
    return A.dtype != dtype and rows <= _FEW_ROWS and rows * A.shape[0] <= _FEW_ENTRIES


def _dropped(rows: Tensor, p: float) -> Tensor:
    if torch.compiler.is_compiling() or len(rows) < _ROWS_OF_OWN_MASK:
        return F.dropout(rows, p)
    return cast(Tensor, _Dropped.apply(rows, p))


class _Dropped(torch.autograd.Function):
    """Dropout that keeps a seed for its mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Drop entries of x `(M, K)`."""
        seed = draw_seed(x.device)
        ctx.p = p
        ctx.save_for_backward(seed)
        return dropped(x, p, seed, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same entries of the gradient."""
        (seed,) = ctx.saved_tensors
        return dropped(dx, ctx.p, seed, 0), None
