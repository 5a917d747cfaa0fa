"""Grouped convolutions in adapter files: ours in peft's form and back, and those that peft trained."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import CheckpointError, LoraConfig, MergeError, export_merged, lora_transform, merge_checkpoint
from fxlora._passes import BranchSpec, lookup
from fxlora.checkpoint import grouped
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import randomise

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Convs(nn.Module):
    """A grouped, a depthwise and an ordinary convolution."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv: Any = CONVS[dims - 1]
        torch.manual_seed(0)
        self.grouped = conv(6, 9, 3, padding=1, stride=2, groups=3)
        self.depthwise = conv(9, 9, 2, groups=9, bias=False)
        self.plain = conv(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.depthwise(self.grouped(x).relu()))


def batch(dims: int = 2) -> Tensor:
    return torch.randn(2, 6, *[6] * dims, generator=torch.Generator().manual_seed(1))


def make(dims: int = 2, capture: Any = "modules", **config: Any) -> Any:
    settings = {"r": 2, "target_modules": ["grouped", "depthwise", "plain"], **config}
    lora = lora_transform(Convs(dims), LoraConfig(**settings), capture=capture, example_inputs=batch(dims))
    randomise(lora)
    return lora.eval()


def theirs(dims: int, path: Path | None = None, **config: Any) -> Any:
    settings = {"r": 9, "target_modules": ["grouped", "depthwise", "plain"], **config}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*groups > 1.*")
        warnings.filterwarnings("ignore", message=".*invalid shape.*")
        if path is not None:
            return peft.PeftModel.from_pretrained(Convs(dims), path).eval()
        torch.manual_seed(2)
        model = peft.get_peft_model(Convs(dims), peft.LoraConfig(**settings))
    randomise(model)
    return model.eval()


def files(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in (WEIGHTS, CONFIG)}


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 5, "r": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 7.3},
    "patterns": {
        "rank_pattern": {"^grouped": 4, "d.*wise": 1, "p.*n": 3}, "alpha_pattern": {"grouped": 11, "depth.*": 0.7},
        "use_rslora": True,
    },
    "bias": {"lora_bias": True, "target_modules": ["grouped"]},
}  # fmt: skip


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_ours_in_peft_and_back(name: str, dims: int, capture: str, tmp_path: Path) -> None:
    ours = make(dims, capture, **CONFIGS[name])
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = ours(batch(dims))
        torch.testing.assert_close(theirs(dims, tmp_path / "ours")(batch(dims)), expected)
    back: Any = lora_transform(Convs(dims), tmp_path / "ours", capture=capture, example_inputs=batch(dims)).eval()
    assert back._specs() == ours._specs()  # ranks and scalings too, to the last bit
    for (key, tensor), (other, expected_tensor) in zip(back.named_parameters(), ours.named_parameters(), strict=True):
        assert key == other and torch.equal(tensor, expected_tensor)
    with torch.no_grad():
        assert torch.equal(back(batch(dims)), expected)
    back.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "ours") == files(tmp_path / "again")


