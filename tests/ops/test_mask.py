"""Dropout from a seed: one mask in forward and backward, another for each layer and seed, right on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fxlora.ops import draw_seed, lora_linear_siblings, lora_swiglu, mask
from fxlora.ops.mask import dropped


def seed_of(value: int) -> Tensor:
    return torch.tensor([value])


def masks(p: float, seed: int, sibling: int = 0, rows: int = 400, columns: int = 501) -> Tensor:
    return dropped(torch.ones(rows, columns), p, seed_of(seed), sibling)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_and_scale(p: float) -> None:
    mask = masks(p, 5)
    kept = mask != 0
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * deviation
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)), atol=0, rtol=2e-4)
    for share in (kept.double().mean(0), kept.double().mean(1)):  # no row or column is special
        assert (share - (1 - p)).abs().max() < 6 * (p * (1 - p) / 400) ** 0.5


def test_all_and_nothing() -> None:
    assert not masks(1.0, 5).any()
    x = torch.randn(3, 4)
    assert torch.equal(dropped(x, 1.0, seed_of(5), 0), torch.zeros(3, 4))


def test_more_rows_than_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = masks(0.5, 5)
    monkeypatch.setattr(mask, "has_kernels", lambda device: True)
    monkeypatch.setattr(mask, "MOST_ROWS", 399)
    assert torch.equal(masks(0.5, 5), expected)


def test_masks_are_independent() -> None:
    """Of seeds, of siblings, and of neighbouring rows and columns: they agree as often as chance has it."""
    first = masks(0.5, 5) != 0
    others = [
        masks(0.5, 6),
        masks(0.5, 5, 1),
        masks(0.5, 5, 2),
        first.roll(1, 0),
        first.roll(1, 1),
    ]
    for other in others:
        assert abs((first == (other != 0)).double().mean().item() - 0.5) < 4 * 0.5 / first.numel() ** 0.5
    assert torch.equal(first, masks(0.5, 5) != 0)


def test_dtypes_have_one_mask() -> None:
    masks_of = [
        dropped(torch.ones(40, 30, dtype=dtype), 0.3, seed_of(5), 1) != 0 for dtype in (torch.float32, torch.bfloat16)
    ]
    assert torch.equal(*masks_of)


def test_seeds_follow_torch() -> None:
    torch.manual_seed(3)
    first = draw_seed(torch.device("cpu"))
    assert first.dtype == torch.int64 and first.shape == (1,)
    assert draw_seed(torch.device("cpu")) != first
    torch.manual_seed(3)
    assert torch.equal(draw_seed(torch.device("cpu")), first)


def branch(x: Tensor, p: float, seed: Tensor, trained: bool = True) -> tuple[Tensor, Tensor]:
    """The branch alone, of one layer whose own weight is zero and whose factors are the identity; and A."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    A = identity.clone().requires_grad_(trained)
    y = lora_linear_siblings(x, [torch.zeros_like(identity)], [None], [A], [identity], [torch.tensor(1.0)], p, seed)[0]
    return y, A


def test_forward_and_backward_have_one_mask() -> None:
    x = torch.randn(60, 12, dtype=torch.float64, requires_grad=True)
    y, A = branch(x, 0.3, seed_of(5))
    mask = y.detach() / x.detach()
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad is not None and A.grad is not None
    torch.testing.assert_close(x.grad, dy * mask)
    torch.testing.assert_close(A.grad, dy.t() @ (x.detach() * mask))


def test_expectation_is_kept() -> None:
    x = torch.randn(4, 6)
    count = 4000
    total = sum((branch(x, 0.4, seed_of(seed), trained=False)[0] for seed in range(count)), torch.zeros(4, 6))
    deviation = x.abs() * (0.4 / 0.6 / count) ** 0.5
    assert ((total / count - x).abs() < 5 * deviation).all()


def with_branches(x: Tensor, parts: list[Any], op: str) -> Tensor:
    W, A, B = parts
    scales = [torch.tensor(2.0)] * 3
    seed = draw_seed(x.device)
    if op == "swiglu":
        return lora_swiglu(x, W, A, B, scales, 0.4, seed)[0]
    return torch.stack(lora_linear_siblings(x, W, [None] * 3, A, B, scales, 0.4, seed)[:3]).tanh().sum(0)


@pytest.mark.parametrize("op", ["linear", "swiglu"])
def test_gradient_checkpointing(op: str) -> None:
    """The seed is drawn again, from the same state, and the gradients are those without checkpointing."""
    parts = [
        [torch.randn(8, 8) for _ in range(3)],
        [torch.randn(2, 8, requires_grad=True) for _ in range(3)],
        [torch.randn(8, 2, requires_grad=True) for _ in range(3)],
    ]
    x = torch.randn(5, 8, requires_grad=True)
    trained = [x, *parts[1], *parts[2]]

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(11)
        y = x
        for _ in range(2):
            y = (
                checkpoint(with_branches, y, parts, op, use_reentrant=False)
                if checkpointed
                else with_branches(y, parts, op)
            )
        return [y.detach(), *torch.autograd.grad(y.sum(), trained)]

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, recomputed)
    torch.manual_seed(12)
    assert not torch.equal(with_branches(x, parts, op), gradients(False)[0])
