"""Sums rounded once: what `passes.fold` needs where ordinary floating-point arithmetic does not decide a rounding.

All of it is elementwise over many sums at a time, on tensors alone.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

_SPLITTER = 2.0**27 + 1
_SAFE = (2.0**-240, 2.0**240)
"""Magnitudes whose products of three, and the errors of these, are normal float64 numbers."""


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to `dtype` as if directly, to the nearest, ties to even.

    torch's own cast to bfloat16 or float16 goes through float32 and so rounds twice. Rounding to odd on the way
    (Boldo and Melquiond, "When double rounding is odd", 2005) makes the two steps equal one.
    """
    if dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    nearest = value.to(torch.float32)
    error = value - nearest.double()
    even = (nearest.view(torch.int32) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float32)
    odd = torch.where((error != 0) & even, torch.nextafter(nearest, towards), nearest)
    return odd.to(dtype)


def rounded_sums(start: Tensor, left: Tensor, right: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`start + Σ scale · left · right` over the last dimension, the exact value rounded once to `dtype`.

    Args:
        start: `(n,)`, finite.
        left: `(n, k)`, finite.
        right: `(n, k)`, finite.
        scale: `(k,)` float64, finite.
        dtype: float64, float32, bfloat16 or float16.

    Returns:
        `(n,)`. A sum of exactly zero is +0, unless `start` is -0.
    """
    first, left, right, scale = (each.double() for each in (start, left, right, scale))
    if not all(_is_safe(each) for each in (first, left, right, scale)):
        return _by_fractions(first, left, right, scale, dtype)
    terms = torch.cat([first[:, None], *_products(left, right, scale)], dim=1)
    return _round_expansion(distilled(terms), first, dtype)


def distilled(terms: Tensor) -> Tensor:
    """Each row as an expansion with the same exact sum: every entry is at most half a unit of the next one's last place.

    Repeated error-free vector transformation (Ogita, Rump and Oishi, "Accurate sum and dot product", 2005) until
    nothing changes.

    Args:
        terms: `(n, m)`, float64, without overflow in any partial sum.
    """
    columns = list(terms.unbind(1))
    while True:
        total, changed = columns[0], False
        for i in range(1, len(columns)):
            upper, lower = two_sum(total, columns[i])
            changed = changed or not (torch.equal(lower, columns[i - 1]) and torch.equal(upper, columns[i]))
            columns[i - 1], total = lower, upper
        columns[-1] = total
        columns = [column for column in columns[:-1] if bool(column.any())] + [total]
        if not changed:
            return torch.stack(columns, dim=1)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(rounded sum, its error), exactly `a + b` together (Knuth, TAOCP 2, 4.2.2, theorem B)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(rounded product, its error), exactly `a b` together, where nothing under- or overflows (Dekker, 1971)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    scaled = value * _SPLITTER
    high = scaled - (scaled - value)
    return high, value - high


def _products(left: Tensor, right: Tensor, scale: Tensor) -> list[Tensor]:
    """Tensors `(n, k)` whose exact sum is `scale · left · right`."""
    product, error = two_product(left, right)
    parts = [*two_product(scale.expand_as(product), product)]
    if bool(error.any()):  # not with factors of 24 bits or less
        parts += two_product(scale.expand_as(error), error)
    return [part for part in parts if bool(part.any())]


def _is_safe(value: Tensor) -> bool:
    size = value.abs()
    return bool(((size == 0) | ((size > _SAFE[0]) & (size < _SAFE[1]))).all())


def _round_expansion(parts: Tensor, start: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each row of a distilled `(n, m)`, rounded once."""
    high, rest = parts[:, -1], _leading(parts[:, :-1])
    towards = torch.nextafter(high, torch.where(rest > 0, torch.inf, -torch.inf).to(high))
    odd = (high.view(torch.int64) & 1) == 1
    if dtype == torch.float64:
        half = (towards - high) / 2
        below = _leading(parts[:, :-1].where(parts[:, :-1] != rest[:, None], 0.0))
        over = (rest.abs() > half.abs()) | (
            (rest == half) & (((below != 0) & ((below > 0) == (rest > 0))) | ((below == 0) & odd))
        )
        result = torch.where((rest != 0) & over, towards, high)
    else:  # to odd, of which any narrower rounding is that of the sum
        result = round_once(torch.where((rest != 0) & ~odd, towards, high), dtype)
    return torch.where((high == 0) & (start == 0), start.to(dtype), torch.where(high == 0, 0.0, result).to(dtype))


def _leading(parts: Tensor) -> Tensor:
    """The last entry of each row that is not zero, which has the sign of the row's sum; 0 if there is none."""
    result = parts.new_zeros(parts.shape[0])
    for column in parts.unbind(1):
        result = torch.where(column != 0, column, result)
    return result


def _by_fractions(start: Tensor, left: Tensor, right: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`rounded_sums` for numbers of extreme size, one after another."""
    factors = [Fraction(each) for each in scale.tolist()]
    values: list[float] = []
    for first, lefts, rights in zip(start.tolist(), left.tolist(), right.tolist(), strict=True):
        exact = Fraction(first) + sum(
            s * Fraction(a) * Fraction(b) for s, a, b in zip(factors, lefts, rights, strict=True)
        )
        values.append(first if exact == 0 and first == 0 else _to_float(exact, to_odd=dtype != torch.float64))
    return round_once(torch.tensor(values, dtype=torch.float64, device=start.device), dtype)


def _to_float(exact: Fraction, *, to_odd: bool) -> float:
    """A fraction as float64, rounded to the nearest or to odd."""
    try:
        nearest = float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")
    error = exact - Fraction(nearest)
    bits = torch.tensor(nearest, dtype=torch.float64)
    if not to_odd or error == 0 or int(bits.view(torch.int64)) & 1:
        return nearest
    return float(torch.nextafter(bits, torch.tensor(float("inf") if error > 0 else float("-inf"), dtype=torch.float64)))