def test_the_file_has_zeros_between_groups(tmp_path: Path) -> None:
    ours = make(r=2)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    compact, dense = (
        ours.get_parameter("grouped.lora_A.default.weight"),
        tensors["base_model.model.grouped.lora_A.weight"],
    )
    assert compact.shape == (2, 2, 3, 3) and dense.shape == (6, 6, 3, 3)
    assert torch.equal(
        tensors["base_model.model.grouped.lora_B.weight"], ours.get_parameter("grouped.lora_B.default.weight")
    )
    blocks = dense.view(3, 2, 3, 2, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(blocks[row, :, column], compact if row == column else torch.zeros_like(compact))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["rank_pattern"] == {"^depthwise": 18, "^grouped": 6}
    assert config["alpha_pattern"] == {"^depthwise": 72, "^grouped": 24}
    assert ours.peft_config["default"].rank_pattern == {}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("capture", ["modules", "symbolic", "export"])
def test_what_peft_trained(capture: Any, dims: int, tmp_path: Path) -> None:
    """Its branch mixes the groups: it runs, is saved as it was, and cannot be folded."""
    config: dict[str, Any] = {"lora_alpha": 5, "lora_dropout": 0.1, "rank_pattern": {"grouped": 3}}
    trained = theirs(dims, **config)
    trained.save_pretrained(tmp_path / "theirs")
    model = Convs(dims).eval()
    before = snapshot(model)
    ours: Any = lora_transform(model, tmp_path / "theirs", capture=capture, example_inputs=batch(dims)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(batch(dims)), trained(batch(dims)))
    ours.verify()
    ours.save_pretrained(tmp_path / "ours")
    saved, expected = (load_file(tmp_path / each / WEIGHTS) for each in ("ours", "theirs"))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)
    assert {s.site: s.r for s in ours._specs()} == {"grouped": 3, "depthwise": 9, "plain": 9}
    for merge in (ours.merge_adapter, lambda: export_merged(ours, tmp_path / "merged")):
        with pytest.raises(MergeError, match=r"'(grouped|depthwise)'.*inputs of all groups.*unmerged"):
            merge()
    save_file(Convs(dims).state_dict(), (tmp_path / "model.safetensors"))
    with pytest.raises(MergeError, match=r"'(grouped|depthwise)\.weight'.*inputs of all groups.*unmerged"):
        merge_checkpoint(tmp_path, tmp_path / "theirs", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    if capture == "modules":
        assert_unchanged(ours.unload(), before)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_compact_files_merge(dims: int, tmp_path: Path) -> None:
    ours = make(dims, use_rslora=True)
    ours.save_pretrained(tmp_path / "adapter")
    save_file(Convs(dims).state_dict(), (tmp_path / "model.safetensors"))
    export_merged(ours, tmp_path / "live")
    merge_checkpoint(tmp_path, tmp_path / "adapter", tmp_path / "files")
    live, folded = ((tmp_path / each / "model.safetensors") for each in ("live", "files"))
    with torch.no_grad():
        merged = Convs(dims)
        merged.load_state_dict(load_file(folded))
        torch.testing.assert_close(merged(batch(dims)), ours(batch(dims)))
    found, expected = load_file(folded), load_file(live)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_dora(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ours round-trips, with a warning; peft's, whose norms are not those of any weight, is refused."""
    ours = make(use_dora=True, target_modules=["grouped"])
    with caplog.at_level(logging.WARNING, "fxlora"):
        ours.save_pretrained(tmp_path / "ours")
    assert "'grouped' is a grouped convolution with DoRA" in caplog.text
    back: Any = lora_transform(Convs(), tmp_path / "ours", capture="modules").eval()
    assert torch.equal(back(batch()), ours(batch()))
    theirs(2, r=3, use_dora=True, target_modules=["grouped"]).save_pretrained(tmp_path / "theirs")
    save_file(Convs().state_dict(), (tmp_path / "model.safetensors"))
    for load in (
        lambda: lora_transform(Convs(), tmp_path / "theirs"),
        lambda: make().load_adapter(tmp_path / "theirs", "other"),
        lambda: merge_checkpoint(tmp_path, tmp_path / "theirs", tmp_path / "out"),
    ):
        with pytest.raises(
            CheckpointError, match=r"grouped\.lora_A.*mixes the groups of 'grouped(.weight)?'.*dora.*without"
        ):
            load()


ALPHAS = st.one_of(st.integers(1, 512), st.decimals("0.001", 100, places=3).map(float))


@settings(max_examples=300, deadline=None)
@given(
    alpha=ALPHAS,
    r=st.integers(1, 64),
    groups=st.integers(2, grouped.MOST_GROUPS),
    rslora=st.booleans(),
    by_pattern=st.booleans(),
)
def test_rank_and_alpha_come_back(alpha: float, r: int, groups: int, rslora: bool, by_pattern: bool) -> None:
    """What is configured here is what is read again, and files say the same scaling up to its last bit."""
    patterns: dict[str, Any] = {"rank_pattern": {"conv": r}, "alpha_pattern": {".*conv": alpha}} if by_pattern else {}
    config = LoraConfig(r=3 if by_pattern else r, lora_alpha=1 if by_pattern else alpha, use_rslora=rslora, **patterns)
    spec = BranchSpec("a.conv", "default", "conv", groups, groups, False, r, 1.0, options=(("groups", groups),))
    written = grouped.in_files(config, [spec])
    rank = lookup(written.rank_pattern, "a.conv", written.r)
    assert rank == r * groups
    scaling = written.scaling(rank, lookup(written.alpha_pattern, "a.conv", written.lora_alpha))
    assert scaling == pytest.approx(config.scaling(r, alpha), rel=3e-16)
    assert grouped.in_memory(written, [spec]) == config


def test_ranks_that_do_not_fit(tmp_path: Path) -> None:
    theirs(2, r=3, target_modules=["grouped"]).save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace('"r": 3', '"r": 6'))
    with pytest.raises(CheckpointError, match=r"grouped.lora_A.*has shape \(3, 6, 3, 3\).*rank 6 needs \(6, 6, 3, 3\)"):
        lora_transform(Convs(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.grouped.lora_A.weight"] = torch.ones(4, 6, 3, 3)
    save_file(tensors, (tmp_path / WEIGHTS))
    (tmp_path / CONFIG).write_text(text.replace('"r": 3', '"r": 4'))
    with pytest.raises(CheckpointError, match="'grouped' has 3 groups, and rank 4 is no multiple"):
        lora_transform(Convs(), tmp_path)


@pytest.mark.parametrize(
    ("init", "bias"), [(True, False), (False, False), ("gaussian", False), (True, True), (False, True)]
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_initial_values_are_pefts_bit_for_bit(dims: int, bias: bool, init: Any) -> None:
    conv: Any = CONVS[dims - 1]
    model = lambda: nn.Sequential(conv(3, 5, 3), conv(5, 4, 1))
    settings: Any = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": init, "lora_bias": bias}
    seeds = []
    for make_model in (
        lambda: peft.get_peft_model(model(), peft.LoraConfig(**settings)),
        lambda: lora_transform(model(), settings),
    ):
        torch.manual_seed(3)
        made = make_model()
        parameters = {
            name.removeprefix("base_model.model."): p for name, p in made.named_parameters() if "lora_" in name
        }
        seeds.append((parameters, torch.rand(3)))
    (expected, after), (found, ours_after) = seeds
    assert found.keys() == expected.keys() and torch.equal(after, ours_after)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_depthwise_layers_keep_the_compact_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """peft's form of 32 groups would be 1,024 times as large."""

    def depthwise() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32)).eval()

    x = torch.randn(2, 32, 5, 5)
    ours = lora_transform(depthwise(), LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    ours.save_pretrained(tmp_path / "adapter")
    assert "'0' has 32 groups: its factors are written in a compact form that peft cannot read" in caplog.text
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {key.removeprefix("base_model.model."): tuple(tensor.shape) for key, tensor in file.items()}
    assert shapes == {"0.lora_A.weight": (4, 1, 3, 3), "0.lora_B.weight": (32, 4, 1, 1)}
    again = lora_transform(depthwise(), tmp_path / "adapter")
    assert again._specs() == ours._specs() and torch.equal(again(x), ours(x))
    base = depthwise()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = ours.merge_and_unload().state_dict()
    assert all(torch.equal(merged[key], value) for key, value in expected.items())
