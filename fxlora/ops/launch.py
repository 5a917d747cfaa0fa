"""Launches the kernels of `fxlora.ops.kernels`: block sizes, grids and buffers. The counterpart of `fxlora.ops.aten`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fxlora.ops.kernels import linear as kernels
from fxlora.ops.mask import RESOLUTION, threshold

_PROGRAMS = 264
"""How many programs a kernel that can split its rows should have: two for each processor of an H100."""

_BLOCK = 1024
"""Elements that one program of a sum takes."""

CONFIG = {
    "shrink": (64, 128, 4, 4),
    "shrink_drop": (64, 64, 4, 4),
    "expand": (64, 128, 4, 1),
    "input_gradient": (64, 128, 4, 1),
    "input_gradient_drop": (64, 128, 4, 1),
    "reduce": (64, 256, 8, 3),
    "reduce_wide": (64, 128, 8, 3),
    "outer": (64, 128, 4, 3),
    "outer_drop": (64, 64, 4, 4),
}
"""Rows and columns of a tile, warps, stages of the pipeline."""


def prepare(As: Sequence[Tensor], dtype: torch.dtype, p: float) -> Tensor:
    """All A one below the other in a dtype, `(Σ rᵢ, K)`; for kernels with dropout even columns before odd ones."""
    ranks, columns = [A.shape[0] for A in As], As[0].shape[1]
    out = As[0].new_empty(sum(ranks), columns, dtype=dtype)
    kernels.prepare_kernel[(triton.cdiv(columns, _BLOCK), sum(ranks))](
        *_three(As), out, *_three_sizes(ranks), columns, HALVE=threshold(p) > 0, BLOCK=_BLOCK, num_warps=4
    )
    return out


def shrink(
    x: Tensor, A: Tensor, ranks: Sequence[int], scales: Sequence[Tensor], p: float, seed: Tensor | None
) -> Tensor:
    """See `fxlora.ops.aten.shrink`."""
    rows, columns = x.shape
    drop_rate, keep = _dropout(p)
    xs = x.new_empty(rows, sum(ranks))
    block_m, block_k, warps, stages = CONFIG["shrink_drop" if drop_rate else "shrink"]
    kernels.shrink_kernel[(triton.cdiv(rows, block_m),)](
        x, A, *_three(scales), xs, seed, rows, columns, *_three_sizes(ranks), drop_rate, keep,
        COUNT=len(ranks), DROP=drop_rate > 0, BLOCK_M=block_m, BLOCK_K=block_k, RANK=_block_rank(ranks), STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    return xs


def expand(xs: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """See `fxlora.ops.aten.expand`."""
    rows, (outputs, rank) = xs.shape[0], B.shape
    y = xs.new_empty(rows, outputs)
    block_m, block_n, warps, _ = CONFIG["expand"]
    kernels.expand_kernel[(triton.cdiv(outputs, block_n), triton.cdiv(rows, block_m))](
        xs, B, bias, y, rows, outputs, rank, xs.stride(0),
        BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, RANK=_block_rank([rank]), num_warps=warps,
    )  # fmt: skip
    return y


def input_gradient(dxa: Tensor, A: Tensor, ranks: Sequence[int], p: float, seed: Tensor | None) -> Tensor:
    """`Σᵢ dropᵢ(dxaᵢ Aᵢ)`."""
    rows, columns = dxa.shape[0], A.shape[1]
    dx = dxa.new_empty(rows, columns)
    drop_rate, keep = _dropout(p)
    block_m, block_k, warps, _ = CONFIG["input_gradient_drop" if drop_rate else "input_gradient"]
    kernels.input_gradient_kernel[(triton.cdiv(columns, block_k), triton.cdiv(rows, block_m))](
        dxa, A, dx, seed, rows, columns, *_three_sizes(ranks), drop_rate, keep, COUNT=len(ranks), DROP=drop_rate > 0,
        BLOCK_M=block_m, BLOCK_K=block_k, RANK=_block_rank(ranks), num_warps=warps,
    )  # fmt: skip
    return dx


def outer(
    dxa: Tensor, x: Tensor, ranks: Sequence[int], p: float, seed: Tensor | None
) -> Tensor:
    """Partials of `dxaᵢᵀ dropᵢ(x)` without the scale of the dropout, `(splits, Σ rᵢ K)`."""
    rows, columns = x.shape
    drop_rate, _ = _dropout(p)
    block_m, block_k, warps, stages = CONFIG["outer_drop" if drop_rate else "outer"]
    blocks = triton.cdiv(columns, block_k)
    split_rows, splits = _splits(rows, block_m, blocks)
    partials = x.new_empty(splits, sum(ranks) * columns, dtype=torch.float32)
    kernels.outer_kernel[(blocks, splits)](
        x, dxa, partials, seed, rows, columns, *_three_sizes(ranks), split_rows, drop_rate, COUNT=len(ranks),
        DROP=drop_rate > 0, BLOCK_M=block_m, BLOCK_K=block_k, RANK=_block_rank(ranks), STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return partials


def backward(
    dys: Sequence[Tensor], x: Tensor, xs: Tensor, A: Tensor, Bs: Sequence[Tensor], scales: Sequence[Tensor],
    p: float, seed: Tensor | None, dtype: torch.dtype, needs_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """See `fxlora.ops.aten.backward`."""
    ranks, outputs = [B.shape[1] for B in Bs], [B.shape[0] for B in Bs]
    dxa, dB_partials = reduce(dys, xs, Bs, scales, ranks, outputs)
    dx = input_gradient(dxa, A, ranks, p, seed) if needs_dx else None
    dA_partials = outer(dxa, x, ranks, p, seed)
    dA = A.new_empty(dA_partials.shape[1], dtype=dtype)
    dB = Bs[0].new_empty(dB_partials.shape[1])
    kernels.finish_outer_kernel[(triton.cdiv(max(dA.numel(), dB.numel()), _BLOCK), 2)](
        dA_partials, dB_partials, dA, dB, len(dA_partials), len(dB_partials), dA.numel(), dB.numel(), _dropout(p)[1],
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return dx, dA, dB


def reduce(
    dys: Sequence[Tensor], xs: Tensor, Bs: Sequence[Tensor], scales: Sequence[Tensor], ranks: Sequence[int],
    outputs: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`[scaleᵢ dyᵢ Bᵢ]ᵢ`, and the partials of all `dyᵢᵀ xsᵢ`."""
    rows = xs.shape[0]
    rank = _block_rank(ranks)
    block_m, block_n, warps, stages = CONFIG["reduce" if rank <= 16 else "reduce_wide"]
    strips = [triton.cdiv(size, block_n) for size in outputs]
    split_rows, splits = _splits(rows, block_m, sum(strips))
    inner = xs.new_empty(sum(n * r for n, r in zip(strips, ranks, strict=True)) * rows)
    outer = xs.new_empty(splits, sum(n * r for n, r in zip(outputs, ranks, strict=True)), dtype=torch.float32)
    kernels.reduce_kernel[(sum(strips), splits)](
        *_three(dys), *_three(Bs), xs, inner, outer, rows, *_three_sizes(outputs), *_three_sizes(ranks), split_rows,
        BLOCK_M=block_m, BLOCK_N=block_n, RANK=rank, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    dxa = torch.empty_like(xs)
    kernels.finish_inner_kernel[(triton.cdiv(rows * max(ranks), _BLOCK), len(Bs))](
        inner, dxa, *_three(scales), *_three_sizes(strips), rows, *_three_sizes(ranks), BLOCK=_BLOCK, num_warps=4
    )
    return dxa, outer


def drop(x: Tensor, p: float, seed: Tensor, sibling: int) -> Tensor:
    """`x` with entries dropped by the mask of a seed and a sibling, the others scaled."""
    rows, columns = x.shape
    out = torch.empty_like(x)
    drop_rate, keep = _dropout(p)
    grid = (triton.cdiv(triton.cdiv(columns, 2), 64), triton.cdiv(rows, 32))
    kernels.drop_kernel[grid](
        x, out, seed, rows, columns, drop_rate, keep, SIBLING=sibling, BLOCK_M=32, BLOCK_K=64, num_warps=4
    )
    return out


def _dropout(p: float) -> tuple[int, float]:
    """How many of `RESOLUTION` numbers are dropped, and the scale of what is kept."""
    dropped = threshold(p)
    return dropped, RESOLUTION / (RESOLUTION - dropped) if dropped < RESOLUTION else 0.0


def _splits(rows: int, block: int, programs: int) -> tuple[int, int]:
    """(rows of a split, number of splits) so that there are enough programs."""
    blocks = triton.cdiv(rows, block)
    wanted = max(1, min(blocks, triton.cdiv(_PROGRAMS, programs)))
    split_rows = triton.cdiv(blocks, wanted) * block
    return split_rows, triton.cdiv(rows, split_rows)


def _block_rank(ranks: Sequence[int]) -> int:
    return max(16, triton.next_power_of_2(max(ranks)))


def _three(values: Sequence[Tensor]) -> list[Tensor]:
    return [*values, *[values[0]] * (3 - len(values))]


def _three_sizes(values: Sequence[int]) -> list[int]:
    return [*values, *[0] * (3 - len(values))]
