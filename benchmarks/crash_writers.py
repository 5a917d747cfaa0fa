"""The writers that `benchmarks.crash_safety` kills: fxlora's, peft's and transformers', of models and adapters alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxlora import LoraConfig, export_merged, lora_transform, merge_checkpoint
from fxlora.checkpoint import exchange

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARDS = 4
_ENOSYS = 38


@dataclass(frozen=True)
class Writer:
    """Something that writes a directory.

    Attributes:
        name: of the call.
        write: writes one of two versions of the same thing.
        load: reads it, as its users do.
        own: whether it is fxlora's.
        prepare: called in the process that writes.
    """

    name: str
    write: Callable[[int, Path], object]
    load: Callable[[Path], object]
    own: bool = True
    prepare: Callable[[Path], object] = lambda directory: None


def writers(place: Path, layers: int, rank: int) -> Iterator[Writer]:
    """All writers, on models and adapters of the same sizes."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=2000 * layers, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)

    def settings(version: int, r: int) -> dict[str, Any]:
        return {"r": r, "lora_alpha": r * (version + 1), "target_modules": TARGETS, "init_lora_weights": False}

    def adapted(version: int, r: int) -> Any:
        return lora_transform(model(0), LoraConfig(**settings(version, r)))

    base = model(0)
    shard = f"{base.num_parameters() * 2 // SHARDS // 1000 + 500}KB"
    base.save_pretrained(place / "base", max_shard_size=shard)
    plain = [model(0), model(1)]
    small, large = [adapted(each, 16) for each in (0, 1)], [adapted(each, rank) for each in (0, 1)]
    for each, lora in enumerate(small):
        lora.save_pretrained(place / f"adapter-{each}")
    theirs = [peft.get_peft_model(model(0), peft.LoraConfig(**settings(each, rank))) for each in (0, 1)]

    def load_model(directory: Path) -> object:
        return transformers.AutoModelForCausalLM.from_pretrained(directory)

    def load_adapter(directory: Path) -> object:
        return peft.PeftConfig.from_pretrained(directory), peft.load_peft_weights(str(directory), device="cpu")

    def save(version: int, out: Path) -> object:
        return large[version].save_pretrained(out)

    yield Writer("fxlora save_pretrained", save, load_adapter)
    yield Writer("… by two renames", save, load_adapter, prepare=_without_exchange)
    yield Writer("… of the working directory", lambda version, _: save(version, Path()), load_adapter, prepare=os.chdir)
    yield Writer(
        "fxlora export_merged",
        lambda version, out: export_merged(small[version], out, max_shard_size=shard, base_dir=place / "base"),
        load_model,
    )
    yield Writer(
        "fxlora merge_checkpoint",
        lambda version, out: merge_checkpoint(place / "base", place / f"adapter-{version}", out),
        load_model,
    )
    yield Writer("peft save_pretrained", lambda version, out: theirs[version].save_pretrained(out), load_adapter, False)
    yield Writer(
        "transformers save_pretrained",
        lambda version, out: plain[version].save_pretrained(out, max_shard_size=shard),
        load_model,
        False,
    )


def _without_exchange(_: Path) -> None:
    exchange._swap = lambda a, b: _ENOSYS
