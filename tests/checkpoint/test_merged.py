"""Merged checkpoints: layouts, names and refusals of both ways. That their bits agree: test_merged_agree."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxlora import (
    AdapterError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    MergeError,
    export_merged,
    lora_transform,
    merge_checkpoint,
)
from fxlora.checkpoint.manifest import MANIFEST_NAME
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import randomise
from tests.zoo import ARCHITECTURES, MLP, SharedModule

ENTRIES = {entry.name: entry for entry in ARCHITECTURES}
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def folder(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def weights(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def make(model: nn.Module | None = None, capture: Any = "modules", **config: Any) -> Any:
    model = model or mlp()
    torch.manual_seed(1)
    lora = lora_transform(model, LoraConfig(**{"r": 2, "target_modules": ["fc1"], **config}), capture=capture)
    randomise(lora)
    return lora.eval()


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


def save_base(path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    path.mkdir()
    save_file(mlp().state_dict() if tensors is None else tensors, path / WEIGHTS, metadata={"format": "pt"})
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def save_adapter(path: Path, model: nn.Module | None = None, **config: Any) -> Path:
    make(model, **config).save_pretrained(path)
    return path


def refused(tmp_path: Path, error: type[Exception], words: str, call: Callable[[], object]) -> None:
    """The call fails with these words, and no file is changed by it."""
    before = folder(tmp_path)
    with pytest.raises(error) as caught:
        call()
    assert re.search(words, str(caught.value)), str(caught.value)
    assert folder(tmp_path) == before and not [p for p in tmp_path.rglob("*") if ".fxlora-" in p.name]


# ---- a live model ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "albert"])
def test_files_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Weights and configuration are byte for byte what saving the merged model writes, also where names in memory
    and in files differ (experts) and where weights are tied."""
    entry = ENTRIES[name]
    lora = make(entry.model(), target_modules=entry.targets)
    export_merged(lora, tmp_path / "ours")
    lora.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours = folder(tmp_path / "ours")
    assert ours.pop(MANIFEST_NAME) and ours == folder(tmp_path / "theirs")


def test_loads_with_auto_classes_and_equal_logits(tmp_path: Path) -> None:
    entry = ENTRIES["llama"]
    lora = make(entry.model(), target_modules=entry.targets)
    assert export_merged(lora, str(tmp_path / "out"), max_shard_size="0.02MB") == tmp_path / "out"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    merged = lora.merge_and_unload()
    assert type(loaded) is type(merged)
    with torch.no_grad():
        assert torch.equal(loaded(**entry.batch())[0], merged(**entry.batch())[0])


def test_index(tmp_path: Path) -> None:
    lora = make()
    export_merged(lora, tmp_path, max_shard_size=300)
    index = json.loads((tmp_path / INDEX).read_text())
    found = weights(tmp_path)
    assert index["metadata"] == {
        "total_size": sum(t.numel() * t.element_size() for t in found.values()),
        "total_parameters": sum(t.numel() for t in found.values()),
    }
    assert index["weight_map"].keys() == found.keys() == mlp().state_dict().keys()
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)
    sizes = [sum(t.numel() * 4 for t in load_file(f).values()) for f in tmp_path.glob("*.safetensors")]
    assert all(
        size <= 300 or len(load_file(f)) == 1 for size, f in zip(sizes, tmp_path.glob("*.safetensors"), strict=True)
    )


@pytest.mark.parametrize("size", ["5", "GB", "5 XB", 0, -1, True, None, "0GB"])
def test_bad_shard_size(size: Any, tmp_path: Path) -> None:
    refused(tmp_path, ConfigError, "max_shard_size", lambda: export_merged(make(), tmp_path / "x", max_shard_size=size))


