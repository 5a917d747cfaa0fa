"""`call_sites` adapts some calls of a shared layer, which replacing modules cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxlora import CaptureError, ConfigError, LoraConfig, MergeError, NoTargetError, lora_transform
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import randomise

X = torch.linspace(-1, 1, 16).view(2, 8)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)))


def config(calls: dict[str, list[int]]) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=["fc"], call_sites=calls)


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize("calls", [[0], [1], [1, 0]])
def test_only_the_chosen_calls_have_the_branch(capture: Any, calls: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twice()
    lora = lora_transform(model, config({"fc": calls}), capture=capture, example_inputs=X)
    randomise(lora)
    A, B = (lora.get_parameter(f"fc.lora_{part}.default.weight").double() for part in "AB")
    weight, bias = model.fc.weight.double(), model.fc.bias.double()
    y = X.double()
    for call in range(2):
        y = y @ (weight + (1.5 * B @ A if call in calls else 0)).T + bias
        y = torch.relu(y) if call == 0 else y
    torch.testing.assert_close(lora(X).double(), y, rtol=1e-5, atol=1e-5)
    lora.verify()
    lora.save_pretrained(tmp_path)
    again = lora_transform(model, tmp_path, capture=capture, example_inputs=X)
    assert again._specs() == lora._specs() and torch.equal(again(X), lora(X))
    with pytest.raises(MergeError, match="'fc': adapter 'default' is at some calls of this layer only"):
        lora.merge_and_unload()


def test_auto_takes_a_whole_graph() -> None:
    assert lora_transform(Twice(), config({"fc": [0]})).capture == "symbolic"


def test_other_adapters_files_do_not_have_the_field(tmp_path: Path) -> None:
    lora_transform(Twice(), {"target_modules": ["fc"]}).save_pretrained(tmp_path)
    assert "call_sites" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("calls", "capture", "error", "message"),
    [
        (
            {"fc": [2]},
            "symbolic",
            NoTargetError,
            "'fc' is called 2 times in the graph, counted from 0; there is no call 2",
        ),
        ({"fd": [0]}, "symbolic", NoTargetError, "no target is called 'fd'. Did you mean 'fc'?"),
        ({"fc": 1}, "symbolic", ConfigError, "should be a list of numbers of calls"),
        ({"fc": []}, "symbolic", ConfigError, "should be a list of numbers of calls"),
        ({"fc": [-1]}, "symbolic", ConfigError, "should be a list of numbers of calls"),
        ({"fc": [0]}, "modules", CaptureError, "only a whole graph can tell apart"),
    ],
)
def test_refusals(calls: Any, capture: Any, error: type[Exception], message: str) -> None:
    model = Twice()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        lora_transform(model, config(calls), capture=capture)
    assert message in str(caught.value)
    assert_unchanged(model, before)


def test_calls_that_differ_between_the_modes_have_no_numbers() -> None:
    class Deeper(Twice):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.fc(x) if self.training else x)

    model = Deeper()
    before = snapshot(model)
    with pytest.raises(CaptureError, match="'fc' is called 3 times in training and 2 times in evaluation"):
        lora_transform(model, config({"fc": [0]}), capture="symbolic")
    assert_unchanged(model, before)
