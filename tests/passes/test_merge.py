"""`merge-branches`: exact rounding, all weights or none, and refusals that change no bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from passes.base import PassResult, Region
from passes.branches import deltas
from passes.branches.base import BranchSpec
from passes.errors import MergeError
from passes.merge import MergeBranches, factors
from passes.printer import print_graph
from passes.sharing import check_not_shared
from passes.sites import base_weight
from tests.passes.helpers import TwoLayers, adapt, exported, insert, region_of, run
from tests.passes.test_exact import DTYPES, nearest, same_numbers

# ---- the pass ----

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = state(model)
    assert now.keys() == before.keys()
    for name, value in now.items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("capture", [region_of, lambda model: exported(model, X)], ids=["symbolic", "export"])
def test_merged_weights_compute_what_the_branches_did(capture: Callable[[nn.Module], Region]) -> None:
    model = TwoLayers()
    region = capture(model)
    specs = (*adapt(region, adapter="one", scaling=1.5), *adapt(region, "fc2", adapter="two", r=1))
    insert(region, *specs)
    live, text, before = run(region, X), print_graph(region.graph), state(model)
    originals: dict[str, Tensor] = {}
    assert MergeBranches(specs, originals).run(region) == PassResult(True, "2 weights")
    torch.testing.assert_close(model(X), live)
    assert print_graph(region.graph) == text  # only weights are changed
    assert originals.keys() == {"fc1.weight", "fc2.weight"}
    assert all(torch.equal(originals[name], before[name]) for name in originals)
    after = state(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == originals.keys()


def delta_of(model: nn.Module, spec: BranchSpec) -> Tensor:
    """The change of the weight that one branch folds to."""
    return deltas(spec, base_weight(model, spec.site)[1], factors(model, spec))["weight"]


@DTYPES
def test_merged_weight_is_rounded_once_from_float64(dtype: torch.dtype) -> None:
    model = TwoLayers().to(dtype)
    region = region_of(model)
    specs = (*adapt(region, "fc1", adapter="a", scaling=1 / 3), *adapt(region, "fc1", adapter="b", r=3, scaling=-2.0))
    weight = model.fc1.weight.detach().double()
    summands = [delta_of(model, spec) for spec in specs]
    MergeBranches(specs).run(region)
    exact = (weight + (summands[0] + summands[1])).flatten().tolist()
    same_numbers(model.fc1.weight.detach().flatten(), [nearest(Fraction(value), dtype) for value in exact])


def test_order_of_adapters_does_not_matter() -> None:
    """Not in a single bit, though a float64 sum depends on its order."""
    model = nn.Sequential(nn.Linear(64, 64)).double()
    region = region_of(model)
    specs = [
        adapt(region, adapter=name, scaling=10.0**exponent)[0]
        for name, exponent in zip("abcd", range(-4, 4, 2), strict=True)
    ]
    before = state(model)
    results = []
    for order in itertools.permutations(specs):
        originals: dict[str, Tensor] = {}
        MergeBranches(order, originals).run(region)
        results.append(model[0].weight.detach().clone())
        with torch.no_grad():
            model[0].weight.copy_(originals["0.weight"])
    unchanged(model, before)
    assert all(torch.equal(result, results[0]) for result in results)
    sums = [sum(delta_of(model, s) for s in order) for order in itertools.permutations(specs)]
    assert not all(torch.equal(each, sums[0]) for each in sums)  # the order would have mattered


def test_transposed_layer() -> None:
    layer = Conv1D(4, 3).double()
    region = region_of(nn.Sequential(layer))
    (spec,) = adapt(region, dtype=torch.float64)
    insert(region, spec)
    x = X.double()
    live = run(region, x)
    MergeBranches((spec,)).run(region)
    torch.testing.assert_close(region.module(x), live, rtol=1e-6, atol=1e-6)  # the live scale is a float32


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.to(x.dtype)).to(self.w.dtype)


def test_bare_parameter_that_is_cast() -> None:
    model = Functional()
    region = region_of(model)
    (spec,) = adapt(region)
    insert(region, spec)
    live = run(region, X)
    MergeBranches((spec,)).run(region)
    torch.testing.assert_close(model(X), live)
    assert base_weight(model, "w") == ("w", model.w)


def test_layer_called_twice_is_folded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    for region in (region_of(Twice()), exported(Twice(), X)):
        (spec,) = adapt(region)
        insert(region, spec)
        live = run(region, X)
        assert MergeBranches((spec,)).run(region).summary == "1 weights"
        torch.testing.assert_close(region.module(X), live)


def test_nothing_to_merge() -> None:
    model = TwoLayers()
    before = state(model)
    originals: dict[str, Tensor] = {}
    assert MergeBranches((), originals).run(region_of(model)) == PassResult(False, "0 weights")
    unchanged(model, before)
    assert not originals


def test_parameter_object_and_its_flags_stay() -> None:
    model = TwoLayers().requires_grad_(False)
    region = region_of(model)
    weight = model.fc1.weight
    version = weight._version
    MergeBranches(adapt(region)).run(region)
    assert model.fc1.weight is weight and not weight.requires_grad and weight.is_leaf
    assert weight._version > version  # written in place, so that views and optimizers see it


# ---- refusals ----


def refused(region: Region, specs: Sequence[BranchSpec], match: str) -> None:
    before, text = state(region.module), print_graph(region.graph)
    originals: dict[str, Tensor] = {}
    with pytest.raises(MergeError, match=match):
        MergeBranches(tuple(specs), originals).run(region)
    unchanged(region.module, before)
    assert not originals and print_graph(region.graph) == text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["fc2.lora_A.default.weight", "fc2.lora_B.default.weight"])
def test_broken_factor(name: str, bad: float) -> None:
    region = region_of(TwoLayers())
    specs = adapt(region)
    with torch.no_grad():
        region.module.get_parameter(name).view(-1)[1] = bad
    refused(region, specs, "^'fc2': .*NaN or infinite.* Adapter default is broken .*nothing was changed$")


def test_scaling_that_overflows() -> None:
    region = region_of(TwoLayers().half())
    specs = (*adapt(region, "fc1", adapter="good"), *adapt(region, "fc2", adapter="big", scaling=1e6))
    refused(region, specs, "^'fc2': .*Adapter big is broken or its scaling too large")


def test_tied_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    region = region_of(model)
    specs = adapt(region)
    refused(region, specs, "^'1': its weight is shared with '2.weight'.*tied=.*nothing was changed$")
    refused(region, specs[2:], "^'2': its weight is shared with '1.weight'")
    MergeBranches(specs[:1]).run(region)  # the layer that is not tied can be merged


def test_layer_tied_to_an_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    for region in (region_of(Tied()), exported(Tied(), torch.arange(5))):
        refused(region, adapt(region, "head"), "^'head': its weight is shared with 'embedding.weight'")
        refused(region, adapt(region, "embedding"), "^'embedding': its weight is shared with 'head.weight'")


def test_parameters_side_by_side_in_one_storage() -> None:
    """As cuDNN lays out the weights of recurrent layers: none changes another."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    together = torch.randn(18)
    for layer, part in zip(model, together.split(9), strict=True):
        layer.weight = nn.Parameter(part.view(3, 3))
    region = region_of(model)
    specs = adapt(region, "0")
    kept = model[1].weight.detach().clone()
    MergeBranches(specs).run(region)
    assert torch.equal(model[1].weight, kept)


