"""Kernels of DoRA's ratio, a factor for each feature of a layer's output, and of its gradient.

    rescale          y = ratio · y0 + bias + residual
    reduce_rescaled  dy' = ratio · dy, partials of [dy'ᵢ Bᵢ]ᵢ and of dy'ᵢᵀ xsᵢ, and of the sums of dyᵢ · y0ᵢ over all tokens:
                     each dy and y0 is read once
    row_norms        ‖W + scale · B A‖ of each row: W is read once

All sums are float32 and have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxlora.ops.kernels.common import large_tile, product, store_large, store_rows, tile


@triton.jit
def rescale_kernel(
    y0, ratio, bias, residual, y, M, N, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of `y (M, N)`; without those of bias and residual that are None."""
    dtype: tl.constexpr = y.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = tl.load(ratio + columns, mask=columns < N, other=0.0).to(tl.float32)
    value = large_tile(y0, rows, columns, M, N, EVEN) * factor[None, :]
    if bias is not None:
        value += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        value += large_tile(residual, rows, columns, M, N, EVEN)
    store_large(y, value.to(dtype), rows, columns, M, N, EVEN)


@triton.jit
def _reduce_strip(
    dy, y0, scaled, B, ratio, xs, inner, outer, sums, strip, split, M, N, R, xs_stride, split_rows, outer_stride,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = dy.dtype.element_ty
    columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, RANK)
    factor = tl.load(ratio + columns, mask=columns < N, other=0.0).to(tl.float32)
    b = (tile(B, columns, ranks, N, R, R, 1, tl.float32) * factor[:, None]).to(dtype)
    total = tl.zeros([BLOCK_N, RANK], tl.float32)
    along = tl.zeros([16, BLOCK_N], tl.float32)
    for start in tl.range(split * split_rows, min(M, (split + 1) * split_rows), BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        part = large_tile(dy, rows, columns, M, N, EVEN, dtype)  # products take it as it comes from memory
        total = product(tl.trans(part), tile(xs, rows, ranks, M, R, xs_stride, 1, dtype), total)
        across = product(part, b, tl.zeros([BLOCK_M, RANK], tl.float32))
        terms = part.to(tl.float32) * large_tile(y0, rows, columns, M, N, EVEN)
        along += tl.sum(tl.reshape(terms, [BLOCK_M // 16, 16, BLOCK_N]), 0)  # within a thread: no barrier for each tile
        store_large(scaled, (part.to(tl.float32) * factor[None, :]).to(dtype), rows, columns, M, N, EVEN)
        store_rows(inner, across, rows, ranks, M, R, R)
    inside = (columns < N)[:, None] & (ranks < R)[None, :]
    outer += split.to(tl.int64) * outer_stride
    tl.store(outer + columns[:, None] * R + ranks[None, :], total * factor[:, None], mask=inside)
    tl.store(outer + sums + columns, tl.sum(along, 0), mask=columns < N)


@triton.jit
def reduce_rescaled_kernel(
    dy0, dy1, dy2, product0, product1, product2, scaled0, scaled1, scaled2, B0, B1, B2, ratio0, ratio1, ratio2, xs, inner,
    outer, M, N0, N1, N2, R0, R1, R2, split_rows,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A strip of BLOCK_N columns of one dy, some of its rows: those of `scaled`, and partials.

    `inner`: for each strip `dy' B` over its columns, `(M, Rᵢ)`, one after the other. `outer`: for each split of the rows
    `dy'ᵢᵀ xsᵢ`, `(Nᵢ, Rᵢ)`, one after the other, and then the sums of `dyᵢ · productᵢ`, `(Nᵢ,)`.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    strips0 = tl.cdiv(N0, BLOCK_N)
    strips1 = tl.cdiv(N1, BLOCK_N)
    stride = R0 + R1 + R2
    sums = N0 * R0 + N1 * R1 + N2 * R2
    outer_stride = sums + N0 + N1 + N2
    rank_rows = tl.cast(M, tl.int64)  # M = 1 is a constant
    if strip < strips0:
        inner += strip * rank_rows * R0
        _reduce_strip(
            dy0, product0, scaled0, B0, ratio0, xs, inner, outer, sums, strip, split, M, N0, R0, stride, split_rows,
            outer_stride, EVEN, BLOCK_M, BLOCK_N, RANK, STAGES,
        )  # fmt: skip
    elif strip < strips0 + strips1:
        inner += (strips0 * R0 + (strip - strips0) * R1) * rank_rows
        first = N0 * R0
        _reduce_strip(
            dy1, product1, scaled1, B1, ratio1, xs + R0, inner, outer + first, sums - first + N0, strip - strips0, split, M,
            N1, R1, stride, split_rows, outer_stride, EVEN, BLOCK_M, BLOCK_N, RANK, STAGES,
        )  # fmt: skip
    else:
        inner += (strips0 * R0 + strips1 * R1 + (strip - strips0 - strips1) * R2) * rank_rows
        first = N0 * R0 + N1 * R1
        _reduce_strip(
            dy2, product2, scaled2, B2, ratio2, xs + R0 + R1, inner, outer + first, sums - first + N0 + N1,
            strip - strips0 - strips1, split, M, N2, R2, stride, split_rows, outer_stride, EVEN, BLOCK_M, BLOCK_N, RANK,
            STAGES,
        )  # fmt: skip


@triton.jit
def row_norms_kernel(
    W, A, B, scale, squared, norms, N, K, R,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`√(squared + 2 scale ⟨W, B A⟩ + scale² ‖B A‖²)` of BLOCK_N rows of `W (N, K)`."""
    dtype: tl.constexpr = W.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, RANK)
    along = tl.zeros([BLOCK_N, RANK], tl.float32)
    gram = tl.zeros([RANK, RANK], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        factor = tile(A, ranks, columns, R, K, K, 1, dtype)
        along = product(tile(W, rows, columns, N, K, K, 1, dtype), tl.trans(factor), along)
        gram = product(factor, tl.trans(factor), gram)
    b = tile(B, rows, ranks, N, R, R, 1, dtype).to(tl.float32)
    factor_scale = tl.load(scale).to(tl.float32)
    twice = 2 * along + factor_scale * tl.dot(b, gram, input_precision="ieee")
    total = tl.load(squared + rows, mask=rows < N, other=0.0) + factor_scale * tl.sum(twice * b, 1)
    tl.store(norms + rows, tl.sqrt(tl.maximum(total, 0.0)), mask=rows < N)
