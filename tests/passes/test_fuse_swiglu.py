"""`fuse-swiglu`: which lowered layers are a SwiGLU block, and which look like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.base import Region, copy_graph
from passes.fuse_siblings import FuseSiblings, fuse_siblings
from passes.fuse_swiglu import FuseSwiglu, fuse_swiglu
from passes.lower import LowerBranches
from passes.printer import print_graph
from tests.passes.helpers import adapt, insert, region_of, run
from tests.passes.lowered import (
    Captured,
    branched,
    captured,
    draw,
    linears,
    parameters,
    swiglu,
    targets,
    without_biases,
)

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def block_parameters(*, bias: bool = False, ranks: tuple[int, int, int] = (2, 2, 2)) -> list[list[Any]]:
    """Of gate, up and down."""
    shapes = ((3, 6), (3, 6), (6, 4))
    return [parameters(1, columns, out, r, bias=bias)[0] for (columns, out), r in zip(shapes, ranks, strict=True)]


def fused(found: Captured) -> tuple[fx.Graph, int]:
    """The lowered graph, fused, and how many blocks there were; the numbers are those of the captured graph."""
    graph, _ = found.lowered()
    fuse_siblings(graph, linears)
    count = fuse_swiglu(graph, linears, swiglu)
    graph.lint()
    for one, two in zip(found.run(graph), found.run(found.gm.graph), strict=True):
        torch.testing.assert_close(one, two)
    assert count == len(targets(graph, swiglu))
    return graph, count


def block(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    return branched(F.silu(branched(x, *gate)) * branched(x, *up), *down)


def up_first(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    u = branched(x, *up)
    return branched(F.silu(branched(x, *gate)) * u, *down)


def factors_swapped(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    return branched(torch.mul(branched(x, *up), F.silu(branched(x, *gate))), *down)


def two_blocks(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    return block(block(x, gate, up, down)[:, :3], gate, up, down)


@pytest.mark.parametrize(("function", "count"), [(block, 1), (up_first, 1), (factors_swapped, 1), (two_blocks, 2)])
def test_fused(function: Callable[..., Any], count: int) -> None:
    graph, found = fused(captured(function, X, *block_parameters()))
    assert found == count
    assert not targets(graph, linears, F.silu)


@pytest.mark.parametrize("function", [block, up_first, factors_swapped])
def test_the_lists_are_gate_up_down(function: Callable[..., Any]) -> None:
    layers = block_parameters(ranks=(1, 2, 3))
    graph, _ = fused(captured(function, X, *layers))
    (call,) = targets(graph, swiglu)
    assert [node.meta["example_value"].shape[0] for node in call.args[2]] == [1, 2, 3]
    assert len(call.args) == 7


def gelu(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    return branched(F.gelu(branched(x, *gate)) * branched(x, *up), *down)


def gate_without_branch(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    return branched(F.silu(F.linear(x, gate[0])) * branched(x, *up), *down)


def down_without_branch(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    return F.linear(F.silu(branched(x, *gate)) * branched(x, *up), down[0])


def another_reader_of_the_product(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Any:
    h = F.silu(branched(x, *gate)) * branched(x, *up)
    return branched(h, *down), h


def another_reader_of_up(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Any:
    u = branched(x, *up)
    return branched(F.silu(branched(x, *gate)) * u, *down), u


def another_reader_of_silu(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Any:
    s = F.silu(branched(x, *gate))
    return branched(s * branched(x, *up), *down), s


def other_inputs(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    return branched(F.silu(branched(x, *gate)) * branched(x.relu(), *up), *down)


def gate_by_itself(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    g, u = branched(x, *gate), branched(x, *up)
    return branched(F.silu(g) * g, *down) + u.sum()


def three_on_x(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Any:
    """A third layer shares the call of gate and up."""
    return block(x, gate, up, down), branched(x, *gate)


def x_written_before_down(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    h = F.silu(branched(x, *gate)) * branched(x, *up)
    x.add_(1)
    return branched(h, *down)


def autocast_at_down(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    h = F.silu(branched(x, *gate)) * branched(x, *up)
    with torch.autocast("cpu", torch.bfloat16):
        return branched(h, *down)


LEFT_ALONE = [
    *(gelu, gate_without_branch, down_without_branch, another_reader_of_the_product, another_reader_of_up),
    *(another_reader_of_silu, other_inputs, gate_by_itself, three_on_x, x_written_before_down, autocast_at_down),
]


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_left_alone(function: Callable[..., Any]) -> None:
    graph, count = fused(captured(function, X, *block_parameters()))
    assert count == 0 and targets(graph, linears)


def test_biases() -> None:
    for layers in (block_parameters(bias=True), [*block_parameters()[:2], block_parameters(bias=True)[2]]):
        assert fused(captured(block, X, *layers))[1] == 0


@pytest.mark.parametrize(("rates", "count"), [((0.5, 0.5, 0.5), 1), ((0.5, 0.5, 0.0), 0), ((0.0, 0.5, 0.5), 0)])
def test_dropout(rates: tuple[float, ...], count: int) -> None:
    """One rate for all three, and one seed."""

    def dropping(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
        g, u = branched(x, *gate, p=rates[0]), branched(x, *up, p=rates[1])
        return branched(F.silu(g) * u, *down, p=rates[2])

    graph, _ = captured(dropping, X, *block_parameters()).lowered()
    fuse_siblings(graph, linears)
    assert fuse_swiglu(graph, linears, swiglu) == count
    graph.lint()
    if count:
        (call,), (seed,) = targets(graph, swiglu), targets(graph, draw)
        assert call.args[5:] == (0.5, seed)


class Mlp(nn.Module):
    """A SwiGLU block whose activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(3, 6, bias=False),
            nn.Linear(3, 6, bias=False),
            nn.Linear(6, 4, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_a_region() -> None:
    region = region_of(Mlp())
    insert(region, *adapt(region))
    LowerBranches(without_biases).run(region)
    FuseSiblings(linears).run(region)
    right, before = run(region, X), print_graph(region.graph)
    copy = Region(copy_graph(region.graph), region.instances)
    found = FuseSwiglu(linears, swiglu).run(copy)
    assert found.modified and found.summary == "1 SwiGLU blocks are one operator each"
    copy.graph.lint()
    torch.testing.assert_close(run(copy, X), right)
    assert print_graph(region.graph) == before
    assert not FuseSwiglu(linears, swiglu).run(copy).modified  # a second time changes nothing