def test_the_model_is_left_alone_also_while_merged(tmp_path: Path) -> None:
    lora = make()
    lora.add_adapter("other", LoraConfig(r=3, target_modules=["fc1", "fc2"]))
    randomise(lora)
    lora.merge_adapter(["other"])
    before = snapshot(lora)
    original = {name: tensor.clone() for name, tensor in lora._lora.originals.items()}
    export_merged(lora, tmp_path / "both")  # "default" is active, "other" is merged
    assert_unchanged(lora, before)
    assert all(torch.equal(original[name], tensor) for name, tensor in lora._lora.originals.items())
    lora.unmerge_adapter()
    export_merged(lora, tmp_path / "again", adapter_names=["default", "other"])
    assert folder(tmp_path / "both") == folder(tmp_path / "again")
    export_merged(lora, tmp_path / "one", adapter_names="other")
    expected = lora.merge_and_unload(adapter_names=["other"]).state_dict()
    found = weights(tmp_path / "one")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_buffers_and_names_of_one_module(tmp_path: Path) -> None:
    """Non-persistent buffers stay out; a module with two names is written under both, for a strict load."""
    model = SharedModule()
    model.register_buffer("kept", torch.ones(3))
    model.register_buffer("dropped", torch.ones(3), persistent=False)
    lora = make(model, target_modules=["shared"])
    export_merged(lora, tmp_path)
    found = weights(tmp_path)
    assert set(found) == {
        "kept", "first.weight", "first.bias", "shared.weight", "shared.bias", "alias.weight", "alias.bias"
    }  # fmt: skip
    fresh = SharedModule()
    fresh.register_buffer("kept", torch.zeros(3))
    fresh.load_state_dict(found)
    assert torch.equal(found["shared.weight"], found["alias.weight"])
    assert torch.equal(fresh(X), lora.merge_and_unload()(X))


class _Tokenizer:
    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").write_text("given")


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    for name in (
        "tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", "code.py", "1_Pooling/config.json",
        "pytorch_model.bin", WEIGHTS, "adapter_config.json", ".git/HEAD", "original/consolidated.00.pth",
        "original/params.json", "onnx/model.onnx",
    ):  # fmt: skip
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("base")
    return path


COPIED = {"tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", "code.py", "1_Pooling/config.json"}


def test_companions(base_dir: Path, tmp_path: Path) -> None:
    lora = make()
    export_merged(lora, tmp_path / "none")
    assert set(folder(tmp_path / "none")) == {WEIGHTS, MANIFEST_NAME}
    export_merged(lora, tmp_path / "given", base_dir=base_dir)
    assert set(folder(tmp_path / "given")) == COPIED | {WEIGHTS, MANIFEST_NAME}
    export_merged(lora, base_dir / "inside", base_dir=base_dir)
    export_merged(lora, base_dir / "inside", base_dir=base_dir)
    assert set(folder(base_dir / "inside")) == COPIED | {WEIGHTS, MANIFEST_NAME}
    lora.name_or_path = str(base_dir)
    export_merged(lora, tmp_path / "default")
    assert "LICENSE" in folder(tmp_path / "default")
    export_merged(lora, tmp_path / "tokenizer", tokenizer=_Tokenizer())
    assert set(folder(tmp_path / "tokenizer")) == {WEIGHTS, MANIFEST_NAME, "tokenizer.json"}
    export_merged(lora, tmp_path / "both", tokenizer=_Tokenizer(), base_dir=base_dir)
    assert folder(tmp_path / "both")["tokenizer.json"] == b"given"
    refused(tmp_path, CheckpointError, "base_dir", lambda: export_merged(lora, tmp_path / "x", base_dir="nowhere"))


def test_files_in_the_directory(tmp_path: Path) -> None:
    for name in ("notes.txt", "adapter.safetensors", "model-00001-of-00009.safetensors", INDEX, "pytorch_model.bin"):
        (tmp_path / name).write_text("old")
    export_merged(make(), tmp_path)
    assert set(folder(tmp_path)) == {"notes.txt", "adapter.safetensors", WEIGHTS, MANIFEST_NAME}