def test_parameters_that_share_memory() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data.view(3, 3))
    region = region_of(model)
    refused(region, adapt(region)[:1], "^'0': its weight is shared with '1.weight'")


class Uses(nn.Module):
    """A layer, and one more use of its weight."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.v = nn.Parameter(torch.randn(3, 3))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.use(self, x)


OTHER_USES: dict[str, Callable[[Uses, Tensor], Tensor]] = {
    "a penalty": lambda m, x: (m.fc.weight**2).sum(),
    "a factor": lambda m, x: x * m.fc.weight[0],
    "as it is": lambda m, x: m.fc.weight.sum(),
    "the other side of a product": lambda m, x: x @ (m.fc.weight @ m.v),
    "the input of a linear": lambda m, x: F.linear(m.fc.weight, m.v),
    "the input of a linear, transposed": lambda m, x: m.fc.weight.T @ m.v,
    "the input of its own linear": lambda m, x: F.linear(m.fc.weight.T, m.fc.weight),
    "both sides": lambda m, x: F.linear(m.fc.weight, m.fc.weight),
    "embedding": lambda m, x: F.embedding(x.long() * 0, m.fc.weight).sum(1),
    "computed": lambda m, x: F.linear(x, m.fc.weight * 2),
    "casted, then computed": lambda m, x: F.linear(x, m.fc.weight.to(x.dtype).abs()),
    "changed in place": lambda m, x: x.add_(m.fc.weight[0]),
}


@pytest.mark.parametrize(
    "capture", [region_of, lambda model: exported(model, X[:3].clone())], ids=["symbolic", "export"]
)
@pytest.mark.parametrize("name", OTHER_USES)
def test_second_use_of_the_weight(name: str, capture: Callable[[nn.Module], Region]) -> None:
    region = capture(Uses(OTHER_USES[name]))
    refused(region, adapt(region, "fc"), "^'fc': its weight is shared with '.+', which a merge would change too")


HARMLESS: dict[str, Callable[[Uses, Tensor], Tensor]] = {
    "dtype": lambda m, x: x.to(m.fc.weight.dtype),
    "device": lambda m, x: x.to(m.fc.weight.device),
    "shape": lambda m, x: x * m.fc.weight.shape[0],
    "size()": lambda m, x: x * m.fc.weight.size(0) * m.fc.weight.dim(),
    "the same product": lambda m, x: F.linear(x, m.fc.weight),
    "the same product, transposed": lambda m, x: x @ m.fc.weight.T,
    "the same product, casted": lambda m, x: x @ m.fc.weight.to(x.dtype).T.type_as(x),
    "of another weight": lambda m, x: F.linear(x, m.v).abs() + m.v.sum(),
}


@pytest.mark.parametrize("capture", [region_of, lambda model: exported(model, X)], ids=["symbolic", "export"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_second_use(name: str, capture: Callable[[nn.Module], Region]) -> None:
    region = capture(Uses(HARMLESS[name]))
    (spec,) = adapt(region, "fc")
    insert(region, spec)
    live = run(region, X)
    assert MergeBranches((spec,)).run(region).modified
    torch.testing.assert_close(region.module(X), live)


def test_module_that_holds_the_weight_and_is_called_whole() -> None:
    """A leaf module of the graph reads its parameters out of sight."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0] + F.linear(x, self.attention.out_proj.weight)

    region = region_of(Net())
    refused(region, adapt(region), "^'attention.out_proj': its weight is shared with 'attention'")


