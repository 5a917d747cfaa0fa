"""`note-layouts`: where the rows of the batch lie in the tensors of an exported graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.layouts import NoteLayouts
from passes.printer import print_graph
from passes.rows import LAYOUT
from tests.passes.helpers import TwoLayers, exported, region_of


class Reshaping(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, int]]] = {
    "kept": (lambda x: x.relu(), ("dim", 0)),
    "time first": (lambda x: x.transpose(0, 1), ("dim", 1)),
    "flattened": (lambda x: x.reshape(-1, 6), ("outer", 0)),
    "flattened, time first": (lambda x: x.transpose(0, 1).reshape(-1, 6), ("inner", 0)),
    "and computed with": (lambda x: (x.reshape(-1, 6) * 2).relu(), ("outer", 0)),
    "split again": (lambda x: x.reshape(-1, 6).view(x.shape[0], x.shape[1], 6), ("dim", 0)),
    "features split": (lambda x: x.view(x.shape[0], x.shape[1], 2, 3), ("dim", 0)),
    "between two": (lambda x: x.view(x.shape[0], x.shape[1], 2, 3).permute(1, 0, 2, 3).reshape(-1, 2, 3), ("inner", 0)),
    "flattened and turned": (lambda x: x.reshape(-1, 6).t(), ("unknown", 0)),
    "summed": (lambda x: x.sum(0), ("unknown", 0)),
}


@pytest.mark.parametrize(("body", "layout"), CASES.values(), ids=CASES)
def test_layout(body: Callable[[Tensor], Tensor], layout: tuple[str, int]) -> None:
    auto = torch.export.Dim.AUTO
    region = exported(Reshaping(body), torch.randn(4, 5, 6), dynamic_shapes={"x": {0: auto, 1: auto}})
    text = print_graph(region.graph)
    assert NoteLayouts().run(region).modified
    (output,) = [node for node in region.graph.nodes if node.op == "output"]
    assert output.args[0][0].meta[LAYOUT] == layout
    assert print_graph(region.graph) == text


def test_a_graph_without_shapes() -> None:
    region = region_of(TwoLayers())
    assert not NoteLayouts().run(region).modified
    assert not any(LAYOUT in node.meta for node in region.graph.nodes)
