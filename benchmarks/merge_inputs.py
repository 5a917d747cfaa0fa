"""Checkpoints and adapters of random weights for `benchmarks.merge_files`, made once and kept in a directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxlora.checkpoint.layout import split, write_index
from fxlora.checkpoint.safetensors_io import Entry, write_tensors

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_POOL = 1 << 26
"""Entries that are drawn; tensors are pieces of them from different places on."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. The fields have the names of its `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name, out, in) of every linear of the layers."""
        hidden, inner = self.hidden_size, self.intermediate_size
        keys = hidden // self.num_attention_heads * self.num_key_value_heads
        sizes = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        for layer in range(self.num_hidden_layers):
            for name, (rows, columns) in sizes.items():
                yield f"model.layers.{layer}.{name}", rows, columns

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights by name."""
        hidden = self.hidden_size
        layers = range(self.num_hidden_layers)
        norms = [
            f"model.layers.{i}.{name}.weight"
            for i in layers
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        return {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "lm_head.weight": (self.vocab_size, hidden),
            **{f"{name}.weight": (rows, columns) for name, rows, columns in self.linears()},
            **dict.fromkeys([*norms, "model.norm.weight"], (hidden,)),
        }


TINY_LLAMA = Shape(2048, 5632, 22, 32, 4, 32000)
"""1.1 billion weights, 2.2 GB in bfloat16."""
LARGE = Shape(4096, 11008, 29, 32, 32, 32000)
"""6.1 billion weights, 12.3 GB in bfloat16."""


def make_base(directory: Path, shape: Shape, max_shard_bytes: int = 1 << 62) -> Path:
    """A bfloat16 checkpoint with the weights of one seed, unless it is there already."""
    if _is_made(directory):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    entries = {name: Entry("BF16", size) for name, size in shape.tensors().items()}
    shards = split(entries, max_shard_bytes)
    draw = _drawing(0.02)
    for shard, names in shards.items():
        write_tensors(
            directory / shard,
            {name: entries[name] for name in names},
            lambda name: draw(entries[name].shape).bfloat16(),
        )
    if len(shards) > 1:
        write_index(directory, shards, {"total_size": sum(entry.nbytes for entry in entries.values())})
    config = {
        **asdict(shape), "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    return _finish(directory, "config.json", config)


def make_adapter(directory: Path, shape: Shape) -> Path:
    """An adapter of rank 16 for every linear, in float32 as peft saves it, unless it is there already."""
    if _is_made(directory):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in shape.linears():
        sizes[f"base_model.model.{name}.lora_A.weight"] = (RANK, columns)
        sizes[f"base_model.model.{name}.lora_B.weight"] = (rows, RANK)
    draw = _drawing(0.01, seed=1)
    entries = {name: Entry("F32", size) for name, size in sizes.items()}
    write_tensors(directory / "adapter_model.safetensors", entries, lambda name: draw(sizes[name]))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0,
        "target_modules": list(TARGETS), "bias": "none", "base_model_name_or_path": None, "inference_mode": True,
    }  # fmt: skip
    return _finish(directory, "adapter_config.json", config)


def _drawing(deviation: float, seed: int = 0) -> Callable[[tuple[int, ...]], Tensor]:
    pool = torch.empty(_POOL).normal_(0, deviation, generator=torch.Generator().manual_seed(seed))
    start = 0

    def draw(shape: tuple[int, ...]) -> Tensor:
        nonlocal start
        size, parts = torch.Size(shape).numel(), list[Tensor]()
        start = (start + 1_000_003) % _POOL
        while size:
            part = pool[start : start + size]
            parts.append(part)
            size, start = size - len(part), 0 if start + size >= _POOL else start + size
        return torch.cat(parts).reshape(shape)

    return draw


def _is_made(directory: Path) -> bool:
    return (directory / ".made").exists()


def _finish(directory: Path, name: str, config: Mapping[str, object]) -> Path:
    (directory / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / ".made").touch()
    return directory
