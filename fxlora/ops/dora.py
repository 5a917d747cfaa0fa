"""`fxlora::lora_dora_siblings`: linear layers that share their input, with low-rank branches of DoRA, as one operator.

    yᵢ = ratioᵢ · y0ᵢ + bᵢ,   y0ᵢ = x Wᵢᵀ + scaleᵢ · x Aᵢᵀ Bᵢᵀ,   ratioᵢ = mᵢ / ‖Wᵢ + scaleᵢ Bᵢ Aᵢ‖     (arXiv:2402.09353, eq. 5)

The ratios are operands, with a gradient, and who calls the operator computes them. Kept for the backward pass are x, `xs`
as for plain LoRA (see `fxlora.ops.linear`, also for x that is kept by its source), and y0: the gradient of a ratio is the sum
of `dyᵢ · y0ᵢ` over all tokens. There is no dropout: with it DoRA also multiplies W with the dropped input, which is another
product than the layer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxlora.ops import aten
from fxlora.ops.autocast import register_autocast
from fxlora.ops.batching import by_rows, by_sample
from fxlora.ops.linear import (
    NO_SECOND,
    aligned_rows,
    bias_gradients,
    check_biases,
    check_residual,
    common_dtype,
    contiguous,
    implementation,
    kept_input,
    output_gradients,
    row_factors,
    rows_of,
    weight_gradients,
)


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
    scales: Sequence[Tensor], ratios: Sequence[Tensor], residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `lora_dora_siblings`."""
    check_residual(residual, x, weights, single=True)
    rows, ranks = aligned_rows(x), [A.shape[0] for A in As]
    As, Bs, scales, ratios = (contiguous(each, x) for each in (As, Bs, scales, ratios))
    use = implementation(rows, Bs)
    A = use.prepare(As, x.dtype)
    xs = use.shrink(rows, A, ranks, scales, 0.0, None)
    parts = zip(xs.split(ranks, 1), weights, Bs, strict=True)
    products = [use.expand(part, B, None).addmm_(rows, W.t()) for part, W, B in parts]
    last = None if residual is None else rows_of(residual)
    outputs = [
        use.rescale(y0, ratio, None if bias is None else bias.contiguous(), last).view(*x.shape[:-1], y0.shape[1])
        for y0, ratio, bias in zip(products, ratios, biases, strict=True)
    ]
    return [*outputs, *products, xs, A]


def backward(
    dys: Sequence[Tensor], x: Tensor, products: Sequence[Tensor], xs: Tensor, weights: Sequence[Tensor], A: Tensor,
    Bs: Sequence[Tensor], scales: Sequence[Tensor], ratios: Sequence[Tensor], dtype: torch.dtype, needs_dx: bool,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x (empty if it needs none), of all A, flat, and of all B and then all ratios, flat.

    Where there is a `row_scale`, `x` is the source that this and the `column_scale` make x of.
    """
    rows, gradients = aligned_rows(x), [rows_of(dy) for dy in dys]
    Bs, scales, ratios = (contiguous(each, x) for each in (Bs, scales, ratios))
    use = implementation(rows, Bs)
    ranks = [B.shape[1] for B in Bs]
    scaled, dxa, partials = use.reduce_rescaled(gradients, products, xs, Bs, ratios, scales)
    partials_A = use.outer(dxa, rows, ranks, 0.0, None, dtype, row_factors(row_scale, x), column_scale)
    dA, rest = use.finish(partials_A, partials, 0.0, dtype, common_dtype([*Bs, *ratios]))
    if not needs_dx:
        return [x.new_empty(0), dA, rest]
    dx = use.input_gradient(dxa, A, ranks, 0.0, None)
    for dy, W in zip(scaled, weights, strict=True):
        dx.addmm_(dy, W)
    return [dx.view(x.shape), dA, rest]


@torch.library.custom_op("fxlora::lora_dora_siblings", mutates_args=())
def lora_dora_siblings(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], ratios: list[Tensor], source: Tensor | None = None, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Linear layers that share their input, with branches of DoRA.

    Args:
        x: `(…, K)`.
        weights: `(Nᵢ, K)`, in x's dtype.
        biases: `(Nᵢ,)`, or None.
        As: `(rᵢ, K)`, of any floating dtype.
        Bs: `(Nᵢ, rᵢ)`.
        scales: one element each.
        ratios: `(Nᵢ,)`, of any floating dtype.
        source: of x, as for `lora_linear_siblings`.
        row_scale: likewise.
        column_scale: likewise.
        residual: None, or what is added to the output of a single layer, in its shape and dtype.

    Returns:
        The outputs `(…, Nᵢ)` in x's dtype; behind them, for the backward pass alone, the products before the ratio
        `(M, Nᵢ)`, `xs (M, Σ rᵢ)` and all A as one matrix in x's dtype.
    """
    del source, row_scale, column_scale  # only for the backward pass
    return forward(x, weights, biases, As, Bs, scales, ratios, residual)


@lora_dora_siblings.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], ratios: list[Tensor], source: Tensor | None = None, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    check_residual(residual, x, weights, single=True)
    columns, rank = x.shape[-1], sum(A.shape[0] for A in As)
    rows = x.numel() // columns
    outputs = [x.new_empty(*x.shape[:-1], W.shape[0]) for W in weights]
    products = [x.new_empty(rows, W.shape[0]) for W in weights]
    return [*outputs, *products, x.new_empty(rows, rank), x.new_empty(rank, columns)]


