"""`fxlora::lora_swiglu`: a SwiGLU block whose three layers have branches, as one operator.

    y = down(silu(gate(x)) · up(x))

Kept for the backward pass are x or its source (see `fxlora.ops.linear`), the base's gate and up, which the frozen block keeps
too, and what has only a branch's rank for features: down's input is made anew.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxlora.ops import aten
from fxlora.ops.autocast import register_autocast
from fxlora.ops.batching import by_rows, by_sample
from fxlora.ops.choice import LARGEST_RANK
from fxlora.ops.linear import (
    NO_SECOND,
    aligned_rows,
    check_residual,
    common_dtype,
    contiguous,
    implementation,
    kept_input,
    row_factors,
    rows_of,
)


def block_implementation(rows: Tensor, Bs: list[Tensor], p: float) -> ModuleType:
    """As for linear layers; the kernels take one rank for all three, and none that is large."""
    ranks = {B.shape[1] for B in Bs}
    return implementation(rows, Bs[:2], p) if len(ranks) == 1 and max(ranks) <= LARGEST_RANK else aten


@torch.library.custom_op("fxlora::lora_swiglu", mutates_args=())
def lora_swiglu(
    x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor], p: float,
    seed: Tensor | None, source: Tensor | None = None, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """A SwiGLU block.

    Args:
        x: `(…, K)`.
        weights: of gate and up `(N, K)`, of down `(O, N)`, in x's dtype.
        As: of gate and up `(rᵢ, K)`, of down `(rᵢ, N)`, of any floating dtype.
        Bs: of gate and up `(N, rᵢ)`, of down `(O, rᵢ)`.
        scales: one element each.
        p: the probability of dropping an entry of a branch's input.
        seed: see `fxlora.ops.mask`; None for no dropout.
        source: of x, as for `lora_linear_siblings`.
        row_scale: likewise.
        column_scale: likewise.
        residual: None, or what is added to the output, in its shape and dtype.

    Returns:
        The output `(…, O)`; behind it, for the backward pass alone, the base's gate and up `(M, N)`, the scaled
        products with the A of gate and up and with that of down, and the first two A as one matrix.
    """
    del source, row_scale, column_scale  # only for the backward pass
    check_residual(residual, x, weights)
    rows, ranks = aligned_rows(x), [A.shape[0] for A in As[:2]]
    As, Bs, scales = contiguous(As, x), contiguous(Bs, x), contiguous(scales, x)
    use = block_implementation(rows, Bs, p)
    A = use.prepare(As[:2], x.dtype)
    xs = use.shrink(rows, A, ranks, scales[:2], p, seed)
    g, u = rows @ weights[0].t(), rows @ weights[1].t()
    h, xd = use.swiglu_forward(g, u, xs, Bs[0], Bs[1], As[2], scales[2], p, seed)
    y = use.expand(xd, Bs[2], None, None if residual is None else rows_of(residual)).addmm_(h, weights[2].t())
    return [y.view(*x.shape[:-1], y.shape[1]), g, u, xs, xd, A]


@lora_swiglu.register_fake
def _(
    x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor], p: float,
    seed: Tensor | None, source: Tensor | None = None, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    check_residual(residual, x, weights)
    columns, middle, rank = x.shape[-1], weights[0].shape[0], As[0].shape[0] + As[1].shape[0]
    rows = x.numel() // columns
    shapes = ((rows, middle), (rows, middle), (rows, rank), (rows, As[2].shape[0]), (rank, columns))
    return [x.new_empty(*x.shape[:-1], weights[2].shape[0]), *(x.new_empty(shape) for shape in shapes)]


@torch.library.custom_op("fxlora::lora_swiglu_backward", mutates_args=())
def lora_swiglu_backward(
    dy: Tensor, x: Tensor, g: Tensor, u: Tensor, xs: Tensor, xd: Tensor, A: Tensor, weights: list[Tensor], A_down: Tensor,
    Bs: list[Tensor], scales: list[Tensor], p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
    needs_dW: bool, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, of the A of gate and up, of down, of the B of gate and up, of down, and of the three weights.

    Those that are not needed are empty.
    """
    rows, gradient = aligned_rows(x), rows_of(dy)
    A_down, Bs, scales = A_down.contiguous(), contiguous(Bs, x), contiguous(scales, x)
    ranks = [B.shape[1] for B in Bs[:2]]
    use = block_implementation(rows, Bs, p)
    dxd, dB_partials = use.reduce([gradient], xd, Bs[2:], scales[2:])
    dg, du, dxa, dB, dA_down = use.swiglu_backward(
        gradient @ weights[2], g, u, xs, Bs[0], Bs[1], A_down, dxd, scales[:2], p, seed, dtype
    )
    row_scale = row_factors(row_scale, x)
    dA_partials = use.outer(dxa, rows, ranks, p, seed, dtype, row_scale, column_scale)
    dA, dB_down = use.finish(dA_partials, dB_partials, p, dtype, dtype)
    dx, dWs = x.new_empty(0), [x.new_empty(0) for _ in weights]
    if needs_dx:
        dx = use.input_gradient(dxa, A, ranks, p, seed).addmm_(dg, weights[0]).addmm_(du, weights[1]).view(x.shape)
    if needs_dW:
        h, _ = use.swiglu_forward(g, u, xs, Bs[0], Bs[1], A_down, scales[2], 0.0, None)
        rows = aten.restored(rows, row_scale, column_scale)
        dWs = [dg.t() @ rows, du.t() @ rows, gradient.t() @ h]
    return [dx, dA, dA_down, dB, dB_down, *dWs]