def test_not_beside_an_adapter(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter")
    base = save_base(tmp_path / "base")
    for call in (
        lambda: export_merged(make(), tmp_path / "adapter"),
        lambda: merge_checkpoint(base, tmp_path / "adapter", tmp_path / "adapter"),
    ):
        refused(tmp_path, CheckpointError, "holds an adapter.*apply it again", call)


def test_export_refusals(tmp_path: Path) -> None:
    plain: Any = mlp()
    refused(
        tmp_path, AdapterError, "takes what lora_transform returned, not a MLP", lambda: export_merged(plain, tmp_path)
    )
    lora = make()
    refused(tmp_path, AdapterError, "'defualt'", lambda: export_merged(lora, tmp_path / "x", adapter_names=["defualt"]))
    refused(tmp_path, ConfigError, "out_dtype", lambda: export_merged(lora, tmp_path / "x", out_dtype=torch.int8))
    with torch.no_grad():
        for factor in "AB":
            lora.get_parameter(f"fc1.lora_{factor}.default.weight").fill_(3e38)
    before = snapshot(lora)
    refused(tmp_path, MergeError, r"'fc1'.*Adapter default is broken", lambda: export_merged(lora, tmp_path / "x"))
    assert_unchanged(lora, before)
    with torch.device("meta"):
        meta = MLP()
    refused(
        tmp_path,
        CheckpointError,
        "'fc1.weight' is on the meta device",
        lambda: export_merged(make(meta), tmp_path / "x"),
    )


def test_untargeted_weight_that_does_not_fit_out_dtype(tmp_path: Path) -> None:
    model = mlp()
    with torch.no_grad():
        model.fc2.bias[0] = 1e5
    lora = make(model)
    call = lambda: export_merged(lora, tmp_path / "x", out_dtype=torch.float16)
    refused(tmp_path, MergeError, r"'fc2.bias': an entry is too large for torch.float16", call)
    base, adapter = save_base(tmp_path / "base", model.state_dict()), save_adapter(tmp_path / "adapter")
    call = lambda: merge_checkpoint(base, adapter, tmp_path / "x", out_dtype=torch.float16)
    refused(tmp_path, MergeError, r"'fc2.bias': an entry is too large", call)


# ---- files ----


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 5},
        {"use_rslora": True},
        {"rank_pattern": {"fc1": 3, "fc[0-9]": 5}, "alpha_pattern": {"^fc2": 7}, "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": ".*fc.*"},
    ],
    ids=str,
)
@pytest.mark.parametrize("out_dtype", [None, torch.float64, torch.bfloat16])
def test_files_and_model_agree(config: dict[str, Any], out_dtype: torch.dtype | None, tmp_path: Path) -> None:
    lora = make(**{"target_modules": ["fc1", "fc2"], **config})
    lora.save_pretrained(tmp_path / "adapter")
    base = save_base(tmp_path / "base", model_type="mine", dtype="float32", text_config={"torch_dtype": "float32"})
    export_merged(lora, tmp_path / "live", out_dtype=out_dtype)
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files", out_dtype=out_dtype)
    assert (tmp_path / "live" / WEIGHTS).read_bytes() == (tmp_path / "files" / WEIGHTS).read_bytes()
    assert report.merged == ("fc1.weight", "fc2.weight") and report.tensors == 4
    found = json.loads((tmp_path / "files" / "config.json").read_text())
    expected = "float32" if out_dtype is None else str(out_dtype).removeprefix("torch.")
    assert found["dtype"] == found["text_config"]["torch_dtype"] == expected and found["model_type"] == "mine"


def test_half_precision_is_rounded_once_to_the_wider_type(tmp_path: Path) -> None:
    lora = make(mlp().bfloat16())
    export_merged(lora, tmp_path, out_dtype=torch.float32)
    a, b = (lora.get_parameter(f"fc1.lora_{x}.default.weight").double() for x in "AB")
    exact = lora.get_parameter("fc1.weight").double() + lora._specs()[0].scaling * (b @ a)
    assert torch.equal(weights(tmp_path)["fc1.weight"], exact.float())


