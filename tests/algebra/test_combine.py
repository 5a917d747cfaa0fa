"""What a combined adapter holds beside factors, what it is called, and what is refused, on real and small models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fxlora import AdapterError, ConfigError, LoraConfig, lora_transform
from fxlora._passes import factors
from tests.algebra.nets import IDS, LAYERS, net, pair, randomise, relative, update_of
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.host.tied import EMBEDDING, HEAD, base, logits, ours, quiet
from tests.host.tied import randomise as randomise_trained

ONE = {"r": 3, "lora_alpha": 5, "target_modules": LAYERS}


def model(**adapters: Any) -> Any:
    """A net with adapters of these configurations and random factors."""
    (first, config), *rest = adapters.items()
    result: Any = lora_transform(
        net(), LoraConfig(**{"r": 3, "target_modules": ["linear"], **config}), adapter_name=first
    )
    for name, other in rest:
        result.add_adapter(name, LoraConfig(**{"r": 3, "target_modules": ["linear"], **other}))
    randomise(result)
    return result.eval()


def branch(lora: Any, adapter: str, site: str) -> Any:
    return next(spec for spec in lora._lora.adapters[adapter].branches if spec.site == site)


# ---- beside factors ----


def test_biases_of_branches_are_summed() -> None:
    """peft drops them: the new adapter's are zero."""
    lora = model(
        one={"lora_bias": True, "lora_alpha": 6}, two={"lora_bias": True}, plain={"target_modules": ["linear"]}
    )
    lora.add_weighted_adapter(["one", "two", "plain"], [0.5, -2.0, 1.0], "sum", "cat")
    own = {name: factors(lora, branch(lora, name, "linear"))["lora_B.bias"] for name in ("one", "two", "sum")}
    scales = {name: branch(lora, name, "linear").scaling for name in ("one", "two")}
    wanted = 0.5 * scales["one"] * own["one"].double() - 2.0 * scales["two"] * own["two"].double()
    torch.testing.assert_close(own["sum"].double(), wanted, rtol=1e-6, atol=1e-6)
    assert lora.peft_config["sum"].lora_bias
    lora.set_adapter("sum")
    lora.merge_adapter()


@pytest.mark.parametrize("tied", [True, False])
def test_changes_of_tokens_are_summed(tied: bool) -> None:
    lora: Any = ours(base(tied), trainable_token_indices=[1, 3])
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7]))
    lora.set_adapter(["default"])
    randomise_trained(lora)
    lora.set_adapter(["other"])
    randomise_trained(lora)
    W = lora.get_parameter(f"{EMBEDDING}.weight").detach()
    rows = {
        name: factors(lora, next(s for s in lora._lora.adapters[name].branches if s.site == EMBEDDING))[
            "trainable_tokens_delta"
        ]
        for name in ("default", "other")
    }
    lora.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", "cat")
    spec = next(s for s in lora._lora.adapters["sum"].branches if s.site == EMBEDDING)
    found = dict(zip(dict(spec.options)["token_ids"], factors(lora, spec)["trainable_tokens_delta"], strict=True))
    assert sorted(found) == [1, 3, 7]
    torch.testing.assert_close(found[1], W[1] + 0.5 * (rows["default"][0] - W[1]))
    torch.testing.assert_close(found[3], W[3] + 0.5 * (rows["default"][1] - W[3]) + 2.0 * (rows["other"][0] - W[3]))
    torch.testing.assert_close(found[7], W[7] + 2.0 * (rows["other"][1] - W[7]))
    lora.set_adapter("sum")
    lora.verify()
    lora.add_weighted_adapter(["default"], [1.0], "same", "linear")
    lora.set_adapter("default")
    expected = logits(lora)
    lora.set_adapter("same")
    torch.testing.assert_close(logits(lora), expected)


