"""Rank spectra and update norms against singular values and norms in float64, and what the pictures of them show."""

from __future__ import annotations

import builtins
import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxlora
from fxlora import AdapterError, ConfigError, LoraConfig, UpdateNorms, lora_transform, spectra, update_norms
from fxlora.cli import cli as commands
from fxlora.inspect.spectra import Spectra, Spectrum, UpdateNorm, place
from tests.zoo import ARCHITECTURES

pytest.importorskip("matplotlib")

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
TARGETS = ["q_proj", "v_proj", "down_proj"]
Q1 = "model.layers.1.self_attn.q_proj"


def trained(model: Any) -> Any:
    """Factors as if they had been trained, of a different size at each layer."""
    generator = torch.Generator().manual_seed(3)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name or "embedding_B" in name:
            parameter.data = 0.02 * (1 + index % 5) * torch.randn(parameter.shape, generator=generator)
    return model


def llama(**settings: Any) -> Any:
    config = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **settings}
    return trained(lora_transform(LLAMA.model(), LoraConfig(**config)))


def product(model: Any, name: str, scaling: float) -> torch.Tensor:
    """`s·BA` as it is written in a book."""
    layer = model.get_submodule(name)
    A, B = (factor.default.weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
    return scaling * B @ A


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    LLAMA.model().save_pretrained(path / "model")
    model.save_pretrained(path / "adapter")
    return path


def test_singular_values_are_those_of_the_product(model: Any) -> None:
    found = spectra(model)
    assert len(found.sites) == 6
    for site in found.sites:
        S = torch.linalg.svdvals(product(model, site.site, 5 / 3))
        torch.testing.assert_close(torch.tensor(site.values, dtype=torch.float64), S[:3], rtol=1e-10, atol=0)
        p = S[:3] / S[:3].sum()
        assert site.effective_rank == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-6)
        assert site.norm == pytest.approx(float(product(model, site.site, 5 / 3).norm()))


def test_norms_are_relative_to_the_weights(model: Any) -> None:
    found = update_norms(model)
    assert found.relative
    for site in found.sites:
        weight = model.get_submodule(site.site).weight.double()
        assert site.relative == pytest.approx(float(product(model, site.site, 5 / 3).norm() / weight.norm()), rel=1e-9)
    assert found.largest()[0].relative == max(site.relative or 0 for site in found.sites)


def test_files_give_the_same_as_the_model(model: Any, directory: Path) -> None:
    live, alone = update_norms(model), update_norms(directory / "adapter")
    based = update_norms(directory / "adapter", base=directory / "model")
    norms = {site.site: site.norm for site in live.sites}
    assert {site.site: site.norm for site in alone.sites} == pytest.approx(norms, rel=1e-12)
    assert not alone.relative and all(site.relative is None for site in alone.sites)
    assert {site.site: site.relative for site in based.sites} == pytest.approx(
        {site.site: site.relative for site in live.sites}
    )
    for site, other in zip(
        sorted(spectra(model).sites, key=lambda each: each.site),
        sorted(spectra(directory / "adapter").sites, key=lambda each: each.site),
        strict=True,
    ):
        assert site.site == other.site and site.values == pytest.approx(other.values, rel=1e-12)


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_merged_counts_from_the_original_weights(capture: Any) -> None:
    example = LLAMA.batch() if capture == "export" else None
    config = LoraConfig(r=2, target_modules=["q_proj"])
    lora = trained(lora_transform(LLAMA.model(), config, capture=capture, example_inputs=example))
    before = update_norms(lora), spectra(lora)
    lora.merge_adapter()
    assert (update_norms(lora), spectra(lora)) == before
    with lora.disable_adapter():
        assert update_norms(lora) == before[0]


def test_dora_counts_the_whole_change(tmp_path: Path) -> None:
    lora = llama(use_dora=True)
    with torch.no_grad():
        lora.get_submodule(Q1).lora_magnitude_vector.default.weight.mul_(1.5)
    weight = lora.get_submodule(Q1).weight.detach().clone().double()
    update = float(product(lora, Q1, 5 / 3).norm())
    lora.save_pretrained(tmp_path / "adapter")
    LLAMA.model().save_pretrained(tmp_path / "model")
    live = {site.site: site for site in update_norms(lora).sites}
    based = {site.site: site for site in update_norms(tmp_path / "adapter", base=tmp_path / "model").sites}
    (note,) = spectra(lora).notes
    alone = update_norms(tmp_path / "adapter")
    merged = lora.merge_and_unload().get_submodule(Q1).weight.detach().double()
    assert live[Q1].norm == pytest.approx(float((merged - weight).norm()), rel=1e-5)
    assert based[Q1].norm == pytest.approx(live[Q1].norm, rel=1e-6)
    assert {site.site: site.norm for site in alone.sites}[Q1] == pytest.approx(update)
    assert "magnitudes need the base's weights" in alone.notes[0] and "s·BA alone" in note