def test_report(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    report = merge_checkpoint(str(base), [str(save_adapter(tmp_path / "adapter"))], str(tmp_path / "out"))
    assert re.fullmatch(r"merged 1 adapter into 1 of 4 weights; wrote 0.0 MB to .*out in \d+\.\d\d s", str(report))
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["bytes"] == 4 * (8 * 16 + 16 + 16 * 4 + 4) and values["seconds"] == report.seconds > 0


def test_base_is_not_changed_and_output_repeats(base_dir: Path, tmp_path: Path) -> None:
    save_file(mlp().state_dict(), base_dir / WEIGHTS)
    (base_dir / "config.json").write_text("{}")
    adapter = save_adapter(tmp_path / "adapter")
    before = folder(base_dir)
    merge_checkpoint(base_dir, adapter, tmp_path / "a")
    merge_checkpoint(base_dir, adapter, tmp_path / "b")
    merge_checkpoint(base_dir, adapter, base_dir / "inside")
    assert {name: data for name, data in folder(base_dir).items() if not name.startswith("inside")} == before
    assert folder(tmp_path / "a") == folder(tmp_path / "b") == folder(base_dir / "inside")
    assert set(folder(tmp_path / "a")) == COPIED | {WEIGHTS, MANIFEST_NAME}


def test_three_adapters_in_any_order(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapters = [save_adapter(tmp_path / name, r=r, lora_alpha=3) for name, r in (("c", 1), ("a", 2), ("b", 3))]
    merge_checkpoint(base, adapters, tmp_path / "one", weights=[0.1, 0.2, 0.3])
    merge_checkpoint(base, adapters[::-1], tmp_path / "two", weights=[0.3, 0.2, 0.1])
    assert folder(tmp_path / "one") == folder(tmp_path / "two")
    merge_checkpoint(base, [*adapters, *adapters], tmp_path / "zero", weights=[1, 1, 1, -1, -1, -1])
    for name, tensor in weights(tmp_path / "zero").items():
        torch.testing.assert_close(tensor, mlp().state_dict()[name])


def test_shards_and_metadata_of_the_base_are_kept(tmp_path: Path) -> None:
    state = mlp().state_dict()
    base = tmp_path / "base"
    base.mkdir()
    files = {
        "model-00001-of-00002.safetensors": ["fc1.bias", "fc2.weight"],
        "odd name.safetensors": ["fc1.weight", "fc2.bias"],
    }
    for file, names in files.items():
        save_file({name: state[name] for name in names}, base / file, metadata={"format": "pt", "by": "me"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (base / INDEX).write_text(json.dumps({"metadata": {"total_size": 848, "note": "x"}, "weight_map": weight_map}))
    merge_checkpoint(base, save_adapter(tmp_path / "adapter"), tmp_path / "out")
    for file, names in files.items():
        assert set(load_file(tmp_path / "out" / file)) == set(names)
        assert b'"__metadata__":{"by":"me","format":"pt"}' in (tmp_path / "out" / file).read_bytes()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index == {"metadata": {"note": "x", "total_size": 848}, "weight_map": weight_map}
    untouched = "model-00001-of-00002.safetensors"
    assert load_file(tmp_path / "out" / untouched).keys() == load_file(base / untouched).keys()


# ---- names ----


def wrapped(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in mlp().state_dict().items()}


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_names_that_differ_by_a_prefix(tmp_path: Path) -> None:
    longer = save_base(tmp_path / "longer", wrapped("model."))
    shorter = save_base(tmp_path / "shorter")
    without, having = save_adapter(tmp_path / "without"), save_adapter(tmp_path / "having", Wrapper())
    merge_checkpoint(shorter, without, tmp_path / "exact")
    merge_checkpoint(longer, without, tmp_path / "added")
    merge_checkpoint(shorter, having, tmp_path / "removed")
    expected = weights(tmp_path / "exact")
    assert {name.removeprefix("model."): t.tolist() for name, t in weights(tmp_path / "added").items()} == {
        name: t.tolist() for name, t in expected.items()
    }
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(tmp_path / "removed").items())


def test_patterns_see_the_names_of_the_adapters_model(tmp_path: Path) -> None:
    config: dict[str, Any] = {"rank_pattern": {"^model.fc1": 5}, "alpha_pattern": {"^model.fc1": 7}}
    lora = make(Wrapper(), **config)
    lora.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(save_base(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["fc1.weight"], lora.merge_and_unload().model.fc1.weight)


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", target_modules=["fc1", "fc2"])
    twice = save_base(tmp_path / "twice", {**wrapped("a."), **wrapped("b.")})
    missing = save_base(tmp_path / "missing", {"fc_1.weight": torch.ones(16, 8), "fc2.weight": torch.ones(4, 16)})
    mixed = {"a.fc1.weight": torch.ones(16, 8), "b.fc2.weight": torch.ones(4, 16)}
    mixed_base = save_base(tmp_path / "mixed", mixed)
    for base, words in (
        (twice, r"'fc1' may be any of 'a.fc1.weight', 'b.fc1.weight'"),
        (missing, r"the base has no 'fc1.weight'. Did you mean 'fc_1.weight'"),
        (mixed_base, r"'fc1' would be 'a.fc1.weight'.*'fc2' would be 'b.fc2.weight'.*common prefix"),
    ):
        refused(tmp_path, CheckpointError, words, lambda base=base: merge_checkpoint(base, adapter, tmp_path / "x"))


def test_bare_parameter(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.w = nn.Parameter(torch.linspace(-1, 1, 64).reshape(8, 8))
            self.out = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            inner: Any = self.inner
            return self.out(nn.functional.linear(x, inner.w))

    torch.manual_seed(0)
    model = Inner()
    base = save_base(tmp_path / "base", model.state_dict())
    lora = make(model, "symbolic", target_modules=["out"], target_parameters=["inner.w"])
    lora.save_pretrained(tmp_path / "adapter")
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert report.merged == ("inner.w", "out.weight")
    export_merged(lora, tmp_path / "live")
    assert folder(tmp_path / "live") == folder(tmp_path / "files")


# ---- layouts ----


class TwoLayouts(nn.Module):
    """Layers stored (out, in) and (in, out) in one model; `square` is of the second kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.square = Conv1D(16, 8), nn.Linear(16, 8), Conv1D(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.linear(self.conv(x)))


@pytest.mark.parametrize("targets", [["conv", "linear"], ["conv", "square"], ["square"], ["linear"]], ids="+".join)
def test_layouts(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoLayouts()
    base = save_base(tmp_path / "base", model.state_dict())
    lora = make(model, target_modules=targets)
    lora.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    export_merged(lora, tmp_path / "live")
    assert folder(tmp_path / "live") == folder(tmp_path / "files")


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_weight_of_unknown_layout(flag: bool, tmp_path: Path) -> None:
    model = TwoLayouts()
    base = save_base(tmp_path / "base", model.state_dict())
    adapter = save_adapter(tmp_path / "adapter", model, target_modules=["conv", "linear", "square"])
    text = (adapter / "adapter_config.json").read_text()
    assert '"fan_in_fan_out": true' in text
    (adapter / "adapter_config.json").write_text(text.replace('_out": true', f'_out": {str(flag).lower()}'))
    call = lambda: merge_checkpoint(base, adapter, tmp_path / "x")
    refused(tmp_path, MergeError, rf"'square.weight' is square.*fan_in_fan_out is {flag}.*export_merged", call)


# ---- refusals ----


def edited(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


A = "base_model.model.fc1.lora_A.weight"
B = "base_model.model.fc1.lora_B.weight"

BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], type[Exception], str]] = {
    "magnitude without DoRA": (
        lambda t: t.update({"base_model.model.fc1.lora_magnitude_vector": torch.ones(16)}), CheckpointError,
        "fc1.lora_magnitude_vector' is a part that use_dora adds",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.emb.lora_embedding_A": torch.ones(2, 9)}), CheckpointError,
        "the base has no 'emb.weight'",
    ),
    "both kinds": (
        lambda t: t.update({"base_model.model.fc1.lora_embedding_A": torch.ones(2, 9)}), CheckpointError,
        "'fc1' has no lora_embedding_B",
    ),
    "saved module": (
        lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 9)}), CheckpointError, "no 'score.weight'"
    ),
    "bias of B": (
        lambda t: t.update({"base_model.model.fc1.lora_B.bias": torch.ones(16)}), CheckpointError,
        "lora_B.bias' is a part that lora_bias adds",
    ),
    "convolution": (
        lambda t: t.update({A: torch.ones(2, 8, 3, 3), B: torch.ones(16, 2, 1, 1)}), CheckpointError,
        r"\(2, 8, 3, 3\) and \(16, 2, 1, 1\), and 'fc1.weight' has shape \(16, 8\)",
    ),
    "base weight": (
        lambda t: t.update({"base_model.model.fc1.base_layer.weight": torch.ones(2)}), CheckpointError,
        "base_layer.weight' is a weight of the base model and differs",
    ),
    "nested": (
        lambda t: t.update({A.replace(".lora", ".base_layer.lora"): t.pop(A), B.replace(".lora", ".base_layer.lora"): t.pop(B)}),
        CheckpointError, "'fc1.base_layer' is nested.*names none of 'fc1' in target_parameters",
    ),
    "one factor only": (lambda t: t.pop(B), CheckpointError, "'fc1' has no lora_B"),
    "rank": (lambda t: t.update({A: torch.ones(3, 8), B: torch.ones(16, 3)}), CheckpointError, "rank 2 needs \\(2, 8\\)"),
    "ranks differ": (lambda t: t.update({A: torch.ones(3, 8)}), CheckpointError, r"\(3, 8\).*rank 2 needs"),
    "width": (lambda t: t.update({A: torch.ones(2, 9)}), CheckpointError, r"\(2, 9\), and 'fc1.weight' with"),
    "NaN": (lambda t: t[A].fill_(torch.nan), CheckpointError, "fc1.lora_A.weight' has NaN"),
    "integers": (lambda t: t.update({A: t[A].int()}), CheckpointError, "I32"),
    "overflow": (lambda t: (t[A].fill_(3e38), t[B].fill_(3e38)), MergeError, "'fc1.weight': .*nothing was written"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_adapter(name: str, tmp_path: Path) -> None:
    edit, error, words = BAD_TENSORS[name]
    base, adapter = save_base(tmp_path / "base"), save_adapter(tmp_path / "adapter")
    merge_checkpoint(base, adapter, tmp_path / "out")  # an earlier result, which must stay
    edited(adapter / "adapter_model.safetensors", edit)
    refused(tmp_path, error, words, lambda: merge_checkpoint(base, adapter, tmp_path / "out"))


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ('"use_qalora": false', '"use_qalora": true', NotImplementedError, "use_qalora"),
        ('"bias": "none"', '"bias": "all"', CheckpointError, "bias='all'.*has none"),
        ('"modules_to_save": null', '"modules_to_save": ["fc9"]', CheckpointError, "modules_to_save.*'fc9'"),
        ('"init_lora_weights": true', '"init_lora_weights": "pissa"', CheckpointError, "changed the base"),
        ('"lora_alpha": 8', '"lora_alpha": NaN', CheckpointError, "adapter_config.json.*NaN is no number"),
        ('"peft_type": "LORA"', '"peft_type": "IA3"', CheckpointError, "IA3"),
    ],
)
def test_bad_configuration(old: str, new: str, error: type[Exception], words: str, tmp_path: Path) -> None:
    base, adapter = save_base(tmp_path / "base"), save_adapter(tmp_path / "adapter")
    text = (adapter / "adapter_config.json").read_text()
    assert old in text
    (adapter / "adapter_config.json").write_text(text.replace(old, new))
    refused(tmp_path, error, words, lambda: merge_checkpoint(base, adapter, tmp_path / "out"))


def test_bad_arguments(tmp_path: Path) -> None:
    base, adapter, out = save_base(tmp_path / "base"), save_adapter(tmp_path / "adapter"), tmp_path / "out"
    for error, words, call in (
        (ConfigError, "adapter_dirs", lambda: merge_checkpoint(base, [], out)),
        (ConfigError, "weights", lambda: merge_checkpoint(base, adapter, out, weights=[1, 2])),
        (ConfigError, "weights", lambda: merge_checkpoint(base, adapter, out, weights=[float("nan")])),
        (ConfigError, "out_dtype", lambda: merge_checkpoint(base, adapter, out, out_dtype=torch.int8)),
        (CheckpointError, "is the base itself", lambda: merge_checkpoint(base, adapter, base / ".." / "base")),
        (CheckpointError, "not a directory", lambda: merge_checkpoint(tmp_path / "nope", adapter, out)),
        (CheckpointError, "not a saved adapter", lambda: merge_checkpoint(base, tmp_path / "nope", out)),
        (CheckpointError, "is a file", lambda: merge_checkpoint(base, adapter, base / WEIGHTS)),
    ):
        refused(tmp_path, error, words, call)


def test_bad_bases(tmp_path: Path) -> None:
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"

    def base(name: str, **files: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file, text in files.items():
            (path / file.replace("__", ".")).write_text(text)
        return path

    def index(weight_map: object) -> str:
        return json.dumps({"weight_map": weight_map})

    indexed = {file: save_base(tmp_path / file) for file in ("outside", "absent", "more", "less", "twice")}
    (indexed["outside"] / INDEX).write_text(index({"fc1.weight": "../base.safetensors"}))
    (indexed["absent"] / INDEX).write_text(index({"fc1.weight": "shard.safetensors"}))
    names = list(mlp().state_dict())
    (indexed["more"] / INDEX).write_text(index(dict.fromkeys([*names, "extra"], WEIGHTS)))
    (indexed["less"] / INDEX).write_text(index(dict.fromkeys(names[1:], WEIGHTS)))
    (indexed["twice"] / INDEX).write_text(f'{{"weight_map": {{"a": "{WEIGHTS}", "a": "{WEIGHTS}"}}}}')
    truncated = save_base(tmp_path / "truncated")
    (truncated / WEIGHTS).write_bytes((truncated / WEIGHTS).read_bytes()[:-4])
    no_map = base("no_map", **{INDEX: "{}"})
    no_json = base("no_json", **{INDEX: "{"})
    for path, words in (
        (base("empty"), "neither model.safetensors nor"),
        (base("pickled", pytorch_model__bin=""), r"only pickled weights \(pytorch_model.bin\)"),
        (no_map, "no 'weight_map'"),
        (no_json, "not valid JSON"),
        (indexed["outside"], "'../base.safetensors', which is no file name in this directory"),
        (indexed["absent"], "shard.safetensors cannot be read"),
        (indexed["more"], "'extra' is in the index, and not in the file"),
        (indexed["less"], "is in the file, and not in the index"),
        (indexed["twice"], "has 'a' twice"),
        (truncated, "truncated or corrupt"),
    ):
        refused(tmp_path, CheckpointError, words, lambda path=path: merge_checkpoint(path, adapter, out))


def test_quantized_and_tied_weights(tmp_path: Path) -> None:
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"
    state = mlp().state_dict()
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        base = save_base(tmp_path / name, {**state, "fc1.weight": state["fc1.weight"].to(dtype)})
        call = lambda base=base: merge_checkpoint(base, adapter, out)
        refused(tmp_path, MergeError, r"'fc1.weight' is quantized \(.* without scales that are known\)", call)
    tied = save_base(tmp_path / "tied", tie_word_embeddings=True, vocab_size=16)
    refused(tmp_path, MergeError, "'fc1.weight' is tied", lambda: merge_checkpoint(tied, adapter, out))


def test_quantized_weights_beside_the_targets_pass_through(tmp_path: Path) -> None:
    state = {
        **mlp().state_dict(),
        "other": torch.ones(3, dtype=torch.int8),
        "scale": torch.ones(2).to(torch.float8_e5m2),
    }
    base = save_base(tmp_path / "base", state)
    merge_checkpoint(base, save_adapter(tmp_path / "adapter"), tmp_path / "out", out_dtype=torch.bfloat16)
    found = weights(tmp_path / "out")
    assert found["other"].dtype == torch.int8 and found["scale"].dtype == torch.float8_e5m2
    assert found["fc2.bias"].dtype == torch.bfloat16


def test_failure_while_writing_leaves_the_earlier_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save_base(tmp_path / "base", a=1), save_adapter(tmp_path / "adapter")
    merge_checkpoint(base, adapter, tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    refused(tmp_path, CheckpointError, "No space left", lambda: merge_checkpoint(base, adapter, tmp_path / "out"))
