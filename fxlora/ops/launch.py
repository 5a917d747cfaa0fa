"""Launches the kernels of `fxlora.ops.kernels`: block sizes, grids and buffers. The counterpart of `fxlora.ops.aten`."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxlora.ops.kernels import dora, linear, swiglu
from fxlora.ops.launcher import Kernel
from fxlora.ops.mask import RESOLUTION, threshold

_prepare = Kernel(linear.prepare_kernel)
_shrink = Kernel(linear.shrink_kernel)
_expand = Kernel(linear.expand_kernel)
_input_gradient = Kernel(linear.input_gradient_kernel)
_outer = Kernel(linear.outer_kernel)
_reduce = Kernel(linear.reduce_kernel)
_finish_strips = Kernel(linear.finish_inner_kernel)
_finish_splits = Kernel(linear.finish_outer_kernel)
_drop = Kernel(linear.drop_kernel)
_rescale = Kernel(dora.rescale_kernel)
_reduce_rescaled = Kernel(dora.reduce_rescaled_kernel)
_row_norms = Kernel(dora.row_norms_kernel)
_swiglu_forward = Kernel(swiglu.forward_kernel)
_swiglu_backward = Kernel(swiglu.backward_kernel)

_PROGRAMS = 264
"""How many programs a kernel that can split its rows should have: two for each processor of an H100."""

_BLOCK = 1024
"""Elements that one program of a sum takes."""

CONFIG = {
    "shrink": (64, 128, 4, 4),
    "shrink_few": (16, 128, 4, 4),
    "shrink_drop": (32, 128, 4, 4),
    "expand": (64, 128, 4, 1),
    "input_gradient": (64, 128, 4, 1),
    "input_gradient_drop": (64, 64, 4, 1),
    "reduce": (64, 256, 8, 3),
    "reduce_wide": (64, 128, 8, 3),
    "rescale": (32, 256, 4, 1),
    "reduce_rescaled": (64, 128, 8, 3),
    "row_norms": (32, 128, 4, 4),
    "row_norms_wide": (32, 64, 8, 3),
    "outer": (64, 128, 4, 3),
    "outer_drop": (64, 128, 8, 3),
    "finish_inner": (256, 8, 2, 1),
    "swiglu": (64, 128, 4, 3),
    "swiglu_drop": (64, 128, 4, 3),
    "swiglu_backward": (64, 64, 4, 3),
    "swiglu_backward_drop": (64, 64, 4, 3),
    "swiglu_backward_dora": (64, 32, 4, 4),
}
"""Rows and columns of a tile (of `finish_inner`: elements, and loads at once), warps, stages of the pipeline; measured on an
H100, rank 16."""

_FEW_ROWS = 2048
"""Up to here 64 rows for each program would leave most of the device idle."""


def prepare(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """See `fxlora.ops.aten.prepare`."""
    if any(A.dtype != As[0].dtype for A in As):  # a kernel that chooses between pointers needs them of one dtype
        As = [A.to(dtype) for A in As]
    ranks, columns = [A.shape[0] for A in As], As[0].shape[1]
    out = As[0].new_empty(sum(ranks), columns, dtype=dtype)
    _prepare((_ceil(columns, _BLOCK), sum(ranks)), (*_three(As), out), (*_three_sizes(ranks), columns), (_BLOCK,), 4)
    return out


def shrink(
    x: Tensor, A: Tensor, ranks: Sequence[int], scales: Sequence[Tensor], p: float, seed: Tensor | None
) -> Tensor:
    """See `fxlora.ops.aten.shrink`."""
    rows, columns = x.shape
    drop_rate, keep = _dropout(p)
    xs = x.new_empty(rows, sum(ranks))
    name = "shrink_few" if rows <= _FEW_ROWS else "shrink_drop" if drop_rate else "shrink"
    block_m, block_k, warps, stages = CONFIG[name]
    blocks = _ceil(rows, block_m)
    split_columns, splits = _splits(columns, block_k, blocks) if name == "shrink_few" else (columns, 1)
    partials = x.new_empty(splits * xs.numel(), dtype=torch.float32) if splits > 1 else None
    _shrink(
        (blocks, splits), (x, A, *_three(scales), xs, partials, seed),
        (rows, columns, *_three_sizes(ranks), split_columns, drop_rate, keep),
        (len(ranks), drop_rate > 0, block_m, block_k, _block_rank(ranks)), warps, stages,
    )  # fmt: skip
    if partials is not None:
        _finish_inner(partials, xs, scales, keep, [splits] * len(ranks), rows, ranks)
    return xs


def expand(xs: Tensor, B: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """See `fxlora.ops.aten.expand`."""
    rows, (outputs, rank) = xs.shape[0], B.shape
    y = xs.new_empty(rows, outputs)
    block_m, block_n, warps, _ = CONFIG["expand"]
    _expand(
        (_ceil(outputs, block_n), _ceil(rows, block_m)), (xs, B, bias, residual, y),
        (rows, outputs, rank, xs.stride(0)), (block_m, block_n, _block_rank([rank])), warps,
    )  # fmt: skip
    return y


def input_gradient(dxa: Tensor, A: Tensor, ranks: Sequence[int], p: float, seed: Tensor | None) -> Tensor:
    """See `fxlora.ops.aten.input_gradient`."""
    rows, columns = dxa.shape[0], A.shape[1]
    dx = dxa.new_empty(rows, columns)
    drop_rate, keep = _dropout(p)
    block_m, block_k, warps, _ = CONFIG["input_gradient_drop" if drop_rate else "input_gradient"]
    _input_gradient(
        (_ceil(columns, block_k), _ceil(rows, block_m)), (dxa, A, dx, seed),
        (rows, columns, *_three_sizes(ranks), drop_rate, keep),
        (len(ranks), drop_rate > 0, block_m, block_k, _block_rank(ranks)), warps,
    )  # fmt: skip
    return dx


def outer(
    dxa: Tensor, x: Tensor, ranks: Sequence[int], p: float, seed: Tensor | None, dtype: torch.dtype,
    row_scale: Tensor | None = None, column_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `fxlora.ops.aten.outer`; without the scale of the dropout, and in float32 always."""
    del dtype
    rows, columns = x.shape
    row_scale, column_scale = (None if each is None else each.contiguous() for each in (row_scale, column_scale))
    drop_rate, _ = _dropout(p)
    block_m, block_k, warps, stages = CONFIG["outer_drop" if drop_rate else "outer"]
    blocks = _ceil(columns, block_k)
    split_rows, splits = _splits(rows, block_m, blocks)
    partials = x.new_empty(splits, sum(ranks) * columns, dtype=torch.float32)
    _outer(
        (blocks, splits), (x, dxa, partials, seed, row_scale, column_scale),
        (rows, columns, *_three_sizes(ranks), split_rows, drop_rate),
        (len(ranks), drop_rate > 0, block_m, block_k, _block_rank(ranks)), warps, stages,
    )  # fmt: skip
    return partials


