"""`fxlora::lora_dora_swiglu`: a SwiGLU block whose three layers have branches of DoRA, as one operator.

The ratios of gate and up are inside of the SwiGLU product, forward and backward, and cost no pass of their own. Kept for
the backward pass are, beyond what `fxlora::lora_swiglu` keeps, down's product before its ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxlora.ops import aten
from fxlora.ops.autocast import register_autocast
from fxlora.ops.batching import by_rows, by_sample
from fxlora.ops.dora import shaped
from fxlora.ops.linear import (
    NO_SECOND,
    aligned_rows,
    check_residual,
    common_dtype,
    contiguous,
    kept_input,
    row_factors,
    rows_of,
)
from fxlora.ops.swiglu import block_implementation


@torch.library.custom_op("fxlora::lora_dora_swiglu", mutates_args=())
def lora_dora_swiglu(
    x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor], ratios: list[Tensor],
    source: Tensor | None = None, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """A SwiGLU block, `y = ratiod · down(silu(ratiog · gate(x)) · ratiou · up(x))`.

    Args:
        x: `(…, K)`.
        weights: of gate and up `(N, K)`, of down `(O, N)`, in x's dtype.
        As: of gate and up `(rᵢ, K)`, of down `(rᵢ, N)`, of any floating dtype.
        Bs: of gate and up `(N, rᵢ)`, of down `(O, rᵢ)`.
        scales: one element each.
        ratios: of gate and up `(N,)`, of down `(O,)`, of any floating dtype.
        source: of x, as for `lora_linear_siblings`.
        row_scale: likewise.
        column_scale: likewise.
        residual: None, or what is added to the output, in its shape and dtype.

    Returns:
        The output `(…, O)`; behind it, for the backward pass alone, the base's gate and up `(M, N)`, down's product
        before its ratio `(M, O)`, the scaled products with the A of gate and up and with that of down, and the first two
        A as one matrix.
    """
    del source, row_scale, column_scale  # only for the backward pass
    check_residual(residual, x, weights)
    rows, ranks = aligned_rows(x), [A.shape[0] for A in As[:2]]
    As, Bs, scales, ratios = (contiguous(each, x) for each in (As, Bs, scales, ratios))
    use = block_implementation(rows, Bs, 0.0)
    A = use.prepare(As[:2], x.dtype)
    xs = use.shrink(rows, A, ranks, scales[:2], 0.0, None)
    g, u = rows @ weights[0].t(), rows @ weights[1].t()
    h, xd = use.swiglu_forward(g, u, xs, Bs[0], Bs[1], As[2], scales[2], 0.0, None, ratios[:2])
    product = use.expand(xd, Bs[2], None).addmm_(h, weights[2].t())
    y = use.rescale(product, ratios[2], None, None if residual is None else rows_of(residual))
    return [y.view(*x.shape[:-1], y.shape[1]), g, u, product, xs, xd, A]


@lora_dora_swiglu.register_fake
def _(
    x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor], ratios: list[Tensor],
    source: Tensor | None = None, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    check_residual(residual, x, weights)
    columns, (last, middle), rank = x.shape[-1], weights[2].shape, As[0].shape[0] + As[1].shape[0]
    rows = x.numel() // columns
    shapes = ((middle,), (middle,), (last,), (rank,), (As[2].shape[0],))
    kept = [x.new_empty(rows, *shape) for shape in shapes]
    return [x.new_empty(*x.shape[:-1], last), *kept, x.new_empty(rank, columns)]


@torch.library.custom_op("fxlora::lora_dora_swiglu_backward", mutates_args=())
def lora_dora_swiglu_backward(
    dy: Tensor, x: Tensor, g: Tensor, u: Tensor, product: Tensor, xs: Tensor, xd: Tensor, A: Tensor, weights: list[Tensor],
    A_down: Tensor, Bs: list[Tensor], scales: list[Tensor], ratios: list[Tensor], dtype: torch.dtype, needs_dx: bool,
    needs_dW: bool, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, of the A of gate and up, of down, and, each flat, of the B and ratios of gate and up, and of down.

    Behind them those of the three weights. Those of x and the weights are empty if they are not needed.
    """
    rows = aligned_rows(x)
    A_down = A_down.contiguous()
    Bs, scales, ratios = (contiguous(each, x) for each in (Bs, scales, ratios))
    ranks = [B.shape[1] for B in Bs[:2]]
    use = block_implementation(rows, Bs, 0.0)
    (gradient,), dxd, partials = use.reduce_rescaled([rows_of(dy)], [product], xd, Bs[2:], ratios[2:], scales[2:])
    dg, du, dxa, flat, dA_down = use.swiglu_backward(
        gradient @ weights[2], g, u, xs, Bs[0], Bs[1], A_down, dxd, scales[:2], 0.0, None, dtype, ratios[:2]
    )
    row_scale = row_factors(row_scale, x)
    dA_partials = use.outer(dxa, rows, ranks, 0.0, None, dtype, row_scale, column_scale)
    dA, flat_down = use.finish(dA_partials, partials, 0.0, dtype, dtype)
    dx, dWs = x.new_empty(0), [x.new_empty(0) for _ in weights]
    if needs_dx:
        dx = use.input_gradient(dxa, A, ranks, 0.0, None).addmm_(dg, weights[0]).addmm_(du, weights[1]).view(x.shape)
    if needs_dW:
        h, _ = use.swiglu_forward(g, u, xs, Bs[0], Bs[1], A_down, scales[2], 0.0, None, ratios[:2])
        rows = aten.restored(rows, row_scale, column_scale)
        dWs = [dg.t() @ rows, du.t() @ rows, gradient.t() @ h]
    return [dx, dA, dA_down, flat, flat_down, *dWs]


