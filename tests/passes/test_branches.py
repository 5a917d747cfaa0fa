"""Layer kinds: what is drawn equals peft's draws, and a branch in a graph equals its fold into the weight."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from passes.branches import KINDS, build_branch, deltas, part_shapes
from passes.branches.base import Branch, BranchDtype, BranchSpec
from passes.leaves import FACTOR_A, FACTOR_B
from passes.merge import factors
from passes.nodes import lora_meta
from passes.sites import find_sites, layer_of
from tests.passes.helpers import adapt, exported, insert, region_of, run

LINEAR = KINDS["linear"]


def spec_of(layer: nn.Module, r: int = 2, **fields: Any) -> BranchSpec:
    shape = layer_of(layer)
    assert shape is not None
    sizes = (shape.in_features, shape.out_features, shape.transposed)
    return BranchSpec("fc", "default", "linear", *sizes, r, **{"scaling": 0.5, **fields})


# ---- the description ----


def test_registry() -> None:
    assert set(KINDS) == {"linear", "embedding", "conv", "parameter", "tied"}


@pytest.mark.parametrize(
    ("site", "is_parameter", "owner"),
    [("h.0.fc", False, "h.0.fc"), ("h.0.w", True, "h.0.lora_parameters.w"), ("w", True, "lora_parameters.w")],
)
def test_owner(site: str, is_parameter: bool, owner: str) -> None:
    spec = BranchSpec(site, "default", "linear", 3, 4, False, 2, 1.0, is_parameter=is_parameter)
    assert spec.owner == owner


def test_sizes() -> None:
    for layer in (nn.Linear(3, 5), Conv1D(5, 3)):
        spec = spec_of(layer, r=2)
        assert part_shapes(spec) == {"lora_A": (2, 3), "lora_B": (5, 2)}
        assert spec.num_parameters == 2 * 3 + 5 * 2


# ---- initial values ----


@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Linear(3, 9, bias=False), Conv1D(5, 7)], ids=str)
def test_initial_values_are_pefts_bit_for_bit(layer: nn.Module, init: bool | str) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["0", "1"], init_lora_weights=init, fan_in_fan_out=isinstance(layer, Conv1D)
    )
    torch.manual_seed(11)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(layer)), config).base_model.model
    after = torch.rand(3)
    torch.manual_seed(11)
    ours = [LINEAR.init(spec_of(layer, r=4, init=init)) for _ in theirs]
    assert torch.equal(torch.rand(3), after)  # the generator goes on alike
    for factor, wrapped in zip(ours, theirs, strict=True):
        for name in (FACTOR_A, FACTOR_B):
            assert factor[name].dtype == torch.float32
            assert torch.equal(factor[name], getattr(wrapped, name)["default"].weight), name


def test_b_starts_at_zero_unless_init_is_false() -> None:
    layer = nn.Linear(64, 48)
    values = {init: LINEAR.init(spec_of(layer, r=16, init=init)) for init in (True, "gaussian", False)}
    assert {init: bool(each[FACTOR_B].any()) for init, each in values.items()} == {
        True: False,
        "gaussian": False,
        False: True,
    }
    assert values[True][FACTOR_A].abs().max() <= 1 / 8  # kaiming: within 1 / sqrt(in)
    assert values["gaussian"][FACTOR_A].std().item() == pytest.approx(1 / 16, rel=0.1)


def test_meta_device_draws_nothing() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        drawn = LINEAR.init(spec_of(nn.Linear(3, 4)))
    assert {name: tuple(each.shape) for name, each in drawn.items()} == {"lora_A": (2, 3), "lora_B": (4, 2)}
    assert all(each.is_meta for each in drawn.values())
    assert torch.equal(torch.get_rng_state(), before)


# ---- the fold beside the branch ----


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T


class BareTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@pytest.mark.parametrize("dtype", ["base", "adapter"])
@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4, bias=False)), nn.Sequential(Conv1D(4, 3)), Bare(), BareTransposed()],
    ids=["Linear", "without bias", "Conv1D", "bare", "bare, transposed"],
)  # fmt: skip
def test_branch_equals_fold(model: nn.Module, capture: str, dtype: BranchDtype) -> None:
    model = copy.deepcopy(model).double()  # adapters are registered in it
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    region = region_of(model) if capture == "symbolic" else exported(model, x)
    (spec,) = adapt(region, r=2, scaling=0.75, dtype=torch.float64)
    base = run(region, x)
    insert(region, spec, dtype=dtype)
    live = run(region, x)
    (weight,) = [parameter for name, parameter in model.named_parameters() if name in ("0.weight", "w")]
    delta = deltas(spec, torch.empty(0), factors(model, spec))["weight"]
    assert delta.dtype == torch.float64 and delta.shape == weight.shape
    with torch.no_grad():
        weight += delta
    torch.testing.assert_close(model(x), live, rtol=1e-13, atol=1e-13)
    assert (live - base).abs().max() > 0.01


sizes = st.integers(1, 6)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(sizes, sizes, sizes, st.booleans(), st.floats(-4, 4), st.integers(0, 2**32))
def test_delta(fan_in: int, fan_out: int, r: int, transposed: bool, scaling: float, seed: int) -> None:
    torch.manual_seed(seed)
    spec = BranchSpec("fc", "default", "linear", fan_in, fan_out, transposed, r, scaling)
    parts = {name: torch.randn(shape) for name, shape in part_shapes(spec).items()}
    before = {name: part.clone() for name, part in parts.items()}
    delta = deltas(spec, torch.empty(0), parts)["weight"]
    expected = torch.einsum(
        "or,ri->io" if transposed else "or,ri->oi", parts["lora_B"].double(), parts["lora_A"].double()
    )
    torch.testing.assert_close(delta, scaling * expected, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(parts[name], before[name]) for name in parts)


def test_delta_of_half_precision_factors_is_computed_in_float64() -> None:
    spec = spec_of(nn.Linear(3, 4))
    parts = {name: torch.randn(shape).bfloat16() for name, shape in part_shapes(spec).items()}
    exact = {name: part.double() for name, part in parts.items()}
    assert torch.equal(*(deltas(spec, torch.empty(0), each)["weight"] for each in (parts, exact)))


def test_build_adds_nodes_only_where_it_is_told() -> None:
    region = region_of(nn.Sequential(nn.Linear(3, 4)))
    adapt(region)
    (site,) = find_sites(region)
    with region.graph.inserting_after(site.node):
        mark = region.graph.call_function(torch.relu, (site.node,))
    with region.graph.inserting_before(mark):
        result = build_branch(region.graph, site, Branch("0", "default"), "base")
    order = list(region.graph.nodes)
    built = [node for node in order if lora_meta(node) is not None]
    assert order.index(site.node) < order.index(built[0]) and built[-1].next is mark
    assert isinstance(result, fx.Node) and result.target is torch.mul
    assert list(site.node.users) == [region.graph.output_node(), mark]  # the caller decides about the users
