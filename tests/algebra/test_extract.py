"""Adapters made of a difference of weights: from models and from files, exact where the difference has low rank."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import fxlora
from fxlora import CheckpointError, ConfigError, LoraConfig, NoTargetError, extract_adapter, lora_transform
from fxlora.algebra.weights import CheckpointWeights
from fxlora.cli import cli
from tests.algebra.nets import IDS, LAYERS, net, randomise, relative, update_of
from tests.algebra.test_laws import MODULES, PARAMETERS, Zoo
from tests.host.tied import BATCH, base, logits, quiet
from tests.zoo import ARCHITECTURES

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")


def tuned(model: nn.Module, r: int = 2, **config: Any) -> nn.Module:
    """The model with a random LoRA of rank r folded in."""
    lora: Any = lora_transform(copy.deepcopy(model), LoraConfig(**{"r": r, "target_modules": LAYERS, **config}))
    randomise(lora)
    return lora.merge_and_unload()


# ---- two models ----


def test_a_difference_of_low_rank_is_found_exactly(tmp_path: Path) -> None:
    before = net().double()
    after = tuned(before)
    report = extract_adapter(before, after, tmp_path, r=2, target_modules=LAYERS, dtype=torch.float64)
    assert report.differing == () and [each.site for each in report.sites] == [
        *LAYERS[2:3],
        LAYERS[0],
        *LAYERS[1:2],
        *LAYERS[3:],
    ]
    assert report.total.relative_error < 1e-14
    lora = lora_transform(copy.deepcopy(before), tmp_path).eval()
    torch.testing.assert_close(lora(IDS), after(IDS), rtol=1e-12, atol=1e-12)
    assert lora.peft_config["default"].base_model_name_or_path is None
    with quiet():
        theirs = peft.PeftModel.from_pretrained(net().double(), str(tmp_path), autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(theirs(IDS), after(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{"r": 2}, {"max_error": 0.5}, {"r": 1, "max_error": 0.01}], ids=str)
def test_the_report_is_what_is_measured(tmp_path: Path, how: dict[str, Any]) -> None:
    """Of full rank, on every kind of layer; the adapter is read back and folded."""
    torch.manual_seed(0)
    before: Any = Zoo().double()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(torch.randn_like(parameter))
    report = extract_adapter(
        before, after, tmp_path, **how, target_modules=MODULES, target_parameters=PARAMETERS, dtype=torch.float64
    )
    lora: Any = lora_transform(copy.deepcopy(before), tmp_path, capture="modules")
    held = set()
    for each in report.sites:
        path = each.site if each.site in dict(before.named_parameters()) else f"{each.site}.weight"
        held.add(path)
        change = after.get_parameter(path).detach() - before.get_parameter(path).detach()
        assert each.norm == pytest.approx(float(change.norm()), rel=1e-12)
        assert each.error == pytest.approx(float((change - update_of(lora, "default", each.site)).norm()), rel=1e-9)
        assert "max_error" not in how or "r" in how or each.relative_error <= 0.5
    assert {each.name for each in report.differing} == {name for name, _ in before.named_parameters()} - held
    assert all("differs by up to" in each.how for each in report.differing)


def test_no_lower_rank_would_do(tmp_path: Path) -> None:
    before = net().double()
    after = tuned(before, r=3)
    report = extract_adapter(before, after, tmp_path, max_error=1e-6, target_modules=LAYERS)
    assert [each.rank for each in report.sites] == [3] * 5
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (3, 3, {})


def test_modules_that_are_held_whole(tmp_path: Path) -> None:
    before = net()
    after = tuned(before, target_modules=["linear"])
    with torch.no_grad():
        after.get_parameter("conv.weight").add_(1.0)
        after.get_parameter("pointwise.bias").add_(1.0)
    report = extract_adapter(
        before, after, tmp_path, r=2, target_modules=["linear"], modules_to_save=["conv", "pointwise"]
    )
    assert report.differing == () and "conv.weight" in report.saved
    torch.testing.assert_close(lora_transform(net(), tmp_path).eval()(IDS), after(IDS), rtol=1e-4, atol=1e-5)


def test_a_shared_weight(tmp_path: Path) -> None:
    before: Any = base()
    after: Any = tuned(before, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    names: Any = {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    with pytest.raises(ConfigError, match="share one weight: pass ensure_weight_tying=True"):
        extract_adapter(before, after, tmp_path, **names)
    report = extract_adapter(before, after, tmp_path, **names, ensure_weight_tying=True)
    assert report.differing == () and len(report.sites) == 2
    torch.testing.assert_close(logits(lora_transform(base(), tmp_path)), logits(after), rtol=1e-4, atol=1e-4)


# ---- two checkpoints ----


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a tuned one in shards."""
    before: Any = LLAMA.model()
    before.save_pretrained(tmp_path / "base")
    after: Any = tuned(before, target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        after.model.norm.weight.add_(0.5)
    after.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    return tmp_path / "base", tmp_path / "tuned"


def test_from_files_as_from_models(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    names = ["q_proj", "down_proj"]
    report = extract_adapter(*checkpoints, tmp_path / "files", r=2, target_modules=names)
    cls = type(LLAMA.model())
    models = [cls.from_pretrained(path) for path in checkpoints]
    extract_adapter(*models, tmp_path / "models", r=2, target_modules=names)
    first, second = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("files", "models"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert [each.name for each in report.differing] == ["model.norm.weight"]
    assert report.differing[0].how == "differs by up to 0.5"
    assert report.total.relative_error < 1e-5
    config = json.loads((tmp_path / "files" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoints[0])
    assert config["auto_mapping"]["base_model_class"] == cls.__name__
    fxlora.merge_checkpoint(checkpoints[0], tmp_path / "files", tmp_path / "merged")
    merged, wanted = (load_file(tmp_path / "merged" / "model.safetensors"), models[1].state_dict())
    for key in merged:
        if key != "model.norm.weight":
            torch.testing.assert_close(merged[key], wanted[key], rtol=1e-5, atol=1e-6)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(models[0], str(tmp_path / "files")).eval()
    models[1].model.norm.weight.data.sub_(0.5)
    torch.testing.assert_close(theirs(**LLAMA.batch())[0], models[1].eval()(**LLAMA.batch())[0], rtol=1e-4, atol=1e-4)


def test_files_without_a_model(tmp_path: Path) -> None:
    """Names and shapes tell linear layers and convolutions; a model tells the rest."""
    before = net()
    after = tuned(before)
    for name, model in (("base", before), ("tuned", after)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    report = extract_adapter(*paths, tmp_path / "some", r=2, target_modules=["linear", "conv", "pointwise"])
    assert [each.name for each in report.differing] == ["embedding.weight", "turned.weight"]
    lora: Any = lora_transform(net(), tmp_path / "some")
    change = after.get_parameter("conv.weight") - before.get_parameter("conv.weight")
    assert relative(update_of(lora, "default", "conv"), change.detach()) < 1e-5
    with torch.device("meta"):
        layers = net()
    report = extract_adapter(*paths, tmp_path / "all", r=2, target_modules=LAYERS, model=layers)
    assert report.differing == ()
    torch.testing.assert_close(lora_transform(net(), tmp_path / "all").eval()(IDS), after(IDS), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="'all-linear' cannot be told from names and shapes"):
        extract_adapter(*paths, tmp_path / "none", r=2, target_modules="all-linear")
    assert not (tmp_path / "none").exists()


def test_one_tensor_at_a_time(checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a pair of weights is alive."""
    alive: list[Any] = []
    most = 0
    load = CheckpointWeights.load

    def counted(self: CheckpointWeights, name: str) -> torch.Tensor:
        nonlocal most
        tensor = load(self, name)
        alive.append(weakref.ref(tensor.untyped_storage()))
        alive[:] = [each for each in alive if each() is not None]
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(CheckpointWeights, "load", counted)
    extract_adapter(*checkpoints, tmp_path / "out", r=2, target_modules=["q_proj", "down_proj"])
    assert most <= 3  # the pair before is given up once the next one is there


# ---- what is refused, and what is reported ----


def test_tensors_of_one_side_and_other_shapes(tmp_path: Path) -> None:
    state = net().state_dict()
    save_file(state, tmp_path / "base.safetensors")
    other = {name: tensor for name, tensor in state.items() if name != "turned.bias"}
    other |= {"extra": torch.zeros(2), "embedding.weight": torch.zeros(31, 12)}
    save_file(other, tmp_path / "tuned.safetensors")
    paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    report = extract_adapter(*paths, tmp_path / "out", r=1, target_modules=["linear"])
    assert {each.name: each.how.split(" '")[0] for each in report.differing} == {
        "embedding.weight": "has the shapes (30, 12) and (31, 12)",
        "extra": "is in",
        "turned.bias": "is in",
    }
    assert "tensors that differ outside of the targets (3)" in str(report)


BROKEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no rank": ({"r": None}, ConfigError, "give a rank `r`, or `max_error`"),
    "rank": ({"r": 0}, ConfigError, "positive integer"),
    "error": ({"max_error": 1.0}, ConfigError, r"relative error in \[0, 1\) but the value passed is 1.0"),
    "dtype": ({"dtype": torch.int8}, ConfigError, "`dtype` should be one of"),
    "target": ({"target_modules": ["linaer"]}, NoTargetError, "Did you mean 'linear'"),
    "missing": ({"target_modules": ["missing"]}, CheckpointError, "tuned.safetensors' has no 'missing.weight'"),
    "shape": ({"target_modules": ["other"]}, CheckpointError, r"'other.weight' has shape \(4, 3\), .* \(3, 4\)"),
    "quantized": (
        {"target_modules": ["bytes"]},
        CheckpointError,
        "'bytes.weight' is I8, which has no plain difference",
    ),
    "broken": ({"target_modules": ["broken"]}, CheckpointError, "'broken.weight' has NaN or infinite entries in"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refused_and_nothing_written(name: str, tmp_path: Path) -> None:
    names = ["linear", "missing", "other", "broken", "bytes"]
    first = {f"{each}.weight": torch.ones(3, 4) for each in names}
    second = {f"{each}.weight": torch.ones(3, 4) for each in names if each != "missing"}
    first["bytes.weight"] = second["bytes.weight"] = torch.ones(3, 4, dtype=torch.int8)
    second |= {"other.weight": torch.ones(4, 3), "broken.weight": torch.full((3, 4), torch.inf)}
    save_file(first, tmp_path / "base.safetensors")
    save_file(second, tmp_path / "tuned.safetensors")
    arguments, error, words = BROKEN[name]
    paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    with pytest.raises(error, match=words):
        extract_adapter(*paths, tmp_path / "out", **{"r": 2, "target_modules": ["linear"], **arguments})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_sources_that_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both be models, or both be paths"):
        extract_adapter(net(), tmp_path, tmp_path / "out", r=1, target_modules=["linear"])
    lora = lora_transform(net(), LoraConfig(r=1, target_modules=["linear"]))
    with pytest.raises(CheckpointError, match="the tuned model has LoRA adapters, which its weights do not hold"):
        extract_adapter(net(), lora, tmp_path / "out", r=1, target_modules=["linear"])
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        extract_adapter(tmp_path, tmp_path, tmp_path / "out", r=1, target_modules=["linear"])
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="holds a model's weights"):
        extract_adapter(net(), net(), tmp_path, r=1, target_modules=["linear"])


# ---- the command ----


def test_the_command(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["extract", *map(str, checkpoints), "-o", str(tmp_path / "out"), "--targets", "q_proj,down_proj"]
    result = CliRunner().invoke(cli, [*arguments, "-r", "2"])
    assert result.exit_code == 0, result.output
    assert "model.layers.1.mlp.down_proj" in result.output and "model.norm.weight differs by up to 0.5" in result.output
    result = CliRunner().invoke(cli, [*arguments, "--max-error", "0.01", "--save", "model.norm", "--json"])
    figures = json.loads(result.output)
    assert [each["rank"] for each in figures["sites"]] == [2] * 4
    assert figures["differing"] == [] and figures["saved"] == ["model.norm.weight"]
    lora: Any = lora_transform(LLAMA.model(), tmp_path / "out")
    after = type(LLAMA.model()).from_pretrained(checkpoints[1])
    with torch.no_grad():
        torch.testing.assert_close(lora.eval()(**BATCH)[0], after.eval()(**BATCH)[0], rtol=1e-4, atol=1e-4)
