"""`fxlora::lora_linear_siblings`: linear layers that share their input, with their low-rank branches, as one operator.

    yᵢ = x Wᵢᵀ + bᵢ + scaleᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ          (arXiv:2106.09685, eq. 3)

Kept for the backward pass are x and `xs = [scaleᵢ · dropᵢ(x) Aᵢᵀ]ᵢ`, no cast or dropped copy of x; where x is what a norm
gave, `x = source · row_scale · column_scale`, not even x but its source, which the norm's own backward pass needs too. The
factors may have another dtype than x, which is that of the products; sums are float32. The small products come first, and
the large one is added to them in the epilogue of its own GEMM; all siblings have one buffer for dx.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxlora.ops import aten, autotune
from fxlora.ops.autocast import register_autocast
from fxlora.ops.batching import by_rows, by_sample
from fxlora.ops.choice import Shape, chosen

NO_SECOND = (
    "{} has no second derivatives: use the model as it was before it was lowered or compiled with backend='fxlora' "
    "wherever you differentiate gradients (create_graph=True)."
)


def implementation(x: Tensor, Bs: Sequence[Tensor], p: float = 0.0) -> ModuleType:
    """What computes the low-rank terms of layers with an input `x (M, K)` and factors `Bᵢ (Nᵢ, rᵢ)`."""
    shape = Shape(x.shape[1], tuple(B.shape[0] for B in Bs), tuple(B.shape[1] for B in Bs), p > 0)
    how = autotune.measured_choice(x.device, x.dtype, x.shape[0], shape) if x.is_cuda and autotune.is_on() else None
    if (how or chosen(x.device, x.dtype, x.shape[0], shape)) != "kernels":
        return aten
    from fxlora.ops import launch

    return launch


def rows_of(tensor: Tensor) -> Tensor:
    """`(…, features)` as contiguous `(M, features)`."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def aligned_rows(tensor: Tensor) -> Tensor:
    """`rows_of` at an address where kernels can read pairs of entries at once; not while tracing."""
    rows = rows_of(tensor)
    return rows.clone() if rows.data_ptr() % 16 else rows


def row_factors(row_scale: Tensor | None, x: Tensor) -> Tensor | None:
    """A factor for each row of x, `(…, 1)` or broadcast so, as `(M, 1)`."""
    return None if row_scale is None else row_scale.expand(*x.shape[:-1], 1).reshape(-1, 1)


def check_residual(residual: Tensor | None, x: Tensor, weights: Sequence[Tensor], single: bool = False) -> None:
    """Raise `ValueError` for what cannot be added to the output of the last layer, or of a single one."""
    if residual is None:
        return
    shape = (*x.shape[:-1], weights[-1].shape[0])
    if single and len(weights) != 1:
        raise ValueError(f"a residual is added to the output of a single layer, not of {len(weights)}")
    if residual.shape != shape or residual.dtype != x.dtype:
        raise ValueError(
            f"what is added to an output {shape} of {x.dtype} should have this shape and dtype: "
            f"got {tuple(residual.shape)} of {residual.dtype}"
        )


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds the numbers of all."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def contiguous(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """All of them as the kernels read them: in a row, on the device of `like` (a scale may be on the CPU)."""
    device = like.device
    return [
        tensor if tensor.device == device and tensor.is_contiguous() else tensor.to(device).contiguous()
        for tensor in tensors
    ]


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
    scales: Sequence[Tensor], p: float, seed: Tensor | None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `lora_linear_siblings`."""
    check_residual(residual, x, weights, single=True)
    rows, ranks = aligned_rows(x), [A.shape[0] for A in As]
    As, Bs, scales = contiguous(As, x), contiguous(Bs, x), contiguous(scales, x)
    use = implementation(rows, Bs, p)
    A = use.prepare(As, x.dtype)
    xs = use.shrink(rows, A, ranks, scales, p, seed)
    outputs: list[Tensor] = []
    for part, W, bias, B in zip(xs.split(ranks, 1), weights, biases, Bs, strict=True):
        start = None if residual is None else rows_of(residual)
        y = use.expand(part, B, None if bias is None else bias.contiguous(), start).addmm_(rows, W.t())
        outputs.append(y.view(*x.shape[:-1], W.shape[0]))
    return [*outputs, xs, A]


