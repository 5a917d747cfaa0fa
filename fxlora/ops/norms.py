"""`fxlora::row_norms`: the norms of the rows of `W + s B A`, as one operator that reads W once. A constant for gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxlora import _passes
from fxlora.ops.autocast import register_autocast
from fxlora.ops.batching import by_sample
from fxlora.ops.choice import Shape, kernels_apply


def norms_of(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    """See `row_norms`."""
    shape = Shape(weight.shape[1], (weight.shape[0],), (A.shape[0],))
    if squared.dtype == torch.float32 and weight.numel() and kernels_apply(weight.device, weight.dtype, shape):
        from fxlora.ops import launch

        return launch.row_norms(weight, A, B, scale, squared)
    return canonical_norms(weight, A, B, scale, squared)


def canonical_norms(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    """What a graph with branches of the weight's dtype computes."""
    return _passes.row_norms(weight, A.to(weight.dtype), B.to(weight.dtype), scale, squared)


@torch.library.custom_op("fxlora::row_norms", mutates_args=())
def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    """Norms of the rows of `W + scale · B A`, in closed form; see `passes.branches.dora`.

    Args:
        weight: W, `(N, K)`.
        A: `(r, K)`, of any floating dtype; W's is that of the products.
        B: `(N, r)`, likewise.
        scale: one element.
        squared: the squared norms of W's rows, `(N,)`.

    Returns:
        `(N,)`, in the dtype of `squared`.
    """
    return norms_of(weight, A, B, scale, squared)


@row_norms.register_fake
def _(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    return squared.new_empty(squared.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    return (None,) * 5


def _by_sample(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int | None]:
    (norms,), (dim,) = by_sample(lambda *own: [row_norms(*own)])(info, in_dims, *args)
    return norms, dim


row_norms.register_autograd(_differentiate, setup_context=_save)
row_norms.register_vmap(_by_sample)
register_autocast("row_norms", row_norms)
