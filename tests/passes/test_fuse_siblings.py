"""`fuse-siblings`: which lowered layers share a call, in which order, and what keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.base import Region, copy_graph
from passes.fuse_siblings import MOST, FuseSiblings, fuse_siblings
from passes.lower import LowerBranches
from passes.printer import print_graph
from tests.passes.helpers import adapt, insert, region_of, run
from tests.passes.lowered import Captured, branched, captured, draw, linears, parameters, targets, write

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def fused(found: Captured) -> tuple[fx.Graph, int]:
    """The lowered graph, fused, and how many layers share a call; the numbers are those of the captured graph."""
    graph, _ = found.lowered()
    count = fuse_siblings(graph, linears)
    graph.lint()
    for one, two in zip(found.run(graph), found.run(found.gm.graph), strict=True):
        torch.testing.assert_close(one, two)
    return graph, count


def sizes(graph: fx.Graph) -> list[int]:
    """The number of layers of each call."""
    return [len(call.args[1]) for call in targets(graph, linears)]


def each_on_x(x: Tensor, *layers: list[Any]) -> list[Tensor]:
    return [branched(x, *layer).relu() for layer in layers]


@pytest.mark.parametrize(
    ("count", "calls", "shared"), [(1, [1], 0), (2, [2], 2), (3, [3], 3), (4, [3, 1], 3), (5, [3, 2], 5)]
)
def test_counts(count: int, calls: list[int], shared: int) -> None:
    graph, found = fused(captured(each_on_x, X, *parameters(count)))
    assert found == shared and sizes(graph) == calls and max(calls) <= MOST


def test_layers_of_other_sizes_and_ranks() -> None:
    layers = [parameters(1, 3, out, r)[0] for out, r in ((4, 2), (7, 1), (2, 3))]
    graph, count = fused(captured(each_on_x, X, *layers))
    assert count == 3 and sizes(graph) == [3]


def test_the_lists_are_in_order() -> None:
    graph, _ = captured(each_on_x, X, *parameters(3)).lowered()
    before = [[call.args[index][0] for call in targets(graph, linears)] for index in range(1, 6)]
    fuse_siblings(graph, linears)
    (call,) = targets(graph, linears)
    assert [list(call.args[index]) for index in range(1, 6)] == before
    assert sorted(user.args[1] for user in call.users) == [0, 1, 2]


def other_inputs(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    return branched(x, *first), branched(x.relu(), *second)


def x_written_between(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    y = branched(x, *first)
    x.add_(1)
    return y, branched(x, *second)


def weight_written_between(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    y = branched(x, *first)
    second[0].mul_(2)
    return y, branched(x, *second)


def autocast_between(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = branched(x, *first)
    return y, branched(x, *second)


def weight_made_from_the_first_output(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    y = branched(x, *first)
    return y, branched(x, second[0] * y.sum(), *second[1:])


def weight_dropped(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    """Numbers are drawn in the order in which they were."""
    return branched(x, *first), branched(x, F.dropout(second[0], 0.0), *second[1:])


def one_bias(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    """Torch has gradients for lists of tensors, and for lists of None, not for mixed ones."""
    return branched(x, *first), branched(x, second[0], None, *second[2:])


@pytest.mark.parametrize(
    "function",
    [
        other_inputs,
        x_written_between,
        weight_written_between,
        autocast_between,
        weight_made_from_the_first_output,
        weight_dropped,
        one_bias,
    ],
)
def test_kept_apart(function: Callable[..., Any]) -> None:
    graph, count = fused(captured(function, X, *parameters(2)))
    assert count == 0 and sizes(graph) == [1, 1]


def test_what_is_computed_of_other_tensors_moves_with_its_call() -> None:
    def made_between(x: Tensor, first: list[Any], second: list[Any]) -> Any:
        y = branched(x, *first)
        return y, branched(x, torch.where(second[0] > 0, second[0].exp(), first[0].cos()), *second[1:])

    graph, count = fused(captured(made_between, X, *parameters(2)))
    assert count == 2 and sizes(graph) == [2]


def test_a_layer_whose_factors_come_too_late_does_not_keep_the_others_apart() -> None:
    def late(x: Tensor, first: list[Any], second: list[Any], third: list[Any]) -> Any:
        y = branched(x, *first)
        return y, branched(x, second[0] * y.sum(), *second[1:]), branched(x, *third)

    graph, count = fused(captured(late, X, *parameters(3)))
    assert count == 2 and sizes(graph) == [2, 1]


def test_other_rates_of_dropout() -> None:
    """Those with dropout have one seed, that of the first."""

    def dropping(x: Tensor, *layers: list[Any]) -> list[Tensor]:
        rates = (0.5, 0.0, 0.5, 0.0)
        return [branched(x, *layer, p=p) for layer, p in zip(layers, rates, strict=True)]

    graph, _ = captured(dropping, X, *parameters(4)).lowered()
    assert len(targets(graph, draw)) == 2
    assert fuse_siblings(graph, linears) == 4
    graph.lint()
    (seed,) = targets(graph, draw)
    assert [(len(call.args[1]), call.args[6], call.args[7]) for call in targets(graph, linears)] == [
        (2, 0.5, seed),
        (2, 0.0, None),
    ]


class Attention(nn.Module):
    """Three layers that read x, with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.q(x))
        k = self.norm(self.k(x))
        return F.softmax(q @ k.t(), 1) @ self.v(x)


def lowered_region(model: nn.Module) -> Region:
    region = region_of(model)
    insert(region, *adapt(region))
    LowerBranches(write).run(region)
    return region


def test_a_region() -> None:
    """The reads of weights and factors move to the first call."""
    region = lowered_region(Attention())
    right = run(region, X)
    before = print_graph(region.graph)
    copy = Region(copy_graph(region.graph), region.instances)
    found = FuseSiblings(linears).run(copy)
    assert found.modified and found.summary == "3 layers share a call"
    copy.graph.lint()
    assert sizes(copy.graph) == [3]
    torch.testing.assert_close(run(copy, X), right)
    assert print_graph(region.graph) == before
    assert not FuseSiblings(linears).run(copy).modified  # a second time changes nothing


def test_a_module_that_writes_into_its_input_keeps_layers_apart() -> None:
    model = Attention()
    model.norm = nn.ReLU(inplace=True)  # type: ignore[assignment]
    region = lowered_region(model)
    assert not FuseSiblings(linears).run(region).modified
