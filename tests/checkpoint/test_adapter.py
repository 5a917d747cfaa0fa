"""Adapter files: what is in them, what is refused, and that a refusal changes nothing. peft itself: test_adapter_peft."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import CheckpointError, FxloraError, LoraConfig, lora_transform
from fxlora.checkpoint.manifest import MANIFEST_NAME
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import randomise
from tests.zoo import MLP

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def make(model: nn.Module | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["fc1", "fc2"], **config}
    lora = lora_transform(model or MLP().eval(), LoraConfig(**settings), example_inputs=X)
    randomise(lora)
    return lora


def folder(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def config(path: Path) -> dict[str, Any]:
    return json.loads((path / CONFIG).read_text())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- what is written ----


def test_layout(saved: Path) -> None:
    assert sorted(folder(saved)) == [MANIFEST_NAME, CONFIG, WEIGHTS]
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(saved / WEIGHTS).items()}
    assert shapes == {
        "base_model.model.fc1.lora_A.weight": (2, 8),
        "base_model.model.fc1.lora_B.weight": (16, 2),
        "base_model.model.fc2.lora_A.weight": (2, 16),
        "base_model.model.fc2.lora_B.weight": (4, 2),
    }
    assert b'{"__metadata__":{"format":"pt"}' in (saved / WEIGHTS).read_bytes()


def test_config_fields(tmp_path: Path) -> None:
    lora = make()
    lora.save_pretrained(tmp_path / "none")
    assert config(tmp_path / "none")["auto_mapping"] == {"base_model_class": "MLP", "parent_library": MLP.__module__}
    assert config(tmp_path / "none")["inference_mode"] is True
    assert config(tmp_path / "none")["base_model_name_or_path"] is None
    assert lora.peft_config["default"].inference_mode is False  # the model's own configuration stays
    make(task_type="CAUSAL_LM", base_model_name_or_path="mine").save_pretrained(tmp_path / "task")
    assert config(tmp_path / "task")["auto_mapping"] is None  # as peft writes it
    assert config(tmp_path / "task")["base_model_name_or_path"] == "mine"
    lora.name_or_path = "some/model"
    lora.save_pretrained(tmp_path / "named")
    assert config(tmp_path / "named")["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("keep", [True, False])
def test_trained_factors_come_back_bit_for_bit(base: torch.dtype, keep: bool, tmp_path: Path) -> None:
    """Also float32 ones on a half-precision base, which fresh factors are rounded to."""
    torch.manual_seed(0)
    lora: Any = lora_transform(
        MLP().to(base), LoraConfig(r=2, target_modules=["fc1"], autocast_adapter_dtype=keep), capture="modules"
    )
    randomise(lora)
    lora.save_pretrained(tmp_path)
    loaded: Any = lora_transform(MLP().to(base), LoraConfig(r=2, target_modules=["fc2"]), capture="modules")
    loaded.load_adapter(tmp_path, "second")
    theirs = peft.PeftModel.from_pretrained(MLP().to(base), tmp_path)
    for name in ("fc1.lora_A", "fc1.lora_B"):
        saved = lora.get_parameter(f"{name}.default.weight")
        ours = loaded.get_parameter(f"{name}.second.weight")
        assert torch.equal(ours, saved.to(ours.dtype)) and torch.equal(ours.to(saved.dtype), saved)
        reference = theirs.get_parameter(f"base_model.model.{name}.default.weight")
        assert reference.dtype == ours.dtype and torch.equal(reference, ours)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_state_dict_of_a_wrapped_model(prefix: str, tmp_path: Path) -> None:
    lora = make()
    gathered = {prefix + name: torch.full_like(value, 0.5) for name, value in lora.state_dict().items()}
    lora.save_pretrained(tmp_path, state_dict=gathered)
    assert all(bool((tensor == 0.5).all()) for tensor in load_file(tmp_path / WEIGHTS).values())


def test_other_adapters_and_files_stay(tmp_path: Path) -> None:
    lora = make()
    lora.add_adapter("other", LoraConfig(r=1, target_modules=["fc1"]))
    lora.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "other" / "notes.txt").write_text("mine")
    before = folder(tmp_path)
    randomise(lora)
    with torch.no_grad():
        lora.get_parameter("fc1.lora_A.other.weight").add_(1)
    lora.save_pretrained(tmp_path, selected_adapters=["other"])
    after = folder(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {f"other/{WEIGHTS}", f"other/{MANIFEST_NAME}"}


def test_shared_factors_are_written_as_copies(tmp_path: Path) -> None:
    lora = make(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), target_modules=["0", "1"])
    lora.get_submodule("1.lora_A.default").weight = lora.get_submodule("0.lora_A.default").weight
    lora.save_pretrained(tmp_path)
    found = load_file(tmp_path / WEIGHTS)
    assert torch.equal(found["base_model.model.0.lora_A.weight"], found["base_model.model.1.lora_A.weight"])


def test_merged_and_disabled_models_save_the_same(tmp_path: Path) -> None:
    lora = make()
    lora.save_pretrained(tmp_path / "a")
    lora.merge_adapter()
    lora.save_pretrained(tmp_path / "b")
    with lora.disable_adapter():
        lora.save_pretrained(tmp_path / "c")
    assert folder(tmp_path / "a") == folder(tmp_path / "b") == folder(tmp_path / "c")


def test_non_finite_factors_are_saved_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora = make()
    with torch.no_grad():
        lora.get_parameter("fc2.lora_B.default.weight")[0, 0] = torch.nan
    with caplog.at_level(logging.WARNING, logger="fxlora"):
        logging.getLogger("fxlora").addHandler(caplog.handler)
        try:
            lora.save_pretrained(tmp_path)
        finally:
            logging.getLogger("fxlora").removeHandler(caplog.handler)
    assert "'fc2.lora_B.default.weight' has NaN or infinite entries" in caplog.text
    with pytest.raises(CheckpointError, match="NaN"):
        lora_transform(MLP(), tmp_path)


# ---- refusals of saving ----


class TwoParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.a, self.inner.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.inner
        return nn.functional.linear(nn.functional.linear(x, inner.a).relu(), inner.b)


def test_two_parameters_of_one_module(tmp_path: Path) -> None:
    """The first one is inside of the second one's wrapper, as in peft."""
    torch.manual_seed(0)
    lora = make(TwoParameters(), target_modules=None, target_parameters=["inner.b", "inner.a"])
    lora.save_pretrained(tmp_path)
    names = [f"base_model.model.inner.{owner}lora_{x}.weight" for owner in ("base_layer.", "") for x in "AB"]
    file = load_file(tmp_path / WEIGHTS)
    assert sorted(file) == sorted(names)
    assert torch.equal(file[names[0]], lora.get_parameter("inner.lora_parameters.a.lora_A.default.weight"))
    torch.manual_seed(0)
    assert torch.equal(lora_transform(TwoParameters(), tmp_path)(X), lora(X))


