"""`freeze-base`: the named parameters require gradients, all others do not."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from passes.base import Instance, PassResult, Region
from passes.freeze import FreezeBase
from passes.printer import print_graph
from tests.passes.helpers import TwoLayers, adapt, insert, region_of


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


FACTORS = {"fc1.lora_A.default.weight", "fc1.lora_B.default.weight"}


def test_only_the_named_are_trained() -> None:
    region = region_of(TwoLayers())
    insert(region, *adapt(region, "fc1"))
    text = print_graph(region.graph)
    assert FreezeBase(FACTORS).run(region) == PassResult(True, "4 parameters switched")
    assert trainable(region.module) == FACTORS
    assert print_graph(region.graph) == text
    region.module(torch.randn(5, 3)).sum()  # nothing but flags was touched


def test_frozen_parameters_are_thawed() -> None:
    model = TwoLayers().requires_grad_(False)
    result = FreezeBase(frozenset({"fc2.bias"})).run(region_of(model))
    assert result == PassResult(True, "1 parameters switched")
    assert trainable(model) == {"fc2.bias"}


@pytest.mark.parametrize("names", [set(), {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}], ids=["none", "all"])
def test_no_change(names: set[str]) -> None:
    model = TwoLayers().requires_grad_(bool(names))
    assert FreezeBase(names).run(region_of(model)) == PassResult(False, "0 parameters switched")
    assert trainable(model) == names


def test_instances_have_their_own_names() -> None:
    blocks = [TwoLayers(), TwoLayers()]
    region = Region(fx.Graph(), tuple(Instance(f"h.{i}", block) for i, block in enumerate(blocks)))
    FreezeBase({"h.1.fc1.weight", "fc2.weight"}).run(region)  # the second is a name of no instance
    assert [trainable(block) for block in blocks] == [set(), {"fc1.weight"}]


@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight"])
def test_tied_parameter_may_be_named_by_either_name(name: str) -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(3, 3, bias=False), "fc2": nn.Linear(3, 3, bias=False)})
    model["fc2"].weight = model["fc1"].weight
    FreezeBase({name}).run(Region(fx.Graph(), (Instance("", model),)))
    assert trainable(model) == {"fc1.weight", "fc2.weight"}
    FreezeBase(set()).run(Region(fx.Graph(), (Instance("", model),)))
    assert trainable(model) == set()


def test_quantized_parameter_is_left_frozen() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    assert not FreezeBase({"other"}).run(Region(fx.Graph(), (Instance("", model),))).modified
