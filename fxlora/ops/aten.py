"""The low-rank terms in ATen's products: on every device, for every dtype. The counterpart of `fxlora.ops.launch`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxlora.ops.mask import dropped


def prepare(As: Sequence[Tensor], dtype: torch.dtype, p: float) -> Tensor:
    """All A one below the other in a dtype, `(Σ rᵢ, K)`."""
    del p
    return torch.cat([A.to(dtype) for A in As])


def shrink(
    x: Tensor, A: Tensor, ranks: Sequence[int], scales: Sequence[Tensor], p: float, seed: Tensor | None
) -> Tensor:
    """`[scaleᵢ · dropᵢ(x) Aᵢᵀ]ᵢ`: x `(M, K)`, A `(Σ rᵢ, K)` as prepared; the result is `(M, Σ rᵢ)` in x's dtype."""
    if seed is None or not p:
        xs = x @ A.t()
    else:
        xs = torch.cat([dropped(x, p, seed, i) @ part.t() for i, part in enumerate(A.split(list(ranks)))], 1)
    for part, scale in zip(xs.split(list(ranks), 1), scales, strict=True):
        part.mul_(scale)
    return xs


def expand(xs: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """`xs Bᵀ + bias`: xs `(M, r)`, B `(N, r)`."""
    factor = B.to(xs.dtype).t()
    return xs @ factor if bias is None else torch.addmm(bias, xs, factor)


def backward(
    dys: Sequence[Tensor], x: Tensor, xs: Tensor, A: Tensor, Bs: Sequence[Tensor], scales: Sequence[Tensor],
    p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The low-rank terms of all gradients.

    Args:
        dys: gradients of the outputs, `(M, Nᵢ)`.
        x: `(M, K)`.
        xs: what `shrink` gave.
        A: `(Σ rᵢ, K)` as prepared.
        Bs: `(Nᵢ, rᵢ)`.
        scales: of one element.
        p: the probability of dropping an entry of x.
        seed: of the masks.
        dtype: of the gradient of A.
        needs_dx: whether the gradient of x is wanted.

    Returns:
        `Σᵢ dropᵢ(scaleᵢ dyᵢ Bᵢ Aᵢ)` `(M, K)`, and the gradients of all Aᵢ and of all Bᵢ, flat, one after the other.
    """
    ranks = [B.shape[1] for B in Bs]
    dxas = [(dy @ B.to(dy.dtype)).mul_(scale) for dy, B, scale in zip(dys, Bs, scales, strict=True)]
    parts = xs.split(ranks, 1)
    dB = torch.cat([(dy.t() @ part).to(B.dtype).flatten() for dy, part, B in zip(dys, parts, Bs, strict=True)])
    if seed is None or not p:
        dxa = torch.cat(dxas, 1) if len(dxas) > 1 else dxas[0]
        return (dxa @ A if needs_dx else None), (dxa.t() @ x).to(dtype).flatten(), dB
    dA = torch.cat([(dxa.t() @ dropped(x, p, seed, i)).to(dtype).flatten() for i, dxa in enumerate(dxas)])
    dx = None
    if needs_dx:
        for i, (dxa, part) in enumerate(zip(dxas, A.split(ranks), strict=True)):
            term = dropped(dxa @ part, p, seed, i)
            dx = term if dx is None else dx.add_(term)
    return dx, dA, dB
