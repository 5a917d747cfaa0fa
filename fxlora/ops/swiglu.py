"""`fxlora::lora_swiglu`: a SwiGLU block whose three layers have branches, as one operator.

    y = down(silu(gate(x)) · up(x))

Kept for the backward pass are x, the base's gate and up, which the frozen block keeps too, and what has only a branch's
rank for features: down's input is made anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxlora.ops.linear import implementation, rows_of


@torch.library.custom_op("fxlora::lora_swiglu", mutates_args=())
def lora_swiglu(
    x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor], p: float,
    seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """A SwiGLU block.

    Args:
        x: `(…, K)`.
        weights: of gate and up `(N, K)`, of down `(O, N)`, in x's dtype.
        As: of gate and up `(r, K)`, of down `(r, N)`, of any floating dtype.
        Bs: of gate and up `(N, r)`, of down `(O, r)`.
        scales: one element each.
        p: the probability of dropping an entry of a branch's input.
        seed: see `fxlora.ops.mask`; None for no dropout.

    Returns:
        The output `(…, O)`; behind it, for the backward pass alone, the base's gate and up `(M, N)`, the scaled
        products with the A of gate and up `(M, 2 r)` and with that of down `(M, r)`, and the first two A as one matrix.
    """
    rows, rank = rows_of(x), As[0].shape[0]
    use = implementation(rows, Bs[:2])
    A = use.prepare(As[:2], x.dtype)
    xs = use.shrink(rows, A, [rank, rank], scales[:2], p, seed)
    g, u = rows @ weights[0].t(), rows @ weights[1].t()
    h, xd = use.swiglu_forward(g, u, xs, Bs[0], Bs[1], As[2], scales[2], p, seed)
    y = use.expand(xd, Bs[2], None).addmm_(h, weights[2].t())
    return [y.view(*x.shape[:-1], y.shape[1]), g, u, xs, xd, A]


@lora_swiglu.register_fake
def _(
    x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor], p: float,
    seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    columns, rank, middle = x.shape[-1], As[0].shape[0], weights[0].shape[0]
    rows = x.numel() // columns
    shapes = ((rows, middle), (rows, middle), (rows, 2 * rank), (rows, rank), (2 * rank, columns))
    return [x.new_empty(*x.shape[:-1], weights[2].shape[0]), *(x.new_empty(shape) for shape in shapes)]


@torch.library.custom_op("fxlora::lora_swiglu_backward", mutates_args=())
def lora_swiglu_backward(
    dy: Tensor, x: Tensor, g: Tensor, u: Tensor, xs: Tensor, xd: Tensor, A: Tensor, weights: list[Tensor], A_down: Tensor,
    Bs: list[Tensor], scales: list[Tensor], p: float, seed: Tensor | None, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x (empty if it needs none), of the A of gate and up, of down, of the B of gate and up, and of down."""
    rows, gradient, rank = rows_of(x), rows_of(dy), A_down.shape[0]
    dtype = A_down.dtype
    use = implementation(rows, Bs[:2])
    dxd, dB_partials = use.reduce([gradient], xd, Bs[2:], scales[2:])
    dg, du, dxa, dB, dA_down = use.swiglu_backward(
        gradient @ weights[2], g, u, xs, Bs[0], Bs[1], A_down, dxd, scales[:2], p, seed, dtype
    )
    dA, dB_down = use.finish(use.outer(dxa, rows, [rank, rank], p, seed), dB_partials, p, dtype, dtype)
    dx = x.new_empty(0)
    if needs_dx:
        dx = (
            use.input_gradient(dxa, A, [rank, rank], p, seed)
            .addmm_(dg, weights[0])
            .addmm_(du, weights[1])
            .view(x.shape)
        )
    return [dx, dA, dA_down, dB, dB_down]


@lora_swiglu_backward.register_fake
def _(
    dy: Tensor, x: Tensor, g: Tensor, u: Tensor, xs: Tensor, xd: Tensor, A: Tensor, weights: list[Tensor], A_down: Tensor,
    Bs: list[Tensor], scales: list[Tensor], p: float, seed: Tensor | None, needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    sizes = (2 * A_down.shape[0] * x.shape[-1], A_down.shape, 2 * Bs[0].numel(), Bs[2].numel())
    return [x.new_empty(x.shape if needs_dx else 0), *(A_down.new_empty(size) for size in sizes)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, As, Bs, scales, ctx.p, seed = inputs
    ctx.save_for_backward(x, *output[1:], seed, *weights, As[2], *Bs, *scales)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, g, u, xs, xd, A, seed, *rest = ctx.saved_tensors
    weights, A_down, Bs, scales = rest[:3], rest[3], rest[4:7], rest[7:]
    needs_dx = ctx.needs_input_grad[0]
    dx, dA, dA_down, dB, dB_down = torch.ops.fxlora.lora_swiglu_backward(
        gradients[0], x, g, u, xs, xd, A, weights, A_down, Bs, scales, ctx.p, seed, needs_dx
    )
    dAs = [*dA.view(2, *A_down.shape[:1], -1), dA_down]
    dBs = [*dB.view(2, *Bs[0].shape), dB_down.view_as(Bs[2])]
    return (dx if needs_dx else None), [None] * 3, dAs, dBs, [None] * 3, None, None


lora_swiglu.register_autograd(_differentiate, setup_context=_save)
