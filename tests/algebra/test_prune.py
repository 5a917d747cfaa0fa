"""Pruned and elected sums, tensor by tensor beside peft's functions, and their laws."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from fxlora.algebra.combine import RECIPES
from fxlora.algebra.prune import Recipe, weighted_sum

THEIRS: dict[str, Any] = {
    "linear": lambda tensors, weights, density, sign: merge_utils.task_arithmetic(tensors, weights),
    "ties": merge_utils.ties,
    "dare_linear": lambda tensors, weights, density, sign: merge_utils.dare_linear(tensors, weights, density),
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": lambda tensors, weights, density, sign: merge_utils.magnitude_prune(tensors, weights, density),
}

weights_of = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(RECIPES)),
    weights=weights_of,
    density=st.floats(0.01, 1),
    sign=st.sampled_from(["total", "frequency"]),
    shape=st.sampled_from([(4, 6), (5,), (3, 2, 4), (1, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equal_to_peft_bit_for_bit(
    kind: str, weights: list[float], density: float, sign: Any, shape: Any, dtype: Any, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in weights]
    tensors = [tensor.mT if transposed and tensor.dim() > 1 else tensor for tensor in tensors]
    torch.manual_seed(seed)
    found = weighted_sum(tensors, weights, RECIPES[kind], density, sign)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = THEIRS[kind](tensors, torch.tensor(weights), density, sign)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["linear", "ties", "magnitude_prune"]),
    weights=weights_of,
    order=st.randoms(),
    density=st.floats(0.1, 1),
)
def test_order_does_not_matter(kind: str, weights: list[float], order: Any, density: float) -> None:
    tensors = [torch.randn(4, 6, dtype=torch.float64) for _ in weights]
    pairs = list(zip(tensors, weights, strict=True))
    expected = weighted_sum(tensors, weights, RECIPES[kind], density)
    order.shuffle(pairs)
    found = weighted_sum([t for t, _ in pairs], [w for _, w in pairs], RECIPES[kind], density)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.77])
def test_how_much_is_kept(density: float) -> None:
    x = torch.arange(1.0, 101.0) * torch.tensor([1.0, -1.0]).repeat(50)
    kept = weighted_sum([x], [1.0], Recipe("magnitude"), density)
    assert torch.equal(kept.nonzero()[:, 0], torch.arange(100 - int(density * 100), 100))
    torch.manual_seed(0)
    many = torch.ones(20_000)
    random = weighted_sum([many], [1.0], Recipe("random"), density)
    assert set(random.unique().tolist()) == {0.0, float(torch.tensor(1.0) / density)}
    assert abs(float(random.mean()) - 1) < 0.05  # scaled up, so that the expected sum stays


def test_an_election() -> None:
    """The majority's sign is found before the weights; what agrees is averaged. An empty majority is positive."""
    tensors = [
        torch.tensor([3.0, 1.0, -2.0, 0.0]),
        torch.tensor([1.0, -4.0, 2.0, 0.0]),
        torch.tensor([-2.0, 2.0, 0.0, 0.0]),
    ]
    total = weighted_sum(tensors, [1.0, 10.0, 100.0], Recipe(elect=True), majority_sign="total")
    assert total.tolist() == [(3 + 10) / 2, -40.0, 20.0, 0.0]
    frequency = weighted_sum(tensors, [1.0, 10.0, 100.0], Recipe(elect=True), majority_sign="frequency")
    assert frequency.tolist() == [(3 + 10) / 2, (1 + 200) / 2, 20.0, 0.0]
