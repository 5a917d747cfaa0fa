"""What the code of optimized models calls: the operators, or what they stand for.

Whether an operator applies and pays is seen at each call, since a model's dtype, device, mode, hooks and surroundings change
after its code was generated. Dynamo traces through these functions. The arguments are lists, one entry for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingModuleSource]
from torch.autograd import forward_ad

from fxlora._passes import has_hooks, rescale, without_bias
from fxlora.ops import autotune, choice
from fxlora.ops.choice import Shape
from fxlora.ops.composed import is_few, of_few_rows, of_many_rows
from fxlora.ops.dora import lora_dora_siblings
from fxlora.ops.dora_swiglu import lora_dora_swiglu
from fxlora.ops.eager import Doras, DoraSwiglu, Linears, Swiglu
from fxlora.ops.linear import lora_linear_siblings
from fxlora.ops.mask import draw_seed
from fxlora.ops.norms import canonical_norms, norms_of, row_norms
from fxlora.ops.swiglu import lora_swiglu

_LINEAR = lora_linear_siblings._opoverload
_DORA = lora_dora_siblings._opoverload
_SWIGLU = lora_swiglu._opoverload
_NORMS = row_norms._opoverload
_DORA_SWIGLU = lora_dora_swiglu._opoverload
_PLAIN = (Tensor, nn.Parameter)

Dropouts = Sequence[nn.Module | None]
Layers = Sequence[nn.Module | None]


def branched_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], dropouts: Dropouts, layers: Layers,
) -> list[Tensor]:  # fmt: skip
    """Linear layers that share their input, with their branches.

    Args:
        x: `(…, K)`.
        weights: `(Nᵢ, K)`.
        biases: `(Nᵢ,)`, or None.
        As: `(rᵢ, K)`.
        Bs: `(Nᵢ, rᵢ)`.
        scales: 0-dim.
        dropouts: of the branches' inputs; None for none. A branch drops entries if its module is in training.
        layers: the modules whose call this stands for, which may have hooks; None where it stands for an operation.

    Returns:
        The outputs `(…, Nᵢ)`.
    """
    composes, tunes = choice.composes(x.device), autotune.is_on() and not torch.compiler.is_compiling()
    few = composes and is_few(x)
    each = zip(weights, biases, As, Bs, scales, dropouts, layers, strict=True)
    if few and not tunes:
        return [of_few_rows(x, *arguments) for arguments in each]
    if not _apply(x, (*weights, *As, *Bs), scales) or not _unwatched(layers):
        return [_canonical(x, *arguments) for arguments in each]
    rates = [_rate(dropout) for dropout in dropouts]
    if composes and not (tunes and _products_are_faster(x, weights, As, any(rates))):
        if few:
            return [of_few_rows(x, *arguments) for arguments in each]
        return [of_many_rows(x, W, b, A, B, scale, p) for (W, b, A, B, scale, *_), p in zip(each, rates, strict=True)]
    if len(set(rates)) == 1 and _alike(As, Bs):
        return _operator(x, weights, biases, As, Bs, scales, rates[0])[: len(weights)]
    return [
        _operator(x, [W], [b], [A], [B], [scale], p)[0] for (W, b, A, B, scale, *_), p in zip(each, rates, strict=True)
    ]


def branched_doras(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], ratios: list[Tensor], layers: Layers,
) -> list[Tensor]:  # fmt: skip
    """Linear layers that share their input, with branches of DoRA and without dropout; see `branched_linears`.

    Args:
        x: `(…, K)`.
        weights: `(Nᵢ, K)`.
        biases: `(Nᵢ,)`, or None.
        As: `(rᵢ, K)`.
        Bs: `(Nᵢ, rᵢ)`.
        scales: 0-dim.
        ratios: of each feature's magnitude to the norm of its weights, `(Nᵢ,)`.
        layers: as there.

    Returns:
        The outputs `(…, Nᵢ)`.
    """
    each = zip(weights, biases, As, Bs, scales, ratios, layers, strict=True)
    applies = not choice.composes(x.device) and _apply(x, (*weights, *As, *Bs, *ratios), scales)
    if not applies or not _unwatched(layers):
        return [_canonical_dora(x, *arguments) for arguments in each]
    if not _alike(As, Bs):
        return [_dora(x, [W], [b], [A], [B], [s], [ratio])[0] for W, b, A, B, s, ratio, _ in each]
    return _dora(x, weights, biases, As, Bs, scales, ratios)[: len(weights)]


def branched_swiglu(
    x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor], dropouts: Dropouts,
    layers: Layers,
) -> list[Tensor]:  # fmt: skip
    """`down(silu(gate(x)) · up(x))` of three layers with branches and without biases; see `branched_linears`.

    Args:
        x: `(…, K)`.
        weights: of gate and up `(N, K)`, of down `(O, N)`.
        As: of gate and up `(r, K)`, of down `(r, N)`.
        Bs: of gate and up `(N, r)`, of down `(O, r)`.
        scales: 0-dim.
        dropouts: as there.
        layers: as there.

    Returns:
        The output `(…, O)`.
    """
    rates = [_rate(dropout) for dropout in dropouts]
    frozen = not any(weight.requires_grad for weight in weights)
    applies = (
        frozen and not choice.composes(x.device) and _apply(x, (*weights, *As, *Bs), scales) and _unwatched(layers)
    )
    if applies and len(set(rates)) == 1 and len({A.shape[0] for A in As}) == 1 and _alike(As, Bs):
        p = rates[0]
        seed = draw_seed(x.device) if p else None
        if torch.compiler.is_compiling():
            return _SWIGLU(x, weights, As, Bs, scales, p, seed)[:1]
        return [cast(Tensor, Swiglu.apply(x, p, seed, *weights, *As, *Bs, *scales))]
    lists = (weights, [None, None, None], As, Bs, scales, dropouts, layers)
    g, u = branched_linears(x, *(cast(Any, each[:2]) for each in lists))
    return branched_linears(F.silu(g) * u, *(cast(Any, each[2:]) for each in lists))


def branched_dora_swiglu(
    x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor], scales: list[Tensor], ratios: list[Tensor],
    layers: Layers,
) -> list[Tensor]:  # fmt: skip
    """`down(silu(gate(x)) · up(x))` of three layers with branches of DoRA, without biases and dropout.

    Args:
        x: `(…, K)`.
        weights: of gate and up `(N, K)`, of down `(O, N)`.
        As: of gate and up `(r, K)`, of down `(r, N)`.
        Bs: of gate and up `(N, r)`, of down `(O, r)`.
        scales: 0-dim.
        ratios: as for `branched_doras`.
        layers: as for `branched_linears`.

    Returns:
        The output `(…, O)`.
    """
    frozen = not any(weight.requires_grad for weight in weights)
    applies = (
        frozen
        and not choice.composes(x.device)
        and _apply(x, (*weights, *As, *Bs, *ratios), scales)
        and _unwatched(layers)
    )
    if applies and len({A.shape[0] for A in As}) == 1 and _alike(As, Bs):
        if torch.compiler.is_compiling():
            return _DORA_SWIGLU(x, weights, As, Bs, scales, ratios)[:1]
        return [cast(Tensor, DoraSwiglu.apply(x, *weights, *As, *Bs, *scales, *ratios))]
    lists = (weights, [None, None, None], As, Bs, scales, ratios, layers)
    g, u = branched_doras(x, *(cast(Any, each[:2]) for each in lists))
    return branched_doras(F.silu(g) * u, *(cast(Any, each[2:]) for each in lists))


def weight_norms(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    """The norms of the rows of `W + scale · B A`: see `fxlora.ops.norms.row_norms`."""
    plain = all(type(each) in _PLAIN for each in (weight, A, B, scale, squared))
    if not plain or choice.composes(weight.device) or torch.compiler.is_exporting():
        return canonical_norms(weight, A, B, scale, squared)
    if torch.compiler.is_compiling():
        return _NORMS(weight, A, B, scale, squared)
    transformed = cast("object | None", peek_interpreter_stack()) is not None
    return (canonical_norms if transformed else norms_of)(weight, A, B, scale, squared)


def _operator(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], p: float,
) -> list[Tensor]:  # fmt: skip
    seed = draw_seed(x.device) if p else None
    if torch.compiler.is_compiling():
        return _LINEAR(x, weights, biases, As, Bs, scales, p, seed)
    return cast("list[Tensor]", Linears.apply(x, p, seed, *weights, *biases, *As, *Bs, *scales))


def _dora(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], As: list[Tensor], Bs: list[Tensor],
    scales: list[Tensor], ratios: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    if torch.compiler.is_compiling():
        return _DORA(x, weights, biases, As, Bs, scales, ratios)
    return cast("list[Tensor]", Doras.apply(x, *weights, *biases, *As, *Bs, *scales, *ratios))


def _products_are_faster(x: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor], drops: bool) -> bool:
    shape = Shape(x.shape[-1], tuple(W.shape[0] for W in weights), tuple(A.shape[0] for A in As), drops)
    return autotune.measured_choice(x.device, x.dtype, x.shape[:-1].numel(), shape) == "products"


def _canonical(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, dropout: nn.Module | None,
    layer: nn.Module | None,
) -> Tensor:  # fmt: skip
    """What the canonical graph of a layer with a branch computes."""
    y = F.linear(x, weight, bias) if layer is None else layer(x)
    s = _branch(x if dropout is None else dropout(x), A, B, scale)
    return torch.add(y, s).to(y.dtype)


def _canonical_dora(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, ratio: Tensor,
    layer: nn.Module | None,
) -> Tensor:  # fmt: skip
    """Likewise with DoRA."""
    y = F.linear(x, weight, bias) if layer is None else layer(x)
    return torch.add(y, rescale(_branch(x, A, B, scale), without_bias(y, bias, -1), ratio, -1)).to(y.dtype)


def _branch(x: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return torch.mul(F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)), scale)


def _rate(dropout: nn.Module | None) -> float:
    return cast(float, dropout.p) if dropout is not None and dropout.training else 0.0


def _alike(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> bool:
    """Whether all factors have one dtype, as an operator's have."""
    return all(factor.dtype == As[0].dtype for factor in (*As, *Bs))


def _apply(x: Tensor, tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> bool:
    """Whether an operator computes what a layer does on these: no subclasses, no casts of autocast, no transforms."""
    compiling = torch.compiler.is_compiling()
    if torch.compiler.is_exporting() or torch.is_autocast_enabled(x.device.type):
        return False
    if not compiling and (
        cast("object | None", peek_interpreter_stack()) is not None or forward_ad._current_level >= 0
    ):
        return False
    plain = type(x) in _PLAIN and all(type(each) in _PLAIN for each in tensors)
    same = all(each.dtype == x.dtype for each in tensors[: len(scales)])
    return plain and same and x.dim() > 1 and x.is_floating_point() and all(s.device == x.device for s in scales)


def _unwatched(layers: Layers) -> bool:
    """Whether nothing runs around a call of a layer, or in its place."""
    return all(layer is None or not is_watched(layer) for layer in layers)


def is_watched(layer: nn.Module) -> bool:
    """Whether something runs around a call of a module, or in its place."""
    return has_hooks(layer) or "forward" in layer.__dict__
