"""Models with several adapters, and what a batch gives when each row is computed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxlora import LoraConfig, LoraModel, lora_transform
from fxlora.serving import BASE
from tests.models.checks import tensors
from tests.oracle.cases import Case


def moved(model: nn.Module, seed: int = 5) -> None:
    """Give every factor, row and copy random values, so that no adapter is like the base or another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "trainable_tokens", "modules_to_save")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def transformed(case: Case, capture: Any) -> LoraModel:
    """The model of a case with two adapters, "a" and "b", of other values."""
    settings = {**case.settings, **case.ours}
    model = lora_transform(
        case.model(), LoraConfig(**settings), capture=capture, adapter_name="a", example_inputs=case.batch()
    )
    # an initialisation that decomposes the base is the first adapter's only
    init = settings.get("init_lora_weights", True)
    other = {**settings, "r": 2 * settings["r"], "init_lora_weights": True if isinstance(init, str) else init}
    model.add_adapter("b", LoraConfig(**other))
    moved(model)
    return model.eval()


def names_for(rows: int) -> list[str]:
    """An adapter for each row: both, none, and one twice."""
    return [("a", "b", BASE, "b", "a")[row % 5] for row in range(rows)]


def alone(model: LoraModel, name: str, batch: dict[str, Any]) -> list[Tensor]:
    """What the whole batch gives with one adapter."""
    if name == BASE:
        with model.disable_adapter():
            return tensors(model(**batch))
    model.set_adapter(name)
    return tensors(model(**batch))


def rows_alone(model: LoraModel, names: Sequence[str], batch: dict[str, Any]) -> list[Tensor]:
    """What each row gives with its adapter, put together."""
    outputs = {name: alone(model, name, batch) for name in dict.fromkeys(names)}
    count = len(outputs[names[0]])
    return [torch.stack([outputs[name][each][row] for row, name in enumerate(names)]) for each in range(count)]


def largest_error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value."""
    scale = max(float(value.abs().max()) for value in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / scale


def tiny_llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()


def llama_with_three() -> LoraModel:
    """Adapters of other ranks, targets and variants: "a", "b" with dropout, "c" with DoRA."""
    model = lora_transform(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
    model.add_adapter("c", LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=True))
    moved(model)
    return model.eval()