def test_pissa_counts_from_its_start() -> None:
    original = LLAMA.model().get_submodule(Q1).weight.detach().double()
    lora = lora_transform(LLAMA.model(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"))
    start = {site.site: site for site in update_norms(lora).sites}[Q1]
    assert start.norm < 1e-6 * float(original.norm()) and start.weight_norm == pytest.approx(float(original.norm()))
    with torch.no_grad():
        lora.get_submodule(Q1).lora_B.default.weight.mul_(1.1)
    moved = {site.site: site for site in update_norms(lora).sites}[Q1]
    assert moved.norm == pytest.approx(0.1 * float(product(lora, Q1, 8 / 3).norm()) / 1.1, rel=1e-4)


class Mixed(nn.Module):
    """Layers outside of blocks, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.embed(ids).mT).mT)


def test_other_kinds_of_layers(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["embed", "conv", "head"])
    lora = trained(lora_transform(Mixed(), config))
    lora.save_pretrained(tmp_path / "adapter")
    before = {name: lora.get_submodule(name).weight.detach().clone().double() for name in ("embed", "conv", "head")}
    live = {site.site: site.norm for site in update_norms(lora).sites}
    alone = {site.site: site.norm for site in update_norms(tmp_path / "adapter").sites}
    assert alone == pytest.approx(live, rel=1e-12)
    merged = lora.merge_and_unload()
    for name, weight in before.items():
        change = merged.get_submodule(name).weight.detach().double() - weight
        assert live[name] == pytest.approx(float(change.norm()), rel=1e-5), name


def test_experts_are_one_stack(tmp_path: Path) -> None:
    entry = next(each for each in ARCHITECTURES if each.name == "mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    lora = trained(lora_transform(entry.model(), config))
    lora.save_pretrained(tmp_path)
    live = {site.site: site for site in spectra(lora).sites}[name]
    before = lora.get_parameter(name).detach().clone().double()
    (alone,) = [site for site in spectra(tmp_path).sites if site.site == "model.layers.0.mlp.experts"]
    change = lora.merge_and_unload().get_parameter(name).detach().double() - before
    assert live.rank == 2 and live.norm == pytest.approx(float(change.norm()), rel=1e-5)
    assert alone.values == pytest.approx(live.values, rel=1e-12)


def test_errors(directory: Path, model: Any) -> None:
    with pytest.raises(AdapterError, match="not a transformed model"):
        spectra(LLAMA.model())
    with pytest.raises(AdapterError, match="defualt"):
        update_norms(model, "defualt")
    with pytest.raises(AdapterError, match="it holds one"):
        spectra(directory / "adapter", "default")
    with pytest.raises(AdapterError, match="has its weights"):
        update_norms(model, base=directory / "model")
    with torch.device("meta"):
        empty = lora_transform(LLAMA.make(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="on the meta device"):
        spectra(empty)
    broken = llama()
    broken.get_submodule(Q1).lora_B.default.weight.data[0, 0] = math.nan
    with pytest.raises(AdapterError, match=f"'{Q1}'.*NaN"):
        update_norms(broken)


def test_places() -> None:
    assert place("model.layers.12.self_attn.q_proj") == (12, "model.layers.*.self_attn.q_proj")
    assert place("model.layers.3.experts.0.w1") == (3, "model.layers.*.experts.0.w1")
    assert place("lm_head") == (None, "lm_head")


SOME = UpdateNorms(
    "adapter 'some'",
    (
        UpdateNorm("layers.0.fc1", 0.5, 10.0),
        UpdateNorm("layers.0.fc2", 0.25, 10.0),
        UpdateNorm("layers.2.fc1", 2.0, 10.0),
        UpdateNorm("head", 0.1, None),
    ),
    relative=True,
)


def test_the_map_of_norms() -> None:
    figure: Any = fxlora.plot_update_norms(SOME)
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["fc1", "fc2", "head"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2", "none"]
    assert axes.get_xlabel() == "block" and bar.get_ylabel() == "‖s·BA‖ / ‖W‖ in %"
    cells = axes.images[0].get_array().filled(math.nan).tolist()
    nan = math.nan
    expected = [[5.0, nan, 20.0, nan], [2.5, nan, nan, nan], [nan] * 4]
    assert cells == [pytest.approx(row, nan_ok=True) for row in expected]
    assert axes.patch.get_hatch() and "largest: 20% at layers.2.fc1" in figure.get_suptitle()
    absolute = UpdateNorms("adapter 'some'", tuple(UpdateNorm(site.site, site.norm) for site in SOME.sites), False)
    assert fxlora.plot_update_norms(absolute).axes[1].get_ylabel() == "‖s·BA‖"


def test_the_panels_of_spectra() -> None:
    found = Spectra(
        "adapter 'some'",
        (
            Spectrum("layers.0.fc1", (4.0, 2.0, 1.0)),
            Spectrum("layers.1.fc1", (0.0, 0.0, 0.0)),
            Spectrum("layers.1.fc2", (8.0, 8.0)),
            Spectrum("head", (3.0, 0.0)),
        ),
    )
    figure: Any = fxlora.plot_rank_spectrum(found)
    first, second, head, bar = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in (first, second, head)] == ["fc1", "fc2", "head"]
    assert first.images[0].get_array().tolist() == [[1, 0], [0.5, 0], [0.25, 0]]
    assert second.images[0].get_array().tolist() == [[None, 1], [None, 1]]
    assert head.images[0].get_array().tolist() == [[1], [0]]
    assert second.lines[0].get_ydata().tolist() == pytest.approx([math.nan, 1.5], nan_ok=True)
    assert "largest" in bar.get_ylabel() and first.get_ylim()[0] < first.get_ylim()[1]


def test_files(tmp_path: Path) -> None:
    for suffix in (".svg", ".png"):
        one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
        for path in (one, other):
            fxlora.plot_update_norms(SOME, save=path)
        assert one.read_bytes() == other.read_bytes()
    texts = [each.text for each in ElementTree.parse(tmp_path / "one.svg").iter() if each.tag.endswith("}text")]
    assert {"fc1", "fc2", "head", "block"} <= set(texts)
    with pytest.raises(ConfigError, match=r"should end in \.svg or \.png"):
        fxlora.plot_update_norms(SOME, save=tmp_path / "one.jpg")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'fxlora\[viz\]'"):
        fxlora.plot_update_norms(SOME)
    assert "most changed" in str(SOME)


def test_pissa_files_say_what_they_hold(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    lora_transform(LLAMA.model(), config).save_pretrained(tmp_path)
    assert "took out of the base" in str(spectra(tmp_path)) and update_norms(tmp_path).notes == spectra(tmp_path).notes


def test_a_base_without_norms_gives_absolute_ones() -> None:
    model = trained(lora_transform(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"])))
    with torch.no_grad():
        model.get_submodule("0").weight.zero_()
    norms = update_norms(model)
    assert not norms.relative and norms.sites[0].norm > 0
    assert fxlora.plot_update_norms(norms).get_suptitle().endswith(" at 0")


def test_texts() -> None:
    text = str(SOME)
    assert "layers.2.fc1  20%" in text and "not known: 1 of 4 layers" in text
    assert "layers.*.fc1  2       12.5%   5% (block 0)    20% (block 2)" in text
    assert json.loads(json.dumps(SOME.to_dict()))["sites"][0]["relative"] == 0.05


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def test_command(directory: Path, tmp_path: Path) -> None:
    adapter = directory / "adapter"
    result = invoke("plot", "norms", adapter, "--base", directory / "model", "-o", tmp_path / "norms.svg")
    assert result.exit_code == 0, result.output
    assert "‖s·BA‖ / ‖W‖: adapter 'adapter'" in result.output and "mlp.down_proj" in result.output
    assert "in %" in (tmp_path / "norms.svg").read_text(encoding="utf-8")
    figures = json.loads(invoke("plot", "spectrum", adapter, "-o", tmp_path / "s.png", "--json").output)
    assert [site["rank"] for site in figures["sites"]] == [3] * 6 and (tmp_path / "s.png").stat().st_size > 1000
    assert invoke("plot", "spectrum", adapter, "--base", adapter).exit_code == 2
    assert isinstance(invoke("plot", "norms", adapter, "-o", tmp_path / "x.gif").exception, ConfigError)
