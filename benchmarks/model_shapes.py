"""Models of the sizes that users train, with as many layers as asked for, and inputs for them.

The configurations are those of the released models, with random weights; SmolLM2 has its own where the demo is installed.
On a CPU most are made smaller in all widths, so that anyone can run them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes.

    Attributes:
        config: makes transformers' configuration from a number of layers and a divisor of all widths.
        layers: how many a benchmark takes by default.
        tokens: batch and length on a GPU.
        small_tokens: batch and length on a CPU.
        shrink: the divisor of widths on a CPU.
        parameters: names of weights that are no layers, which have LoRA besides the linear layers.
    """

    config: Callable[[int, int], Any]
    layers: int
    tokens: tuple[int, int]
    small_tokens: tuple[int, int]
    shrink: int
    parameters: tuple[str, ...] = ()


def _llama(layers: int, shrink: int, hidden: int, inner: int, heads: int, groups: int, size: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden // shrink, intermediate_size=inner // shrink, num_hidden_layers=layers, head_dim=size,
        num_attention_heads=heads // shrink, num_key_value_heads=max(1, groups // shrink), vocab_size=1024,
        max_position_embeddings=65536, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip


def _qwen_moe(layers: int, shrink: int) -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=2048 // shrink, intermediate_size=6144 // shrink, moe_intermediate_size=768 // shrink,
        num_hidden_layers=layers, num_attention_heads=32 // shrink, num_key_value_heads=max(1, 4 // shrink),
        head_dim=128, num_experts=128 // shrink, num_experts_per_tok=8 // min(shrink, 4), vocab_size=1024,
        max_position_embeddings=65536, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip


def _vit(layers: int, shrink: int) -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=1024 // shrink, intermediate_size=4096 // shrink, num_hidden_layers=layers,
        num_attention_heads=16 // shrink, attn_implementation="sdpa",
    )  # fmt: skip


EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

SHAPES = {
    "llama-3-8b": Shape(lambda n, k: _llama(n, k, 4096, 14336, 32, 8, 128), 4, (4, 2048), (2, 64), 8),
    "llama-3.2-1b": Shape(lambda n, k: _llama(n, k, 2048, 8192, 32, 8, 64), 16, (4, 1024), (2, 64), 4),
    "smollm2": Shape(lambda n, k: _llama(n, k, 576, 1536, 9, 3, 64), 4, (8, 1024), (2, 64), 1),
    "qwen-moe": Shape(_qwen_moe, 2, (4, 2048), (2, 64), 4),
    "qwen-moe-experts": Shape(_qwen_moe, 2, (4, 2048), (2, 64), 4, EXPERTS),
    "vit-l": Shape(_vit, 8, (64, 197), (2, 197), 4),
}


def build(shape: str, layers: int, shrink: int, device: str, dtype: torch.dtype, head: bool = False) -> Any:
    """A model with its weights frozen; the same one at each call.

    Args:
        shape: a key of `SHAPES`.
        layers: how many.
        shrink: the divisor of all widths.
        device: where its weights are.
        dtype: of its weights.
        head: whether it is a language model with its head, and gives a loss.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = SHAPES[shape].config(layers, shrink)
    kind = AutoModelForCausalLM if head else AutoModel
    path = demo_directory() if shape == "smollm2" and shrink == 1 else None
    torch.manual_seed(0)
    if path is not None:
        model = kind.from_pretrained(path, num_hidden_layers=layers, use_cache=False, dtype=dtype).to(device)
    else:
        with torch.device(device):
            model = kind.from_config(config, dtype=dtype, **_OPTIONS.get(config.model_type, {}))
    return model.requires_grad_(False)


_OPTIONS: dict[str, dict[str, Any]] = {"vit": {"add_pooling_layer": False}}


def demo_directory() -> Path | None:
    """The demo's model, if it is installed."""
    from fxlora.demo import smollm2

    try:
        return smollm2.cached_model_dir()
    except (ModuleNotFoundError, FileNotFoundError):
        return None


def targets(model: nn.Module) -> tuple[str, ...]:
    """The last parts of the names of all linear layers but the head."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return tuple(sorted(names - {"lm_head"}))


def inputs(model: Any, tokens: tuple[int, int], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """An input that wants a gradient, as the frozen model must have one: embedded tokens, or images.

    Args:
        model: from `build`.
        tokens: batch and length; an image has the length that its model makes of it.
        device: where.
        dtype: of the values.
    """
    torch.manual_seed(1)
    config = model.config
    if config.model_type == "vit":
        size, name = (tokens[0], config.num_channels, config.image_size, config.image_size), "pixel_values"
    else:
        size, name = (*tokens, config.hidden_size), "inputs_embeds"
    return {name: torch.randn(size, device=device, dtype=dtype, requires_grad=True)}
