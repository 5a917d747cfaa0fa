"""Sums rounded once, beside exact arithmetic with fractions."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.exact import distilled, round_once, rounded_sums, two_product, two_sum

FORMATS = {torch.bfloat16: (8, -126, 127), torch.float16: (11, -14, 15), torch.float32: (24, -126, 127)}
"""Of each dtype: binary digits, smallest and largest exponent of a normal number (IEEE 754)."""


def nearest(value: Fraction, dtype: torch.dtype, *, negative: bool = False) -> float:
    """The number of `dtype` nearest to an exact value, ties to even; `negative` is the sign of a zero."""
    digits, smallest, largest = FORMATS[dtype]
    if value == 0:
        return -0.0 if negative else 0.0
    exponent = math.floor(math.log2(abs(value)))  # may be off by one beside a power of two
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - digits + 1)
    rounded = round(value / unit) * unit  # Fraction rounds half to even
    if abs(rounded) >= Fraction(2) ** (largest + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def same_numbers(found: Tensor, expected: Sequence[float]) -> None:
    """Equal in every bit, but for the payload of NaN."""
    wrong = [
        (index, a, b)
        for index, (a, b) in enumerate(zip(found.double().tolist(), expected, strict=True))
        if not (a == b and math.copysign(1, a) == math.copysign(1, b)) and not (math.isnan(a) and math.isnan(b))
    ]
    assert not wrong, wrong[:5]


def check_rounding(values: Sequence[float], dtype: torch.dtype) -> None:
    found = round_once(torch.tensor(values, dtype=torch.float64), dtype)
    assert found.dtype == dtype
    same_numbers(found, [nearest(Fraction(v), dtype, negative=math.copysign(1, v) < 0) for v in values])


DTYPES = pytest.mark.parametrize("dtype", FORMATS, ids=str)


@DTYPES
def test_round_random_values_of_all_sizes(dtype: torch.dtype) -> None:
    draw = random.Random(1)
    _, smallest, largest = FORMATS[dtype]
    check_rounding([draw.uniform(-1, 1) * 2.0 ** draw.uniform(smallest - 30, largest + 3) for _ in range(3000)], dtype)


def near_ties(dtype: torch.dtype, count: int) -> list[float]:
    """Midpoints of neighbours, and what lies just beside them: here rounding twice goes wrong."""
    draw = random.Random(2)
    digits, smallest, largest = FORMATS[dtype]
    values: list[float] = []
    for _ in range(count):
        exponent = draw.randint(smallest - 2, largest)
        unit = 2.0 ** (max(exponent, smallest) - digits + 1)
        lower = draw.randint(0 if exponent < smallest else 2 ** (digits - 1), 2**digits - 1) * unit
        middle = lower + unit / 2
        beside = [math.nextafter(middle, math.inf), math.nextafter(middle, 0), middle * (1 + 2.0**-30)]
        values += [lower, middle, *beside, -middle, *(-value for value in beside)]
    return values


@DTYPES
def test_round_ties_and_their_neighbours(dtype: torch.dtype) -> None:
    check_rounding(near_ties(dtype, 300), dtype)


def test_casting_directly_would_round_twice() -> None:
    """The reason for `round_once`; should this ever fail, torch's cast has become exact."""
    wrong = 0
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.tensor(near_ties(dtype, 300), dtype=torch.float64)
        wrong += int((values.to(dtype) != round_once(values, dtype)).sum())
    assert wrong > 100


@DTYPES
def test_round_at_the_edges(dtype: torch.dtype) -> None:
    digits, smallest, largest = FORMATS[dtype]
    tiny = 2.0 ** (smallest - digits + 1)
    highest = (2 - 2.0 ** (1 - digits)) * 2.0**largest
    overflow = (2 - 2.0**-digits) * 2.0**largest  # half way to the next power of two: ties to even, to infinity
    edges = [0.0, 1.0, tiny, tiny / 2, tiny * 1.5, tiny * 2.5, 2.0**smallest, 2.0**smallest - tiny / 2]
    edges += [highest, overflow, math.nextafter(overflow, 0), 2.0 ** (largest + 1), 1e300, 5e-324, 1e-60, 1e39]
    edges += [math.nextafter(edge, towards) for edge in edges for towards in (0, math.inf)]
    check_rounding([value for edge in edges if math.isfinite(edge) for value in (edge, -edge)], dtype)


@DTYPES
def test_round_what_is_not_finite(dtype: torch.dtype) -> None:
    found = round_once(torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64), dtype)
    same_numbers(found, [math.inf, -math.inf, math.nan])


def test_round_keeps_float64_and_shapes() -> None:
    value = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(round_once(value, torch.float64), value)
    assert torch.equal(round_once(value.T, torch.bfloat16), round_once(value, torch.bfloat16).T)
    assert round_once(value[0, 0], torch.float16).shape == ()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_round_any_values(values: list[float]) -> None:
    for dtype in FORMATS:
        check_rounding(values, dtype)


# ---- sums of products ----


def exact_sum(start: float, left: Sequence[float], right: Sequence[float], scale: Sequence[float]) -> Fraction:
    products = (Fraction(s) * Fraction(a) * Fraction(b) for s, a, b in zip(scale, left, right, strict=True))
    return Fraction(start) + sum(products)


