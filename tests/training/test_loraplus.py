"""LoRA+: peft's groups, and peft's training to the bit."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as create_by_peft
from torch import nn

from fxlora import AdapterError, ConfigError, create_loraplus_optimizer
from tests.training.nets import by_our_names, ours, theirs, train

SETTINGS: dict[str, Any] = dict(lr=1e-2, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=3e-3)

CONFIGS: dict[str, dict[str, Any]] = {
    "factors": dict(target_modules=["fc1", "fc2"]),
    "embedding": dict(target_modules=["embed", "fc1"]),
    "copies": dict(target_modules=["fc1"], modules_to_save=["norm", "head"]),
    "biases": dict(target_modules=["fc1"], lora_bias=True, bias="all"),
    "tokens": dict(target_modules=["fc1"], trainable_token_indices={"embed": [1, 3]}),
    "dora": dict(target_modules=["embed", "fc1"], use_dora=True),
}


def groups(model: nn.Module, optimizer: torch.optim.Optimizer, names: dict[str, Any]) -> list[tuple[Any, ...]]:
    name_of = {id(parameter): name for name, parameter in names.items()}
    return [
        (sorted(name_of[id(p)] for p in group["params"]), group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_groups_and_training_are_pefts(name: str, optimizer_cls: Any) -> None:
    config = dict(r=4, **CONFIGS[name])
    model, reference = ours(**config), theirs(**config)
    optimizer = create_loraplus_optimizer(model, optimizer_cls, **SETTINGS)
    expected = create_by_peft(reference, optimizer_cls, **SETTINGS)
    names = by_our_names(reference)
    assert groups(model, optimizer, dict(model.named_parameters())) == groups(reference, expected, names)
    start = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    train(model, optimizer)
    train(reference, expected)
    for each, before in start.items():
        after = model.get_parameter(each)
        assert not torch.equal(after, before), each
        if name == "dora":  # its norm is computed otherwise
            torch.testing.assert_close(after, names[each], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(after, names[each]), each


def test_an_adapter_called_lora_b() -> None:
    """peft looks for "lora_B" anywhere in a parameter's name, and so takes this adapter's A for B."""
    model = ours(r=4, target_modules=["fc1"])
    model.add_adapter("my_lora_B", dict(r=4, target_modules=["fc1"]))
    model.set_adapter("my_lora_B")
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=2.0)
    found = {group["lr"]: group["params"] for group in optimizer.param_groups if group["params"]}
    assert found[1.0][0] is model.get_parameter("fc1.lora_A.my_lora_B.weight")
    assert found[2.0][0] is model.get_parameter("fc1.lora_B.my_lora_B.weight")


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_captures(capture: str) -> None:
    model = ours(capture, r=4, target_modules=["embed", "fc1"])
    assert model.capture == capture
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 1, 0]


def test_a_wrapper_with_a_head() -> None:
    wrapper = nn.ModuleDict({"model": ours(r=4, target_modules=["fc1"]), "more": nn.Linear(5, 2)})
    optimizer = create_loraplus_optimizer(wrapper, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 1, 1]


def test_eight_bit_optimizers_keep_embeddings_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    manager = SimpleNamespace(register_module_override=lambda *args: kept.append(args))
    optim = SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    model = ours(r=4, target_modules=["fc1"])
    optimizer = create_loraplus_optimizer(model, AdamW8bit, lr=1e-3, loraplus_lr_ratio=4, betas=(0.8, 0.9))
    assert kept == [(model.get_submodule("embed"), "weight", {"optim_bits": 32})]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_ratios(ratio: float) -> None:
    with pytest.raises(ConfigError, match="loraplus_lr_ratio must be a positive number"):
        create_loraplus_optimizer(
            ours(r=4, target_modules=["fc1"]), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio
        )


def test_nothing_to_train() -> None:
    frozen = ours(r=4, target_modules=["fc1"], inference_mode=True)
    for model, message in ((frozen, "nothing to train"), (nn.Linear(2, 2), "Linear has no adapters; lora_transform")):
        with pytest.raises(AdapterError, match=message):
            create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
