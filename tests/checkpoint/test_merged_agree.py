"""Three ways to a merged checkpoint give the same bits, and it loads as an ordinary model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxlora import LoraConfig, MergeError, export_merged, lora_transform, merge_checkpoint
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import randomise
from tests.zoo import ARCHITECTURES, MLP

ENTRIES = {entry.name: entry for entry in ARCHITECTURES}


def make(name: str, dtype: torch.dtype = torch.float32, capture: Any = "modules", **config: Any) -> Any:
    entry = ENTRIES[name]
    batch = entry.batch()
    settings = {"r": 4, "target_modules": entry.targets, **config}
    model = lora_transform(entry.model().to(dtype), LoraConfig(**settings), capture=capture, example_inputs=batch)
    randomise(model)
    return model.eval()


def folder(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_ways_agree(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import transformers

    entry = ENTRIES[name]
    entry.model().to(dtype).save_pretrained(tmp_path / "base")
    lora = make(name, dtype)
    before = snapshot(lora)
    export_merged(lora, tmp_path / "live")
    assert_unchanged(lora, before)
    lora.save_pretrained(tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    assert len(report.merged) == len(lora._specs()) and "merged" in str(report)
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    expected = weights(tmp_path / "theirs")
    for way in ("live", "files"):
        found = weights(tmp_path / way)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    reloaded, reference = (type(merged).from_pretrained(tmp_path / way).eval() for way in ("live", "theirs"))
    assert reloaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(reloaded(**entry.batch())[0], reference(**entry.batch())[0])
    assert transformers.AutoConfig.from_pretrained(tmp_path / "live").architectures == [type(merged).__name__]


def test_the_exact_sum_is_rounded_once(tmp_path: Path) -> None:
    lora = make("llama", torch.bfloat16)
    export_merged(lora, tmp_path)
    spec = lora._specs()[0]
    a, b = (lora.get_parameter(f"{spec.site}.lora_{x}.default.weight").double() for x in "AB")
    exact = lora.get_parameter(f"{spec.site}.weight").double() + spec.scaling * (b @ a)
    found = weights(tmp_path)[f"{spec.site}.weight"]
    nearest = (
        torch.nextafter(found, torch.full_like(found, torch.inf)).double(),
        torch.nextafter(found, torch.full_like(found, -torch.inf)).double(),
    )
    error = (found.double() - exact).abs()
    assert all((error <= (other - exact).abs()).all() for other in nearest)


def test_out_dtype_keeps_what_the_base_dtype_would_lose(tmp_path: Path) -> None:
    lora = make("llama", torch.bfloat16)
    export_merged(lora, tmp_path, out_dtype=torch.float32)
    found = weights(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    name = f"{lora._specs()[0].site}.weight"
    assert not torch.equal(found[name], found[name].bfloat16().float())


def test_shards_load_and_stay_in_their_files(tmp_path: Path) -> None:
    lora = make("llama")
    export_merged(lora, tmp_path / "shards", max_shard_size=20_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    expected = lora.merge_and_unload()
    reloaded = type(expected).from_pretrained(tmp_path / "shards").eval()
    assert all(torch.equal(p, reloaded.get_parameter(n)) for n, p in expected.named_parameters())
    again = make("llama")
    again.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "shards", [tmp_path / "adapter"], tmp_path / "twice", weights=[-1.0])
    assert sorted(folder(tmp_path / "twice")) == sorted(folder(tmp_path / "shards"))
    export_merged(again, tmp_path / "shards")  # one file now: the old shards must not stay beside it
    assert [p.name for p in (tmp_path / "shards").glob("*.safetensors*")] == ["model.safetensors"]


def test_same_bytes(tmp_path: Path) -> None:
    lora = make("llama")
    for name in ("a", "b"):
        export_merged(lora, tmp_path / name)
    assert folder(tmp_path / "a") == folder(tmp_path / "b")


@pytest.mark.parametrize("capture", ["symbolic", "export", "modules"])
def test_plain_models_and_merged_state(capture: Any, tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    lora: Any = lora_transform(
        MLP().eval(), LoraConfig(r=2, target_modules=["fc1"]), capture=capture, example_inputs=x
    )  # fmt: skip
    randomise(lora)
    export_merged(lora, tmp_path / "before")
    lora.merge_adapter()
    export_merged(lora, tmp_path / "while-merged")
    assert folder(tmp_path / "before") == folder(tmp_path / "while-merged")
    plain = MLP().eval()
    plain.load_state_dict(load_file(tmp_path / "before" / "model.safetensors"))
    assert torch.equal(plain(x), lora(x))
    assert sorted(folder(tmp_path / "before")) == ["SHA256SUMS", "model.safetensors"]


def test_tied_head_is_written_once_and_not_merged(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    lora = lora_transform(transformers.LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))
    export_merged(lora, tmp_path / "tied")
    names = set(weights(tmp_path / "tied"))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    lora.add_adapter("head", LoraConfig(r=2, target_modules=["lm_head"]))
    before = folder(tmp_path)
    with pytest.raises(MergeError, match=r"'lm_head'.*shared with"):
        export_merged(lora, tmp_path / "tied", adapter_names=["head"])
    assert folder(tmp_path) == before


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(MLP().state_dict(), (tmp_path / "model.safetensors"))
    (tmp_path / "notes.txt").write_text("kept")
    return tmp_path


def adapter(path: Path, model: Any = None, **config: Any) -> Path:
    lora: Any = lora_transform(model or MLP(), LoraConfig(**{"r": 2, "target_modules": ["fc1"], **config}))
    randomise(lora)
    lora.save_pretrained(path)
    return path


def test_several_adapters_with_weights(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp = tmp_path_factory.mktemp("out")
    one, two = adapter(tmp / "one"), adapter(tmp / "two", r=3, target_modules=["fc1", "fc2"])
    orders = []
    for order, shares in (([one, two], [0.5, 2.0]), ([two, one], [2.0, 0.5])):
        merge_checkpoint(base, order, tmp / "out", weights=shares)
        orders.append(folder(tmp / "out"))
    assert orders[0] == orders[1] and orders[0]["notes.txt"] == b"kept"


def test_overflow_is_refused(base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp = tmp_path_factory.mktemp("out")
    path = adapter(tmp / "adapter")
    with pytest.raises(MergeError, match=r"'fc1\.weight': .*NaN or infinite"):
        merge_checkpoint(base, path, tmp / "out", weights=[1e60])
    assert not (tmp / "out").exists() and len(list(tmp.iterdir())) == 1
