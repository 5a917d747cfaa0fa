"""What the kernels share: masked tiles, products, and the dropout mask that a seed gives.

A mask is a function of (seed, sibling, row, column) alone: forward and backward make it anew and nothing is kept. One
32-bit hash serves two neighbouring columns, 15 bits each, so that a probability is rounded to a multiple of 2⁻¹⁵.
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
def large_tile(pointer, rows, columns, M, N, EVEN: tl.constexpr):
    """A tile of a contiguous `(M, N)` as float32; without a mask if the blocks divide the sizes."""
    place = pointer + rows[:, None].to(tl.int64) * N + columns[None, :]
    if EVEN:
        return tl.load(place).to(tl.float32)
    return tl.load(place, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0).to(tl.float32)


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
def pair_words(seed, pairs):
    """One well-mixed word for each pair of columns."""
    word = (pairs.to(tl.uint32) + 1) * 0x27D4EB2F + (seed >> 32).to(tl.uint32)
    word = (word ^ (word >> 15)) * 0x2C1B3C6D
    word = (word ^ (word >> 12)) * 0x297A2D39
    return word ^ (word >> 15)


@triton.jit
def words(row_word, pair_word):
    """`(rows, pairs)`: the hash from which all siblings' masks are made."""
    word = (row_word[:, None] ^ pair_word[None, :]) * 0x9E3779B1
    return (word ^ (word >> 16)) * 0x85EBCA6B


@triton.jit
def kept_bits(word, sibling: tl.constexpr, threshold):
    """For each pair bit 0 and bit 16: whether the left and the right column are kept.

    `threshold` is the number of 2¹⁵ that are dropped.
    """
    if sibling > 0:
        word = word * (0x6C8E9CF5 + 0x3504F332 * sibling)
    word = word ^ (word >> 15)
    both = (word | 0x80008000) - (threshold * 0x00010001).to(tl.uint32)
    return (both >> 15) & 0x00010001


@triton.jit
def halves(packed, dtype: tl.constexpr):
    """The left and the right 16-bit numbers of each 32-bit word."""
    left = packed.to(tl.uint16).to(dtype, bitcast=True)
    right = (packed >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return left, right


@triton.jit
def packed(left, right, dtype: tl.constexpr):
    """The inverse of `halves`, from numbers of any dtype."""
    low = left.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (right.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def packed_tile(pointer, rows, pairs, row_count, pair_count, pair_stride):
    """Pairs of 16-bit numbers as 32-bit words, zero outside of the matrix; `pointer` is to contiguous rows."""
    inside = (rows < row_count)[:, None] & (pairs < pair_count)[None, :]
    words = pointer.to(tl.pointer_type(tl.uint32), bitcast=True)
    return tl.load(words + rows[:, None].to(tl.int64) * pair_stride + pairs[None, :], mask=inside, other=0)
