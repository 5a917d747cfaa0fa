"""What `explain` predicts, beside what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from fxlora import LoraConfig, explain, lora_transform
from tests.zoo import ARCHITECTURES, MLP

ENTRIES = {entry.name: entry for entry in ARCHITECTURES}
LINEAR = {"r": 4, "target_modules": "all-linear"}
CONFIGS: dict[str, Any] = {
    "plain": LINEAR,
    "DoRA": {**LINEAR, "use_dora": True},
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "patterns": {**LINEAR, "rank_pattern": {"q_proj": 2}},
}


def file_size(model: nn.Module, config: Any, path: Path) -> tuple[int, int]:
    """(bytes of the adapter's file, trainable parameters)."""
    lora = lora_transform(model, LoraConfig(**config))
    lora.save_pretrained(path)
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    return (path / "adapter_model.safetensors").stat().st_size, trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_file_and_parameters_are_exact(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = ENTRIES["qwen2"].model().to(dtype)
    explained = explain(model, config)
    assert explained.unknown == ""
    assert (explained.adapter_bytes, explained.trainable) == file_size(model, config, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "t5", "bert", "vit"])
def test_file_is_exact_for_other_architectures(name: str, tmp_path: Path) -> None:
    model = ENTRIES[name].model()
    explained = explain(model, LINEAR)
    assert (explained.adapter_bytes, explained.trainable) == file_size(model, LINEAR, tmp_path)


def alive(model: nn.Module, batch: Any) -> int:
    """Bytes of what a real forward leaves for backward."""
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(batch)]
    known = {tensor.untyped_storage()._cdata for tensor in tensors if isinstance(tensor, Tensor)}
    found: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        for output in pytree.tree_leaves(model.train()(**batch)):
            if isinstance(output, Tensor):
                keep(output)
    return sum(storage.nbytes() for number, storage in found.items() if number not in known)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5", "vit"])
def test_activations_are_those_of_a_real_run(name: str) -> None:
    entry = ENTRIES[name]
    model, batch = entry.model(), entry.batch()
    predicted = explain(model, LINEAR, example_inputs=batch).activations
    assert predicted is not None
    full = alive(model.requires_grad_(True), batch)
    lora = alive(lora_transform(model, LoraConfig(**LINEAR), capture="modules"), batch)
    assert predicted.full == pytest.approx(full, rel=0.02) and predicted.lora == pytest.approx(lora, rel=0.02)


def test_nothing_is_changed_and_meta_will_do() -> None:
    entry = ENTRIES["llama"]
    model, batch = entry.model(), entry.batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real = explain(model, LINEAR, example_inputs=batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("lora" in name for name, _ in model.named_modules())
    meta = {name: value.to("meta") for name, value in batch.items()}
    assert explain(model.to("meta"), LINEAR, example_inputs=meta) == real
    assert "activations kept for backward" in str(real) and "adapter file" in str(real)


class Branching(MLP):
    """Runs with values only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool(x.sum() > 0) else -x)


def test_what_cannot_be_predicted_is_said() -> None:
    explained = explain(Branching(), {"target_modules": ["fc1"]}, example_inputs=torch.ones(2, 8))
    assert explained.activations is None and explained.adapter_bytes is not None
    assert "not predicted: DataDependentOutputException" in str(explained)


@pytest.mark.gpu
def test_activations_on_the_gpu() -> None:
    """Within a tenth of what the allocator counts."""
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=1000)).cuda()
    batch = {"input_ids": torch.randint(0, 1000, (4, 256), device="cuda")}
    predicted = explain(model, LINEAR, example_inputs=batch).activations
    assert predicted is not None
    measured: list[int] = []
    for make in (lambda: model.requires_grad_(True), lambda: lora_transform(model, LoraConfig(**LINEAR))):
        each = make().train()
        each(**batch)
        before = torch.cuda.memory_allocated()
        output = each(**batch)
        measured.append(torch.cuda.memory_allocated() - before)
        del output
    assert [predicted.full, predicted.lora] == pytest.approx(measured, rel=0.1)
