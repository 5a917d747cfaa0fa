"""Questions to a graph: answers on a small model, and errors that know what was meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from fxlora import (
    GraphError,
    LoraConfig,
    dominators,
    lora_transform,
    paths_to,
    region_between,
    sites_reachable,
    to_networkx,
)
from tests.zoo import MLP


class Diamond(nn.Module):
    """Two ways from the input to the head, and a layer that nothing leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.free = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.left(x) + self.right(x)) + self.free.exp()


@pytest.fixture(scope="module")
def graph() -> Any:
    return to_networkx(lora_transform(Diamond(), LoraConfig(r=2, target_modules=["left", "head"])))


def test_paths_to_an_adapter_and_to_a_layer(graph: Any) -> None:
    stem = ["x", "stem"]
    left = [*stem, "left_lora_a", "left_lora_b", "left_lora_s"]
    assert paths_to(graph, "left") == {"left_lora_s": left}
    assert list(paths_to(graph, "default")) == ["left_lora_s", "head_lora_s"]
    assert paths_to(graph, "right") == {"right": [*stem, "right"]}
    assert paths_to(graph, "exp") == {"exp": []}
    with pytest.raises(GraphError, match="called 'defalt'. Did you mean 'default'"):
        paths_to(graph, "defalt")


def test_dominators(graph: Any) -> None:
    plain = to_networkx(fx.symbolic_trace(Diamond()))
    assert dominators(plain, "head") == ["x", "stem", "add", "head"]
    assert dominators(plain, "x") == ["x"]
    assert dominators(graph, "right") == ["x", "stem", "right"]
    with pytest.raises(GraphError, match="no input leads to 'exp'"):
        dominators(graph, "exp")
    with pytest.raises(GraphError, match="called 'stm'. Did you mean 'stem'"):
        dominators(graph, "stm")


def test_region_between(graph: Any) -> None:
    plain = to_networkx(fx.symbolic_trace(Diamond()))
    region = region_between(plain, "stem", "add")
    assert region.nodes == ("stem", "left", "right", "add")
    assert region.inputs == ("x",) and region.outputs == ("add",)
    side = region_between(plain, "left", "add")
    assert side.nodes == ("left", "add") and side.inputs == ("stem", "right")
    assert region_between(plain, "x", "output").outputs == ("output",)
    with pytest.raises(GraphError, match="no path leads from 'head' to 'stem'; there is one from 'stem' to 'head'"):
        region_between(plain, "head", "stem")
    with pytest.raises(GraphError, match="no path leads from 'left' to 'right'$"):
        region_between(plain, "left", "right")


def test_sites_reachable(graph: Any) -> None:
    assert sites_reachable(graph, "right.weight") == ["right", "head"]
    assert sites_reachable(graph, "left.lora_B.default.weight") == ["left", "head"]
    assert sites_reachable(graph, "free") == []
    with pytest.raises(GraphError, match="parameter 'stem.wieght'. Did you mean 'stem.weight'"):
        sites_reachable(graph, "stem.wieght")


def test_a_layer_that_is_called_twice() -> None:
    class Twice(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(x)) + self.fc2(self.fc1(x))

    twice = to_networkx(fx.symbolic_trace(Twice()))
    with pytest.raises(GraphError, match="'fc1' is 2 nodes; name one: fc1, fc1_1|called 'nothing'"):
        region_between(twice, "nothing", "fc2")
    assert list(paths_to(twice, "fc2")) == ["fc2"]
