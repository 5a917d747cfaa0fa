"""A small language model with a tied or an untied head, in both libraries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from torch import Tensor, nn

from fxlora import LoraConfig, LoraModel, lora_transform

VOCABULARY, WIDTH = 40, 16
BATCH = {"input_ids": torch.tensor([[1, 2, 3, 7, 9, 30], [7, 7, 0, 39, 2, 5]])}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PREFIX = "base_model.model."


def base(tied: bool = True, dtype: torch.dtype = torch.float32, architecture: str = "Llama") -> nn.Module:
    import transformers

    torch.manual_seed(0)
    name = {"Llama": "LlamaConfig", "Gemma3": "Gemma3TextConfig"}[architecture]
    config = getattr(transformers, name)(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCABULARY, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype).eval()


def ours(model: nn.Module, capture: Any = "modules", **fields: Any) -> LoraModel:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})
    return lora_transform(model, config, capture=capture, example_inputs=BATCH if capture == "export" else None)


@contextmanager
def quiet() -> Iterator[None]:
    """peft warns of tied weights, and transformers of peft's calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(model: nn.Module, **fields: Any) -> Any:
    with quiet():
        return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH)[0]


def randomise(model: nn.Module) -> None:
    """Random values for all that is trained, alike in two models of one structure."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def backward(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    out = model(**BATCH)[0]
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
