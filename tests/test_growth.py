"""The work on a model grows with its size, not with the square of it: counted in executed lines, not in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxlora
import passes
from fxlora import LoraConfig, LoraModel, explain, lora_transform, plan

COUNTED = tuple(str(Path(cast(str, package.__file__)).parent) for package in (fxlora, passes, torch.fx))


class Deep(nn.Module):
    """Linear layers one after another."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Functional(nn.Module):
    """The same, by functions that take weights and buffers of the model itself."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(4, 4) for _ in range(depth))
        for index in range(depth):
            self.register_buffer(f"shift{index}", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate(self.weights):
            x = F.linear(x, weight) + getattr(self, f"shift{index}")
        return x


def transformed(model: nn.Module, capture: Any) -> LoraModel:
    return lora_transform(model, LoraConfig(r=2, target_modules=r"layers\.\d+"), capture=capture)


def merged(model: LoraModel) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def lines(function: Callable[[Any], object], argument: object) -> int:
    """How many lines of our packages and of torch.fx a call executes; each turn of a loop or comprehension counts."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal count
        if not frame.f_code.co_filename.startswith(COUNTED):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(argument)
    finally:
        sys.settrace(before)
    return count


def check_linear(function: Callable[[Any], object], make: Callable[[int], object]) -> None:
    function(make(4))  # what is made once, such as classes
    small, middle, large = (lines(function, make(depth)) for depth in (8, 16, 32))
    quadratic = (large - middle) - 2 * (middle - small)
    assert quadratic <= 40, (small, middle, large)  # one line for each pair of layers makes 384


WORK: dict[str, Callable[[Any], object]] = {
    "symbolic": lambda model: transformed(model, "symbolic"),
    "modules": lambda model: transformed(model, "modules"),
    "plan": lambda model: plan(model, LoraConfig(r=2, target_modules=r"layers\.\d+")),
    "explain": lambda model: explain(model, LoraConfig(r=2, target_modules=r"layers\.\d+")),
}


@pytest.mark.parametrize("name", WORK)
def test_linear_in_the_layers_of_a_model(name: str) -> None:
    check_linear(WORK[name], Deep)


def test_linear_in_the_weights_that_functions_take() -> None:
    config = LoraConfig(r=2, target_parameters=["weights.0"])
    check_linear(lambda model: lora_transform(model, config, capture="symbolic"), Functional)


LATER: dict[str, Callable[[Any], object]] = {
    "verify": LoraModel.verify,
    "merge and unmerge": merged,
    "second adapter": lambda model: model.add_adapter("second", LoraConfig(r=2, target_modules=r"layers\.\d+")),
    "merge_and_unload": LoraModel.merge_and_unload,
    "unload": LoraModel.unload,
}


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
@pytest.mark.parametrize("name", LATER)
def test_linear_in_the_layers_of_a_transformed_model(name: str, capture: str) -> None:
    check_linear(LATER[name], lambda depth: transformed(Deep(depth), capture))