def test_meta_weight() -> None:
    region = region_of(TwoLayers().to("meta"))
    originals: dict[str, Tensor] = {}
    with pytest.raises(MergeError, match="^'fc1': the weight is on the meta device; load real weights, then merge$"):
        MergeBranches(adapt(region), originals).run(region)
    assert not originals


def test_meta_weight_after_a_real_one() -> None:
    model = TwoLayers()
    model.fc2.to("meta")
    region = region_of(model)
    specs, before = adapt(region), model.fc1.weight.detach().clone()
    with pytest.raises(MergeError, match="'fc2': the weight is on the meta device"):
        MergeBranches(specs).run(region)
    assert torch.equal(model.fc1.weight, before)


def test_quantized_weight() -> None:
    model = TwoLayers()
    model.fc1.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    region = region_of(model)
    refused(region, adapt(region), "^'fc1': the weight is torch.int8; dequantize the layer, then merge$")


def test_parametrized_layer_beside_the_merged_one() -> None:
    """A weight that is computed by torch.nn.utils.parametrize is not a parameter, and is no one's business here."""
    model = nn.Sequential(nn.Linear(3, 3), weight_norm(nn.Linear(3, 3)))
    region = region_of(model)
    specs = adapt(region, "0")
    MergeBranches(specs).run(region)
    check_not_shared(region, specs)
