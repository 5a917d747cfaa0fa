"""The operators without the dispatcher, for eager mode: the same computation, at a fifth of the cost of a call.

A registered operator goes through several layers of Python at each call, which small layers notice. Gradients of gradients
are refused, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxlora.ops import dora, linear
from fxlora.ops.dora_swiglu import differentiate, lora_dora_swiglu, lora_dora_swiglu_backward
from fxlora.ops.linear import common_dtype
from fxlora.ops.swiglu import lora_swiglu, lora_swiglu_backward

_swiglu = lora_swiglu._init_fn
_swiglu_backward = lora_swiglu_backward._init_fn
_dora_swiglu = lora_dora_swiglu._init_fn
_dora_swiglu_backward = lora_dora_swiglu_backward._init_fn


class Linears(torch.autograd.Function):
    """`fxlora::lora_linear_siblings` of x, p, seed, and the lists one behind the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        """The outputs."""
        weights, biases, As, Bs, scales = _split(tensors, 5)
        with torch._C._AutoDispatchBelowADInplaceOrView():  # outputs are no views, as those of an operator
            *outputs, xs, A = linear.forward(x, weights, biases, As, Bs, scales, p, seed)
        ctx.p, ctx.count, ctx.dtype = p, len(weights), As[0].dtype
        ctx.save_for_backward(x, xs, A, seed, *weights, *Bs, *scales)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients."""
        x, xs, A, seed, *rest = ctx.saved_tensors
        weights, Bs, scales = _split(rest, 3)
        needs = ctx.needs_input_grad
        dx, dA, dB = linear.backward(dys, x, xs, weights, A, Bs, scales, ctx.p, seed, ctx.dtype, needs[0])
        needs_dW, needs_db = needs[3 : 3 + ctx.count], needs[3 + ctx.count : 3 + 2 * ctx.count]
        dWs, dbs = linear.weight_gradients(dys, x, needs_dW), linear.bias_gradients(dys, needs_db)
        if ctx.count == 1:
            return dx if needs[0] else None, None, None, *dWs, *dbs, dA.view(-1, x.shape[-1]), dB.view_as(Bs[0]), None
        dAs = dA.view(-1, x.shape[-1]).split([B.shape[1] for B in Bs])
        dBs = [part.view_as(B) for part, B in zip(dB.split([B.numel() for B in Bs]), Bs, strict=True)]
        return dx if needs[0] else None, None, None, *dWs, *dbs, *dAs, *dBs, *[None] * ctx.count


class Doras(torch.autograd.Function):
    """`fxlora::lora_dora_siblings` of x and the lists one behind the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        """The outputs."""
        weights, biases, As, Bs, scales, ratios = _split(tensors, 6)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            found = dora.forward(x, weights, biases, As, Bs, scales, ratios)
        ctx.count, ctx.dtype = len(weights), As[0].dtype
        ctx.save_for_backward(x, *found[ctx.count :], *weights, *Bs, *scales, *ratios)
        return tuple(found[: ctx.count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients."""
        n = ctx.count
        x, *rest = ctx.saved_tensors
        products, (xs, A), rest = rest[:n], rest[n : n + 2], rest[n + 2 :]
        weights, Bs, scales, ratios = _split(rest, 4)
        needs = ctx.needs_input_grad
        dx, dA, flat = dora.backward(dys, x, products, xs, weights, A, Bs, scales, ratios, ctx.dtype, needs[0])
        needs_dW, needs_db = needs[1 : 1 + n], needs[1 + n : 1 + 2 * n]
        dWs = linear.weight_gradients(dora.rescaled(dys, ratios), x, needs_dW) if any(needs_dW) else [None] * n
        dbs = linear.bias_gradients(dys, needs_db)
        dAs = dA.view(-1, x.shape[-1]).split([B.shape[1] for B in Bs])
        gradients = dora.shaped(flat, [*Bs, *ratios])
        return dx if needs[0] else None, *dWs, *dbs, *dAs, *gradients[:n], *[None] * n, *gradients[n:]


class Swiglu(torch.autograd.Function):
    """`fxlora::lora_swiglu` of x, p, seed, and the lists one behind the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor | None, *tensors: Tensor) -> Tensor:
        """The output."""
        weights, As, Bs, scales = _split(tensors, 4)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y, *kept = _swiglu(x, weights, As, Bs, scales, p, seed)
        ctx.p, ctx.dtype = p, As[0].dtype
        ctx.save_for_backward(x, *kept, seed, *weights, As[2], *Bs, *scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients."""
        x, g, u, xs, xd, A, seed, *rest = ctx.saved_tensors
        weights, A_down, Bs, scales = rest[:3], rest[3], rest[4:7], rest[7:]
        dx, dA, dA_down, dB, dB_down, *_ = _swiglu_backward(
            dy, x, g, u, xs, xd, A, weights, A_down, Bs, scales, ctx.p, seed, ctx.dtype, ctx.needs_input_grad[0], False
        )
        dAs = [*dA.view(2, A_down.shape[0], -1), dA_down]
        dBs = [*dB.view(2, *Bs[0].shape), dB_down.view_as(Bs[2])]
        return dx if ctx.needs_input_grad[0] else None, None, None, *[None] * 3, *dAs, *dBs, *[None] * 3


class DoraSwiglu(torch.autograd.Function):
    """`fxlora::lora_dora_swiglu` of x and the lists one behind the other; for frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        """The output."""
        weights, As, Bs, scales, ratios = _split(tensors, 5)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y, *kept = _dora_swiglu(x, weights, As, Bs, scales, ratios)
        ctx.shapes, ctx.dtype = [A.shape for A in As[:2]], common_dtype([*As, *Bs, *ratios])
        ctx.save_for_backward(x, None, None, *kept, *weights, As[2], *Bs, *scales, *ratios)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients."""
        needs_dx = ctx.needs_input_grad[0]
        dx, _, dAs, dBs, d_ratios = differentiate(
            _dora_swiglu_backward, dy, ctx.saved_tensors, ctx.shapes, ctx.dtype, needs_dx, False
        )
        return dx if needs_dx else None, *[None] * 3, *dAs, *dBs, *[None] * 3, *d_ratios


def _split(tensors: Sequence[Any], count: int) -> list[list[Any]]:
    size = len(tensors) // count
    return [list(tensors[start : start + size]) for start in range(0, len(tensors), size)]
