"""`fxlora::lora_linear` and `fxlora::lora_linear_siblings`: linear layers with their low-rank branches as one operator.

    yᵢ = x Wᵢᵀ + bᵢ + scaleᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ          (arXiv:2106.09685, eq. 3)

Kept for the backward pass are x and `xs = [scaleᵢ · dropᵢ(x) Aᵢᵀ]ᵢ`, no cast or dropped copy of x. The factors may have
another dtype than x, which is that of the products; sums are float32. The small products come first, and the large one
is added to them in the epilogue of its own GEMM; all siblings have one buffer for dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxlora.ops import aten
from fxlora.ops.choice import choose


def implementation(x: Tensor, Bs: Sequence[Tensor]) -> ModuleType:
    """What computes the low-rank terms of layers with an input `x (M, K)` and factors `Bᵢ (Nᵢ, rᵢ)`."""
    outputs, ranks = tuple(B.shape[0] for B in Bs), tuple(B.shape[1] for B in Bs)
    if not choose(x.device, x.dtype, x.shape[0], outputs, ranks).kernels:
        return aten
    from fxlora.ops import launch

    return launch


def rows_of(tensor: Tensor) -> Tensor:
    """`(…, features)` as contiguous `(M, features)`."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
    scales: Sequence[Tensor], p: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """See `lora_linear_siblings`."""
    rows, ranks = rows_of(x), [A.shape[0] for A in As]
    use = implementation(rows, Bs)
    A = use.prepare(As, x.dtype)
    xs = use.shrink(rows, A, ranks, scales, p, seed)
    outputs: list[Tensor] = []
    for part, W, bias, B in zip(xs.split(ranks, 1), weights, biases, Bs, strict=True):
        y = use.expand(part, B, bias).addmm_(rows, W.t())
        outputs.append(y.view(*x.shape[:-1], W.shape[0]))
    return [*outputs, xs, A]


def backward(
    dys: Sequence[Tensor], x: Tensor, xs: Tensor, weights: Sequence[Tensor], A: Tensor, Bs: Sequence[Tensor],
    scales: Sequence[Tensor], p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x (empty if it needs none), of all A and of all B, the last two flat."""
    rows, gradients = rows_of(x), [rows_of(dy) for dy in dys]
    use = implementation(rows, Bs)
    ranks = [B.shape[1] for B in Bs]
    dxa, dB_partials = use.reduce(gradients, xs, Bs, scales)
    dA, dB = use.finish(use.outer(dxa, rows, ranks, p, seed), dB_partials, p, dtype, Bs[0].dtype)
    if not needs_dx:
        return [x.new_empty(0), dA, dB]
    dx = use.input_gradient(dxa, A, ranks, p, seed)
    for dy, W in zip(gradients, weights, strict=True):
        dx.addmm_(dy, W)
    return [dx.view(x.shape), dA, dB]


@torch.library.custom_op("fxlora::lora_linear_siblings", mutates_args=())
def lora_linear_siblings(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], p: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Linear layers that share their input.

    Args:
        x: `(…, K)`.
        weights: `(Nᵢ, K)`, in x's dtype.
        biases: `(Nᵢ,)`, or None.
        As: `(rᵢ, K)`, of any floating dtype.
        Bs: `(Nᵢ, rᵢ)`.
        scales: one element each.
        p: the probability of dropping an entry of a branch's input; each branch has a mask of its own.
        seed: see `fxlora.ops.mask`; None for no dropout.

    Returns:
        The outputs `(…, Nᵢ)` in x's dtype; behind them, for the backward pass alone, `xs (M, Σ rᵢ)` and all A as one
        matrix in x's dtype.
    """
    return forward(x, weights, biases, As, Bs, scales, p, seed)


@lora_linear_siblings.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], p: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    outputs = [x.new_empty(*x.shape[:-1], W.shape[0]) for W in weights]
    rank, columns = sum(A.shape[0] for A in As), x.shape[-1]
    return [*outputs, x.new_empty(x.numel() // columns, rank), x.new_empty(rank, columns)]


@torch.library.custom_op("fxlora::lora_linear_siblings_backward", mutates_args=())
def lora_linear_siblings_backward(
    dys: list[Tensor], x: Tensor, xs: Tensor, weights: list[Tensor], A: Tensor, Bs: list[Tensor],
    scales: list[Tensor], p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """See `backward`."""
    return backward(dys, x, xs, weights, A, Bs, scales, p, seed, dtype, needs_dx)


@lora_linear_siblings_backward.register_fake
def _(
    dys: list[Tensor], x: Tensor, xs: Tensor, weights: list[Tensor], A: Tensor, Bs: list[Tensor],
    scales: list[Tensor], p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return [dx, A.new_empty(A.numel(), dtype=dtype), Bs[0].new_empty(sum(B.numel() for B in Bs))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, _, As, Bs, scales, ctx.p, seed = inputs
    ctx.count = len(weights)
    ctx.factors = [(A.shape, A.dtype) for A in As]
    ctx.save_for_backward(x, *output[-2:], seed, *weights, *Bs, *scales)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, xs, A, seed, *rest = ctx.saved_tensors
    n = ctx.count
    weights, Bs, scales = (rest[i * n : (i + 1) * n] for i in range(3))
    needs = ctx.needs_input_grad
    dys = gradients[:n]
    dx, dA, dB = torch.ops.fxlora.lora_linear_siblings_backward(
        dys, x, xs, weights, A, Bs, scales, ctx.p, seed, ctx.factors[0][1], needs[0]
    )
    dWs = [dy.flatten(0, -2).t() @ x.flatten(0, -2) if need else None for dy, need in zip(dys, needs[1], strict=True)]
    dbs = None  # torch takes a list of None for no list of tensors
    if not isinstance(needs[2], bool):
        dbs = [dy.flatten(0, -2).sum(0) if need else None for dy, need in zip(dys, needs[2], strict=True)]
    sizes = [shape.numel() for shape, _ in ctx.factors]
    dAs = [part.view(shape) for part, (shape, _) in zip(dA.split(sizes), ctx.factors, strict=True)]
    dBs = [part.view_as(B) for part, B in zip(dB.split([B.numel() for B in Bs]), Bs, strict=True)]
    return dx if needs[0] else None, dWs, dbs, dAs, dBs, [None] * n, None, None


lora_linear_siblings.register_autograd(_differentiate, setup_context=_save)
