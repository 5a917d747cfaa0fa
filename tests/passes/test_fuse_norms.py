"""`fuse-norms`: which norms of DoRA's weights are replaced, in graphs of Dynamo's and of regions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from passes.branches.dora import magnitude_ratio, rescale, row_norms, without_bias
from passes.fuse_norms import fuse_norms
from passes.fuse_siblings import fuse_siblings
from passes.lower import LowerBranches
from tests.passes.helpers import TwoLayers, adapt, insert, region_of, run
from tests.passes.lowered import Captured, captured, dora_parameters, doras, rescaled, targets, write

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def norms(W: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    """Stands for the operator."""
    del squared
    with torch.autocast("cpu", enabled=False):
        return (W + scale * B @ A).norm(dim=1)


def fused(found: Captured) -> tuple[fx.Graph, int]:
    """The lowered graph with its norms replaced; the numbers are those of the captured graph."""
    graph, _ = found.lowered()
    count = fuse_norms(graph, doras, norms)
    graph.lint()
    assert count == len(targets(graph, norms))
    for one, two in zip(found.run(graph), found.run(found.gm.graph), strict=True):
        torch.testing.assert_close(one, two, rtol=0.03, atol=0.03)
    return graph, count


def under_autocast(x: Tensor, *layer: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return rescaled(x, *layer)


@pytest.mark.parametrize("function", [rescaled, under_autocast])
def test_fused(function: Callable[..., Any]) -> None:
    """Nothing of the norm is left, and the operator has the factors below their casts."""
    graph, count = fused(captured(function, X, *dora_parameters()[0]))
    assert count == 1
    (call,) = targets(graph, norms)
    assert all(operand.op == "placeholder" for operand in call.args)
    assert not targets(graph, "sqrt", "to", "detach", "t", "sum")


def test_operators_written_in_other_ways() -> None:
    """As functions of torch, as methods, and with the operands the other way."""
    found = captured(rescaled, X, *dora_parameters()[0])
    graph, _ = found.lowered()
    functions = {operator.add: torch.add, operator.truediv: torch.div, operator.eq: torch.eq}
    methods = {operator.mul: "mul", operator.matmul: "matmul", operator.pow: "__pow__"}
    for node in graph.nodes:
        if node.target in (operator.mul, operator.add):
            node.args = node.args[::-1]
        if node.target in methods:
            node.op, node.target = "call_method", methods[node.target]
        node.target = functions.get(node.target, node.target)
    for one, two in zip(found.run(graph), found.run(found.gm.graph), strict=True):
        torch.testing.assert_close(one, two)
    assert fuse_norms(graph, doras, norms) == 1
    assert not targets(graph, "sqrt", "mul", "matmul")


def layer_with(norm: Callable[..., Tensor], W_of: Callable[[Tensor], Tensor] = lambda W: W) -> Callable[..., Tensor]:
    """A layer with DoRA whose norm is another."""

    def layer(
        x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, m: Tensor, squared: Tensor
    ) -> Tensor:
        y = torch.nn.functional.linear(x, W, bias)
        s = torch.mul(torch.nn.functional.linear(torch.nn.functional.linear(x, A), B), scale)
        ratio = magnitude_ratio(m, norm(W_of(W), A, B, scale, squared))
        return torch.add(y, rescale(s, without_bias(y, bias, -1), ratio, -1))

    return layer


def plain_norm(W: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    return (W + scale * B @ A).norm(dim=1)


def three_times(W: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    a, b, s = A.detach().to(W.dtype), B.detach().to(W.dtype), scale.detach()
    along, gram = (W.detach() @ a.t()).to(W.dtype), (a @ a.t()).to(W.dtype)
    return (squared + 3 * s * (along * b).sum(-1) + s**2 * ((b @ gram) * b).sum(-1)).clamp(min=0).sqrt()


def of_two_factors(W: Tensor, A: Tensor, B: Tensor, scale: Tensor, squared: Tensor) -> Tensor:
    a, b, s = A.detach().to(W.dtype), B.detach().to(W.dtype), scale.detach()
    other = W[:2].detach().to(W.dtype)
    along, gram = (W.detach() @ a.t()).to(W.dtype), (other @ other.t()).to(W.dtype)
    return (squared + 2 * s * (along * b).sum(-1) + s**2 * ((b @ gram) * b).sum(-1)).clamp(min=0).sqrt()


@pytest.mark.parametrize(
    "function",
    [
        layer_with(plain_norm),
        layer_with(three_times),
        layer_with(of_two_factors),
        layer_with(row_norms, lambda W: 2 * W),
    ],
    ids=["plain", "another number", "another operand", "another weight"],
)
def test_left_alone(function: Callable[..., Any]) -> None:
    found = captured(function, X, *dora_parameters()[0])
    graph, count = found.lowered()
    assert count == 1
    before = str(graph)
    assert fuse_norms(graph, doras, norms) == 0
    assert str(graph) == before


def test_norms_move_with_their_ratios() -> None:
    """Also from behind another layer under autocast: they need no context of their own any more."""

    def two(x: Tensor, first: list[Any], second: list[Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return rescaled(x, *first), rescaled(x, *second)

    graph, count = fused(captured(two, X, *dora_parameters(2)))
    assert count == 2
    assert fuse_siblings(graph, doras) == 2
    graph.lint()


def test_a_region() -> None:
    region = region_of(TwoLayers())
    insert(region, *adapt(region, variant="dora"))
    right = run(region, X)
    LowerBranches(write).run(region)
    assert fuse_norms(region.graph, doras, norms) == 2
    region.graph.lint()
    assert not targets(region.graph, row_norms, getattr, "to")
    torch.testing.assert_close(run(region, X), right)
