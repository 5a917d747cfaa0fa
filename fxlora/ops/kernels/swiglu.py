"""Kernels of the middle of a SwiGLU block: between the large products of gate and up and that of down.

    forward    h = silu(g + xsg Bgᵀ) · (u + xsu Buᵀ), and partials of drop(h) Adᵀ         g, u are read and h is written once
    backward   dg, du from dh + drop(dxd Ad), and partials of dg Bg, du Bu, dgᵀ xsg, duᵀ xsu, drop(h)ᵀ dxd

All tensors are `(M, N)`, `xs (M, 2 R)`, `dxd (M, R)`, the factors 16-bit: Bg and Bu `(N, R)`, Ad `(R, N)`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxlora.ops.kernels.common import kept_bits, pair_words, product, row_words, tile, words


@triton.jit
def _kept(seed, row_word, columns, sibling: tl.constexpr, threshold):
    """Whether each entry of a tile is kept."""
    kept = kept_bits(words(row_word, pair_words(seed, columns // 2)), sibling, threshold)
    return ((kept >> ((columns % 2) * 16)[None, :]) & 1) != 0


@triton.jit
def forward_kernel(
    g, u, xs, Bg, Bu, Ad, h, partials, seed_pointer, M, N, R, strip_columns, threshold,
    SIBLING: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr,
    STAGES: tl.constexpr,
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
        gate = product(xs_gate, tile(Bg, ranks, columns, R, N, 1, R, dtype), tile(g, rows, columns, M, N, N, 1, tl.float32))
        up = product(xs_up, tile(Bu, ranks, columns, R, N, 1, R, dtype), tile(u, rows, columns, M, N, N, 1, tl.float32))
        value = (gate * tl.sigmoid(gate) * up).to(dtype)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(h + rows[:, None].to(tl.int64) * N + columns[None, :], value, mask=inside)
        if DROP:
            value = tl.where(_kept(seed, row_word, columns, SIBLING, threshold), value, 0.0)
        total = product(value, tile(Ad, columns, ranks, N, R, 1, N, dtype), total)
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(partials + strip.to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :], total, mask=inside)


@triton.jit
def _backward_tile(
    dh, g, u, du, rows, columns, xs_gate, xs_up, dxd, Bg, Bu, Ad, total_gate, total_up, total_down, inner_gate, inner_up,
    seed, row_word, M, N, threshold, keep_scale, SIBLING: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = g.dtype.element_ty
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    place = rows[:, None].to(tl.int64) * N + columns[None, :]
    gate = product(xs_gate, tl.trans(Bg), tile(g, rows, columns, M, N, N, 1, tl.float32))
    up = product(xs_up, tl.trans(Bu), tile(u, rows, columns, M, N, N, 1, tl.float32))
    gradient = tile(dh, rows, columns, M, N, N, 1, tl.float32)
    if DROP:
        kept = _kept(seed, row_word, columns, SIBLING, threshold)
        gradient += tl.where(kept, product(dxd, Ad, tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * keep_scale, 0.0)
    else:
        gradient = product(dxd, Ad, gradient)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    value = (silu * up).to(dtype)
    if DROP:
        value = tl.where(kept, value, 0.0)
    d_up = (gradient * silu).to(dtype)
    d_gate = (gradient * up * sigmoid * (1.0 + gate - silu)).to(dtype)
    tl.store(dh + place, d_gate, mask=inside)
    tl.store(du + place, d_up, mask=inside)
    total_gate = product(tl.trans(d_gate), xs_gate, total_gate)
    total_up = product(tl.trans(d_up), xs_up, total_up)
    total_down = product(tl.trans(value), dxd, total_down)
    inner_gate = product(d_gate, Bg, inner_gate)
    inner_up = product(d_up, Bu, inner_up)
    return total_gate, total_up, total_down, inner_gate, inner_up


@triton.jit
def _store_outer(outer, total_gate, total_up, total_down, columns, ranks, N, R):
    inside = (columns < N)[:, None] & (ranks < R)[None, :]
    by_row = columns[:, None] * R + ranks[None, :]
    tl.store(outer + by_row, total_gate, mask=inside)
    tl.store(outer + N * R + by_row, total_up, mask=inside)
    tl.store(outer + 2 * N * R + ranks[None, :] * N + columns[:, None], total_down, mask=inside)


@triton.jit
def backward_kernel(
    dh, g, u, xs, Bg, Bu, Ad, dxd, du, inner, outer, seed_pointer, M, N, R, split_rows, threshold, keep_scale,
    SIBLING: tl.constexpr, DROP: tl.constexpr, TWO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One or two blocks of columns, some rows: `dg` over `dh`, `du`, and partials.

    `inner[gate, up][strip] = dg Bg, du Bu`, `(M, R)`; `outer[split] = dgᵀ xsg, duᵀ xsu (N, R), dxdᵀ drop(h) (R, N)`, the
    last without the dropout's scale. `dxd` has the scale of its layer in it, and not that of the dropout.
    """
    dtype: tl.constexpr = g.dtype.element_ty
    strip = tl.program_id(0)
    split = tl.program_id(1)
    width: tl.constexpr = 2 * BLOCK_N if TWO else BLOCK_N
    first = strip * width + tl.arange(0, BLOCK_N)
    second = first + BLOCK_N
    ranks = tl.arange(0, RANK)
    Bg0 = tile(Bg, first, ranks, N, R, R, 1, dtype)
    Bu0 = tile(Bu, first, ranks, N, R, R, 1, dtype)
    Ad0 = tile(Ad, ranks, first, R, N, N, 1, dtype)
    gate0 = tl.zeros([BLOCK_N, RANK], tl.float32)
    up0 = tl.zeros([BLOCK_N, RANK], tl.float32)
    down0 = tl.zeros([BLOCK_N, RANK], tl.float32)
    if TWO:
        Bg1 = tile(Bg, second, ranks, N, R, R, 1, dtype)
        Bu1 = tile(Bu, second, ranks, N, R, R, 1, dtype)
        Ad1 = tile(Ad, ranks, second, R, N, N, 1, dtype)
        gate1 = tl.zeros([BLOCK_N, RANK], tl.float32)
        up1 = tl.zeros([BLOCK_N, RANK], tl.float32)
        down1 = tl.zeros([BLOCK_N, RANK], tl.float32)
    seed = tl.load(seed_pointer) if DROP else 0
    strips = tl.num_programs(0)
    for start in tl.range(split * split_rows, min(M, (split + 1) * split_rows), BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        row_word = row_words(seed, rows) if DROP else rows
        xs_gate = tile(xs, rows, ranks, M, R, 2 * R, 1, dtype)
        xs_up = tile(xs + R, rows, ranks, M, R, 2 * R, 1, dtype)
        part = tile(dxd, rows, ranks, M, R, R, 1, dtype)
        inner_gate = tl.zeros([BLOCK_M, RANK], tl.float32)
        inner_up = tl.zeros([BLOCK_M, RANK], tl.float32)
        gate0, up0, down0, inner_gate, inner_up = _backward_tile(
            dh, g, u, du, rows, first, xs_gate, xs_up, part, Bg0, Bu0, Ad0, gate0, up0, down0, inner_gate, inner_up,
            seed, row_word, M, N, threshold, keep_scale, SIBLING, DROP, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if TWO:
            gate1, up1, down1, inner_gate, inner_up = _backward_tile(
                dh, g, u, du, rows, second, xs_gate, xs_up, part, Bg1, Bu1, Ad1, gate1, up1, down1, inner_gate, inner_up,
                seed, row_word, M, N, threshold, keep_scale, SIBLING, DROP, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        inside = (rows < M)[:, None] & (ranks < R)[None, :]
        place = strip.to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :]
        tl.store(inner + place, inner_gate, mask=inside)
        tl.store(inner + strips.to(tl.int64) * M * R + place, inner_up, mask=inside)
    outer += split.to(tl.int64) * 3 * N * R
    _store_outer(outer, gate0, up0, down0, first, ranks, N, R)
    if TWO:
        _store_outer(outer, gate1, up1, down1, second, ranks, N, R)
