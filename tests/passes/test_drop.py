"""`drop-branches` is the inverse of `insert-branches`, node for node and bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.base import SELF_CALL, Instance, PassResult, Region, copy_graph
from passes.branches.base import Branch, BranchDtype
from passes.drop import DropBranches
from passes.insert import InsertBranches
from passes.nodes import lora_meta
from passes.printer import print_graph
from tests.passes.helpers import TwoLayers, adapt, exported, insert, region_of, run

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


class Twice(nn.Module):
    """A layer that is called twice in a row, and whose output has several users."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(self.fc(x))
        return {"y": y, "more": F.linear(y, self.w) + y}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "two layers": TwoLayers,
    "a chain": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
    "one call after another": Twice,
}


@pytest.mark.parametrize("dtype", ["base", "adapter"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("capture", [region_of, lambda model: exported(model, X)], ids=["symbolic", "export"])
@pytest.mark.parametrize("name", MODELS)
def test_drop_undoes_insert(
    name: str, capture: Callable[[nn.Module], Region], dropout: float, dtype: BranchDtype
) -> None:
    region = capture(MODELS[name]())
    text, nodes, meta = print_graph(region.graph), list(region.graph.nodes), [n.meta for n in region.graph.nodes]
    before = run(region, X)
    insert(region, *adapt(region, adapter="one", dropout=dropout), *adapt(region, adapter="two"), dtype=dtype)
    assert print_graph(region.graph) != text
    count = sum(lora_meta(node) is not None for node in region.graph.nodes)
    assert DropBranches().run(region) == PassResult(True, f"{count} nodes")
    region.graph.lint()
    assert print_graph(region.graph) == text
    assert list(region.graph.nodes) == nodes
    assert [node.meta for node in region.graph.nodes] == meta
    torch.testing.assert_close(run(region, X), before, rtol=0, atol=0)


def test_plain_graph_is_left_alone() -> None:
    region = region_of(TwoLayers())
    text = print_graph(region.graph)
    assert DropBranches().run(region) == PassResult(False, "0 nodes")
    assert print_graph(region.graph) == text


def test_factors_that_are_only_registered_are_no_matter() -> None:
    region = region_of(TwoLayers())
    adapt(region)
    assert not DropBranches().run(region).modified


def test_insert_again_gives_the_same_graph() -> None:
    region = region_of(TwoLayers())
    specs = adapt(region)
    insert(region, *specs)
    text = print_graph(region.graph)
    DropBranches().run(region)
    region.graph = copy_graph(region.graph)  # as the pipeline does: a graph remembers the names that it gave away
    insert(region, *specs)
    assert print_graph(region.graph) == text


def test_drop_in_one_site_only() -> None:
    """A graph with branches at one site: the other site is untouched."""
    region = region_of(TwoLayers())
    (spec,) = adapt(region, "fc2")
    text = print_graph(region.graph)
    insert(region, spec)
    DropBranches().run(region)
    assert print_graph(region.graph) == text


def test_site_whose_output_nobody_uses() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.fc(x)
            return x

    region = region_of(Unused())
    text = print_graph(region.graph)
    insert(region, *adapt(region))
    DropBranches().run(region)
    assert print_graph(region.graph) == text


def test_template() -> None:
    graph = fx.Graph()
    graph.output(graph.call_module(SELF_CALL, (graph.placeholder("input"),)))
    region = Region(graph, (Instance("h.0.fc", nn.Linear(3, 4)),))
    text = print_graph(graph)
    InsertBranches((Branch("", "one", dropout=True), Branch("", "two"))).run(region)
    DropBranches().run(region)
    assert print_graph(graph) == text
