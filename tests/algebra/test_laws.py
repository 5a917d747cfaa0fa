"""Laws of weighted sums in float64, on every kind of layer, those that peft refuses among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxlora import LoraConfig, lora_transform
from fxlora.algebra import COMBINATIONS
from fxlora.algebra.combine import RECIPES
from fxlora.algebra.derive import matrices
from fxlora.algebra.prune import weighted_sum
from tests.algebra.nets import randomise, relative, update_of

EXACT = 1e-14
"""Relative error of float64 sums and decompositions of small matrices."""


class Zoo(nn.Module):
    """One of each kind; their outputs are not needed, only their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.turned = nn.Linear(6, 9), Conv1D(7, 6)
        self.embedding = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(5, 4)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 4, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(2, 5, 2)
        self.grouped, self.depthwise = nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(6, 6, 3, groups=6)
        self.up, self.bilinear = nn.ConvTranspose2d(4, 6, 3), nn.Bilinear(3, 4, 5)
        self.matrix, self.experts = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(3, 7, 5))
        self.turned_experts = TurnedExperts()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class TurnedExperts(nn.Module):
    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 7))


MODULES = [
    *("linear", "turned", "embedding", "attention", "lstm", "conv1", "conv2", "conv3", "grouped", "depthwise", "up"),
    "bilinear",
]
PARAMETERS = ["matrix", "experts", "turned_experts.weight"]


def zoo(ranks: dict[str, int], **config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = Zoo().double().eval()
    for index, (name, r) in enumerate(ranks.items()):
        settings_ = LoraConfig(
            r=r, lora_alpha=2 * index + 3, target_modules=MODULES, target_parameters=PARAMETERS, **config
        )
        if index == 0:
            model = lora_transform(model, settings_, adapter_name=name, capture="modules")
        else:
            model.add_adapter(name, settings_)
    randomise(model)
    return model


def sites(model: Any, adapter: str) -> list[str]:
    return [spec.site for spec in model._lora.adapters[adapter].branches]


def expected(model: Any, weights: dict[str, float], site: str) -> Tensor:
    found = [w * update_of(model, name, site) for name, w in weights.items() if site in sites(model, name)]
    return torch.stack(found).sum(0)


weight = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)


@settings(max_examples=8, deadline=None)
@given(weights=st.tuples(weight, weight, weight), ranks=st.tuples(*[st.integers(1, 5)] * 3))
def test_cat_is_the_sum(weights: tuple[float, ...], ranks: tuple[int, ...]) -> None:
    model = zoo(dict(zip("abc", ranks, strict=True)))
    model.add_weighted_adapter(["a", "b", "c"], weights, "sum", "cat")
    assert len(sites(model, "sum")) == 17
    for site in sites(model, "sum"):
        wanted = expected(model, dict(zip("abc", weights, strict=True)), site)
        assert (update_of(model, "sum", site) - wanted).norm() <= EXACT * sum(
            abs(w) * update_of(model, n, site).norm() for n, w in zip("abc", weights, strict=True)
        )
    model.verify()


@settings(max_examples=8, deadline=None)
@given(weights=st.tuples(weight, weight), ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_svd_of_full_rank_is_the_sum(weights: tuple[float, float], ranks: tuple[int, int]) -> None:
    model = zoo({"a": ranks[0], "b": ranks[1]})
    model.add_weighted_adapter(["a", "b"], weights, "sum", "svd", svd_rank=sum(ranks))
    for site in sites(model, "sum"):
        wanted = expected(model, {"a": weights[0], "b": weights[1]}, site)
        assert (update_of(model, "sum", site) - wanted).norm() <= 10 * EXACT * sum(
            abs(w) * update_of(model, n, site).norm() for n, w in zip("ab", weights, strict=True)
        )


@pytest.mark.parametrize("w", [0.7, 1.0, -1.3])
def test_linear_with_one_adapter_is_its_multiple(w: float) -> None:
    model = zoo({"a": 3})
    model.add_weighted_adapter(["a"], [w], "sum", "linear")
    for site in sites(model, "sum"):
        assert relative(update_of(model, "sum", site), w * update_of(model, "a", site)) < EXACT


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_the_order_of_adapters_does_not_matter(kind: str) -> None:
    """But for `dare_*`, where it decides which adapter gets which draws."""
    model = zoo({"a": 3, "b": 3, "c": 3})
    how: Any = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
    model.add_weighted_adapter(["a", "b", "c"], [0.7, -0.4, 1.5], "one", kind, **how)
    model.add_weighted_adapter(["c", "a", "b"], [1.5, 0.7, -0.4], "other", kind, **how)
    for site in sites(model, "one"):
        assert relative(update_of(model, "other", site), update_of(model, "one", site)) < 100 * EXACT, site


@pytest.mark.parametrize("kind", [kind for kind in COMBINATIONS if "ties" not in kind])  # elections drop entries
def test_pruning_nothing_leaves_the_plain_sum(kind: str) -> None:
    model = zoo({"a": 3, "b": 3})
    how: Any = {} if kind in ("linear", "cat", "svd") else {"density": 1.0}
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", kind, **how)
    plain = "cat" if kind == "cat" else "svd" if kind.endswith("svd") else "linear"
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "plain", plain)
    for site in sites(model, "sum"):
        assert relative(update_of(model, "sum", site), update_of(model, "plain", site)) < 100 * EXACT, site


@pytest.mark.parametrize("kind", ["ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
def test_pruned_updates_at_full_rank_are_pruned_sums(kind: str) -> None:
    """Experts and all others: decomposed at the rank of the shape, what was pruned is exact."""
    model = zoo({"a": 2, "b": 2})
    torch.manual_seed(5)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", kind, density=0.5, svd_rank=30)
    torch.manual_seed(5)
    model.add_adapter("drawn", model.peft_config["sum"])  # the draws that come first
    for site in sites(model, "sum"):
        updates = [update_of(model, name, site) for name in "ab"]
        wanted = weighted_sum(updates, [0.7, -0.4], RECIPES[kind.removesuffix("_svd")], 0.5)
        assert relative(update_of(model, "sum", site), wanted) < 100 * EXACT, site


def test_subtraction_is_exact() -> None:
    model = zoo({"a": 3, "b": 2})
    model.subtract_adapter("a", "b", "difference")
    for site in sites(model, "difference"):
        wanted = update_of(model, "a", site) - update_of(model, "b", site)
        assert relative(update_of(model, "difference", site), wanted) < EXACT, site
    model.add_weighted_adapter(["difference", "b"], [1.0, 1.0], "a again", "cat")
    for site in sites(model, "a"):
        assert relative(update_of(model, "a again", site), update_of(model, "a", site)) < EXACT, site
    assert model.peft_config["difference"].r == 5


def test_what_is_left_of_a_rank_changes_nothing_and_can_be_trained() -> None:
    model = zoo({"a": 1, "b": 1})
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "svd", svd_rank=7)
    for site in sites(model, "sum"):
        spec = next(s for s in model._lora.adapters["sum"].branches if s.site == site)
        A, B = matrices(model, spec)
        alive = (A.abs().sum(-1) > 0) | (B.abs().sum(-2) > 0)
        assert bool(alive.all()), site
        assert relative(update_of(model, "sum", site), expected(model, {"a": 1.0, "b": 1.0}, site)) < 10 * EXACT
