"""What the kernels share: masked tiles, products, and the dropout mask that a seed gives.

A mask is a function of (seed, sibling, row, column) alone: forward and backward make it anew and nothing is kept. It is a
hash of a word for each row and one for each column, six operations for an entry, which may wait for memory anyway: a
generator of the quality of Philox takes longer than the products.
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
def product(a, b, total):
    """`total + a @ b` of 16-bit numbers, summed in float32."""
    return tl.dot(a, b, total)


@triton.jit
def row_words(seed, rows):
    """One well-mixed word for each row."""
    word = (rows.to(tl.uint32) + 1) * 0x9E3779B1 + seed.to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def column_words(seed, columns):
    """One well-mixed word for each column."""
    word = (columns.to(tl.uint32) + 1) * 0x27D4EB2F + (seed >> 32).to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x2C1B3C6D
    word = (word ^ (word >> 13)) * 0x297A2D39
    return word ^ (word >> 16)


@triton.jit
def words(row_word, column_word):
    """`(rows, columns)`: what the masks of all siblings are made of."""
    word = (row_word[:, None] ^ column_word[None, :]) * 0x9E3779B1
    return word ^ (word >> 16)


@triton.jit
def kept(word, sibling: tl.constexpr, threshold):
    """Whether each entry is kept; `threshold` of 2³² are dropped."""
    if sibling == 0:
        return word * 0x85EBCA6B >= threshold.to(tl.uint32)
    elif sibling == 1:
        return word * 0xC2B2AE35 >= threshold.to(tl.uint32)
    else:
        return word * 0x27D4EB2F >= threshold.to(tl.uint32)
