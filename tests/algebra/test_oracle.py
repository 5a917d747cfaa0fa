"""Combined adapters beside peft's: every type, on every kind of layer that peft combines, with one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fxlora import LoraConfig, lora_transform
from fxlora.algebra import COMBINATIONS
from tests.algebra.nets import (
    IDS,
    LAYERS,
    combine_both,
    factors_of,
    net,
    pair,
    product,
    randomise,
    relative,
    update_of,
)
from tests.host.tied import quiet

TWO = {
    "one": {"r": 3, "lora_alpha": 5, "target_modules": LAYERS},
    "two": {"r": 3, "lora_alpha": 2, "target_modules": LAYERS},
}
PRUNING = [kind for kind in COMBINATIONS if kind not in ("linear", "cat", "svd")]
ON_FACTORS = [kind for kind in COMBINATIONS if not kind.endswith("svd")]
SVD_TOLERANCE = 5e-6
"""peft decomposes in float32: a backward error of a few eps (1.2e-7) times the size, and we in float64 for `svd`."""


def options(kind: str, density: float = 0.6) -> dict[str, Any]:
    return {"density": density} if kind in PRUNING else {}


@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.6], [-0.3, -2.0]], ids=str)
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_every_type(kind: str, weights: list[float]) -> None:
    models = pair(TWO)
    combine_both(models, ["one", "two"], weights, kind, **options(kind))
    for site in LAYERS:
        ours, theirs = factors_of(models, site)
        if kind in ON_FACTORS:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), site
        else:
            assert [a.shape for a in ours] == [b.shape for b in theirs]
            assert relative(product(*ours), product(*theirs)) < SVD_TOLERANCE, site
    models[0].set_adapter("sum")
    models[1].set_adapter("sum")
    torch.testing.assert_close(models[0](IDS), models[1](IDS), rtol=1e-4, atol=1e-4)
    models[0].verify()


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", [kind for kind in PRUNING if "ties" in kind])
def test_densities_and_elections(kind: str, sign: str, density: float) -> None:
    configs = {**TWO, "three": {**TWO["two"], "lora_alpha": 7}}
    models = pair(configs)
    weights = [0.7, -0.4, 1.3]
    combine_both(models, list(configs), weights, kind, density=density, majority_sign_method=sign)
    for site in LAYERS:
        ours, theirs = factors_of(models, site)
        if kind in ON_FACTORS:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), site
        else:
            assert relative(product(*ours), product(*theirs)) < SVD_TOLERANCE, site


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["dare_linear", "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_densities(kind: str, density: float) -> None:
    models = pair(TWO)
    combine_both(models, ["one", "two"], [0.7, 0.4], kind, density=density)
    for site in LAYERS:
        ours, theirs = factors_of(models, site)
        assert relative(product(*ours), product(*theirs)) < SVD_TOLERANCE, site


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_the_generator_is_left_as_peft_leaves_it(kind: str) -> None:
    """So that whatever is drawn next (another adapter, a dropout) is the same too."""
    ours, theirs = pair(TWO)
    torch.manual_seed(3)
    ours.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", kind, **options(kind))
    after = torch.rand(4)
    torch.manual_seed(3)
    with quiet():
        theirs.base_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", kind, **options(kind))
    assert torch.equal(torch.rand(4), after)


@pytest.mark.parametrize("clamp", [0.2, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_clamping(kind: str, clamp: float) -> None:
    """The signs of singular vectors decide what is clamped: they are peft's."""
    models = pair(TWO)
    combine_both(models, ["one", "two"], [0.7, 0.4], kind, svd_clamp=clamp, **options(kind))
    for site in LAYERS:
        for ours, theirs in zip(*factors_of(models, site), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_ranks_of_svd(rank: int) -> None:
    models = pair(TWO)
    combine_both(models, ["one", "two"], [0.7, 0.4], "svd", svd_rank=rank)
    for site in LAYERS:
        ours, theirs = factors_of(models, site)
        assert ours[0].shape == theirs[0].shape and ours[0].shape[0] == rank == models[0].peft_config["sum"].r
        assert relative(product(*ours), product(*theirs)) < SVD_TOLERANCE, site


def test_a_rank_above_what_shapes_allow() -> None:
    """peft cannot make such factors."""
    models = pair(TWO)
    with pytest.raises(RuntimeError, match="shape"):
        combine_both(models, ["one", "two"], [0.7, 0.4], "svd", svd_rank=40)
    ours = models[0]
    for site in LAYERS:
        wanted = 0.7 * update_of(ours, "one", site) + 0.4 * update_of(ours, "two", site)
        assert relative(update_of(ours, "sum", site), wanted) < SVD_TOLERANCE
    assert {spec.r for spec in ours._lora.adapters["sum"].branches} == {40}


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_unlike_adapters(kind: str) -> None:
    """Other ranks, targets and scalings; the rank of `cat` is the sum at each layer, where peft pads with zeros."""
    configs = {
        "one": {"r": 3, "lora_alpha": 5, "target_modules": ["linear", "conv", "embedding"]},
        "two": {"r": 5, "lora_alpha": 2, "target_modules": ["linear", "turned", "embedding"]},
    }
    models = pair(configs)
    combine_both(models, ["one", "two"], [0.7, -0.4], kind, **options(kind))
    for site in ("linear", "conv", "embedding", "turned"):
        ours, theirs = factors_of(models, site)
        assert relative(product(*ours), product(*theirs)) < SVD_TOLERANCE, site
    config = models[0].peft_config["sum"]
    assert config.r == models[1].peft_config["sum"].r == config.lora_alpha
    assert set(config.target_modules) == models[1].peft_config["sum"].target_modules
    assert config.rank_pattern == ({"^conv": 3, "^turned": 5} if kind == "cat" else {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ON_FACTORS)
def test_half_precision_factors(kind: str, dtype: torch.dtype) -> None:
    configs = {name: {**config, "target_modules": ["linear", "turned"]} for name, config in TWO.items()}
    ours = lora_transform(
        net().to(dtype), LoraConfig(**configs["one"], autocast_adapter_dtype=False), adapter_name="one"
    )
    ours.add_adapter("two", LoraConfig(**configs["two"], autocast_adapter_dtype=False))
    with quiet():
        theirs = peft.get_peft_model(
            net().to(dtype), peft.LoraConfig(**configs["one"]), adapter_name="one", autocast_adapter_dtype=False
        )
        theirs.add_adapter("two", peft.LoraConfig(**configs["two"]), autocast_adapter_dtype=False)
    randomise(ours, theirs)
    combine_both((ours, theirs), ["one", "two"], [0.7, -0.4], kind, **options(kind))
    for site in ("linear", "turned"):
        for a, b in zip(*factors_of((ours, theirs), site), strict=True):
            assert a.dtype == dtype and torch.equal(a, b.to(dtype)), site  # peft has `cat` in float32


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear"])
def test_one_adapter_is_combined_linearly(kind: str) -> None:
    models = pair(TWO)
    combine_both(models, ["two"], [-0.5], kind, **options(kind))
    for site in LAYERS:
        ours, theirs = factors_of(models, site)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), site


@pytest.mark.parametrize("targets", [("lin.*", "conv|linear"), ("linear", "linear")], ids=str)
def test_targets_by_expression(targets: tuple[str, str]) -> None:
    configs = {name: {"r": 2, "target_modules": text} for name, text in zip(("one", "two"), targets, strict=True)}
    models = pair(configs)
    combine_both(models, ["one", "two"], [1.0, 1.0], "svd")
    assert (
        relative(product(*factors_of(models, "linear")[0]), product(*factors_of(models, "linear")[1])) < SVD_TOLERANCE
    )
    expected = models[1].peft_config["sum"].target_modules
    assert models[0].peft_config["sum"].target_modules == (expected if targets[0] != targets[1] else targets[0])


@pytest.mark.parametrize("kind", ["cat", "svd", "ties"])
def test_peft_reads_the_result_and_we_read_pefts(kind: str, tmp_path: Path) -> None:
    models = pair(TWO)
    combine_both(models, ["one", "two"], [0.7, -0.4], kind, **options(kind))
    ours, theirs = models
    ours.set_adapter("sum")
    theirs.set_adapter("sum")
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["sum"])
    with quiet():
        theirs.save_pretrained(str(tmp_path / "theirs"), selected_adapters=["sum"])
        read = peft.PeftModel.from_pretrained(net(), str(tmp_path / "ours" / "sum")).eval()
    torch.testing.assert_close(read(IDS), ours(IDS))
    again = lora_transform(net(), tmp_path / "theirs" / "sum").eval()
    torch.testing.assert_close(again(IDS), theirs(IDS))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_ties_svd"])