def test_parameter_of_the_root(tmp_path: Path) -> None:
    """peft refuses such a target, so nothing says what the key must be; ours comes back to us."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 64).reshape(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w)

    lora = make(Root(), target_modules=None, target_parameters=["w"])
    lora.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {f"base_model.model.lora_{x}.weight" for x in "AB"}
    assert torch.equal(lora_transform(Root(), tmp_path)(X), lora(X))


def short(lora: Any) -> dict[str, Tensor]:
    return {name: value[:1] for name, value in lora.state_dict().items()}


def lacking(lora: Any) -> dict[str, Tensor]:
    return {name: value for name, value in lora.state_dict().items() if name != "fc1.lora_A.default.weight"}


def without_data(lora: Any) -> dict[str, Tensor]:
    return {name: value.to("meta") for name, value in lora.state_dict().items()}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (short, r"has shape \(1, 8\), and the adapter's configuration says \(2, 8\); is it a shard\?"),
        (lacking, r"state_dict has no 'fc1.lora_A.default.weight'. Did you mean"),
        (without_data, r"'fc1.lora_A.default.weight' is on the meta device"),
    ],
)
def test_bad_state_dict(state: Callable[[Any], dict[str, Tensor]], words: str, saved: Path) -> None:
    lora = make()
    before = folder(saved.parent)
    with pytest.raises(CheckpointError, match=words):
        lora.save_pretrained(saved, state_dict=state(lora))
    assert folder(saved.parent) == before


def test_meta_model_cannot_be_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = MLP()
    lora = lora_transform(model, LoraConfig(r=2, target_modules=["fc1"]), capture="modules")
    with pytest.raises(CheckpointError, match="meta device"):
        lora.save_pretrained(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_target_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match=r"x' is a file"):
        make().save_pretrained(tmp_path / "x")
    assert folder(tmp_path) == {"x": b"mine"}


def test_failure_between_the_files_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder(saved.parent)
    monkeypatch.setattr(LoraConfig, "to_json", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(r=1).save_pretrained(saved)
    assert folder(saved.parent) == before


# ---- refusals of loading ----

PREFIX = "base_model.model."
A1 = f"{PREFIX}fc1.lora_A.weight"


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({new: t.pop(old)})


def added(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({name: torch.ones(shape)})


def filled(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t[A1][1, 2].fill_(value)


EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], type[Exception], list[str]]] = {
    "unknown key": (added(f"{PREFIX}fc3.lora_A.weight", 2, 8), CheckpointError, ["fc3.lora_A", "belongs to no target"]),
    "misspelt key": (renamed(A1, f"{PREFIX}f1.lora_A.weight"), CheckpointError, ["f1.lora_A", "Did you mean 'fc1.lora_A"]),
    "missing key": (lambda t: t.pop(A1), CheckpointError, ["lacks", A1, "target_modules"]),
    "two missing": (
        lambda t: (t.pop(A1), t.pop(f"{PREFIX}fc2.lora_B.weight")), CheckpointError, ["lacks", "and 1 more keys"]
    ),
    "twice": (added("fc1.lora_A.weight", 2, 8), CheckpointError, [A1, "'fc1.lora_A.weight'", "mean the same tensor"]),
    "another rank": (
        lambda t: t.update({A1: torch.ones(3, 8)}), CheckpointError, [A1, "(3, 8)", "rank 2 needs (2, 8)"]
    ),
    "another width": (lambda t: t.update({A1: torch.ones(2, 9)}), CheckpointError, [A1, "(2, 9)", "another model"]),
    "another dimension": (lambda t: t.update({A1: torch.ones(2, 8, 1)}), CheckpointError, [A1, "(2, 8, 1)"]),
    "NaN": (filled(torch.nan), CheckpointError, [A1, "NaN", "earlier checkpoint"]),
    "infinite": (filled(-torch.inf), CheckpointError, [A1, "infinite"]),
    "integers": (lambda t: t.update({A1: t[A1].int()}), CheckpointError, [A1, "I32", "convert"]),
    "eight bits": (lambda t: t.update({A1: t[A1].to(torch.float8_e4m3fn)}), CheckpointError, [A1, "F8_E4M3"]),
    "base weight": (
        added(f"{PREFIX}fc1.base_layer.weight", 16, 8), CheckpointError,
        ["fc1.base_layer.weight", "must not change", "save_embedding_layers=False"],
    ),
    "base bias": (added(f"{PREFIX}fc1.base_layer.bias", 16), CheckpointError, ["fc1.base_layer.bias"]),
    "a weight under its own name": (added(f"{PREFIX}fc1.weight", 16, 8), CheckpointError, ["fc1.weight", "of the base model"]),
    "magnitude vector": (added(f"{PREFIX}fc1.lora_magnitude_vector", 16), CheckpointError, ["lora_magnitude_vector"]),
    "nested parameters": (added(f"{PREFIX}fc1.base_layer.lora_A.weight", 2, 8), CheckpointError, ["further parameter", "target_parameters"]),
    "nothing": (lambda t: t.clear(), CheckpointError, ["lacks", "and 3 more keys"]),
}  # fmt: skip


def load_first(model: nn.Module, path: Path) -> None:
    lora_transform(model, path, example_inputs=X)


def load_another(model: nn.Module, path: Path) -> None:
    model.load_adapter(path, "another")  # type: ignore[operator]


def check_refused(path: Path, error: type[Exception], words: list[str]) -> None:
    """Both ways to load refuse, and leave the model and the files alone."""
    files = folder(path.parent)
    for load in (load_first, load_another):
        model = MLP() if load is load_first else make()
        before = snapshot(model)
        with pytest.raises(error) as caught:
            load(model, path)
        assert isinstance(caught.value, FxloraError)
        for word in [str(path), *words]:
            assert word in str(caught.value)
        assert_unchanged(model, before)
    assert folder(path.parent) == files


@pytest.mark.parametrize("name", EDITS)
def test_bad_tensors(name: str, saved: Path) -> None:
    edit, error, words = EDITS[name]
    tensors = {key: tensor.clone() for key, tensor in load_file(saved / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    check_refused(saved, error, words)


class Mixed(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv, self.fc1 = nn.Embedding(9, 5), nn.Conv1d(5, 6, 2), nn.Linear(3, 4)

    def forward(self, i: Tensor) -> Tensor:
        return self.fc1(self.conv(self.emb(i).transpose(1, 2)))


E = f"{PREFIX}emb"
DORA: dict[str, Any] = {"use_dora": True}
MIXED: dict[str, Any] = {"target_modules": ["emb", "conv", "fc1"]}
WITH_BIAS: dict[str, Any] = {"target_modules": ["conv", "fc1"], "lora_bias": True}

PARTS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], dict[str, Any], list[str]]] = {
    "no magnitude": (
        {**MIXED, **DORA}, lambda t: t.pop(f"{E}.lora_magnitude_vector"), {},
        ["lacks", f"{E}.lora_magnitude_vector", "use_dora in adapter_config.json asks for it", "correct the configuration"],
    ),
    "not a DoRA": (
        {**MIXED, **DORA}, lambda t: t, {"use_dora": False},
        ["lora_magnitude_vector' (and 2 more keys)", "a part that use_dora adds", "set it there"],
    ),
    "no bias": (
        WITH_BIAS, lambda t: t.pop(f"{PREFIX}conv.lora_B.bias"), {},
        ["lacks", "conv.lora_B.bias", "lora_bias in adapter_config.json asks for it"],
    ),
    "not with a bias": (
        WITH_BIAS, lambda t: t, {"lora_bias": False}, ["lora_B.bias' (and 1 more keys)", "a part that lora_bias adds"],
    ),
    "embedding factors for a linear": (
        MIXED, renamed(A1, f"{PREFIX}fc1.lora_embedding_A"), {},
        ["fc1.lora_embedding_A", "another kind of layer: 'fc1' is of the kind 'linear'", "lora_A and lora_B"],
    ),
    "linear factors for an embedding": (
        MIXED, renamed(f"{E}.lora_embedding_B", f"{E}.lora_B.weight"), {},
        ["emb.lora_B.weight", "'emb' is of the kind 'embedding'", "lora_embedding_A and lora_embedding_B"],
    ),
    "magnitude of another shape": (
        {**MIXED, **DORA}, lambda t: t.update({f"{PREFIX}conv.lora_magnitude_vector": torch.ones(6)}), {},
        ["conv.lora_magnitude_vector", "(6,)", "needs (1, 6, 1)"],
    ),
    "convolution of another kernel": (
        MIXED, lambda t: t.update({f"{PREFIX}conv.lora_A.weight": torch.ones(2, 5, 3)}), {},
        ["conv.lora_A.weight", "(2, 5, 3)", "needs (2, 5, 2)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_do_not_belong(name: str, tmp_path: Path) -> None:
    settings, edit, changes, words = PARTS[name]
    lora: Any = lora_transform(Mixed(), LoraConfig(r=2, **settings), capture="modules")
    lora.save_pretrained(tmp_path / "adapter")
    values = config(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**values, **changes}))
    tensors = {key: tensor.clone() for key, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    before = snapshot(lora)
    for load in (
        lambda: lora_transform(Mixed(), tmp_path / "adapter"),
        lambda: lora.load_adapter(tmp_path / "adapter", "b"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert_unchanged(lora, before)


def test_truncated_file(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-1])
    check_refused(saved, CheckpointError, [WEIGHTS, "truncated or corrupt"])


def test_no_weights(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    check_refused(saved, CheckpointError, [WEIGHTS, "does not exist"])


def test_pickled_weights(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    check_refused(saved, CheckpointError, ["adapter_model.bin", "pickle", "safetensors"])


def test_no_configuration(saved: Path) -> None:
    (saved / CONFIG).unlink()
    check_refused(saved, CheckpointError, [CONFIG, "does not exist"])


def test_configuration_with_more_targets_than_files(saved: Path) -> None:
    make(r=2, target_modules=["fc1"]).save_pretrained(saved)
    text = (saved / CONFIG).read_text().replace('"fc1"', '"fc1", "fc2"')
    (saved / CONFIG).write_text(text)
    check_refused(saved, CheckpointError, ["lacks", "fc2.lora_A.weight", "2 layers"])


def test_keys_without_prefix(saved: Path) -> None:
    expected = make()(X)
    tensors = load_file(saved / WEIGHTS)
    save_file({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, saved / WEIGHTS)
    assert torch.equal(lora_transform(same_base(make()), saved)(X), expected)


def same_base(lora: Any) -> nn.Module:
    model = MLP().eval()
    model.load_state_dict({name: value for name, value in lora.state_dict().items() if "lora_" not in name})
    return model


def test_meta_base_is_refused(saved: Path) -> None:
    with torch.device("meta"):
        model = MLP()
    with pytest.raises(CheckpointError, match=r"meta device \('fc1.weight' is there\).*real weights first"):
        lora_transform(model, saved, capture="modules")
    assert all(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "_lora")


def test_loaded_factors_are_no_view_of_the_file(saved: Path) -> None:
    lora = lora_transform(same_base(make()), saved)
    expected = lora(X)
    content = (saved / WEIGHTS).read_bytes()
    with open(saved / WEIGHTS, "r+b") as file:  # as a careless writer does
        file.seek(len(content) // 2)
        file.write(bytes(len(content) // 2))
    assert torch.equal(lora(X), expected)
