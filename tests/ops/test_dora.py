"""`lora_dora_siblings` and `lora_dora_swiglu` by ATen against float64, with all fresh memory poisoned."""

from __future__ import annotations

import pytest
import torch

from fxlora.ops import lora_dora_siblings
from tests.ops.cases import DORA, DORA_SWIGLU
from tests.ops.references import Case, sibling_errors, swiglu_errors, worst


@pytest.mark.parametrize("case", DORA, ids=str)
def test_numbers(case: Case, poisoned_memory: None) -> None:
    assert worst(case, sibling_errors(case)) == ""


@pytest.mark.parametrize("case", DORA_SWIGLU, ids=str)
def test_numbers_of_blocks(case: Case, poisoned_memory: None) -> None:
    assert worst(case, swiglu_errors(case)) == ""


def test_an_output_that_the_loss_does_not_read() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    W, A, B, ratios = (
        [torch.randn(shape, requires_grad=grad) for _ in range(2)]
        for shape, grad in (((3, 4), False), ((2, 4), True), ((3, 2), True), ((3,), True))
    )
    scale = torch.tensor(2.0)
    first, _, *rest = lora_dora_siblings(x, W, [None, None], A, B, [scale, scale], ratios)
    assert not any(each.requires_grad for each in rest)
    first.sum().backward()
    (alone, *_) = lora_dora_siblings(x, W[:1], [None], A[:1], B[:1], [scale], ratios[:1])
    right = torch.autograd.grad(alone.sum(), [x, A[0], B[0], ratios[0]])
    for found, want in zip((x.grad, A[0].grad, B[0].grad, ratios[0].grad), right, strict=True):
        torch.testing.assert_close(found, want)
    assert all(each[1].grad is not None and not each[1].grad.any() for each in (A, B, ratios))


def test_a_trained_bias_beside_none_is_refused() -> None:
    """Torch has no gradients for a list with tensors and None: the bias would silently get none."""
    W, A, B, ratios = ([torch.randn(shape) for _ in range(2)] for shape in ((3, 4), (2, 4), (3, 2), (3,)))
    scale = torch.tensor(2.0)
    biases = [torch.randn(3, requires_grad=True), None]
    with pytest.raises(ValueError, match="a bias is trained, but not all layers have one"):
        lora_dora_siblings(torch.randn(5, 4, requires_grad=True), W, biases, A, B, [scale, scale], ratios)