@torch.library.custom_op("fxlora::lora_dora_siblings_backward", mutates_args=())
def lora_dora_siblings_backward(
    dys: list[Tensor], x: Tensor, products: list[Tensor], xs: Tensor, weights: list[Tensor], A: Tensor, Bs: list[Tensor],
    scales: list[Tensor], ratios: list[Tensor], dtype: torch.dtype, needs_dx: bool, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `backward`."""
    return backward(dys, x, products, xs, weights, A, Bs, scales, ratios, dtype, needs_dx, row_scale, column_scale)


@lora_dora_siblings_backward.register_fake
def _(
    dys: list[Tensor], x: Tensor, products: list[Tensor], xs: Tensor, weights: list[Tensor], A: Tensor, Bs: list[Tensor],
    scales: list[Tensor], ratios: list[Tensor], dtype: torch.dtype, needs_dx: bool, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    size = sum(each.numel() for each in (*Bs, *ratios))
    return [dx, A.new_empty(A.numel(), dtype=dtype), A.new_empty(size, dtype=common_dtype([*Bs, *ratios]))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, As, Bs, scales, ratios, *scaled, _ = inputs
    kept = [*kept_input(x, *scaled), *output[len(weights) :]]
    check_biases(biases)
    ctx.count = len(weights)
    ctx.shapes, ctx.dtype = [A.shape for A in As], common_dtype(As)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[ctx.count :])
    ctx.save_for_backward(*kept, *weights, *Bs, *scales, *ratios)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    n = ctx.count
    x, row_scale, column_scale, *rest = ctx.saved_tensors
    products, (xs, A), rest = rest[:n], rest[n : n + 2], rest[n + 2 :]
    weights, Bs, scales, ratios = (rest[i * n : (i + 1) * n] for i in range(4))
    needs = ctx.needs_input_grad
    dys = output_gradients(gradients[:n], x, weights)
    dx, dA, flat = torch.ops.fxlora.lora_dora_siblings_backward(
        dys, x, products, xs, weights, A, Bs, scales, ratios, ctx.dtype, needs[0], row_scale, column_scale
    )
    x = aten.restored(x, row_scale, column_scale) if any(needs[1]) else x
    dWs = weight_gradients(rescaled(dys, ratios), x, needs[1]) if any(needs[1]) else [None] * n
    # torch takes a list of None for no list of tensors
    dbs = None if isinstance(needs[2], bool) else bias_gradients(dys, needs[2])
    dAs = [part.view(shape) for part, shape in zip(dA.split([s.numel() for s in ctx.shapes]), ctx.shapes, strict=True)]
    rest = shaped(flat, [*Bs, *ratios])
    found = (dx if needs[0] else None, dWs, dbs, dAs, rest[:n], [None] * n, rest[n:], *[None] * 3, dys[0])
    return found[: len(needs)]  # torch leaves trailing defaults out


def rescaled(dys: Sequence[Tensor], ratios: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the products before the ratio."""
    return [(dy * ratio).to(dy.dtype) for dy, ratio in zip(dys, ratios, strict=True)]


def shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that lie one after the other, with the shapes and dtypes of others."""
    parts = flat.split([each.numel() for each in like])
    return [part.view(each.shape).to(each.dtype) for part, each in zip(parts, like, strict=True)]


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(NO_SECOND.format("fxlora::lora_dora_siblings"))


lora_dora_siblings.register_autograd(_differentiate, setup_context=_save)
lora_dora_siblings.register_vmap(by_rows(lora_dora_siblings))
register_autocast("lora_dora_siblings", lora_dora_siblings, cast=(0, 1, 2, 7, 10))
lora_dora_siblings_backward.register_autograd(_refuse)
lora_dora_siblings_backward.register_vmap(by_sample(lora_dora_siblings_backward))
register_autocast("lora_dora_siblings_backward", lora_dora_siblings_backward)