@lora_swiglu_backward.register_fake
def _(
    dy: Tensor, x: Tensor, g: Tensor, u: Tensor, xs: Tensor, xd: Tensor, A: Tensor, weights: list[Tensor], A_down: Tensor,
    Bs: list[Tensor], scales: list[Tensor], p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
    needs_dW: bool, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    sizes = (A.numel(), A_down.shape, Bs[0].numel() + Bs[1].numel(), Bs[2].numel())
    factors = (x.new_empty(size, dtype=dtype) for size in sizes)
    return [
        x.new_empty(x.shape if needs_dx else 0),
        *factors,
        *(x.new_empty(W.shape if needs_dW else 0) for W in weights),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, As, Bs, scales, ctx.p, seed, *scaled, _ = inputs
    ctx.shapes, ctx.dtype = [A.shape for A in As[:2]], common_dtype([*As, *Bs])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*kept_input(x, *scaled), *output[1:], seed, *weights, As[2], *Bs, *scales)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, row_scale, column_scale, g, u, xs, xd, A, seed, *rest = ctx.saved_tensors
    weights, A_down, Bs, scales = rest[:3], rest[3], rest[4:7], rest[7:]
    needs_dx, needs_dW, *others = ctx.needs_input_grad
    dx, dA, dA_down, dB, dB_down, *dWs = torch.ops.fxlora.lora_swiglu_backward(
        gradients[0], x, g, u, xs, xd, A, weights, A_down, Bs, scales, ctx.p, seed, ctx.dtype, needs_dx, any(needs_dW),
        row_scale, column_scale,
    )  # fmt: skip
    sizes = [shape.numel() for shape in ctx.shapes]
    dAs = [*(part.view(shape) for part, shape in zip(dA.split(sizes), ctx.shapes, strict=True)), dA_down]
    dBs = [*(part.view(B.shape) for part, B in zip(dB.split([B.numel() for B in Bs[:2]]), Bs, strict=False))]
    dWs = [dW if need else None for dW, need in zip(dWs, needs_dW, strict=True)]
    dBs = [*dBs, dB_down.view(Bs[2].shape)]
    found = (dx if needs_dx else None, dWs, dAs, dBs, [None] * 3, *[None] * 5, gradients[0])
    return found[: 2 + len(others)]  # torch leaves trailing defaults out


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(NO_SECOND.format("fxlora::lora_swiglu"))


lora_swiglu.register_autograd(_differentiate, setup_context=_save)
lora_swiglu.register_vmap(by_rows(lora_swiglu, seed=6))
register_autocast("lora_swiglu", lora_swiglu, cast=(0, 1, 7, 10))
lora_swiglu_backward.register_autograd(_refuse)
lora_swiglu_backward.register_vmap(by_sample(lora_swiglu_backward))
register_autocast("lora_swiglu_backward", lora_swiglu_backward)
