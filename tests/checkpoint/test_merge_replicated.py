"""`layer_replication` merged from files: the result has more layers than the base, and is the live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import CheckpointError, LoraConfig, MergeError, lora_transform, merge_checkpoint

IDS = torch.arange(12).view(2, 6)
RANGES = [[0, 2], [1, 3], [0, 1]]
ORDER = [0, 1, 1, 2, 0]


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=48
        )
    )


def bert() -> Any:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=48
        )
    )


def windows() -> Any:
    """With a list of what each layer is."""
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=48, sliding_window=2, use_sliding_window=True, max_window_layers=2,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        )
    )  # fmt: skip


MODELS = {"llama": (llama, "q_proj"), "bert": (bert, "query"), "windows": (windows, "q_proj")}


def plain(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def adapted(name: str, **options: Any) -> Any:
    settings = {"r": 2, "target_modules": [MODELS[name][1]], "layer_replication": RANGES, **options}
    model = lora_transform(plain(name), LoraConfig(**settings))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
        elif "magnitude" in key:
            parameter.data.mul_(1.1)
    return model.eval()


def files(name: str, path: Path, **options: Any) -> tuple[Any, Path, Path]:
    model = adapted(name, **options)
    plain(name).save_pretrained(path / "base")
    model.save_pretrained(path / "adapter")
    return model, path / "base", path / "adapter"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def weights(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_the_result_is_the_live_model(name: str, dora: bool, tmp_path: Path) -> None:
    model, base, adapter = files(name, tmp_path, use_dora=dora)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert len(report.merged) == len(ORDER)
    result = type(plain(name)).from_pretrained(tmp_path / "out").eval()
    assert result.config.num_hidden_layers == len(ORDER)
    torch.testing.assert_close(logits(result), logits(model))
    merged = model.merge_and_unload(tied="untie").state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in result.state_dict().items())
    if name == "windows":
        before = json.loads((base / "config.json").read_text())["layer_types"]
        assert result.config.layer_types == [before[index] for index in ORDER]


def test_shards(tmp_path: Path) -> None:
    """Each layer is in the file of the one that it comes from; the index says so."""
    _, base, adapter = files("llama", tmp_path)
    plain("llama").save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    merge_checkpoint(base, adapter, tmp_path / "one")
    merge_checkpoint(tmp_path / "sharded", adapter, tmp_path / "several")
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(one) and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())


def test_layers_that_are_left_out(tmp_path: Path) -> None:
    model, base, adapter = files("llama", tmp_path, layer_replication=[[1, 2]])
    merge_checkpoint(base, adapter, tmp_path / "out")
    result = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert len(result.model.layers) == 1
    torch.testing.assert_close(logits(result), logits(model))


def test_a_base_of_other_layers(tmp_path: Path) -> None:
    _, base, adapter = files("llama", tmp_path)
    other = adapted("llama", layer_replication=None)
    other.save_pretrained(tmp_path / "other")

    def refused(error: type[Exception], words: str, adapters: Any = adapter) -> None:
        with pytest.raises(error, match=words):
            merge_checkpoint(base, adapters, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(MergeError, "have different layer_replication", [adapter, tmp_path / "other"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "mlp_only_layers": [1]}))
    refused(MergeError, "'mlp_only_layers' in config.json names layers by number")
    (base / "config.json").write_text(json.dumps(config))
    tensors = weights(base)
    small = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    save_file(small, base / "model.safetensors", metadata={"format": "pt"})
    refused(CheckpointError, r"has \[1, 3\], which is no range of the base's 2 layers")
    twice = {**tensors, "bert.encoder.layer.0.x": torch.ones(1)}
    save_file(twice, base / "model.safetensors", metadata={"format": "pt"})
    refused(MergeError, "needs one list of layers.*the base has 2")
