"""Initialisations in a whole model: peft's values and outputs, the base given back, and conversion to plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxlora import AdapterError, LoraConfig, lora_transform
from tests.faults.snapshots import assert_unchanged, snapshot

NAMES = ["orthogonal", "pissa", "pissa_niter_4", "olora", "mica"]
CHANGING = ["pissa", "pissa_niter_4", "olora"]
X = torch.linspace(-1, 1, 40).view(5, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), Conv1D(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def ours(name: str, capture: Any = "auto", model: nn.Module | None = None, targets: Any = ("fc1", "fc2")) -> Any:
    model = net() if model is None else model
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), init_lora_weights=name)
    return lora_transform(model, config, capture=capture, example_inputs=X)


def theirs(name: str) -> Any:
    model = net()
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["fc1"], init_lora_weights=name)
    return peft.get_peft_model(model, config)


def train(model: Any) -> None:
    """The same change of every factor that is trained."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].removeprefix("base_model.model.")):
        if "lora_" in name and parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capture", ["symbolic", "modules", "export"])
def test_as_in_peft(name: str, capture: str) -> None:
    reference, model = theirs(name), ours(name, capture, targets=["fc1"])
    for key, parameter in model.named_parameters():
        if key.startswith("fc1"):
            path = f"base_model.model.{key if 'lora_' in key else key.replace('fc1', 'fc1.base_layer')}"
            assert torch.equal(parameter, reference.get_parameter(path)), key
            assert parameter.requires_grad == reference.get_parameter(path).requires_grad, key
    torch.testing.assert_close(model(X), net()(X), rtol=1e-5, atol=1e-5)
    train(model)
    train(reference)
    torch.testing.assert_close(model(X), reference(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(X), reference(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("how", ["unload", "delete"])
def test_the_base_is_given_back(name: str, how: str) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lora = ours(name, "modules", model)
    assert not torch.equal(model.fc1.weight, before["fc1.weight"])
    train(lora)
    if how == "unload":
        lora.unload()
    else:
        lora.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
        lora.delete_adapter("default")
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_later_adapters_part_stays_when_the_first_is_deleted() -> None:
    model = net()
    weight = model.fc1.weight.detach().clone()
    lora = ours("pissa", "modules", model, ["fc1"])
    lora.add_adapter("second", LoraConfig(r=2, lora_alpha=2, target_modules=["fc1"], init_lora_weights="pissa"))
    lora.delete_adapter("default")
    lora.set_adapter("second")
    expected = nn.functional.linear(X, weight, model.fc1.bias)
    torch.testing.assert_close(lora.fc1(X), expected, rtol=1e-5, atol=1e-5)
    lora.unload()
    assert torch.equal(model.fc1.weight, weight)


def test_a_changed_base_under_merged_adapters_is_refused() -> None:
    lora = lora_transform(net(), LoraConfig(r=2, target_modules=["fc1"]))
    lora.merge_adapter()
    before = snapshot(lora)
    with pytest.raises(
        AdapterError, match="init_lora_weights='pissa' changes base weights; call unmerge_adapter first"
    ):
        lora.add_adapter("second", LoraConfig(r=2, target_modules=["fc1"], init_lora_weights="pissa"))
    assert_unchanged(lora, before)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("rslora", [False, True])
def test_conversion_to_plain(name: str, rslora: bool, tmp_path: Path) -> None:
    model = net()
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["fc1", "fc2"], init_lora_weights=name, use_rslora=rslora,
        rank_pattern={"fc2": 3}, alpha_pattern={"fc2": 5},
    )  # fmt: skip
    lora = lora_transform(model, config)
    lora.save_pretrained(tmp_path / "initial")
    train(lora)
    lora.save_pretrained(tmp_path / "plain", convert_to_plain=True)
    saved = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and saved["r"] == 8 and saved["rank_pattern"] == {"fc2": 6}
    expected = lora(X)
    again = lora_transform(net(), tmp_path / "plain")
    torch.testing.assert_close(again(X), expected, rtol=1e-5, atol=1e-5)
    in_peft = peft.PeftModel.from_pretrained(net(), tmp_path / "plain")
    torch.testing.assert_close(in_peft(X), expected, rtol=1e-5, atol=1e-5)
    lora.save_pretrained(tmp_path / "as-peft", path_initial_model_for_weight_conversion=tmp_path / "initial")
    files = [(tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("plain", "as-peft")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["pissa", "olora", "mica", "orthogonal"])
def test_files_in_both_directions(name: str, tmp_path: Path) -> None:
    """As in peft, loading makes the changed base anew."""
    lora = ours(name, targets=["fc1"])
    train(lora)
    lora.save_pretrained(tmp_path / "ours")
    in_peft = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(in_peft(X), lora(X), rtol=1e-5, atol=1e-5)
    in_peft.save_pretrained(tmp_path / "theirs")
    again = lora_transform(net(), tmp_path / "theirs")
    torch.testing.assert_close(again(X), lora(X), rtol=0, atol=0)