def nearest64(value: Fraction, start: float) -> float:
    return start if value == 0 and start == 0 else float(value)


def check_sums(start: Tensor, left: Tensor, right: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    found = rounded_sums(start, left, right, scale, dtype)
    assert found.dtype == dtype
    rows = zip(start.tolist(), left.tolist(), right.tolist(), strict=True)
    sums = [(first, exact_sum(first, a, b, scale.tolist())) for first, a, b in rows]
    if dtype == torch.float64:
        same_numbers(found, [nearest64(value, first) for first, value in sums])
    else:
        same_numbers(
            found, [nearest(value, dtype, negative=math.copysign(1, first) < 0 == first) for first, value in sums]
        )


ALL = (*FORMATS, torch.float64)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("factors", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_of_random_products(dtype: torch.dtype, factors: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(200, 5).to(factors), torch.randn(200, 5).to(factors)
    if factors == torch.float64:
        left, right = left + 1e-9 * torch.randn(200, 5, dtype=factors), right * (1 + 1e-12)
    scale = torch.tensor([2.0, 1 / 3, -0.7, 1e-3, 16.0], dtype=torch.float64)
    check_sums(torch.randn(200).double(), left, right, scale, dtype)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_sums_that_lie_at_ties_and_just_beside(dtype: torch.dtype) -> None:
    digits = 53 if dtype == torch.float64 else FORMATS[dtype][0]
    unit = 2.0 ** (1 - digits)
    starts, lefts = [], []
    for odd in (0, 1):
        for sign in (1, -1):
            for beside in (0.0, 2.0**-140, -(2.0**-140), 2.0**-60, -(2.0**-60)):
                starts.append(sign * (1 + odd * unit))
                lefts.append([sign * unit / 2, sign * beside])
    ones = torch.ones(len(starts), 2, dtype=torch.float64)
    start, left = torch.tensor(starts, dtype=torch.float64), torch.tensor(lefts, dtype=torch.float64)
    check_sums(start, left, ones, torch.ones(2, dtype=torch.float64), dtype)


def test_below_a_power_of_two_the_gap_is_half() -> None:
    starts = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    left = torch.tensor(
        [[-(2.0**-54), 0], [-(2.0**-54), -(2.0**-120)], [-(2.0**-54), 2.0**-120], [2.0**-54, 0]]
    ).double()
    check_sums(starts, left, torch.ones(4, 2), torch.ones(2, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_sums_that_cancel(dtype: torch.dtype) -> None:
    start = torch.tensor([0.5, -0.0, 0.0, -0.0, 1e-30], dtype=torch.float64)
    left = torch.tensor([[-0.5, 0], [1, -1], [3, -3], [0, 0], [1, -1]], dtype=torch.float64)
    found = rounded_sums(start, left, torch.ones(5, 2), torch.ones(2, dtype=torch.float64), dtype)
    tiny = float(torch.tensor(1e-30).double()) if dtype == torch.float32 else None
    expected = [0.0, -0.0, 0.0, -0.0, nearest(Fraction(1e-30), dtype) if dtype != torch.float64 else 1e-30]
    assert tiny is None or expected[-1] != 0
    same_numbers(found, expected)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.floats(-1e20, 1e20), min_size=4, max_size=4), min_size=1, max_size=6), st.sampled_from(ALL))
def test_any_sums(rows: list[list[float]], dtype: torch.dtype) -> None:
    """Also of numbers so small that only fractions are exact."""
    values = torch.tensor(rows, dtype=torch.float64)
    check_sums(values[:, 0], values[:, 1:3], values[:, 2:4], torch.tensor([1.0, 1 / 3], dtype=torch.float64), dtype)


def test_extreme_factors_are_summed_as_fractions() -> None:
    left, right = torch.tensor([[1e-200, 1.0]]).double(), torch.tensor([[1e-200, 2.0**-60]]).double()
    left[0, 0] = 1e-200
    right[0, 0] = 1e200
    check_sums(torch.ones(1).double(), left, right, torch.tensor([1e-3, 1.0]).double(), torch.float64)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.floats(-1e100, 1e100), st.floats(-1e100, 1e100))
def test_sum_and_product_of_two_are_exact(a: float, b: float) -> None:
    x, y = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    total, error = two_sum(x, y)
    assert Fraction(float(total)) + Fraction(float(error)) == Fraction(a) + Fraction(b)
    if abs(a * b) > 1e-250:
        product, error = two_product(x, y)
        assert Fraction(float(product)) + Fraction(float(error)) == Fraction(a) * Fraction(b)


def test_distilled_keeps_the_sum_and_does_not_overlap() -> None:
    torch.manual_seed(1)
    terms = torch.randn(50, 9, dtype=torch.float64) * 10.0 ** torch.randint(-20, 20, (50, 9))
    parts = distilled(terms)
    for before, after in zip(terms.tolist(), parts.tolist(), strict=True):
        assert sum(map(Fraction, before)) == sum(map(Fraction, after))
        kept = [value for value in after if value]
        assert all(abs(small) <= math.ulp(large) / 2 for small, large in itertools.pairwise(kept))
