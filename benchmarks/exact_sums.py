"""The correctly rounded `W + Σ s·BA` by a way of its own, as the yardstick of `benchmarks.merge_rounding`.

Sums are made in numpy's long double (80 bits on x86) with a bound of their error. Entries that this does not decide are
made with fractions, which are exact. Nothing is taken from the library, whose arithmetic is what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}
"""Of each dtype: binary digits, and the smallest exponent of a normal number (IEEE 754)."""
UNIT = float(np.finfo(np.longdouble).eps) / 2
"""The relative error of one operation of long doubles."""
_EXACT = 0.5 + 1e-7
"""Units in the last place; a bound of an error above this is replaced by the error itself."""
_BLOCK = 1 << 20
"""Entries that are summed at a time."""


@dataclass(frozen=True)
class Summand:
    """`scale · B A`, with `B` `(out, r)` and `A` `(r, in)`, of any floating dtype."""

    B: Tensor
    A: Tensor
    scale: float


@dataclass
class Count:
    """How far a result is from the exact sums.

    Attributes:
        wrong: entries that are not the correctly rounded sum.
        ulps: the largest error in units of the last place of the exact sum: where it is above 0.5 and the entry wrong, a
            bound of it.
        fractions: entries for which fractions were needed.
    """

    wrong: int = 0
    ulps: float = 0.0
    fractions: int = 0


def compare(weight: Tensor, summands: Sequence[Summand], results: Sequence[Tensor]) -> list[Count]:
    """Hold results against the exact sums.

    Args:
        weight: `(out, in)`.
        summands: what is added.
        results: each `(out, in)`, all of one dtype of `FORMATS`.

    Returns:
        One count for each result.
    """
    counts = [Count() for _ in results]
    step = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        block = _Block(weight[rows], [Summand(each.B[rows], each.A, each.scale) for each in summands])
        block.count([_wide(result[rows]) for result in results], FORMATS[results[0].dtype], counts)
    return counts


def nearest(value: Fraction, digits: int, smallest: int) -> tuple[Fraction, Fraction]:
    """(the nearest number with so many binary digits, ties to even; the unit of its last place as the value has it)."""
    if value == 0:
        return value, Fraction(2) ** (smallest - digits + 1)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - digits + 1)
    steps, rest = divmod(size, unit)
    steps += rest > unit / 2 or (rest == unit / 2 and steps % 2 == 1)
    return (steps * unit if value > 0 else -steps * unit), unit


class _Block:
    """Some rows of a weight with what is added to them."""

    def __init__(self, weight: Tensor, summands: Sequence[Summand]) -> None:
        self._weight = _wide(weight)
        self._summands = [(_wide(each.B), _wide(each.A).T.copy(), each.scale) for each in summands]

    def count(self, results: Sequence[Array], form: tuple[int, int], counts: Sequence[Count]) -> None:
        """Add to the counts what is wrong with each result, in float64, of a format of (digits, smallest exponent)."""
        digits, smallest = form
        value, error = self._sums()
        unit = np.ldexp(np.longdouble(1), np.maximum(np.frexp(value)[1] - 1, smallest) - digits + 1)
        steps, distance = np.rint(value / unit), error / unit
        decided = (np.abs(value / unit - steps) + distance < 0.5) & (distance < 0.125)
        rounded = (steps * unit).astype(np.float64)
        open_entries = list(self._exact(~decided))
        for result, count in zip(results, counts, strict=True):
            count.fractions += len(open_entries)
            ulps = np.where(decided, (np.abs(result - value) + error) / unit, 0)
            right = decided & (result == rounded)
            count.wrong += int((decided & ~right).sum())
            near = right & (ulps > _EXACT)
            for place, exact in [*open_entries, *self._exact(near)]:
                best, last = nearest(exact, digits, smallest)
                count.wrong += Fraction(float(result[place])) != best
                ulps[place] = float(abs(Fraction(float(result[place])) - exact) / last)
            count.ulps = max(count.ulps, float(ulps.max()))

    def _sums(self) -> tuple[Array, Array]:
        """The sums, and how far they may be from the exact ones."""
        value, size = np.zeros(self._weight.shape, np.longdouble), np.abs(self._weight)
        operations = len(self._summands) + 2
        for B, A, scale in self._summands:
            product = np.einsum("ik,jk->ij", B.astype(np.longdouble), A.astype(np.longdouble))
            value += np.longdouble(scale) * product
            size += abs(scale) * (np.abs(B) @ np.abs(A).T)
            operations += B.shape[1]
        value += self._weight
        return value, (1.01 * UNIT * operations * size).astype(np.longdouble)

    def _exact(self, where: Array) -> Iterator[tuple[tuple[int, int], Fraction]]:
        """(place, exact sum) of single entries."""
        for i, j in np.argwhere(where).tolist():
            value = Fraction(float(self._weight[i, j]))
            for B, A, scale in self._summands:
                pairs = zip(B[i].tolist(), A[j].tolist(), strict=True)
                value += Fraction(scale) * sum((Fraction(b) * Fraction(a) for b, a in pairs), Fraction(0))
            yield (i, j), value


def _wide(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()
