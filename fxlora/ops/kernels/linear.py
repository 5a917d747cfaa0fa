"""Kernels of the low-rank terms of linear layers that share their input; the large products are cuBLAS's.

Up to three layers with weights `Wᵢ (Nᵢ, K)` and factors `Aᵢ (Rᵢ, K)`, `Bᵢ (Nᵢ, Rᵢ)` read one `x (M, K)`. The factors may be
float32: what is multiplied is cast. All sums are float32 and have a fixed order.

    prepare         all Aᵢ as one matrix in x's dtype
    shrink          xs = [scaleᵢ · dropᵢ(x) Aᵢᵀ]ᵢ              x is read once
    expand          y = xs Bᵀ + bias + residual
    reduce          partials of [dyᵢ Bᵢ]ᵢ and of dyᵢᵀ xsᵢ      each dy is read once
    input_gradient  dx = Σᵢ dropᵢ(dxaᵢ Aᵢ)
    outer           partials of dxaᵢᵀ dropᵢ(x)                  x is read once
    finish_*        the sums of the partials
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxlora.ops.kernels.common import column_words, kept, product, row_words, store_rows, tile


@triton.jit
def prepare_kernel(A0, A1, A2, out, R0, R1, R2, K, BLOCK: tl.constexpr):
    """The factors one below the other in the dtype of `out (R0 + R1 + R2, K)`."""
    row = tl.program_id(1)
    if row < R0:
        source = A0 + row * K
    elif row < R0 + R1:
        source = A1 + (row - R0) * K
    else:
        source = A2 + (row - R0 - R1) * K
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row * K + column, tl.load(source + column, mask=column < K), mask=column < K)


@triton.jit
def _dropped(part, row_word, column_word, sibling: tl.constexpr, threshold, DROP: tl.constexpr):
    if DROP:
        return tl.where(kept(row_word, column_word, sibling, threshold), part, 0.0)
    return part


@triton.jit
def _store_scaled(pointer, total, scale, keep_scale, rows, ranks, M, R, stride):
    store_rows(pointer, total * (tl.load(scale).to(tl.float32) * keep_scale), rows, ranks, M, R, stride)


@triton.jit
def shrink_kernel(
    x, A, scale0, scale1, scale2, xs, partials, seed_pointer, M, K, R0, R1, R2, split_columns, threshold, keep_scale,
    COUNT: tl.constexpr, DROP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A strip of BLOCK_M rows of `xs (M, R0 + R1 + R2)`; A as prepared.

    Where there are `partials`, they are for `finish_inner`: of each split of the columns an unscaled sum, `(M, Rᵢ)`.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, RANK)
    total0 = tl.zeros([BLOCK_M, RANK], tl.float32)
    total1 = tl.zeros([BLOCK_M, RANK], tl.float32)
    total2 = tl.zeros([BLOCK_M, RANK], tl.float32)
    seed = tl.load(seed_pointer) if DROP else 0
    row_word = row_words(seed, rows) if DROP else rows
    split = tl.program_id(1)
    for start in tl.range(split * split_columns, min(K, (split + 1) * split_columns), BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        part = tile(x, rows, columns, M, K, K, 1, dtype)
        column_word = column_words(seed, columns) if DROP else columns
        factor = tile(A, columns, ranks, K, R0, 1, K, dtype)
        total0 = product(_dropped(part, row_word, column_word, 0, threshold, DROP), factor, total0)
        if COUNT > 1:
            factor = tile(A + R0 * K, columns, ranks, K, R1, 1, K, dtype)
            total1 = product(_dropped(part, row_word, column_word, 1, threshold, DROP), factor, total1)
        if COUNT > 2:
            factor = tile(A + (R0 + R1) * K, columns, ranks, K, R2, 1, K, dtype)
            total2 = product(_dropped(part, row_word, column_word, 2, threshold, DROP), factor, total2)
    stride = R0 + R1 + R2
    if partials is not None:
        rank_rows = tl.cast(M, tl.int64)  # M = 1 is a constant
        splits = tl.num_programs(1)
        store_rows(partials + split * rank_rows * R0, total0, rows, ranks, M, R0, R0)
        if COUNT > 1:
            store_rows(partials + (splits * R0 + split * R1) * rank_rows, total1, rows, ranks, M, R1, R1)
        if COUNT > 2:
            store_rows(partials + (splits * (R0 + R1) + split * R2) * rank_rows, total2, rows, ranks, M, R2, R2)
    else:
        _store_scaled(xs, total0, scale0, keep_scale, rows, ranks, M, R0, stride)
        if COUNT > 1:
            _store_scaled(xs + R0, total1, scale1, keep_scale, rows, ranks, M, R1, stride)
        if COUNT > 2:
            _store_scaled(xs + R0 + R1, total2, scale2, keep_scale, rows, ranks, M, R2, stride)


@triton.jit
def expand_kernel(
    xs, B, bias, residual, y, M, N, R, xs_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A tile of `y = xs Bᵀ + bias + residual`, `(M, N)`; without those of the last two that are None."""
    dtype: tl.constexpr = y.dtype.element_ty
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, RANK)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    factor = tile(B, ranks, columns, R, N, 1, R, dtype)
    total = product(tile(xs, rows, ranks, M, R, xs_stride, 1, dtype), factor, total)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    place = rows[:, None].to(tl.int64) * N + columns[None, :]
    if residual is not None:
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(dtype), mask=inside)


