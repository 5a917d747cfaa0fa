"""What the kernels share: masked tiles, products, and the dropout mask that a seed gives.

A mask is a function of (seed, sibling, row, column) alone: forward and backward make it anew and nothing is kept. It is the
product of a random word for each row and one for each column, modulo 2³², compared with a threshold: two operations for an
entry, where a generator of the quality of Philox takes longer than the products. Spectrum, and correlations of rows,
columns and squares of entries, are those of independent numbers (tests/ops/test_mask.py).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(pointer, rows, columns, row_count, column_count, row_stride, column_stride, dtype: tl.constexpr):
    """`pointer[rows, columns]` as `dtype`, zero outside of the matrix."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(dtype)


@triton.jit
def large_tile(pointer, rows, columns, M, N, EVEN: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """A tile of a contiguous `(M, N)` as `dtype`; without a mask if the blocks divide the sizes."""
    place = pointer + rows[:, None].to(tl.int64) * N + columns[None, :]
    if EVEN:
        return tl.load(place).to(dtype)
    return tl.load(place, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0).to(dtype)


@triton.jit
def store_large(pointer, value, rows, columns, M, N, EVEN: tl.constexpr):
    """Store a tile of a contiguous `(M, N)`."""
    place = pointer + rows[:, None].to(tl.int64) * N + columns[None, :]
    if EVEN:
        tl.store(place, value)
    else:
        tl.store(place, value, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def store_rows(pointer, value, rows, ranks, M, R, stride):
    """Store rows of a `(M, R)` that lie a stride apart."""
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(pointer + rows[:, None].to(tl.int64) * stride + ranks[None, :], value, mask=inside)


@triton.jit
def product(a, b, total):
    """`total + a @ b` of 16-bit numbers, summed in float32."""
    return tl.dot(a, b, total)


@triton.jit
def _mixed(word, factor):
    """Bits of a word spread over all of it."""
    word = (word ^ (word >> 16)) * factor
    return word ^ (word >> 15)


@triton.jit
def row_words(seed, rows):
    """One word for each row."""
    return _mixed((rows.to(tl.uint32) + 1) * 0x9E3779B1 + seed.to(tl.uint32), 0x85EBCA6B)


@triton.jit
def sibling_words(row_word, sibling: tl.constexpr):
    """The words of rows for one of several siblings."""
    if sibling == 0:
        return row_word
    elif sibling == 1:
        return row_word * 0x85EBCA6B
    else:
        return row_word * 0xC2B2AE35


@triton.jit
def column_words(seed, columns):
    """One odd word for each column."""
    return _mixed((columns.to(tl.uint32) + 1) * 0x27D4EB2F + (seed >> 32).to(tl.uint32), 0x2C1B3C6D) | 1


@triton.jit
def kept(row_word, column_word, sibling: tl.constexpr, threshold):
    """Whether each entry of `(rows, columns)` is kept; `threshold` of 2³² are dropped."""
    return sibling_words(row_word, sibling)[:, None] * column_word[None, :] >= threshold.to(tl.uint32)
