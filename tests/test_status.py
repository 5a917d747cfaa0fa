"""The status of layers and models, field by field against peft's; trainability against peft's after every call."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fxlora
from fxlora import LoraConfig, lora_transform

CAPTURES = ["symbolic", "export", "modules"]
IDS = torch.tensor([[0, 3, 5, 1], [2, 2, 4, 0]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(6, 4), nn.Conv1d(4, 3, 2)
        self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        return self.head(torch.tanh(self.fc(x)))


CONFIGS: dict[str, dict[str, Any]] = {
    "all kinds": {"target_modules": ["embed", "conv", "fc", "head"]},
    "magnitudes": {"target_modules": ["fc", "conv"], "use_dora": True, "lora_dropout": 0.1},
    "bias of B": {"target_modules": ["fc"], "lora_bias": True},
    "whole modules": {"target_modules": ["fc"], "modules_to_save": ["head"]},
    "tokens": {"target_modules": ["fc"], "trainable_token_indices": {"embed": [1, 3]}},
    "biases": {"target_modules": ["fc"], "bias": "lora_only"},
    "never trained": {"target_modules": ["fc"], "init_lora_weights": "mica"},
    "rows and factors": {"target_modules": ["head", "fc"], "r": 3, "use_rslora": True},
}


def both(capture: Any, **config: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    ours = lora_transform(Net(), LoraConfig(r=2).replace(**config), capture=capture, example_inputs=IDS)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(Net(), peft.LoraConfig(**{"r": 2, **config}))
    return ours, theirs


def layers(statuses: list[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(each) for each in statuses]


def compare(ours: Any, theirs: Any) -> None:
    expected = layers(theirs.get_layer_status())
    for each in expected:
        each["name"] = each["name"].removeprefix("model.").removesuffix(".token_adapter")
    assert layers(ours.get_layer_status()) == expected
    assert dataclasses.asdict(ours.get_model_status()) == dataclasses.asdict(theirs.get_model_status())


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", CONFIGS)
def test_as_pefts(name: str, capture: Any) -> None:
    ours, theirs = both(capture, **CONFIGS[name])
    compare(ours, theirs)
    ours.merge_adapter()
    theirs.merge_adapter()
    compare(ours, theirs)
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    for model in (ours, theirs):
        model.set_requires_grad("default", False)
    if name == "biases":  # unlike in peft they belong to the adapter here, as with set_adapter
        assert ours.get_model_status().trainable_params == 0
        theirs.base_model.model.fc.base_layer.bias.requires_grad_(False)
    compare(ours, theirs)


def both_call(call: Callable[[Any], object]) -> Callable[[Any, Any], None]:
    def run(ours: Any, theirs: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(ours)
            call(theirs)

    return run


def set_several(model: Any, names: list[str]) -> None:
    (model.base_model if isinstance(model, peft.PeftModel) else model).set_adapter(names)
    if isinstance(model, peft.PeftModel):
        model.active_adapter = names[0]  # peft's outer wrapper would still name a former one


def add(name: str, **config: Any) -> Callable[[Any, Any], None]:
    def run(ours: Any, theirs: Any) -> None:
        ours.add_adapter(name, LoraConfig(**config))
        theirs.add_adapter(name, peft.LoraConfig(**config))

    return run


def status_of_both(ours: Any, theirs: Any) -> None:
    compare(ours, theirs)
    expected = {name.removeprefix("base_model.model.") for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize("capture", CAPTURES)
def test_trainability_after_every_call(capture: Any) -> None:
    """With the same targets for all adapters, as peft's layers know nothing of adapters that they do not have."""
    steps = [
        add("z", target_modules=["fc", "conv"], r=3),
        add("early", target_modules=["fc", "conv"], r=1),
        both_call(lambda model: model.set_adapter("z")),
        both_call(lambda model: model.set_requires_grad(["early", "default"])),
        both_call(lambda model: model.set_requires_grad("z", False)),
        add("more", target_modules=["fc", "conv"]),
        both_call(lambda model: model.set_adapter("early", inference_mode=True)),
        both_call(lambda model: set_several(model, ["z", "default"])),
        both_call(lambda model: model.merge_adapter(["default"])),
        both_call(lambda model: model.unmerge_adapter()),
        both_call(lambda model: model.delete_adapter("early")),  # not active
        both_call(lambda model: model.set_requires_grad("default", False)),
        both_call(lambda model: model.delete_adapter("z")),  # one of two active
        both_call(lambda model: model.delete_adapter("default")),  # the last active
    ]
    ours, theirs = both(capture, target_modules=["fc", "conv"])
    for step in steps:
        step(ours, theirs)
        status_of_both(ours, theirs)
    ours.delete_adapter("more")
    assert ours.active_adapters == [] and not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_first_by_name_becomes_active(capture: Any, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = both(capture, target_modules=["fc"])
    for name in ("z", "b"):
        add(name, target_modules=["fc"])(ours, theirs)
    both_call(lambda model: model.delete_adapter("default"))(ours, theirs)
    assert ours.active_adapters == theirs.active_adapters == ["b"]
    assert "'default' was active and is deleted now; 'b' is active now" in caplog.text
    status_of_both(ours, theirs)


def test_disabled() -> None:
    """Unlike in peft nothing about trainability changes: peft makes all active adapters trainable on the way out."""
    ours, theirs = both("modules", target_modules=["fc"])
    with ours.disable_adapter(), theirs.disable_adapter():
        assert [each.enabled for each in ours.get_layer_status()] == [False]
        assert ours.get_model_status().enabled is theirs.get_model_status().enabled is False
        assert ours.get_model_status().requires_grad == {"default": True}
    for model in (ours, theirs):
        model.set_requires_grad("default", False)
        with model.disable_adapter():
            pass
    assert ours.get_model_status().requires_grad == {"default": False}
    assert theirs.get_model_status().requires_grad == {"default": True}


@pytest.mark.parametrize("capture", CAPTURES)
def test_irregular(capture: Any) -> None:
    ours, theirs = both(capture, target_modules=["fc", "conv"])
    ours.get_parameter("fc.lora_A.default.weight").requires_grad_(False)
    theirs.get_parameter("base_model.model.fc.lora_A.default.weight").requires_grad_(False)
    compare(ours, theirs)
    assert ours.get_model_status().requires_grad == {"default": "irregular"}
    assert ours.get_layer_status()[0].requires_grad == {"default": True}
    assert fxlora.get_layer_status(ours) == ours.get_layer_status()
    assert fxlora.get_model_status(ours) == ours.get_model_status()


def test_adapters_of_other_targets() -> None:
    ours, _ = both("modules", target_modules=["fc"])
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["conv", "fc"]))
    ours.set_adapter("other")
    ours.merge_adapter()
    found = {each.name: (each.available_adapters, each.merged_adapters) for each in ours.get_layer_status()}
    assert found == {"conv": (["other"], ["other"]), "fc": (["default", "other"], ["other"])}
    assert ours.get_model_status().merged_adapters == ["other"]


def test_parameters_and_attention() -> None:
    """Named by what they are; peft names the module and nests its wrappers."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ours: Any = lora_transform(
        model, LoraConfig(r=2, target_modules=["self_attn"], target_parameters=["linear1.weight"]), capture="modules"
    )
    found = {each.name: each.module_type for each in ours.get_layer_status()}
    assert found["linear1.weight"] == "lora.ParamWrapper" and found["self_attn.out_proj"] == "lora.Linear"
    assert len(found) == ours.get_model_status().num_adapter_layers == 3