@triton.jit
def _add_term(
    total, row_word, column_word, sibling: tl.constexpr, threshold, dxa, A, rows, columns, ranks, M, R, K, stride, DROP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`total + dropᵢ(dxaᵢ Aᵢ)`, without the scale of the dropout."""
    part = tile(dxa, rows, ranks, M, R, stride, 1, A.dtype.element_ty)
    factor = tile(A, ranks, columns, R, K, K, 1, A.dtype.element_ty)
    if DROP:
        term = product(part, factor, tl.zeros([BLOCK_M, BLOCK_K], tl.float32))
        return total + _dropped(term, row_word, column_word, sibling, threshold, DROP)
    return product(part, factor, total)


@triton.jit
def input_gradient_kernel(
    dxa, A, dx, seed_pointer, M, K, R0, R1, R2, threshold, keep_scale,
    COUNT: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A tile of `dx = Σᵢ dropᵢ(dxaᵢ Aᵢ)`, `(M, K)`; A as prepared."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, RANK)
    stride = R0 + R1 + R2
    seed = tl.load(seed_pointer) if DROP else 0
    row_word = row_words(seed, rows) if DROP else rows
    column_word = column_words(seed, columns) if DROP else columns
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    total = _add_term(
        total,
        row_word,
        column_word,
        0,
        threshold,
        dxa,
        A,
        rows,
        columns,
        ranks,
        M,
        R0,
        K,
        stride,
        DROP,
        BLOCK_M,
        BLOCK_K,
    )
    if COUNT > 1:
        total = _add_term(
            total, row_word, column_word, 1, threshold, dxa + R0, A + R0 * K, rows, columns, ranks, M, R1, K, stride, DROP,
            BLOCK_M, BLOCK_K,
        )  # fmt: skip
    if COUNT > 2:
        total = _add_term(
            total, row_word, column_word, 2, threshold, dxa + R0 + R1, A + (R0 + R1) * K, rows, columns, ranks, M, R2, K,
            stride, DROP, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    tl.store(dx + rows[:, None].to(tl.int64) * K + columns[None, :], total * keep_scale, mask=inside)


@triton.jit
def _reduce_strip(
    dy, B, xs, inner, outer, strip, split, M, N, R, xs_stride, split_rows, outer_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = dy.dtype.element_ty
    columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, RANK)
    b = tile(B, columns, ranks, N, R, R, 1, dtype)
    total = tl.zeros([BLOCK_N, RANK], tl.float32)
    for start in tl.range(split * split_rows, min(M, (split + 1) * split_rows), BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        part = tile(dy, rows, columns, M, N, N, 1, dtype)
        total = product(tl.trans(part), tile(xs, rows, ranks, M, R, xs_stride, 1, dtype), total)
        across = product(part, b, tl.zeros([BLOCK_M, RANK], tl.float32))
        store_rows(inner, across, rows, ranks, M, R, R)
    inside = (columns < N)[:, None] & (ranks < R)[None, :]
    tl.store(outer + split.to(tl.int64) * outer_stride + columns[:, None] * R + ranks[None, :], total, mask=inside)


@triton.jit
def reduce_kernel(
    dy0, dy1, dy2, B0, B1, B2, xs, inner, outer, M, N0, N1, N2, R0, R1, R2, split_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A strip of BLOCK_N columns of one dy, some of its rows.

    `inner`: for each strip `dy B` over its columns, `(M, Rᵢ)`, one after the other. `outer`: for each split of the rows
    `dyᵢᵀ xsᵢ`, `(Nᵢ, Rᵢ)`, one after the other.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    strips0 = tl.cdiv(N0, BLOCK_N)
    strips1 = tl.cdiv(N1, BLOCK_N)
    stride = R0 + R1 + R2
    outer_stride = N0 * R0 + N1 * R1 + N2 * R2
    rank_rows = tl.cast(M, tl.int64)  # M = 1 is a constant
    if strip < strips0:
        inner += strip * rank_rows * R0
        _reduce_strip(
            dy0, B0, xs, inner, outer, strip, split, M, N0, R0, stride, split_rows, outer_stride,
            BLOCK_M, BLOCK_N, RANK, STAGES,
        )  # fmt: skip
    elif strip < strips0 + strips1:
        inner += (strips0 * R0 + (strip - strips0) * R1) * rank_rows
        _reduce_strip(
            dy1, B1, xs + R0, inner, outer + N0 * R0, strip - strips0, split, M, N1, R1, stride, split_rows, outer_stride,
            BLOCK_M, BLOCK_N, RANK, STAGES,
        )  # fmt: skip
    else:
        inner += (strips0 * R0 + strips1 * R1 + (strip - strips0 - strips1) * R2) * rank_rows
        _reduce_strip(
            dy2, B2, xs + R0 + R1, inner, outer + N0 * R0 + N1 * R1, strip - strips0 - strips1, split, M, N2, R2, stride,
            split_rows, outer_stride, BLOCK_M, BLOCK_N, RANK, STAGES,
        )  # fmt: skip


@triton.jit
def _sum_strips(inner, out, scale, factor, strips, M, R, stride, BLOCK: tl.constexpr, LOADS: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(M, tl.int64) * R
    inside = element < size
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, strips, LOADS):
        for strip in tl.static_range(LOADS):  # independent loads: a sum of hundreds of strips would wait for each
            place = (first + strip) * size + element
            total += tl.load(inner + place, mask=inside & (place < strips * size), other=0.0).to(tl.float32)
    place = (element // R).to(tl.int64) * stride + element % R
    tl.store(out + place, total * (tl.load(scale).to(tl.float32) * factor), mask=inside)


@triton.jit
def finish_inner_kernel(
    inner, out, scale0, scale1, scale2, factor, strips0, strips1, strips2, M, R0, R1, R2,
    BLOCK: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """`[factor · scaleᵢ · Σ strips]ᵢ`, `(M, R0 + R1 + R2)`; program (block, i)."""
    sibling = tl.program_id(1)
    stride = R0 + R1 + R2
    rank_rows = tl.cast(M, tl.int64)  # M = 1 is a constant
    if sibling == 0:
        _sum_strips(inner, out, scale0, factor, strips0, M, R0, stride, BLOCK, LOADS)
    elif sibling == 1:
        _sum_strips(inner + strips0 * R0 * rank_rows, out + R0, scale1, factor, strips1, M, R1, stride, BLOCK, LOADS)
    else:
        skipped = (strips0 * R0 + strips1 * R1) * rank_rows
        _sum_strips(inner + skipped, out + R0 + R1, scale2, factor, strips2, M, R2, stride, BLOCK, LOADS)


@triton.jit
def _sum_splits(partials, out, splits, size, stride, factor, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partials + element, mask=inside, other=0.0)
        partials += stride
    tl.store(out + element, total * factor, mask=inside)


@triton.jit
def finish_outer_kernel(
    first, second, out_first, out_second, splits_first, splits_second, size_first, size_second, stride_first, stride_second,
    factor_first, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two flat sums over splits, the first with a factor; program (block, 0 or 1)."""
    if tl.program_id(1) == 0:
        _sum_splits(first, out_first, splits_first, size_first, stride_first, factor_first, BLOCK)
    else:
        _sum_splits(second, out_second, splits_second, size_second, stride_second, 1.0, BLOCK)


@triton.jit
def _store_ranks(pointer, value, columns, ranks, K, R):
    inside = (columns < K)[:, None] & (ranks < R)[None, :]
    tl.store(pointer + ranks[None, :] * K + columns[:, None], value, mask=inside)


@triton.jit
def _scaled(gradient, row_scale, rows, M):
    if row_scale is not None:
        factor = tl.load(row_scale + rows, mask=rows < M, other=0.0).to(tl.float32)
        gradient = (gradient.to(tl.float32) * factor[:, None]).to(gradient.dtype)
    return gradient


@triton.jit
def outer_kernel(
    x, dxa, partials, seed_pointer, row_scale, column_scale, M, K, R0, R1, R2, split_rows, threshold,
    COUNT: tl.constexpr, DROP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns of `dxaᵢᵀ dropᵢ(x)` over some rows: partials `(splits, R0 + R1 + R2, K)`.

    With scales, which are None otherwise, `x · row_scale · column_scale` takes the place of x: the scales of the rows are
    multiplied into the few columns of dxa, those of the columns into the sums.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    stride = R0 + R1 + R2
    partials += split.to(tl.int64) * stride * K
    first = split * split_rows
    last = min(M, first + split_rows)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    seed = tl.load(seed_pointer) if DROP else 0
    column_word = column_words(seed, columns) if DROP else columns
    total0 = tl.zeros([BLOCK_K, RANK], tl.float32)
    total1 = tl.zeros([BLOCK_K, RANK], tl.float32)
    total2 = tl.zeros([BLOCK_K, RANK], tl.float32)
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        part = tile(x, rows, columns, M, K, K, 1, dtype)
        row_word = row_words(seed, rows) if DROP else rows
        gradient = _scaled(tile(dxa, rows, ranks, M, R0, stride, 1, dtype), row_scale, rows, M)
        total0 = product(tl.trans(_dropped(part, row_word, column_word, 0, threshold, DROP)), gradient, total0)
        if COUNT > 1:
            gradient = _scaled(tile(dxa + R0, rows, ranks, M, R1, stride, 1, dtype), row_scale, rows, M)
            total1 = product(tl.trans(_dropped(part, row_word, column_word, 1, threshold, DROP)), gradient, total1)
        if COUNT > 2:
            gradient = _scaled(tile(dxa + R0 + R1, rows, ranks, M, R2, stride, 1, dtype), row_scale, rows, M)
            total2 = product(tl.trans(_dropped(part, row_word, column_word, 2, threshold, DROP)), gradient, total2)
    if column_scale is not None:
        factor = tl.load(column_scale + columns, mask=columns < K, other=0.0).to(tl.float32)[:, None]
        total0 *= factor
        total1 *= factor
        total2 *= factor
    _store_ranks(partials, total0, columns, ranks, K, R0)
    if COUNT > 1:
        _store_ranks(partials + R0 * K, total1, columns, ranks, K, R1)
    if COUNT > 2:
        _store_ranks(partials + (R0 + R1) * K, total2, columns, ranks, K, R2)


@triton.jit
def drop_kernel(
    x, out, seed_pointer, M, K, threshold, keep_scale,
    SIBLING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`dropᵢ(x)` itself, for what has no kernel with the mask inside; any dtype."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    seed = tl.load(seed_pointer)
    keep = kept(row_words(seed, rows), column_words(seed, columns), SIBLING, threshold)
    offsets = rows[:, None].to(tl.int64) * K + columns[None, :]
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    value = tl.load(x + offsets, mask=inside & keep, other=0.0)
    tl.store(out + offsets, value * keep_scale, mask=inside)
