"""Dtypes of base and adapters, and the preparation of quantized models, against peft's."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fxlora import (
    AdapterError,
    ConfigError,
    LoraConfig,
    cast_adapter_dtype,
    cast_mixed_precision_params,
    lora_transform,
    prepare_model_for_kbit_training,
)
from tests.training.nets import Net, ours, train
from tests.zoo import ARCHITECTURES

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")


class Params4bit(nn.Parameter):
    """By its name what bitsandbytes has."""


def loaded(dtype: torch.dtype = torch.bfloat16, **marks: Any) -> Any:
    """A model with the marks that transformers leaves on a quantized one, and with parameters as such a one has."""
    model = LLAMA.model().to(dtype)
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = Params4bit(layer.weight.data)
    model.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    for name, value in marks.items():
        setattr(model, name, value)
    return model


MARKS: list[dict[str, Any]] = [
    {},
    dict(is_loaded_in_8bit=True),
    dict(is_loaded_in_4bit=True, quantization_method="bitsandbytes"),
    *(dict(quantization_method=name) for name in ("gptq", "aqlm", "eetq", "torchao", "hqq", "awq")),
    dict(hqq_quantized=True),
]


@pytest.mark.parametrize("marks", MARKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_as_peft(marks: dict[str, Any], dtype: torch.dtype, checkpointing: bool) -> None:
    model, reference = loaded(dtype, **marks), loaded(dtype, **marks)
    parameters = dict(model.named_parameters())
    options = {"use_reentrant": True}
    assert prepare_model_for_kbit_training(model, checkpointing, options) is model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers has given up
        peft.prepare_model_for_kbit_training(reference, checkpointing, options)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.dtype == expected[name].dtype, name
        assert not parameter.requires_grad
    flags = [
        [getattr(module, "gradient_checkpointing", None) for module in each.modules()] for each in (model, reference)
    ]
    assert flags[0] == flags[1]


def test_what_is_cast() -> None:
    model = prepare_model_for_kbit_training(loaded())
    assert {str(parameter.dtype) for parameter in model.parameters()} == {
        "torch.float32",
        "torch.bfloat16",
        "torch.uint8",
    }
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_a_prepared_model_trains(options: dict[str, Any] | None) -> None:
    model = LLAMA.model().bfloat16()
    model.is_loaded_in_8bit = True  # pyright: ignore[reportArgumentType]
    prepare_model_for_kbit_training(model, True, options)
    lora: Any = lora_transform(model, LoraConfig(r=4, target_modules=LLAMA.targets)).train()
    assert lora.is_activation_checkpointing if hasattr(lora, "is_activation_checkpointing") else True
    lora(**LLAMA.batch()).logits.square().mean().backward()
    factors = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    assert len(factors) == 28 and all(parameter.grad is not None for parameter in factors)


def test_refusals_change_nothing() -> None:
    with pytest.raises(AdapterError, match="has adapters already, which would be frozen too"):
        prepare_model_for_kbit_training(ours(r=4, target_modules=["fc1"]))
    net: Any = Net().bfloat16()
    net.is_loaded_in_4bit = True
    with pytest.raises(
        ConfigError, match="Net has no gradient_checkpointing_enable; pass use_gradient_checkpointing=False"
    ):
        prepare_model_for_kbit_training(net)
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in net.parameters())
    prepare_model_for_kbit_training(net, use_gradient_checkpointing=False)
    assert not any(parameter.requires_grad or parameter.dtype == torch.bfloat16 for parameter in net.parameters())


def test_cast_adapter_dtype() -> None:
    model = ours(r=4, target_modules=["embed", "fc1"], use_dora=True, modules_to_save=["head"])
    model.add_adapter("other", dict(r=4, target_modules=["fc1"]))
    before = {name: (parameter, parameter.dtype) for name, parameter in model.named_parameters()}
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 1)
    cast_adapter_dtype(model, "default", torch.bfloat16)
    for name, parameter in model.named_parameters():
        same, dtype = before[name]
        assert parameter is same
        mine = "lora_" in name and ".default." in name
        assert parameter.dtype == (torch.bfloat16 if mine else dtype), name
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype
    model.verify()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 2)
    cast_adapter_dtype(model, "default")
    assert model.get_parameter("fc1.lora_A.default.weight").dtype == torch.float32


def test_cast_adapter_dtype_of_token_rows() -> None:
    model = ours(r=4, target_modules=["fc1"], trainable_token_indices={"embed": [1]})
    cast_adapter_dtype(model, "default", torch.float64)
    assert model.get_parameter("embed.trainable_tokens_delta.default.weight").dtype == torch.float64
    model(torch.tensor([[1, 2]])).sum().backward()


def test_mixed_precision() -> None:
    model = ours(r=4, target_modules=["fc1", "fc2"], modules_to_save=["head"])
    model.add_adapter("other", dict(r=4, target_modules=["fc1"]))
    model.register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    before = dict(model.named_parameters())
    cast_mixed_precision_params(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        in_adapter = "lora_" in name or "modules_to_save" in name
        expected = torch.float32 if in_adapter else torch.int8 if name == "packed" else torch.bfloat16
        assert parameter.dtype == expected, name
    with torch.autocast("cpu", torch.bfloat16):
        train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3))


def test_mixed_precision_of_a_plain_model() -> None:
    net = Net()
    net.fc1.requires_grad_(False)
    cast_mixed_precision_params(net.double(), torch.float16)
    assert net.fc1.weight.dtype == torch.float16 and net.fc2.weight.dtype == torch.float32


def test_norms_follow_the_weights() -> None:
    model = ours(r=4, target_modules=["fc1"], use_dora=True)
    cast_mixed_precision_params(model, torch.bfloat16)
    norm: Any = model.get_submodule("fc1.lora_weight_norm.default")
    expected = model.get_parameter("fc1.weight").double().square().sum(1)
    torch.testing.assert_close(norm.squared.double(), expected, rtol=1e-6, atol=0)


def test_refused_casts() -> None:
    model = ours(r=4, target_modules=["fc1"])
    for cast in (
        lambda: cast_adapter_dtype(model, "default", torch.int8),
        lambda: cast_mixed_precision_params(model, torch.int8),
    ):
        with pytest.raises(ConfigError, match="dtype must be one of .*, not torch.int8"):
            cast()
    with pytest.raises(AdapterError, match="no adapter is called 'x'"):
        cast_adapter_dtype(model, "x")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="adapters default are merged; call unmerge_adapter first"):
        cast_mixed_precision_params(model, torch.bfloat16)
    assert model.get_parameter("fc1.weight").dtype == torch.float32
