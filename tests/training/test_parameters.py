"""What belongs to an adapter, and optimizers' groups of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxlora import AdapterError, LoraModel, adapter_parameters, parameter_groups
from tests.training.nets import ours, train

ALL: dict[str, Any] = dict(
    r=4,
    target_modules=["fc1"],
    use_dora=True,
    modules_to_save=["head"],
    bias="lora_only",
    trainable_token_indices={"embed": [1, 2]},
)
ROLES = {
    "A": ["fc1.lora_A.default.weight"],
    "B": ["fc1.lora_B.default.weight"],
    "variant": ["fc1.lora_magnitude_vector.default.weight"],
    "rows": ["embed.trainable_tokens_delta.default.weight"],
    "copy": ["head.modules_to_save.default.weight", "head.modules_to_save.default.bias"],
    "bias": ["fc1.bias"],
}


def with_other() -> LoraModel:
    model = ours(**ALL)
    model.add_adapter("other", dict(r=2, target_modules=["fc1", "fc2"]))
    return model


@pytest.mark.parametrize("capture", ["modules", "symbolic", "export"])
def test_roles(capture: str) -> None:
    model = ours(capture, **ALL)
    everything = adapter_parameters(model, "default")
    assert set(everything) == {name for name, p in model.named_parameters() if p.requires_grad}
    for role, names in ROLES.items():
        found = adapter_parameters(model, "default", role)  # pyright: ignore[reportArgumentType]
        assert list(found) == names, role
        assert all(found[name] is model.get_parameter(name) for name in names)
    assert list(adapter_parameters(model, "default", "B", "A")) == ROLES["A"] + ROLES["B"]


def test_branch_biases_and_frozen_factors() -> None:
    model = ours(r=4, target_modules=["fc1"], lora_bias=True)
    assert list(adapter_parameters(model, "default", "bias")) == ["fc1.lora_B.default.bias"]
    mica = ours(r=4, target_modules=["fc1"], init_lora_weights="mica")
    assert list(adapter_parameters(mica, "default")) == ["fc1.lora_A.default.weight"]


def test_an_adapter_that_is_not_active() -> None:
    model = with_other()
    found = adapter_parameters(model, "other")
    assert len(found) == 4 and not any(parameter.requires_grad for parameter in found.values())


def test_tied_factors_are_given_once() -> None:
    transformers = pytest.importorskip("transformers")
    from fxlora import LoraConfig, lora_transform

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, tie_word_embeddings=True)
    model = lora_transform(
        transformers.GPT2LMHeadModel(config),
        LoraConfig(r=2, target_modules=["wte", "lm_head"], ensure_weight_tying=True),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in adapter_parameters(model, "default").values()} == {id(p) for p in trained}
    (group,) = parameter_groups(model, {"default": {"lr": 1.0}})
    assert len(group["params"]) == len(trained) == 2


def test_groups() -> None:
    model = with_other()
    model.get_parameter("norm.weight").requires_grad_()
    options = {"default": {"lr": 1e-3}, "default.B": {"lr": 1e-2}, "other": {"lr": 1e-4, "weight_decay": 0.0}}
    groups = parameter_groups(model, options, lr=1e-5, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("default.B", 1e-2, 0.1, 1),
        ("default", 1e-3, 0.1, 6),
        ("other", 1e-4, 0.0, 4),
        ("rest", 1e-5, 0.1, 1),
    ]
    every = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(every) == len(set(every))


def test_a_role_has_its_adapters_options() -> None:
    groups = parameter_groups(ours(**ALL), {"default": {"lr": 1.0, "weight_decay": 0.5}, "default.copy": {"lr": 2.0}})
    assert (groups[0]["name"], groups[0]["lr"], groups[0]["weight_decay"]) == ("default.copy", 2.0, 0.5)


def test_rest_is_what_trains_now() -> None:
    model = with_other()
    (group,) = parameter_groups(model, lr=0.1)
    assert group["name"] == "rest" and len(group["params"]) == 7


def test_one_optimizer_for_adapters_in_turn() -> None:
    model = with_other()
    optimizer = torch.optim.AdamW(parameter_groups(model, {"default": {"lr": 1e-2}, "other": {"lr": 1e-3}}))
    for active, resting in (("other", "default"), ("default", "other")):
        model.set_adapter(active)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, optimizer)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(adapter_parameters(model, active))
        assert not moved & set(adapter_parameters(model, resting))


def test_wrappers() -> None:
    model = ours(r=4, target_modules=["fc1"])
    assert len(adapter_parameters(torch.compile(model), "default")) == 2  # pyright: ignore[reportArgumentType]
    wrapper = nn.ModuleList([model, nn.Linear(2, 2)])
    assert [group["name"] for group in parameter_groups(wrapper, {"default": {}}, lr=1.0)] == ["default", "rest"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("defualt", "no adapter is called 'defualt'.*Did you mean 'default'"),
        ("default.C", "'default.C': a group is an adapter, or an adapter with one of A, B, "),
        ("default.copies", "Did you mean 'copy'"),
    ],
)
def test_unknown_groups(key: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        parameter_groups(ours(**ALL), {key: {"lr": 1.0}})


def test_refusals() -> None:
    model = ours(r=4, target_modules=["fc1"], inference_mode=True)
    with pytest.raises(AdapterError, match="nothing to train"):
        parameter_groups(model, lr=1.0)
    with pytest.raises(AdapterError, match="leave 'params' out"):
        parameter_groups(model, {"default": {"params": []}})
    with pytest.raises(AdapterError, match="a parameter's role is one of A, B, .*, not 'C'"):
        adapter_parameters(model, "default", "C")  # pyright: ignore[reportArgumentType]
    with pytest.raises(AdapterError, match="no adapter is called 'x'"):
        adapter_parameters(model, "x")
    with pytest.raises(AdapterError, match="has several transformed models; give one"):
        adapter_parameters(nn.ModuleList([model, ours(r=4, target_modules=["fc1"])]), "default")