def test_tied_factors_stay_tied() -> None:
    lora: Any = ours(base(), target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    for name in ("default", "other"):
        lora.set_adapter(name)
        randomise_trained(lora)
    lora.add_weighted_adapter(["default", "other"], [0.3, -0.6], "sum", "cat")
    wanted = 0.3 * update_of(lora, "default", EMBEDDING) - 0.6 * update_of(lora, "other", EMBEDDING)
    for site in (EMBEDDING, HEAD):
        assert relative(update_of(lora, "sum", site), wanted) < 1e-6
    a = f"{EMBEDDING}.lora_embedding_A.sum.weight"
    assert lora.get_parameter(a) is lora.get_parameter(a.replace(EMBEDDING, HEAD))
    lora.set_adapter("sum")
    live = logits(lora)
    lora.merge_adapter()
    torch.testing.assert_close(logits(lora), live, rtol=1e-4, atol=1e-4)


def test_one_tied_and_one_apart() -> None:
    lora: Any = ours(base(), target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    lora.add_adapter("apart", LoraConfig(r=2, target_modules=["embed_tokens"]))
    before = snapshot(lora)
    with pytest.raises(AdapterError, match="'lm_head' shares the factors .* and not in 'apart'"):
        lora.add_weighted_adapter(["default", "apart"], [1.0, 1.0], "sum", "cat")
    assert_unchanged(lora, before)


@pytest.mark.parametrize("merged", [False, True])
def test_dora_by_its_changes_of_the_weight(merged: bool) -> None:
    """peft sums `B A` and forgets the magnitudes. The rank is that of the shape, so that nothing is lost."""
    lora = model(one={"use_dora": True}, two={}, target=ONE)
    with torch.no_grad():
        lora.get_parameter("linear.lora_magnitude_vector.one.weight").mul_(1.3)
    wanted = 0.7 * update_of(lora, "one", "linear") - 0.4 * update_of(lora, "two", "linear")
    if merged:
        lora.merge_adapter(["two"])
    lora.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", "svd", svd_rank=12)
    assert not lora.peft_config["sum"].use_dora
    assert relative(update_of(lora, "sum", "linear"), wanted) < 1e-6
    with pytest.raises(AdapterError, match=r"'one' is DoRA, whose magnitudes have no 'cat' sum; use 'svd'"):
        lora.add_weighted_adapter(["one", "two"], [1.0, 1.0], "other", "cat")


def test_rslora_keeps_its_scale() -> None:
    """peft keeps use_rslora, which multiplies the sum by the root of its rank."""
    lora, theirs = pair({name: {**ONE, "use_rslora": True} for name in ("one", "two")})
    for each in (lora, theirs.base_model):
        each.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", "cat")
    wanted = 0.7 * update_of(lora, "one", "linear") + 0.4 * update_of(lora, "two", "linear")
    assert relative(update_of(lora, "sum", "linear"), wanted) < 1e-6
    theirs = theirs.base_model.model.linear.get_delta_weight("sum")
    assert relative(theirs.detach(), wanted * 6**0.5) < 1e-6


def test_scaled_adapters() -> None:
    lora = model(one={}, two={})
    lora.set_scale("one", 3.0)
    lora.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "cat")
    wanted = update_of(lora, "one", "linear") + update_of(lora, "two", "linear")
    assert relative(update_of(lora, "sum", "linear"), wanted) < 1e-6


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return Grouped().double()


@pytest.fixture
def mixing(tmp_path: Path) -> Any:
    """A model with two adapters that peft trained, whose branches mix the groups of a convolution."""
    config = {"r": 4, "target_modules": ["conv"], "init_lora_weights": False}
    lora: Any = lora_transform(grouped(), LoraConfig(r=2, target_modules=["conv"]), adapter_name="compact")
    for name in ("one", "two"):
        with quiet():
            theirs = peft.get_peft_model(grouped(), peft.LoraConfig(**config))
            theirs.save_pretrained(str(tmp_path / name))
        lora.load_adapter(tmp_path / name, name)
    return lora.eval()


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_branches_that_mix_groups(kind: str, mixing: Any) -> None:
    """No weight can hold them, but their sum is one of them."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def output(name: str) -> torch.Tensor:
        mixing.set_adapter(name)
        return (mixing(x) - grouped()(x)).detach()

    wanted = 0.7 * output("one") - 0.4 * output("two")
    mixing.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", kind, svd_rank=8)
    assert relative(output("sum"), wanted) < 1e-6
    report = mixing.reduce_rank("one", 2, "small")
    assert report.sites[0].rank == 2 and 0 < report.sites[0].relative_error < 1
    mixing.add_weighted_adapter(["one", "two"], [0.7, -0.4], "pruned", "ties_svd", density=0.5)
    mixing.set_adapter("pruned")
    mixing.verify()
    with pytest.raises(AdapterError, match="2 groups, and svd_rank 3 is no multiple"):
        mixing.add_weighted_adapter(["one", "two"], [1.0, 1.0], "odd", "svd", svd_rank=3)
    with pytest.raises(AdapterError, match="'compact' and 'one' differ in whether they mix its groups"):
        mixing.add_weighted_adapter(["compact", "one"], [1.0, 1.0], "odd", "cat")


# ---- targets ----


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"target_modules": ["linear"]}, {"target_modules": "conv|linear"}),
        ({"target_modules": LAYERS, "exclude_modules": ["conv"]}, {"target_modules": ["conv"]}),
        ({"target_modules": "all-linear"}, {"target_modules": ["conv"], "rank_pattern": {"conv": 2}}),
        ({"target_modules": [], "target_parameters": ["linear.weight"]}, {"target_modules": ["turned"]}),
    ],
    ids=str,
)
def test_any_two_ways_to_name_targets(one: dict[str, Any], two: dict[str, Any]) -> None:
    lora = model(one=one, two=two)
    lora.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", "cat")
    wanted = {spec.site for name in ("one", "two") for spec in lora._lora.adapters[name].branches}
    assert {spec.site for spec in lora._lora.adapters["sum"].branches} == wanted
    fresh = lora_transform(net(), lora.peft_config["sum"])
    assert {spec.site for spec in fresh._specs()} == wanted


def test_ranks_by_pattern() -> None:
    pattern = {"rank_pattern": {"conv": 1, "linear": 5}, "target_modules": LAYERS}
    lora = model(one=pattern, two=pattern)
    lora.add_weighted_adapter(["one", "two"], [1.0, 1.0], "cat", "cat")
    lora.add_weighted_adapter(["one", "two"], [1.0, 1.0], "linear", "linear")
    lora.add_weighted_adapter(["one", "two"], [1.0, 1.0], "svd", "svd")
    ranks = {name: {s.site: s.r for s in lora._lora.adapters[name].branches} for name in ("cat", "linear", "svd")}
    assert ranks["cat"] == {"embedding": 6, "linear": 10, "turned": 6, "conv": 2, "pointwise": 6}
    assert ranks["linear"] == {"embedding": 3, "linear": 5, "turned": 3, "conv": 1, "pointwise": 3}
    assert set(ranks["svd"].values()) == {5}
    assert lora.peft_config["cat"].rank_pattern == {"^conv": 2, "^embedding": 6, "^pointwise": 6, "^turned": 6}
    assert all(spec.scaling == 1 for name in ranks for spec in lora._lora.adapters[name].branches)


@pytest.mark.parametrize("capture", ["symbolic", "export", "modules"])
@pytest.mark.parametrize("kind", ["ties", "dare_linear_svd"])
def test_captures_and_life(capture: Any, kind: str) -> None:
    lora: Any = lora_transform(net(), LoraConfig(**ONE), adapter_name="one", capture=capture, example_inputs=IDS)
    lora.add_adapter("two", LoraConfig(**ONE))
    randomise(lora)
    state = snapshot(lora)
    lora.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", kind, density=0.5)
    assert lora.active_adapters == ["one"]
    assert not any(p.requires_grad for n, p in lora.named_parameters() if ".sum." in n)
    lora.set_adapter("sum")
    lora.verify()
    live = lora(IDS)
    assert torch.equal(copy.deepcopy(lora)(IDS), live)
    live.sum().backward()
    lora.merge_adapter()
    torch.testing.assert_close(lora(IDS), live, rtol=1e-4, atol=1e-4)
    lora.unmerge_adapter()
    lora.set_adapter("one")
    lora.delete_adapter("sum")
    lora.zero_grad()
    assert_unchanged(lora, state)


# ---- what is refused ----

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no adapters": ({"adapters": [], "weights": []}, "0 adapters need as many weights, not 0"),
    "too few weights": ({"weights": [1.0]}, "2 adapters need as many weights, not 1"),
    "weight that is no number": ({"weights": [1.0, float("nan")]}, "finite numbers, not nan"),
    "named twice": ({"adapters": ["one", "one"]}, "'one' is named twice"),
    "unknown adapter": ({"adapters": ["one", "tow"]}, "no adapter is called 'tow'.*Did you mean 'two'"),
    "name taken": ({"adapter_name": "two"}, "Adapter with name 'two' already exists"),
    "unknown type": ({"combination_type": "tied"}, "unknown combination_type 'tied'.*Did you mean 'ties'"),
    "no density": ({"combination_type": "ties"}, "'ties' needs `density`"),
    "density of nothing": ({"combination_type": "dare_linear", "density": 0.0}, r"in \(0, 1\], not 0.0"),
    "density above all": ({"combination_type": "ties", "density": 1.5}, r"in \(0, 1\], not 1.5"),
    "unknown election": ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "not 'most'"),
    "rank of nothing": ({"svd_rank": 0}, "svd_rank should be a positive integer, not 0"),
    "clamp": ({"svd_clamp": 2}, r"in \[0, 1\], not 2"),
    "driver without CUDA": ({"svd_driver": "gesvd"}, "is for CUDA, and the adapters are elsewhere"),
    "other ranks": (
        {"adapters": ["one", "big"], "combination_type": "linear"},
        "needs adapters of one rank, and at 'linear' 'one' has 3, 'big' has 5; use 'cat'",
    ),
    "broken adapter": ({"adapters": ["one", "broken"]}, "'linear': the update of one of the adapters has NaN"),
    "broken factors": (
        {"adapters": ["one", "broken"], "combination_type": "cat"},
        "'linear': the combined factors have NaN or infinite entries",
    ),
    "changed base": ({"adapters": ["one", "pissa"]}, "'pissa' started with .*convert_to_plain=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_changed(name: str) -> None:
    lora = model(one={}, two={}, big={"r": 5}, broken={})
    lora.add_adapter("pissa", LoraConfig(r=2, target_modules=["turned"], init_lora_weights="pissa"))
    with torch.no_grad():
        lora.get_parameter("linear.lora_B.broken.weight")[0, 0] = float("inf")
    arguments, words = REFUSED[name]
    before, generator = snapshot(lora), torch.get_rng_state()
    with pytest.raises(AdapterError, match=words):
        lora.add_weighted_adapter(
            **{"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "sum", **arguments}
        )
    assert_unchanged(lora, before)
    if "broken" not in name:
        assert torch.equal(torch.get_rng_state(), generator)


def test_the_meta_device() -> None:
    with torch.device("meta"):
        lora: Any = lora_transform(net(), LoraConfig(**ONE))
    with pytest.raises(AdapterError, match="is on the meta device"):
        lora.add_weighted_adapter(["default"], [1.0], "sum")


def test_different_forms_of_one_layer() -> None:
    """A layer in its output and as a bare parameter has two names."""
    lora: Any = lora_transform(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), capture="modules")
    lora.add_adapter("bare", LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"]))
    with pytest.raises((AdapterError, ConfigError), match="name it once|no configuration"):
        lora.add_weighted_adapter(["default", "bare"], [1.0, 1.0], "sum", "cat")


def test_patterns_that_name_an_attention_are_used(caplog: pytest.LogCaptureFixture) -> None:
    """Both weights of an attention have the rank of its name, and no log line says that the name matches nothing."""
    lora: Any = lora_transform(
        nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)}),
        LoraConfig(r=4, target_modules=["attention", "linear"]),
        capture="modules",
    )
    randomise(lora)
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["linear"]))
    with caplog.at_level("WARNING", logger="fxlora"):
        lora.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    ranks = {spec.site: spec.r for spec in lora._lora.adapters["sum"].branches}
    assert ranks == {"attention.in_proj_weight": 4, "attention.out_proj": 4, "linear": 6}
    assert "^attention" in lora.peft_config["sum"].rank_pattern and not caplog.records