def test_attention(kind: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Attention().eval()

    configs = {name: {**config, "target_modules": ["attention"]} for name, config in TWO.items()}
    ours = lora_transform(make(), LoraConfig(**configs["one"]), adapter_name="one", capture="modules")
    ours.add_adapter("two", LoraConfig(**configs["two"]))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**configs["one"]), adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(**configs["two"]))
    pairs = []
    generator = torch.Generator().manual_seed(2)
    for adapter in ("one", "two"):
        for spec in ours._lora.adapters[adapter].branches:
            name = "attention" if spec.site.endswith("in_proj_weight") else "attention.base_layer.out_proj"
            for part in ("lora_A", "lora_B"):
                mine = ours.get_parameter(f"{spec.owner}.{part}.{adapter}.weight")
                other = theirs.get_parameter(f"base_model.model.{name}.{part}.{adapter}.weight")
                pairs.append((mine, other))
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(torch.randn(mine.shape, generator=generator))
            other.copy_(mine)
    combine_both((ours, theirs), ["one", "two"], [0.7, -0.4], kind, **options(kind))
    theirs.set_adapter("sum")
    layer = theirs.base_model.model.attention
    expected = {
        "attention.in_proj_weight": layer.get_delta_weight("sum"),
        "attention.out_proj": layer.base_layer.out_proj.get_delta_weight("sum"),
    }
    for site, value in expected.items():
        assert relative(update_of(ours, "sum", site), value.detach()) < SVD_TOLERANCE, site
