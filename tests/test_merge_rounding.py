"""The yardstick of `benchmarks.merge_rounding`: independent of the library, it agrees with the fold and sees every error."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import exact_sums
from benchmarks.exact_sums import FORMATS, Summand, compare, nearest
from benchmarks.merge_rounding import few_bits, fold, orders, parts, rounding, summand, weights

DTYPES = pytest.mark.parametrize("dtype", FORMATS, ids=str)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def folded(weight: Tensor, each: Summand) -> Tensor:
    return fold(weight, [each])(weight[None])[0]


@DTYPES
def test_the_fold_is_exact_and_peft_is_not(dtype: torch.dtype) -> None:
    weight = weights(20_000, dtype)
    found = rounding(weight, summand(weight, 16, 3**0.5, 0.1))
    assert (found.wrong, found.module_differs, found.changed) == (0, 0, 0)
    assert found.ulps <= 0.5 + 1e-6
    assert found.peft_safe_wrong > 100 and found.peft_changed > 100


@DTYPES
def test_ties(dtype: torch.dtype) -> None:
    weight, update = few_bits(3000, dtype, 4, 1.0)
    (count,) = compare(weight, [update], [folded(weight, update)])
    assert count.wrong == 0 and count.ulps == 0.5 and count.fractions > 300


@DTYPES
def test_every_wrong_entry_is_counted(dtype: torch.dtype) -> None:
    weight = weights(3000, dtype)
    update = summand(weight, 4, 0.5, 0.1)
    right = folded(weight, update)
    wrong = right.clone()
    places = torch.tensor([0, 1, 777, 2999])
    wrong.view(-1)[places] = torch.nextafter(right.view(-1)[places], torch.tensor(torch.inf, dtype=dtype))
    counts = compare(weight, [update], [right, wrong])
    assert [count.wrong for count in counts] == [0, 4] and counts[1].ulps > 0.5


@DTYPES
def test_long_doubles_and_fractions_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(2000, dtype)
    update = summand(weight, 3, 3**0.5, 0.1)
    results = [folded(weight, update), weight, (weight.double() + 3**0.5 * (update.B @ update.A)).to(dtype)]
    quick = compare(weight, [update], results)
    monkeypatch.setattr(exact_sums, "UNIT", 1.0)
    slow = compare(weight, [update], results)
    assert [count.fractions for count in slow] == [weight.numel()] * 3
    assert [count.wrong for count in quick] == [count.wrong for count in slow]
    assert quick[1].wrong > 1000
    assert [count.ulps for count in quick] == pytest.approx([count.ulps for count in slow], rel=1e-6)


def test_nearest_is_how_numpy_rounds() -> None:
    """numpy casts float64 to float16 and float32 in one rounding."""
    draw = random.Random(0)
    for dtype, cast in ((torch.float16, np.float16), (torch.float32, np.float32)):
        digits, smallest = FORMATS[dtype]
        values = [draw.uniform(-1, 1) * 2.0 ** draw.uniform(smallest - digits - 2, 14) for _ in range(500)]
        values += [float(cast(value)) * (1 + 2.0**-digits) for value in values]  # beside ties, and ties
        for value in values:
            assert nearest(Fraction(value), digits, smallest)[0] == Fraction(float(cast(value)))


def test_orders_blocks_and_threads() -> None:
    weight = weights(5000, torch.bfloat16)
    found = orders(weight, [summand(weight, 4, scale, 0.1) for scale in (0.5, 2.0, 3**0.5)])
    assert (found.differ, found.wrong) == (0, 0) and found.peft_differ > 0 and found.peft_wrong > 0
    pieces = parts(weight, summand(weight, 4, 2.0, 0.1))
    assert (pieces.runs, pieces.differ) == (8, 0)