def finish(
    first: Tensor, second: Tensor, p: float, dtype: torch.dtype, dtype_second: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `fxlora.ops.aten.finish`; the first gets the scale of the dropout."""
    one, two = first.new_empty(first.shape[1], dtype=dtype), second.new_empty(second.shape[1], dtype=dtype_second)
    sizes = one.numel(), two.numel()
    _finish_splits(
        (_ceil(max(sizes), _BLOCK), 2), (first, second, one, two),
        (first.shape[0], second.shape[0], *sizes, first.stride(0), second.stride(0), _dropout(p)[1]), (_BLOCK,), 4,
    )  # fmt: skip
    return one, two


def reduce(dys: Sequence[Tensor], xs: Tensor, Bs: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `fxlora.ops.aten.reduce`."""
    ranks, outputs = [B.shape[1] for B in Bs], [B.shape[0] for B in Bs]
    rows = xs.shape[0]
    rank = _block_rank(ranks)
    block_m, block_n, warps, stages = CONFIG["reduce" if rank <= 32 else "reduce_wide"]
    strips = [_ceil(size, block_n) for size in outputs]
    split_rows, splits = _splits(rows, block_m, sum(strips))
    inner = xs.new_empty(sum(n * r for n, r in zip(strips, ranks, strict=True)) * rows)
    outer = xs.new_empty(splits, sum(n * r for n, r in zip(outputs, ranks, strict=True)), dtype=torch.float32)
    _reduce(
        (sum(strips), splits), (*_three(dys), *_three(Bs), xs, inner, outer),
        (rows, *_three_sizes(outputs), *_three_sizes(ranks), split_rows), (block_m, block_n, rank), warps, stages,
    )  # fmt: skip
    dxa = torch.empty_like(xs)
    _finish_inner(inner, dxa, scales, 1.0, strips, rows, ranks)
    return dxa, outer


def rescale(y0: Tensor, ratio: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """See `fxlora.ops.aten.rescale`."""
    rows, columns = y0.shape
    y = torch.empty_like(y0)
    block_m, block_n, warps, _ = CONFIG["rescale"]
    _rescale(
        (_ceil(columns, block_n), _ceil(rows, block_m)), (y0, ratio, bias, residual, y), (rows, columns),
        (rows % block_m == 0 and columns % block_n == 0, block_m, block_n), warps,
    )  # fmt: skip
    return y


def reduce_rescaled(
    dys: Sequence[Tensor], products: Sequence[Tensor], xs: Tensor, Bs: Sequence[Tensor], ratios: Sequence[Tensor],
    scales: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """See `fxlora.ops.aten.reduce_rescaled`."""
    ranks, outputs = [B.shape[1] for B in Bs], [B.shape[0] for B in Bs]
    rows = xs.shape[0]
    block_m, block_n, warps, stages = CONFIG["reduce_rescaled"]
    strips = [_ceil(size, block_n) for size in outputs]
    split_rows, splits = _splits(rows, block_m, sum(strips))
    scaled = [torch.empty_like(dy) for dy in dys]
    inner = xs.new_empty(sum(n * r for n, r in zip(strips, ranks, strict=True)) * rows)
    size = sum(n * (r + 1) for n, r in zip(outputs, ranks, strict=True))
    outer = xs.new_empty(splits, size, dtype=torch.float32)
    even = rows % block_m == 0 and all(size % block_n == 0 for size in outputs)
    _reduce_rescaled(
        (sum(strips), splits),
        (*_three(dys), *_three(products), *_three(scaled), *_three(Bs), *_three(ratios), xs, inner, outer),
        (rows, *_three_sizes(outputs), *_three_sizes(ranks), split_rows),
        (even, block_m, block_n, _block_rank(ranks)), warps, stages,
    )  # fmt: skip
    dxa = torch.empty_like(xs)
    _finish_inner(inner, dxa, scales, 1.0, strips, rows, ranks)
    return scaled, dxa, outer


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    """See `fxlora.ops.norms.row_norms`."""
    (rows, columns), rank = weight.shape, A.shape[0]
    norms = torch.empty_like(squared, memory_format=torch.contiguous_format)
    operands = (each.detach().to(weight.device).contiguous() for each in (weight, A, B, scale, squared))
    block_n, block_k, warps, stages = CONFIG["row_norms" if rank <= 32 else "row_norms_wide"]
    _row_norms(
        (_ceil(rows, block_n), 1), (*operands, norms), (rows, columns, rank),
        (block_n, block_k, _block_rank([rank])), warps, stages,
    )  # fmt: skip
    return norms


def _finish_inner(
    inner: Tensor, out: Tensor, scales: Sequence[Tensor], factor: float, strips: Sequence[int], rows: int,
    ranks: Sequence[int],
) -> None:  # fmt: skip
    block, loads, warps, _ = CONFIG["finish_inner"]
    _finish_strips(
        (_ceil(rows * max(ranks), block), len(ranks)), (inner, out, *_three(scales)),
        (factor, *_three_sizes(strips), rows, *_three_sizes(ranks)), (block, loads), warps,
    )  # fmt: skip


def drop(x: Tensor, p: float, seed: Tensor, sibling: int) -> Tensor:
    """`x` with entries dropped by the mask of a seed and a sibling, the others scaled."""
    rows, columns = x.shape
    out = torch.empty_like(x)
    drop_rate, keep = _dropout(p)
    _drop((_ceil(columns, 64), _ceil(rows, 32)), (x, out, seed), (rows, columns, drop_rate, keep), (sibling, 32, 64), 4)
    return out


def _dropout(p: float) -> tuple[int, float]:
    """How many of `RESOLUTION` numbers are dropped, and the scale of what is kept."""
    dropped = threshold(p)
    return dropped, RESOLUTION / (RESOLUTION - dropped) if p < 1 else 0.0


def _splits(rows: int, block: int, programs: int) -> tuple[int, int]:
    """(rows, or columns, of a split, number of splits) so that there are enough programs."""
    blocks = _ceil(rows, block)
    wanted = max(1, min(blocks, _ceil(_PROGRAMS, programs)))
    split_rows = _ceil(blocks, wanted) * block
    return split_rows, _ceil(rows, split_rows)


def _block_rank(ranks: Sequence[int]) -> int:
    return max(16, 1 << (max(ranks) - 1).bit_length())


def _ceil(size: int, block: int) -> int:
    """How many blocks there are; `triton.cdiv` is made for kernels, and takes microseconds."""
    return -(-size // block)


def _three(values: Sequence[Tensor]) -> list[Tensor]:
    return [*values, *[values[0]] * (3 - len(values))]


def _three_sizes(values: Sequence[int]) -> list[int]:
    return [*values, *[0] * (3 - len(values))]


def swiglu_forward(
    g: Tensor, u: Tensor, xs: Tensor, Bg: Tensor, Bu: Tensor, Ad: Tensor, scale: Tensor, p: float, seed: Tensor | None,
    ratios: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fxlora.ops.aten.swiglu_forward`."""
    rows, columns = g.shape
    rank = Ad.shape[0]
    if any(factor.dtype != g.dtype for factor in (Bg, Bu, Ad)):  # read by every program: half the bytes
        Bg, Bu, Ad = prepare([Bg.view(rank, columns), Bu.view(rank, columns), Ad], g.dtype).split(rank)
    drop_rate, keep = _dropout(p)
    block_m, block_n, warps, stages = CONFIG["swiglu_drop" if drop_rate else "swiglu"]
    strip_columns = max(block_n, _ceil(_ceil(columns, 16), block_n) * block_n)
    strips = _ceil(columns, strip_columns)
    h = torch.empty_like(g)
    partials = g.new_empty(strips, rows, rank, dtype=torch.float32)
    _swiglu_forward(
        (strips, _ceil(rows, block_m)), (g, u, xs, Bg, Bu, Ad, *ratios, h, partials, seed),
        (rows, columns, rank, strip_columns, drop_rate),
        (2, drop_rate > 0, rows % block_m == 0 and columns % block_n == 0, block_m, block_n, _block_rank([rank])),
        warps, stages,
    )  # fmt: skip
    xd = g.new_empty(rows, rank)
    _finish_inner(partials, xd, [scale], keep, [strips], rows, [rank])
    return h, xd


def swiglu_backward(
    dh: Tensor, g: Tensor, u: Tensor, xs: Tensor, Bg: Tensor, Bu: Tensor, Ad: Tensor, dxd: Tensor, scales: Sequence[Tensor],
    p: float, seed: Tensor | None, dtype: torch.dtype, ratios: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fxlora.ops.aten.swiglu_backward`. `dg` takes the memory of `dh`."""
    rows, columns = g.shape
    rank = Ad.shape[0]
    drop_rate, keep = _dropout(p)
    name = "swiglu_backward_drop" if drop_rate else "swiglu_backward" if ratios[0] is None else "swiglu_backward_dora"
    block_m, block_n, warps, stages = CONFIG[name]
    strips = _ceil(columns, block_n)
    split_rows, splits = _splits(rows, block_m, strips)
    du = torch.empty_like(g)
    inner = g.new_empty(2, strips, rows, rank)
    before = 2 * columns * (rank if ratios[0] is None else rank + 1)
    outer = g.new_empty(splits, before + columns * rank, dtype=torch.float32)
    _swiglu_backward(
        (strips, splits), (dh, g, u, xs, Bg, Bu, Ad, *ratios, dxd, du, inner, outer, seed),
        (rows, columns, rank, split_rows, drop_rate, keep),
        (2, drop_rate > 0, rows % block_m == 0 and columns % block_n == 0, block_m, block_n, _block_rank([rank])),
        warps, stages,
    )  # fmt: skip
    dxa = g.new_empty(rows, 2 * rank)
    _finish_inner(inner, dxa, scales, 1.0, [strips, strips], rows, [rank, rank])
    dAd, dB = finish(outer[:, before:], outer[:, :before], p, dtype, dtype)
    return dh, du, dxa, dB, dAd.view(rank, columns)
