"""Kernels of the middle of a SwiGLU block: between the large products of gate and up and that of down.

    forward    h = silu(g + xsg Bgᵀ) · (u + xsu Buᵀ), and partials of drop(h) Adᵀ         g, u are read and h is written once
    backward   dg, du from dh + drop(dxd Ad), and partials of dg Bg, du Bu, dgᵀ xsg, duᵀ xsu, drop(h)ᵀ dxd

All tensors are `(M, N)`, `xs (M, 2 R)`, `dxd (M, R)`, the factors 16-bit: Bg and Bu `(N, R)`, Ad `(R, N)`. With DoRA a ratio
`(N,)` multiplies gate and up each, before silu; backward, it multiplies dg and du, and there are partials of its gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxlora.ops.kernels.common import column_words, kept, large_tile, product, row_words, store_large, tile


@triton.jit
def _ratios(ratio, columns, N):
    return tl.load(ratio + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _of_pairs(terms, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums of rows that are 8 apart: a thread has both from the tensor cores, and needs no barrier for each tile."""
    return tl.sum(tl.reshape(terms, [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)


@triton.jit
def _of_columns(sums):
    return tl.sum(tl.sum(sums, 0), 0)


@triton.jit
def forward_kernel(
    g, u, xs, Bg, Bu, Ad, ratio_gate, ratio_up, h, partials, seed_pointer, M, N, R, strip_columns, threshold,
    SIBLING: tl.constexpr, DROP: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of some columns: `h`, and `partials[strip] = drop(h) Adᵀ`, `(M, R)`, without the dropout's scale."""
    dtype: tl.constexpr = g.dtype.element_ty
    strip = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, RANK)
    xs_gate = tile(xs, rows, ranks, M, R, 2 * R, 1, dtype)
    xs_up = tile(xs + R, rows, ranks, M, R, 2 * R, 1, dtype)
    total = tl.zeros([BLOCK_M, RANK], tl.float32)
    if DROP:
        seed = tl.load(seed_pointer)
        row_word = row_words(seed, rows)
    for start in tl.range(strip * strip_columns, min(N, (strip + 1) * strip_columns), BLOCK_N, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_N)
        factor = tile(Bg, ranks, columns, R, N, 1, R, dtype)
        gate = product(xs_gate, factor, large_tile(g, rows, columns, M, N, EVEN))
        factor = tile(Bu, ranks, columns, R, N, 1, R, dtype)
        up = product(xs_up, factor, large_tile(u, rows, columns, M, N, EVEN))
        if ratio_gate is not None:
            gate *= _ratios(ratio_gate, columns, N)
            up *= _ratios(ratio_up, columns, N)
        value = (gate * tl.sigmoid(gate) * up).to(dtype)
        store_large(h, value, rows, columns, M, N, EVEN)
        if DROP:
            value = tl.where(kept(row_word, column_words(seed, columns), SIBLING, threshold), value, 0.0)
        total = product(value, tile(Ad, columns, ranks, N, R, 1, N, dtype), total)
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(partials + strip.to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :], total, mask=inside)


@triton.jit
def backward_kernel(
    dh, g, u, xs, Bg, Bu, Ad, ratio_gate, ratio_up, dxd, du, inner, outer, seed_pointer, M, N, R, split_rows, threshold, keep_scale,
    SIBLING: tl.constexpr, DROP: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A strip of BLOCK_N columns, some rows: `dg` over `dh`, `du`, and partials.

    `inner[gate, up][strip] = dg Bg, du Bu`, `(M, R)`; `outer[split] = dgᵀ xsg, duᵀ xsu (N, R), with DoRA the sums for
    both ratios (N,), dxdᵀ drop(h) (R, N)`, the last without the dropout's scale. `dxd` has the scale of its layer in it, and not that of the dropout.
    """
    dtype: tl.constexpr = g.dtype.element_ty
    strip = tl.program_id(0)
    split = tl.program_id(1)
    columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, RANK)
    factor_gate = tile(Bg, columns, ranks, N, R, R, 1, dtype)
    factor_up = tile(Bu, columns, ranks, N, R, R, 1, dtype)
    factor_down = tile(Ad, ranks, columns, R, N, N, 1, dtype)
    total_gate = tl.zeros([BLOCK_N, RANK], tl.float32)
    total_up = tl.zeros([BLOCK_N, RANK], tl.float32)
    total_down = tl.zeros([BLOCK_N, RANK], tl.float32)
    if ratio_gate is not None:
        along_gate = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)
        along_up = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)
        scale_gate = _ratios(ratio_gate, columns, N)
        scale_up = _ratios(ratio_up, columns, N)
    seed = tl.load(seed_pointer) if DROP else 0
    column_word = column_words(seed, columns) if DROP else columns
    inner += strip.to(tl.int64) * M * R
    inner_up = inner + tl.cast(tl.num_programs(0), tl.int64) * M * R
    for start in tl.range(split * split_rows, min(M, (split + 1) * split_rows), BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        xs_gate = tile(xs, rows, ranks, M, R, 2 * R, 1, dtype)
        xs_up = tile(xs + R, rows, ranks, M, R, 2 * R, 1, dtype)
        part = tile(dxd, rows, ranks, M, R, R, 1, dtype)
        gate = product(xs_gate, tl.trans(factor_gate), large_tile(g, rows, columns, M, N, EVEN))
        up = product(xs_up, tl.trans(factor_up), large_tile(u, rows, columns, M, N, EVEN))
        if ratio_gate is not None:
            gate_before = gate
            up_before = up
            gate *= scale_gate
            up *= scale_up
        gradient = large_tile(dh, rows, columns, M, N, EVEN)
        if DROP:
            keep = kept(row_words(seed, rows), column_word, SIBLING, threshold)
            term = product(part, factor_down, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            gradient += tl.where(keep, term * keep_scale, 0.0)
        else:
            gradient = product(part, factor_down, gradient)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        value = (silu * up).to(dtype)
        if DROP:
            value = tl.where(keep, value, 0.0)
        d_up = gradient * silu
        d_gate = gradient * up * sigmoid * (1.0 + gate - silu)
        if ratio_gate is not None:
            along_gate += _of_pairs(d_gate * gate_before, BLOCK_M, BLOCK_N)
            along_up += _of_pairs(d_up * up_before, BLOCK_M, BLOCK_N)
            d_gate *= scale_gate
            d_up *= scale_up
        d_up = d_up.to(dtype)
        d_gate = d_gate.to(dtype)
        store_large(dh, d_gate, rows, columns, M, N, EVEN)
        store_large(du, d_up, rows, columns, M, N, EVEN)
        total_gate = product(tl.trans(d_gate), xs_gate, total_gate)
        total_up = product(tl.trans(d_up), xs_up, total_up)
        total_down = product(tl.trans(value), part, total_down)
        zero = tl.zeros([BLOCK_M, RANK], tl.float32)
        inside = (rows < M)[:, None] & (ranks < R)[None, :]
        place = rows[:, None] * R + ranks[None, :]
        tl.store(inner + place, product(d_gate, factor_gate, zero), mask=inside)
        tl.store(inner_up + place, product(d_up, factor_up, zero), mask=inside)
    sums = 2 * N if ratio_gate is not None else 0
    outer += split.to(tl.int64) * (3 * N * R + sums)
    inside = (columns < N)[:, None] & (ranks < R)[None, :]
    by_row = columns[:, None] * R + ranks[None, :]
    tl.store(outer + by_row, total_gate, mask=inside)
    tl.store(outer + N * R + by_row, total_up, mask=inside)
    tl.store(outer + 2 * N * R + sums + ranks[None, :] * N + columns[:, None], total_down, mask=inside)
    if ratio_gate is not None:
        tl.store(outer + 2 * N * R + columns, _of_columns(along_gate), mask=columns < N)
        tl.store(outer + 2 * N * R + N + columns, _of_columns(along_up), mask=columns < N)
