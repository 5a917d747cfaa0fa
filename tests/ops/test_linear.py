"""`lora_linear_siblings` by ATen against float64, with all fresh memory poisoned."""

from __future__ import annotations

import pytest
import torch

from fxlora.ops import lora_linear_siblings
from tests.ops.cases import LINEAR
from tests.ops.references import Case, sibling_errors, worst


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_numbers(case: Case, poisoned_memory: None) -> None:
    assert worst(case, sibling_errors(case)) == ""


def test_an_output_that_the_loss_does_not_read() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    W, A, B = (
        [torch.randn(shape, requires_grad=grad) for _ in range(2)]
        for shape, grad in (((3, 4), False), ((2, 4), True), ((3, 2), True))
    )
    scale = torch.tensor(2.0)
    first, _, *rest = lora_linear_siblings(x, W, [None, None], A, B, [scale, scale], 0.0, None)
    assert not any(each.requires_grad for each in rest)
    first.sum().backward()
    (alone, *_) = lora_linear_siblings(x, W[:1], [None], A[:1], B[:1], [scale], 0.0, None)
    right = torch.autograd.grad(alone.sum(), [x, A[0], B[0]])
    for found, want in zip((x.grad, A[0].grad, B[0].grad), right, strict=True):
        torch.testing.assert_close(found, want)
    assert A[1].grad is not None and not A[1].grad.any() and B[1].grad is not None and not B[1].grad.any()


def test_a_trained_bias_beside_none_is_refused() -> None:
    """Torch has no gradients for a list with tensors and None: the bias would silently get none."""
    W, A, B = ([torch.randn(shape) for _ in range(2)] for shape in ((3, 4), (2, 4), (3, 2)))
    scale = torch.tensor(2.0)
    biases = [torch.randn(3, requires_grad=True), None]
    x = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(ValueError, match="a bias is trained, but not all layers have one"):
        lora_linear_siblings(x, W, biases, A, B, [scale, scale], 0.0, None)
    frozen = [torch.randn(3), None]
    y = lora_linear_siblings(x, W, frozen, A, B, [scale, scale], 0.0, None)[0]
    torch.testing.assert_close(y, x @ (W[0] + 2 * B[0] @ A[0]).t() + frozen[0])
