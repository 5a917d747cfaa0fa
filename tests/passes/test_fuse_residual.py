"""`fuse-residual`: which sums become the first summand of an operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.fuse_residual import fuse_residual
from tests.passes.examples import calls, checked, layers, with_examples

X, R, W = (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4, 4))


def after(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(x, [W])[0] + r,)


def before(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (torch.add(r, layers(x, [W])[0]),)


def in_a_row(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    h = r + layers(x, [W])[0]
    return h, h + layers(torch.tanh(h), [W])[0]


def residual_is_input(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (x + layers(x, [W])[0],)


@pytest.mark.parametrize(("function", "count"), [(after, 1), (before, 1), (in_a_row, 2), (residual_is_input, 1)])
def test_fused(function: Callable[..., tuple[Tensor, ...]], count: int) -> None:
    gm = with_examples(function, X, R, W)
    assert fuse_residual(gm.graph, (layers,), single=(layers,)) == count
    checked(gm, function, X, R, W)
    assert all("residual" in call.kwargs for call in calls(gm))
    assert not any(node.name.startswith("add") for node in gm.graph.nodes)


def read_twice(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    y = layers(x, [W])[0]
    return y + r, y


def broadcast(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(x, [W])[0] + r[0],)


def number(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(x, [W])[0] + 2,)


def scaled_sum(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (torch.add(layers(x, [W])[0], r, alpha=2),)


def wider(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(x, [W])[0] + r.double(),)


def twice_itself(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    y = layers(x, [W])[0]
    return (y + y,)


def made_later(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    y = layers(x, [W])[0]
    return (y + torch.tanh(r),)


def written_between(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    r = r.clone()
    y = layers(x, [W])[0]
    r.mul_(2)
    return (y + r,)


def of_several_layers(x: Tensor, r: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    y, z = layers(x, [W, 2 * W])
    return y + r, z


KEPT = (
    read_twice, broadcast, number, scaled_sum, wider, twice_itself, made_later, written_between, of_several_layers,
)  # fmt: skip


@pytest.mark.parametrize("function", KEPT)
def test_kept(function: Callable[..., tuple[Tensor, ...]]) -> None:
    gm = with_examples(function, X, R, W)
    assert fuse_residual(gm.graph, (layers,), single=(layers,)) == 0
    assert not any(call.kwargs for call in calls(gm))
