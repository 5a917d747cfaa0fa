"""Adapters go to peft and come back, bitwise."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxlora import AdapterError, CheckpointError, LoraConfig, export_merged, lora_transform, merge_checkpoint
from tests.models.checks import randomise
from tests.zoo import ARCHITECTURES, MLP, Entry

WEIGHTS = "adapter_model.safetensors"
ENTRIES = {entry.name: entry for entry in ARCHITECTURES}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"layers.0.*": 3}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1},
    "regex": {"target_modules": r".*layers\.1.*(q|v)_proj"},
}


def make(entry: Entry, capture: str, **config: Any) -> Any:
    settings = {"r": 4, "target_modules": entry.targets, **config}
    model = lora_transform(
        entry.model(), LoraConfig(**settings), capture=capture, example_inputs=entry.batch()
    )  # fmt: skip
    randomise(model)
    return model.eval()


def logits(model: Any, entry: Entry) -> torch.Tensor:
    with torch.no_grad():
        return model(**entry.batch())[0]


@pytest.mark.parametrize("capture", ["modules", "export"])
@pytest.mark.parametrize("name", CONFIGS)
def test_to_peft_and_back(name: str, capture: str, tmp_path: Path) -> None:
    entry = ENTRIES["llama"]
    ours = make(entry, capture, **CONFIGS[name])
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(entry.model(), tmp_path / "ours").eval()
    factors = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    assert len(factors) == 2 * len(ours._specs())
    for key, tensor in factors.items():
        assert torch.equal(tensor, ours.get_parameter(key.removeprefix("base_model.model.")))
    torch.testing.assert_close(logits(theirs, entry), logits(ours, entry))
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    configs = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("ours", "theirs")]
    for config in configs:
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
    assert configs[0] == configs[1]
    back = lora_transform(
        entry.model(), str(tmp_path / "theirs"), capture=capture, example_inputs=entry.batch()
    )  # fmt: skip
    assert torch.equal(logits(back.eval(), entry), logits(ours, entry))
    assert not any(p.requires_grad for p in back.parameters())


def test_a_peft_configuration_object_is_accepted() -> None:
    entry = ENTRIES["gpt2"]
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    ours = lora_transform(entry.model(), config)
    assert ours.peft_config["default"].r == 4 and ours.peft_config["default"].task_type == "CAUSAL_LM"
    assert ours.peft_config["default"].target_modules == ["c_attn"]


def test_conv1d_adapter_loads_in_peft(tmp_path: Path) -> None:
    entry = ENTRIES["gpt2"]
    ours = make(entry, "modules")
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(entry.model(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, entry), logits(ours, entry))


def test_bare_parameter_adapter_loads_in_peft(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.w)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).relu()

    ours: Any = lora_transform(Outer(), LoraConfig(r=2, target_parameters=["inner.w"]))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    theirs = peft.PeftModel.from_pretrained(Outer(), tmp_path)
    torch.testing.assert_close(theirs(x), ours(x))
    assert torch.equal(lora_transform(Outer(), tmp_path)(x), ours(x))


def test_several_adapters(tmp_path: Path) -> None:
    model: Any = lora_transform(MLP().eval(), LoraConfig(r=2, target_modules=["fc1"]), adapter_name="default")
    model.add_adapter("lora", LoraConfig(r=3, target_modules=["fc2"]))  # a name that breaks peft's key mapping
    randomise(model)
    (tmp_path / "optimizer.pt").write_bytes(b"kept")
    model.save_pretrained(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "lora/SHA256SUMS", "lora/adapter_config.json",
        "lora/adapter_model.safetensors", "optimizer.pt",
    ]  # fmt: skip
    other: Any = lora_transform(MLP().eval(), tmp_path)
    other.load_adapter(tmp_path / "lora", "second", is_trainable=True)
    assert other.get_parameter("fc2.lora_A.second.weight").requires_grad  # as in peft, though it is not active yet
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(other.get_parameter(name.replace(".lora.", ".second.")), parameter)
    model.save_pretrained(tmp_path / "one", selected_adapters=["lora"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["lora"]
    with pytest.raises(AdapterError, match="no adapter is called 'nope'"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["nope"])
    assert not (tmp_path / "none").exists()


def test_same_bytes_and_modes(tmp_path: Path) -> None:
    model: Any = lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc2", "fc1"]))
    old = os.umask(0o027)
    try:
        for name in ("a", "b"):
            model.save_pretrained(tmp_path / name)
    finally:
        os.umask(old)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert stat.S_IMODE((tmp_path / "a" / file).stat().st_mode) == 0o640


def test_gathered_state_dict_is_used(tmp_path: Path) -> None:
    model: Any = lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"]))
    gathered = {f"_orig_mod.{name}": torch.full_like(p, 0.25) for name, p in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert all((t == 0.25).all() for t in load_file(tmp_path / "adapter_model.safetensors").values())


# ---- targeted embeddings ----

EMBEDDINGS: dict[str, Any] = {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
SAVED = ["base_model.model.lm_head.base_layer.weight", "base_model.model.model.embed_tokens.base_layer.weight"]


@pytest.fixture
def with_embeddings(tmp_path: Path) -> Path:
    """What peft saves when the embeddings are targets: their base weights too."""
    theirs: Any = peft.get_peft_model(ENTRIES["llama"].model(), peft.LoraConfig(**EMBEDDINGS))
    randomise(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_embedding_A" in name:
                parameter.normal_(std=0.1)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        theirs.save_pretrained(tmp_path / "theirs")
    assert sorted(key for key in load_file(tmp_path / "theirs" / WEIGHTS) if "base_layer" in key) == SAVED
    return tmp_path / "theirs"


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_base_weights_that_repeat_the_bases(capture: str, with_embeddings: Path, tmp_path: Path) -> None:
    entry = ENTRIES["llama"]
    theirs = peft.PeftModel.from_pretrained(entry.model(), with_embeddings).eval()
    ours: Any = lora_transform(
        entry.model(), with_embeddings, capture=capture, example_inputs=entry.batch()
    ).eval()  # fmt: skip
    torch.testing.assert_close(logits(ours, entry), logits(theirs, entry))
    ours.merge_adapter()  # the originals are what counts, not the merged weights
    ours.load_adapter(with_embeddings, "again")
    ours.unmerge_adapter()
    ours.delete_adapter("again")
    ours.save_pretrained(tmp_path / "ours")
    saved, expected = (load_file(tmp_path / each / WEIGHTS) for each in ("ours", "theirs"))
    assert expected.keys() == saved.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    assert expected.keys() - load_file(tmp_path / "ours" / WEIGHTS).keys() == set(SAVED)
    # peft needs no base weights in the file, and says nothing of them
    back = peft.PeftModel.from_pretrained(entry.model(), tmp_path / "ours").eval()
    assert torch.equal(logits(back, entry), logits(theirs, entry))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_base_weights_in_another_dtype(dtype: torch.dtype, with_embeddings: Path) -> None:
    """What loading would write counts: a base in bfloat16 has the same weights rounded."""
    lora_transform(ENTRIES["llama"].model().to(dtype), with_embeddings, capture="modules")


@pytest.mark.parametrize("key", SAVED)
def test_other_base_weights_are_refused(key: str, with_embeddings: Path) -> None:
    tensors = load_file(with_embeddings / WEIGHTS)
    moved = tensors[key].clone()
    moved[3, 5] = moved[3, 5].nextafter(moved.new_tensor(torch.inf))  # one bit
    for value in (moved, tensors[key][:-1].clone()):
        save_file({**tensors, key: value}, with_embeddings / WEIGHTS)
        with pytest.raises(CheckpointError) as caught:
            lora_transform(ENTRIES["llama"].model(), with_embeddings, capture="modules")
        for word in (key, "put it into the base first", "save_embedding_layers=False"):
            assert word in str(caught.value)


def test_merged_from_files(with_embeddings: Path, tmp_path: Path) -> None:
    entry = ENTRIES["llama"]
    entry.model().save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", with_embeddings, tmp_path / "files")
    ours: Any = lora_transform(entry.model(), with_embeddings, capture="modules")
    export_merged(ours, tmp_path / "live")
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("live", "files")]
    assert weights[0] == weights[1]
    expected = peft.PeftModel.from_pretrained(entry.model(), with_embeddings).merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "files" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])
