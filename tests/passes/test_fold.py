"""Low-rank updates folded: the correctly rounded value of the exact sum, whatever the blocks, the order and the dtypes."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from passes.errors import MergeError
from passes.exact import round_once
from passes.fold import Fold, Loss, LowRank, NewRows
from tests.passes.test_exact import FORMATS, nearest, nearest64, same_numbers

DTYPES = (*FORMATS, torch.float64)


def exact(weight: Tensor, summands: list[LowRank], factor: Tensor | None = None) -> list[tuple[float, Fraction]]:
    """(entry of the weight, exact sum) in storage order."""
    result: list[tuple[float, Fraction]] = []
    groups, rows, columns = weight.shape
    factors = torch.ones_like(weight, dtype=torch.float64) if factor is None else factor.expand_as(weight)
    for g, i, j in itertools.product(range(groups), range(rows), range(columns)):
        value = Fraction(float(weight[g, i, j])) * Fraction(float(factors[g, i, j]))
        for each in summands:
            pairs = zip(each.left[g, i].tolist(), each.right[g, :, j].tolist(), strict=True)
            value += Fraction(each.scale) * sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
        result.append((float(weight[g, i, j]), value))
    return result


def check(
    weight: Tensor, summands: list[LowRank], out_dtype: torch.dtype | None = None, factor: Tensor | None = None
) -> Tensor:
    """Fold, compared with exact sums rounded to the nearest, ties to even."""
    dtype = out_dtype or weight.dtype
    before = weight.clone()
    merged = Fold(tuple(weight.shape), summands, weight.dtype, out_dtype, factor=factor)(weight)
    assert merged.dtype == dtype and torch.equal(weight, before)
    expected = [
        nearest64(value, first)
        if dtype == torch.float64
        else nearest(value, dtype, negative=first == 0 and math.copysign(1, first) < 0)
        for first, value in exact(weight, summands, factor)
    ]
    same_numbers(merged.flatten(), expected)
    return merged


def random(groups: int, rows: int, columns: int, r: int, dtype: torch.dtype, scale: float) -> LowRank:
    left, right = torch.randn(groups, rows, r) * 0.05, torch.randn(groups, r, columns) * 0.3
    return LowRank(left.to(dtype), right.to(dtype), scale)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scale", [2.0, 1 / 3, -0.7])
@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("out", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random(dtype: torch.dtype, out: torch.dtype | None, factors: torch.dtype, scale: float) -> None:
    weight = (torch.randn(2, 7, 16) * 0.1).to(dtype)
    check(weight, [random(2, 7, 16, 3, factors, scale), random(2, 7, 16, 1, factors, 0.25)], out)


def coarse(*shape: int, most: int = 3) -> Tensor:
    return torch.randint(-most, most + 1, shape).float()


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_exact_cancellation(dtype: torch.dtype, out: torch.dtype) -> None:
    """Numbers of few bits: many sums are ties of the narrow dtypes, many are zero."""
    weight = (coarse(1, 24, 32, most=300) * 2.0**-8).to(dtype)
    weight[0, :, :2] = torch.tensor([-0.0, 0.0])
    update = LowRank(coarse(1, 24, 4) * 2.0**-9, coarse(1, 4, 32), 1.0)
    merged = check(weight, [update], out)
    zero = LowRank(torch.cat([update.left, update.left], 2), torch.cat([update.right, -update.right], 1), 1.0)
    again = check(weight, [zero], out)
    assert torch.equal(again.signbit(), weight.signbit()) and not torch.equal(merged, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_near_zero(dtype: torch.dtype) -> None:
    """Weights that the update takes away almost wholly: their entries are far smaller than the products."""
    update = random(1, 12, 16, 4, torch.float32, 2.0)
    weight = -round_once(2.0 * update.left.double() @ update.right.double(), dtype)
    check(weight, [update])
    check(weight, [update], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_all_sizes(dtype: torch.dtype) -> None:
    powers = torch.randint(-60, 12, (1, 10, 16))
    weight = (torch.randn(1, 10, 16) * 2.0**powers).to(dtype)
    left = torch.randn(1, 10, 3) * 2.0 ** torch.randint(-70, 6, (1, 10, 3))
    check(weight, [LowRank(left, torch.randn(1, 3, 16) * 2.0 ** torch.randint(-70, 3, (1, 3, 16)), 0.3)])


@pytest.mark.parametrize("size", [2.0**-140, 2.0**-70, 2.0**70, 2.0**100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extreme_factors(dtype: torch.dtype, size: float) -> None:
    """Where float32, or float64, would under- or overflow on the way."""
    weight = torch.randn(1, 6, 8).to(dtype)
    check(weight, [LowRank(torch.randn(1, 6, 2) * size, torch.randn(1, 2, 8).double() / size, 1.5)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factor_on_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(1, 6, 8).to(dtype)
    weight[0, 0, :2] = torch.tensor([-0.0, 0.0])
    update = random(1, 6, 8, 2, torch.float32, 2.0)
    for factor in (torch.rand(1, 6, 1, dtype=torch.float64) + 0.5, torch.rand(1, 1, 8, dtype=torch.float64) + 0.5):
        check(weight, [update], factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_order_and_threads_do_not_matter(dtype: torch.dtype) -> None:
    weight = (torch.randn(2, 65, 64) * 0.1).to(dtype)
    summands = [random(2, 65, 64, r, torch.float32, 10.0**-r) for r in (1, 2, 3)]
    results: list[Tensor] = []
    for order in itertools.permutations(summands):
        fold = Fold((2, 65, 64), order, dtype)
        results.append(fold(weight))
    fold = Fold((2, 65, 64), summands, dtype)
    for step in (1, 7, 64):
        out = torch.empty_like(weight)
        for group, start in itertools.product(range(2), range(0, 65, step)):
            fold.into(out[group, start : start + step], weight[group, start : start + step], group, start)
        results.append(out)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(fold(weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_products_that_are_not_to_be_trusted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, update = (torch.randn(1, 33, 64) * 0.1).to(dtype), random(1, 33, 64, 8, torch.float32, 0.3)
    expected = Fold((1, 33, 64), [update], dtype)(weight)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert torch.equal(Fold((1, 33, 64), [update], dtype)(weight), expected)


def test_precision_set_by_the_newer_names() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        weight = torch.randn(1, 8, 16).bfloat16()
        check(weight, [random(1, 8, 16, 4, torch.float32, 2.0)])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_update_keep_every_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(1, 6, 8).to(dtype)
    weight[0, 2, :3] = torch.tensor([-0.0, math.inf, math.nan])
    update = random(1, 6, 8, 2, torch.float32, 2.0)
    update.left[0, 2] = 0
    merged = Fold((1, 6, 8), [update], dtype)(weight)
    same_numbers(merged[0, 2], weight[0, 2].tolist())
    nothing = Fold((1, 6, 8), [], dtype)(weight)
    same_numbers(nothing.flatten(), weight.flatten().tolist())
    assert nothing.data_ptr() != weight.data_ptr()


def test_nothing_is_added_and_the_dtype_changes() -> None:
    """float64 to half precision is one rounding here, and two in torch."""
    weight = torch.tensor([[[1 + 2.0**-8 + 2.0**-40, 1.0]]], dtype=torch.float64)
    merged = Fold((1, 1, 2), [], torch.float64, torch.bfloat16)(weight)
    same_numbers(merged.flatten(), [1 + 2.0**-7, 1.0])
    assert weight.to(torch.bfloat16)[0, 0, 0] == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays(dtype: torch.dtype) -> None:
    weight = torch.ones(1, 2, 64, dtype=dtype)
    weight[0, 0, 5:8] = torch.tensor([math.inf, -math.inf, math.nan])
    merged = Fold((1, 2, 64), [LowRank(torch.ones(1, 2, 1), torch.ones(1, 1, 64), 2.0)], dtype)(weight)
    expected = [3.0] * 128
    expected[5:8] = [math.inf, -math.inf, math.nan]
    same_numbers(merged.flatten(), expected)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_overflow_is_refused_at_the_very_edge(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    half = (top - float(torch.nextafter(torch.tensor(top, dtype=dtype), torch.tensor(0.0, dtype=dtype)))) / 2
    weight = torch.full((1, 1, 64), top, dtype=dtype)

    def folded(size: float) -> Tensor:
        return Fold((1, 1, 64), [LowRank(torch.ones(1, 1, 1), torch.ones(1, 1, 64), size)], dtype)(weight)

    assert torch.equal(folded(math.nextafter(half, 0)), weight)  # rounds back
    with pytest.raises(MergeError, match="NaN or infinite"):
        folded(half)


def test_new_rows_take_the_place_of_old_ones() -> None:
    weight, rows = torch.randn(1, 9, 8).bfloat16(), torch.randn(2, 8)
    update = random(1, 9, 8, 2, torch.float32, 2.0)
    fold = Fold((1, 9, 8), [update], torch.bfloat16, new_rows=NewRows(torch.tensor([7, 0]), rows))
    merged = fold(weight)
    for row, values in ((7, rows[0]), (0, rows[1])):
        part = LowRank(update.left[:, row : row + 1], update.right, 2.0)
        sums = exact(values.view(1, 1, 8), [part])
        same_numbers(merged[0, row], [nearest(value, torch.bfloat16) for _, value in sums])
    plain = Fold((1, 9, 8), [update], torch.bfloat16)(weight)
    assert torch.equal(merged[0, 1:7], plain[0, 1:7]) and torch.equal(merged[0, 8], plain[0, 8])
    out = torch.empty(3, 8, dtype=torch.bfloat16)
    fold.into(out, weight[0, 6:9], 0, 6)
    assert torch.equal(out, merged[0, 6:9])
    with pytest.raises(MergeError, match="NaN or infinite"):
        Fold((1, 9, 8), [], torch.bfloat16, new_rows=NewRows(torch.tensor([1]), torch.full((1, 8), math.nan)))


def test_dense_update_is_rounded_once_from_float64() -> None:
    weight, dense = torch.randn(1, 4, 8).bfloat16(), torch.randn(1, 4, 8, dtype=torch.float64)
    dense[0, 0, 0] = weight[0, 0, 0] = 0
    weight[0, 0, 0] = -0.0
    merged = Fold((1, 4, 8), [], torch.bfloat16, dense=dense)(weight)
    assert torch.equal(merged, round_once(weight.double() + dense, torch.bfloat16))
    assert merged[0, 0, 0].signbit()
    with pytest.raises(MergeError):
        Fold((1, 4, 8), [], torch.bfloat16, dense=dense * 1e300)(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loss(dtype: torch.dtype) -> None:
    weight, update = torch.randn(1, 32, 64).to(dtype), random(1, 32, 64, 4, torch.float32, 0.01)
    loss = Loss()
    merged = Fold((1, 32, 64), [update], dtype)(weight, loss)
    delta = 0.01 * update.left.double() @ update.right.double()
    value = weight.double() + delta
    assert loss.entries == 2048
    assert loss.update == pytest.approx(float(delta.square().sum()), rel=1e-3)
    assert loss.lost == pytest.approx(float((merged.double() - value).square().sum()), rel=1e-3)
    assert loss.weight == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert loss.largest == pytest.approx(float(delta.abs().max()), rel=1e-2)
    assert loss.unchanged == int((merged == weight).sum())
    assert (loss.unchanged > 1000) == (dtype == torch.bfloat16)


def test_loss_of_a_sample() -> None:
    """Rows that do not depend on the blocks."""
    weight, update = torch.randn(2, 1000, 256).bfloat16(), random(2, 1000, 256, 4, torch.float32, 0.1)
    fold, found = Fold((2, 1000, 256), [update], torch.bfloat16), list[Loss]()
    for step in (1000, 64):
        loss = Loss.sample(weight.numel())
        for group, start in itertools.product(range(2), range(0, 1000, step)):
            rows = weight[group, start : start + step]
            fold.into(torch.empty_like(rows), rows, group, start, loss)
        found.append(loss)
    assert found[0].every == 7 and found[0].entries == found[1].entries == 286 * 256
    assert found[0].lost == pytest.approx(found[1].lost) and found[0].unchanged == found[1].unchanged
    whole = Loss()
    fold(weight, whole)
    assert found[0].lost / found[0].update == pytest.approx(whole.lost / whole.update, rel=0.1)


def test_empty_weights() -> None:
    for shape in ((1, 0, 5), (1, 5, 0), (0, 3, 4)):
        update = LowRank(torch.randn(shape[0], shape[1], 2), torch.randn(shape[0], 2, shape[2]), 1.0)
        assert Fold(shape, [update], torch.float32)(torch.empty(shape)).shape == shape