@lora_dora_swiglu_backward.register_fake
def _(
    dy: Tensor, x: Tensor, g: Tensor, u: Tensor, product: Tensor, xs: Tensor, xd: Tensor, A: Tensor, weights: list[Tensor],
    A_down: Tensor, Bs: list[Tensor], scales: list[Tensor], ratios: list[Tensor], dtype: torch.dtype, needs_dx: bool,
    needs_dW: bool, row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    sizes = (sum(each.numel() for each in (*Bs[part], *ratios[part])) for part in (slice(2), slice(2, 3)))
    factors = [x.new_empty(size, dtype=dtype) for size in (A.numel(), A_down.shape, *sizes)]
    return [
        x.new_empty(x.shape if needs_dx else 0),
        *factors,
        *(x.new_empty(W.shape if needs_dW else 0) for W in weights),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, As, Bs, scales, ratios, *scaled, _ = inputs
    ctx.shapes, ctx.dtype = [A.shape for A in As[:2]], common_dtype([*As, *Bs, *ratios])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*kept_input(x, *scaled), *output[1:], *weights, As[2], *Bs, *scales, *ratios)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    needs_dx, needs_dW, *others = ctx.needs_input_grad
    dx, dWs, *found = differentiate(
        torch.ops.fxlora.lora_dora_swiglu_backward, gradients[0], ctx.saved_tensors, ctx.shapes, ctx.dtype, needs_dx,
        any(needs_dW),
    )  # fmt: skip
    dWs = [dW if need else None for dW, need in zip(dWs, needs_dW, strict=True)]
    dAs, dBs, d_ratios = found
    results = (dx if needs_dx else None, dWs, dAs, dBs, [None] * 3, d_ratios, *[None] * 3, gradients[0])
    return results[: 2 + len(others)]  # torch leaves trailing defaults out


def differentiate(
    backward: Callable[..., list[Tensor]], dy: Tensor, saved: Sequence[Any], shapes: Sequence[torch.Size],
    dtype: torch.dtype, needs_dx: bool, needs_dW: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of x, and of all weights, A, B and ratios, from what both ways to call the operator save.

    Args:
        backward: `lora_dora_swiglu_backward`.
        dy: of the output.
        saved: x or its source, the two scales that make x of it, what the operator returns behind its output, weights, down's A, all B, scales and ratios.
        shapes: of the A of gate and up.
        dtype: of the factors' gradients.
        needs_dx: whether that of x is needed.
        needs_dW: likewise of the weights.
    """
    (x, row_scale, column_scale, *kept), weights, A_down, rest = saved[:9], list(saved[9:12]), saved[12], saved[13:]
    Bs, scales, ratios = (list(rest[first : first + 3]) for first in (0, 3, 6))
    dx, dA, dA_down, flat, flat_down, *dWs = backward(
        dy, x, *kept, weights, A_down, Bs, scales, ratios, dtype, needs_dx, needs_dW, row_scale, column_scale
    )
    first = [part.view(shape) for part, shape in zip(dA.split([s.numel() for s in shapes]), shapes, strict=True)]
    dBg, dBu, d_ratio_gate, d_ratio_up = shaped(flat, [*Bs[:2], *ratios[:2]])
    dB_down, d_ratio_down = shaped(flat_down, [Bs[2], ratios[2]])
    return dx, dWs, [*first, dA_down], [dBg, dBu, dB_down], [d_ratio_gate, d_ratio_up, d_ratio_down]


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(NO_SECOND.format("fxlora::lora_dora_swiglu"))


lora_dora_swiglu.register_autograd(_differentiate, setup_context=_save)
lora_dora_swiglu.register_vmap(by_rows(lora_dora_swiglu))
register_autocast("lora_dora_swiglu", lora_dora_swiglu, cast=(0, 1, 6, 9))
lora_dora_swiglu_backward.register_autograd(_refuse)
lora_dora_swiglu_backward.register_vmap(by_sample(lora_dora_swiglu_backward))
register_autocast("lora_dora_swiglu_backward", lora_dora_swiglu_backward)
