"""The low-rank terms in ATen's products: on every device, for every dtype. The counterpart of `fxlora.ops.launch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxlora.ops.mask import dropped


def prepare(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A one below the other in a dtype, `(Σ rᵢ, K)`."""
    return As[0].to(dtype, copy=True) if len(As) == 1 else torch.cat([A.to(dtype) for A in As])


def shrink(
    x: Tensor, A: Tensor, ranks: Sequence[int], scales: Sequence[Tensor], p: float, seed: Tensor | None
) -> Tensor:
    """`[scaleᵢ · dropᵢ(x) Aᵢᵀ]ᵢ`: x `(M, K)`, A `(Σ rᵢ, K)` as prepared; the result is `(M, Σ rᵢ)` in x's dtype."""
    if seed is None or not p:
        xs = x @ A.t()
    else:
        xs = torch.cat([dropped(x, p, seed, i) @ part.t() for i, part in enumerate(A.split(list(ranks)))], 1)
    for part, scale in zip(_columns(xs, ranks), scales, strict=True):
        part.mul_(scale)
    return xs


def expand(xs: Tensor, B: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """`xs Bᵀ + bias + residual`: xs `(M, r)`, B `(N, r)`, the residual `(M, N)`."""
    factor = B.to(xs.dtype).t()
    if residual is None:
        return xs @ factor if bias is None else torch.addmm(bias, xs, factor)
    y = torch.addmm(residual, xs, factor)
    return y if bias is None else y.add_(bias)


def reduce(dys: Sequence[Tensor], xs: Tensor, Bs: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What gradients of outputs `dyᵢ (M, Nᵢ)` become along the branches.

    Returns:
        `[scaleᵢ dyᵢ Bᵢ]ᵢ`, `(M, Σ rᵢ)`, and partials of all `dyᵢᵀ xsᵢ`, flat, one after the other: `(splits, Σ Nᵢ rᵢ)`.
    """
    dxas = [_scaled_product(dy, B, scale) for dy, B, scale in zip(dys, Bs, scales, strict=True)]
    parts = _columns(xs, [B.shape[1] for B in Bs])
    dB = [_product(dy.t(), part, B.dtype).flatten() for dy, part, B in zip(dys, parts, Bs, strict=True)]
    return _joined(dxas, 1), _joined(dB, 0)[None]


def rescale(y0: Tensor, ratio: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """`ratio · y0 + bias + residual`: y0 and the residual `(M, N)`, ratio and bias `(N,)`; the result has y0's dtype."""
    y = y0 * ratio
    for summand in (bias, residual):
        y = y if summand is None else y.add_(summand)
    return y.to(y0.dtype)


def reduce_rescaled(
    dys: Sequence[Tensor], products: Sequence[Tensor], xs: Tensor, Bs: Sequence[Tensor], ratios: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """What gradients of outputs `dyᵢ (M, Nᵢ)` become below `rescale`, and along the branches.

    Args:
        dys: contiguous.
        products: what was rescaled, `(M, Nᵢ)`.
        xs: as for `reduce`.
        Bs: as there.
        ratios: `(Nᵢ,)`.
        scales: as there.

    Returns:
        `ratioᵢ · dyᵢ`; and what `reduce` makes of these, with behind its partials those of the sums of `dyᵢ · productᵢ`
        over all tokens: `(splits, Σ Nᵢ rᵢ + Σ Nᵢ)`.
    """
    scaled = [rescale(dy, ratio, None) for dy, ratio in zip(dys, ratios, strict=True)]
    dxa, partials = reduce(scaled, xs, Bs, scales)
    wide = torch.promote_types(xs.dtype, torch.float32)
    sums = [(dy.to(wide) * product).sum(0) for dy, product in zip(dys, products, strict=True)]
    return scaled, dxa, torch.cat([partials.to(wide), _joined(sums, 0)[None]], 1)


def input_gradient(dxa: Tensor, A: Tensor, ranks: Sequence[int], p: float, seed: Tensor | None) -> Tensor:
    """`Σᵢ dropᵢ(dxaᵢ Aᵢ)`: dxa `(M, Σ rᵢ)`, A `(Σ rᵢ, K)` as prepared."""
    if seed is None or not p:
        return dxa @ A
    terms = (dropped(d @ part, p, seed, i) for i, (d, part) in enumerate(_parts(dxa, A, ranks)))
    dx = next(terms)
    for term in terms:
        dx.add_(term)
    return dx


def outer(
    dxa: Tensor, x: Tensor, ranks: Sequence[int], p: float, seed: Tensor | None, dtype: torch.dtype,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Partials of all `dxaᵢᵀ dropᵢ(x · row_scale · column_scale)`, flat, one after the other: `(splits, Σ rᵢ K)`.

    Their sums will have the dtype.
    """
    x = restored(x, row_scale, column_scale)
    if seed is None or not p:
        return _product(dxa.t(), x, dtype).view(1, -1)
    parts = dxa.split(list(ranks), 1)
    return torch.cat([_product(part.t(), dropped(x, p, seed, i), dtype) for i, part in enumerate(parts)]).view(1, -1)


def restored(source: Tensor, row_scale: Tensor | None, column_scale: Tensor | None) -> Tensor:
    """An input from what is kept of it: itself, or its source, of which `source · row_scale · column_scale` is the input."""
    if row_scale is None:
        return source
    x = source * row_scale
    return (x if column_scale is None else x * column_scale).to(source.dtype)


def finish(
    first: Tensor, second: Tensor, p: float, dtype: torch.dtype, dtype_second: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sums of two stacks of partials `(splits, size)`; `p` is the dropout behind the first."""
    del p
    sums = (each[0] if len(each) == 1 else each.sum(0) for each in (first, second))
    return next(sums).to(dtype), next(sums).to(dtype_second)


def swiglu_forward(
    g: Tensor, u: Tensor, xs: Tensor, Bg: Tensor, Bu: Tensor, Ad: Tensor, scale: Tensor, p: float, seed: Tensor | None,
    ratios: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The middle of a SwiGLU block with the branches of its three layers.

    Args:
        g: the base's gate, `(M, N)`.
        u: the base's up, likewise.
        xs: what `shrink` gave for both, side by side.
        Bg: `(N, r)`, the rank may be another one than that of Bu and Ad.
        Bu: `(N, r)`.
        Ad: `(r, N)`.
        scale: of down.
        p: the probability of dropping an entry of down's input.
        seed: of its mask, which is that of the third sibling.
        ratios: of gate and up with DoRA, `(N,)`.

    Returns:
        `h = silu(ratiog · (g + xsg Bgᵀ)) · ratiou · (u + xsu Buᵀ)`, and `scale · drop(h) Adᵀ`, `(M, r)`.
    """
    xg, xu = xs.split([Bg.shape[1], Bu.shape[1]], 1)
    gate, up = (
        _rescaled(y, ratio) for y, ratio in zip((_branched(g, xg, Bg), _branched(u, xu, Bu)), ratios, strict=True)
    )
    h = torch.nn.functional.silu(gate).mul_(up)
    return h, (_dropped(h, p, seed) @ Ad.to(h.dtype).t()).mul_(scale)


def swiglu_backward(
    dh: Tensor, g: Tensor, u: Tensor, xs: Tensor, Bg: Tensor, Bu: Tensor, Ad: Tensor, dxd: Tensor, scales: Sequence[Tensor],
    p: float, seed: Tensor | None, dtype: torch.dtype, ratios: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `swiglu_forward`; `dh` is changed.

    Args:
        dh: of h through down's own weight.
        g: as there.
        u: as there.
        xs: as there.
        Bg: as there.
        Bu: as there.
        Ad: as there.
        dxd: `scale · dy Bd`, `(M, r)`.
        scales: of gate and up.
        p: as there.
        seed: as there.
        dtype: of the factors' gradients.
        ratios: as there.

    Returns:
        dg, du, `[scale dg Bg, scale du Bu]` side by side, the gradients of Bg and Bu, and then of the ratios, flat, and
        that of Ad.
    """
    xg, xu = xs.split([Bg.shape[1], Bu.shape[1]], 1)
    products = [_branched(g, xg, Bg), _branched(u, xu, Bu)]
    gate, up = (_rescaled(y, ratio) for y, ratio in zip(products, ratios, strict=True))
    term, silu = dxd @ Ad.to(dh.dtype), torch.nn.functional.silu(gate)
    h = silu * up
    dh.add_(_dropped(term, p, seed))
    dAd = (dxd.t() @ _dropped(h, p, seed)).to(dtype)
    du = dh * silu
    dg = torch.ops.aten.silu_backward(dh.mul_(up), gate)
    own = [ratio for ratio in ratios if ratio is not None]
    if own:
        (dg, du), dxa, dB = reduce_rescaled([dg, du], products, xs, [Bg, Bu], own, scales)
    else:
        dxa, dB = reduce([dg, du], xs, [Bg, Bu], scales)
    return dg, du, dxa, dB[0].to(dtype), dAd


def _scaled_product(dy: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """`scale · dy B` in dy's dtype: a factor that is cast gets the scale with it."""
    if B.dtype == dy.dtype:
        return (dy @ B).mul_(scale)
    return dy @ torch.mul(B, scale, out=B.new_empty(B.shape, dtype=dy.dtype))


def _product(one: Tensor, two: Tensor, dtype: torch.dtype) -> Tensor:
    """`one · two` for a sum in a dtype, which cuBLAS gives of 16-bit tensors without a cast if it is float32."""
    if one.is_cuda and torch.version.hip is None and dtype == torch.float32 != one.dtype and one.dtype.itemsize == 2:
        return torch.mm(one, two, out_dtype=torch.float32)
    return one @ two


def _columns(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Views of successive columns; of all of them the tensor itself, which costs nothing."""
    return (tensor,) if len(sizes) == 1 else tensor.split(list(sizes), 1)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _parts(dxa: Tensor, A: Tensor, ranks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(dxa.split(list(ranks), 1), A.split(list(ranks)), strict=True)


def _dropped(h: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """With the mask of down's input, the third sibling's."""
    return h if seed is None or not p else dropped(h, p, seed, 2)


def _rescaled(y: Tensor, ratio: Tensor | None) -> Tensor:
    return y if ratio is None else rescale(y, ratio, None)


def _branched(base: Tensor, xs: Tensor, B: Tensor) -> Tensor:
    return torch.addmm(base, xs, B.to(base.dtype).t())