def backward(
    dys: Sequence[Tensor], x: Tensor, xs: Tensor, weights: Sequence[Tensor], A: Tensor, Bs: Sequence[Tensor],
    scales: Sequence[Tensor], p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x (empty if it needs none), of all A and of all B, the last two flat.

    Where there is a `row_scale`, `x` is the source that this and the `column_scale` make x of.
    """
    rows, gradients = aligned_rows(x), [rows_of(dy) for dy in dys]
    Bs, scales = contiguous(Bs, x), contiguous(scales, x)
    use = implementation(rows, Bs, p)
    ranks = [B.shape[1] for B in Bs]
    dxa, dB_partials = use.reduce(gradients, xs, Bs, scales)
    dA_partials = use.outer(dxa, rows, ranks, p, seed, dtype, row_factors(row_scale, x), column_scale)
    dA, dB = use.finish(dA_partials, dB_partials, p, dtype, common_dtype(Bs))
    if not needs_dx:
        return [x.new_empty(0), dA, dB]
    dx = use.input_gradient(dxa, A, ranks, p, seed)
    for dy, W in zip(gradients, weights, strict=True):
        dx.addmm_(dy, W)
    return [dx.view(x.shape), dA, dB]


@torch.library.custom_op("fxlora::lora_linear_siblings", mutates_args=())
def lora_linear_siblings(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], p: float, seed: Tensor | None, source: Tensor | None = None, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None, residual: Tensor | None = None,
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
        source: None, or what x is made of, in x's shape and dtype: `x = source · row_scale · column_scale`. It is kept in
            place of x, gets no gradient, and counts for those of A and of the weights alone.
        row_scale: `(…, 1)`, with a source.
        column_scale: `(K,)`, or None for ones.
        residual: None, or what is added to the output of a single layer, in its shape and dtype.

    Returns:
        The outputs `(…, Nᵢ)` in x's dtype; behind them, for the backward pass alone, `xs (M, Σ rᵢ)` and all A as one
        matrix in x's dtype.
    """
    del source, row_scale, column_scale  # only for the backward pass
    return forward(x, weights, biases, As, Bs, scales, p, seed, residual)


@lora_linear_siblings.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], p: float, seed: Tensor | None, source: Tensor | None = None, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None, residual: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    check_residual(residual, x, weights, single=True)
    outputs = [x.new_empty(*x.shape[:-1], W.shape[0]) for W in weights]
    rank, columns = sum(A.shape[0] for A in As), x.shape[-1]
    return [*outputs, x.new_empty(x.numel() // columns, rank), x.new_empty(rank, columns)]


@torch.library.custom_op("fxlora::lora_linear_siblings_backward", mutates_args=())
def lora_linear_siblings_backward(
    dys: list[Tensor], x: Tensor, xs: Tensor, weights: list[Tensor], A: Tensor, Bs: list[Tensor],
    scales: list[Tensor], p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `backward`."""
    return backward(dys, x, xs, weights, A, Bs, scales, p, seed, dtype, needs_dx, row_scale, column_scale)


@lora_linear_siblings_backward.register_fake
def _(
    dys: list[Tensor], x: Tensor, xs: Tensor, weights: list[Tensor], A: Tensor, Bs: list[Tensor],
    scales: list[Tensor], p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return [dx, A.new_empty(A.numel(), dtype=dtype), A.new_empty(sum(B.numel() for B in Bs), dtype=common_dtype(Bs))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, As, Bs, scales, ctx.p, seed, *scaled, _ = inputs
    kept = kept_input(x, *scaled)
    check_biases(biases)
    ctx.count = len(weights)
    ctx.shapes, ctx.dtype = [A.shape for A in As], common_dtype(As)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[-2:])
    ctx.save_for_backward(*kept, *output[-2:], seed, *weights, *Bs, *scales)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    x, row_scale, column_scale, xs, A, seed, *rest = ctx.saved_tensors
    n = ctx.count
    weights, Bs, scales = (rest[i * n : (i + 1) * n] for i in range(3))
    needs = ctx.needs_input_grad
    dys = output_gradients(gradients[:n], x, weights)
    dx, dA, dB = torch.ops.fxlora.lora_linear_siblings_backward(
        dys, x, xs, weights, A, Bs, scales, ctx.p, seed, ctx.dtype, needs[0], row_scale, column_scale
    )
    x = aten.restored(x, row_scale, column_scale) if any(needs[1]) else x
    dWs = weight_gradients(dys, x, needs[1])
    # torch takes a list of None for no list of tensors
    dbs = None if isinstance(needs[2], bool) else bias_gradients(dys, needs[2])
    sizes = [shape.numel() for shape in ctx.shapes]
    dAs = [part.view(shape) for part, shape in zip(dA.split(sizes), ctx.shapes, strict=True)]
    dBs = [part.view(B.shape) for part, B in zip(dB.split([B.numel() for B in Bs]), Bs, strict=True)]
    found = (dx if needs[0] else None, dWs, dbs, dAs, dBs, [None] * n, *[None] * 5, dys[0])
    return found[: len(needs)]  # torch leaves trailing defaults out


def kept_input(
    x: Tensor, source: Tensor | None = None, row_scale: Tensor | None = None, column_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What is kept of an input: itself, or its source with the scales that make it.

    Raises:
        ValueError: for a source without a scale for each row, or of another shape or dtype.
    """
    if source is None:
        return x, None, None
    if row_scale is None or source.shape != x.shape or source.dtype != x.dtype:
        raise ValueError(
            f"the source of an input {tuple(x.shape)} of {x.dtype} should have this shape and dtype, and a scale for each "
            f"row: got {tuple(source.shape)} of {source.dtype}"
        )
    return source, row_scale, column_scale


def check_biases(biases: Sequence[Tensor | None]) -> None:
    """Raise a `ValueError` where a trained bias would silently get no gradient."""
    if None in biases and any(bias is not None and bias.requires_grad for bias in biases):
        raise ValueError("a bias is trained, but not all layers have one: torch has no gradients for such lists")


def output_gradients(gradients: Sequence[Tensor | None], x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The incoming gradients, with zeros for the outputs that the loss does not read."""
    return [
        x.new_zeros(*x.shape[:-1], W.shape[0]) if dy is None else dy for dy, W in zip(gradients, weights, strict=True)
    ]


def weight_gradients(dys: Sequence[Tensor], x: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """`dyᵢᵀ x` of the weights that need it."""
    return [rows_of(dy).t() @ rows_of(x) if need else None for dy, need in zip(dys, needs, strict=True)]


def bias_gradients(dys: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The sums of `dyᵢ` over all tokens, for the biases that need it."""
    return [rows_of(dy).sum(0) if need else None for dy, need in zip(dys, needs, strict=True)]


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(NO_SECOND.format("fxlora::lora_linear_siblings"))


lora_linear_siblings.register_autograd(_differentiate, setup_context=_save)
lora_linear_siblings.register_vmap(by_rows(lora_linear_siblings, seed=7))
register_autocast("lora_linear_siblings", lora_linear_siblings, cast=(0, 1, 2, 8, 11))
lora_linear_siblings_backward.register_autograd(_refuse)
lora_linear_siblings_backward.register_vmap(by_sample(lora_linear_siblings_backward))
register_autocast("lora_linear_siblings_backward", lora_linear_siblings_backward)
