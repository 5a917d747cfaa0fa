"""`insert-branches`: the canonical form as text and as numbers, no change without branches, and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from passes.base import SELF_CALL, Instance, PassResult, Region
from passes.branches import BranchSpec
from passes.branches.base import Branch, BranchDtype
from passes.errors import PassError
from passes.insert import InsertBranches
from passes.nodes import LoraMeta, lora_meta
from passes.printer import print_graph
from tests.passes.helpers import TwoLayers, adapt, exported, insert, region_of, run

assert_expected_inline = pytest.importorskip("expecttest").assert_expected_inline


def show(region: Region, text: str) -> None:
    region.graph.lint()
    assert_expected_inline(print_graph(region.graph), text, skip=1)


def expected(x: Tensor, layer: nn.Linear, *specs: BranchSpec) -> Tensor:
    """The layer with its branches, by the formula."""
    y = F.linear(x, layer.weight, layer.bias)
    for spec in specs:
        factors = (layer.get_parameter(f"lora_{name}.{spec.adapter}.weight") for name in "AB")
        y = y + spec.scaling * (x @ next(factors).T @ next(factors).T)
    return y


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def test_before() -> None:
    show(
        region_of(TwoLayers()),
        """\
  x    = input
  fc1  = self.fc1(x)
  relu = relu(fc1)
  fc2  = self.fc2(relu)
  return fc2""",
    )


def test_base_dtype() -> None:
    model = TwoLayers()
    region = region_of(model)
    (spec,) = adapt(region, "fc1")
    insert(region, spec)
    show(
        region,
        """\
  x                = input
  fc1              = self.fc1(x)
+ fc1_lora_A       = self.fc1.lora_A.default.weight
+ fc1_lora_B       = self.fc1.lora_B.default.weight
+ fc1_lora_dtype   = x.dtype
+ fc1_lora_A_1     = fc1_lora_A.to(fc1_lora_dtype)
+ fc1_lora_B_1     = fc1_lora_B.to(fc1_lora_dtype)
+ fc1_lora_a       = linear(x, fc1_lora_A_1)
+ fc1_lora_b       = linear(fc1_lora_a, fc1_lora_B_1)
+ fc1_lora_scaling = self.fc1.lora_scaling.default()
+ fc1_lora_s       = mul(fc1_lora_b, fc1_lora_scaling)
+ fc1_lora_y       = add(fc1, fc1_lora_s)
+ fc1_lora_dtype_1 = fc1.dtype
+ fc1_lora_y_1     = fc1_lora_y.to(fc1_lora_dtype_1)
  relu             = relu(fc1_lora_y_1)
  fc2              = self.fc2(relu)
  return fc2""",
    )
    torch.testing.assert_close(run(region, X), model.fc2(torch.relu(expected(X, model.fc1, spec))))


def test_adapter_dtype() -> None:
    model = TwoLayers()
    region = region_of(model)
    (spec,) = adapt(region, "fc1")
    insert(region, spec, dtype="adapter")
    show(
        region,
        """\
  x                = input
  fc1              = self.fc1(x)
+ fc1_lora_A       = self.fc1.lora_A.default.weight
+ fc1_lora_B       = self.fc1.lora_B.default.weight
+ fc1_lora_dtype   = fc1_lora_A.dtype
+ fc1_lora_x       = x.to(fc1_lora_dtype)
+ fc1_lora_a       = linear(fc1_lora_x, fc1_lora_A)
+ fc1_lora_b       = linear(fc1_lora_a, fc1_lora_B)
+ fc1_lora_scaling = self.fc1.lora_scaling.default()
+ fc1_lora_s       = mul(fc1_lora_b, fc1_lora_scaling)
+ fc1_lora_y       = add(fc1, fc1_lora_s)
+ fc1_lora_dtype_1 = fc1.dtype
+ fc1_lora_y_1     = fc1_lora_y.to(fc1_lora_dtype_1)
  relu             = relu(fc1_lora_y_1)
  fc2              = self.fc2(relu)
  return fc2""",
    )
    torch.testing.assert_close(run(region, X), model.fc2(torch.relu(expected(X, model.fc1, spec))))


def test_dropout_comes_after_the_cast() -> None:
    model = TwoLayers()
    region = region_of(model)
    (spec,) = adapt(region, "fc2", dropout=0.5)
    insert(region, spec, dtype="adapter")
    show(
        region,
        """\
  x                = input
  fc1              = self.fc1(x)
  relu             = relu(fc1)
  fc2              = self.fc2(relu)
+ fc2_lora_A       = self.fc2.lora_A.default.weight
+ fc2_lora_B       = self.fc2.lora_B.default.weight
+ fc2_lora_dtype   = fc2_lora_A.dtype
+ fc2_lora_x       = relu.to(fc2_lora_dtype)
+ fc2_lora_dropout = self.fc2.lora_dropout.default(fc2_lora_x)
+ fc2_lora_a       = linear(fc2_lora_dropout, fc2_lora_A)
+ fc2_lora_b       = linear(fc2_lora_a, fc2_lora_B)
+ fc2_lora_scaling = self.fc2.lora_scaling.default()
+ fc2_lora_s       = mul(fc2_lora_b, fc2_lora_scaling)
+ fc2_lora_y       = add(fc2, fc2_lora_s)
+ fc2_lora_dtype_1 = fc2.dtype
+ fc2_lora_y_1     = fc2_lora_y.to(fc2_lora_dtype_1)
  return fc2_lora_y_1""",
    )
    found = run(region, X)
    torch.manual_seed(3)
    assert not torch.equal(run(region, X), found)
    model.fc2.lora_dropout.eval()
    torch.testing.assert_close(run(region, X), expected(torch.relu(model.fc1(X)), model.fc2, spec))


def test_two_adapters_are_two_branches_and_one_cast() -> None:
    model = TwoLayers()
    region = region_of(model)
    (one,) = adapt(region, "fc2", adapter="one")
    (two,) = adapt(region, "fc2", adapter="two", r=1, scaling=-3.0)
    insert(region, one, two)
    show(
        region,
        """\
  x                  = input
  fc1                = self.fc1(x)
  relu               = relu(fc1)
  fc2                = self.fc2(relu)
+ fc2_lora_A         = self.fc2.lora_A.one.weight
+ fc2_lora_B         = self.fc2.lora_B.one.weight
+ fc2_lora_dtype     = relu.dtype
+ fc2_lora_A_1       = fc2_lora_A.to(fc2_lora_dtype)
+ fc2_lora_B_1       = fc2_lora_B.to(fc2_lora_dtype)
+ fc2_lora_a         = linear(relu, fc2_lora_A_1)
+ fc2_lora_b         = linear(fc2_lora_a, fc2_lora_B_1)
+ fc2_lora_scaling   = self.fc2.lora_scaling.one()
+ fc2_lora_s         = mul(fc2_lora_b, fc2_lora_scaling)
+ fc2_lora_y         = add(fc2, fc2_lora_s)
+ fc2_lora_A_2       = self.fc2.lora_A.two.weight
+ fc2_lora_B_2       = self.fc2.lora_B.two.weight
+ fc2_lora_dtype_1   = relu.dtype
+ fc2_lora_A_3       = fc2_lora_A_2.to(fc2_lora_dtype_1)
+ fc2_lora_B_3       = fc2_lora_B_2.to(fc2_lora_dtype_1)
+ fc2_lora_a_1       = linear(relu, fc2_lora_A_3)
+ fc2_lora_b_1       = linear(fc2_lora_a_1, fc2_lora_B_3)
+ fc2_lora_scaling_1 = self.fc2.lora_scaling.two()
+ fc2_lora_s_1       = mul(fc2_lora_b_1, fc2_lora_scaling_1)
+ fc2_lora_y_1       = add(fc2_lora_y, fc2_lora_s_1)
+ fc2_lora_dtype_2   = fc2.dtype
+ fc2_lora_y_2       = fc2_lora_y_1.to(fc2_lora_dtype_2)
  return fc2_lora_y_2""",
    )
    torch.testing.assert_close(run(region, X), expected(torch.relu(model.fc1(X)), model.fc2, one, two))


def test_one_layer_feeding_another() -> None:
    """The second branch must read the first layer's new output."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    region = region_of(model)
    first, second = adapt(region)
    insert(region, first, second)
    show(
        region,
        """\
  input_1         = input
  _0              = self.0(input_1)
+ _0_lora_A       = self.0.lora_A.default.weight
+ _0_lora_B       = self.0.lora_B.default.weight
+ _0_lora_dtype   = input_1.dtype
+ _0_lora_A_1     = _0_lora_A.to(_0_lora_dtype)
+ _0_lora_B_1     = _0_lora_B.to(_0_lora_dtype)
+ _0_lora_a       = linear(input_1, _0_lora_A_1)
+ _0_lora_b       = linear(_0_lora_a, _0_lora_B_1)
+ _0_lora_scaling = self.0.lora_scaling.default()
+ _0_lora_s       = mul(_0_lora_b, _0_lora_scaling)
+ _0_lora_y       = add(_0, _0_lora_s)
+ _0_lora_dtype_1 = _0.dtype
+ _0_lora_y_1     = _0_lora_y.to(_0_lora_dtype_1)
  _1              = self.1(_0_lora_y_1)
+ _1_lora_A       = self.1.lora_A.default.weight
+ _1_lora_B       = self.1.lora_B.default.weight
+ _1_lora_dtype   = _0_lora_y_1.dtype
+ _1_lora_A_1     = _1_lora_A.to(_1_lora_dtype)
+ _1_lora_B_1     = _1_lora_B.to(_1_lora_dtype)
+ _1_lora_a       = linear(_0_lora_y_1, _1_lora_A_1)
+ _1_lora_b       = linear(_1_lora_a, _1_lora_B_1)
+ _1_lora_scaling = self.1.lora_scaling.default()
+ _1_lora_s       = mul(_1_lora_b, _1_lora_scaling)
+ _1_lora_y       = add(_1, _1_lora_s)
+ _1_lora_dtype_1 = _1.dtype
+ _1_lora_y_1     = _1_lora_y.to(_1_lora_dtype_1)
  return _1_lora_y_1""",
    )
    torch.testing.assert_close(run(region, X), expected(expected(X, model[0], first), model[1], second))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))


def test_layer_called_twice_has_its_branch_at_both_calls() -> None:
    model = Twice()
    region = region_of(model)
    (spec,) = adapt(region)
    branch = Branch("fc", "default")
    result = InsertBranches((branch,)).run(region)
    assert result == PassResult(True, "1 branches at 2 calls")
    assert [lora_meta(node).call for node in region.graph.nodes if node.target is torch.mul] == [0, 1]
    torch.testing.assert_close(run(region, X), expected(expected(X, model.fc, spec), model.fc, spec))


class Functional(nn.Module):
    """A bare weight, used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = x @ self.w.T
        return {"y": y, "sum": y + y}


def test_bare_weight_and_all_of_its_users() -> None:
    model = Functional()
    region = region_of(model)
    (spec,) = adapt(region)
    insert(region, spec)
    show(
        region,
        """\
  x              = input
  w              = self.w
  getattr_1      = w.T
  matmul         = matmul(x, getattr_1)
+ w_lora_A       = self.lora_parameters.w.lora_A.default.weight
+ w_lora_B       = self.lora_parameters.w.lora_B.default.weight
+ w_lora_dtype   = x.dtype
+ w_lora_A_1     = w_lora_A.to(w_lora_dtype)
+ w_lora_B_1     = w_lora_B.to(w_lora_dtype)
+ w_lora_a       = linear(x, w_lora_A_1)
+ w_lora_b       = linear(w_lora_a, w_lora_B_1)
+ w_lora_scaling = self.lora_parameters.w.lora_scaling.default()
+ w_lora_s       = mul(w_lora_b, w_lora_scaling)
+ w_lora_y       = add(matmul, w_lora_s)
+ w_lora_dtype_1 = matmul.dtype
+ w_lora_y_1     = w_lora_y.to(w_lora_dtype_1)
  add            = add(w_lora_y_1, w_lora_y_1)
  return {y: w_lora_y_1, sum: add}""",
    )
    factors = model.lora_parameters.w
    delta = spec.scaling * factors.lora_B["default"].weight @ factors.lora_A["default"].weight
    found = run(region, X)
    torch.testing.assert_close(found["y"], X @ (model.w + delta).T)
    assert torch.equal(found["sum"], 2 * found["y"])


def test_exported_graph() -> None:
    model = TwoLayers()
    region = exported(model, X)
    (spec,) = adapt(region, "fc2")
    insert(region, spec)
    show(
        region,
        """\
  fc1_weight       = self.fc1.weight   # float32 [4, 3]
  fc1_bias         = self.fc1.bias   # float32 [4]
  fc2_weight       = self.fc2.weight   # float32 [2, 4]
  fc2_bias         = self.fc2.bias   # float32 [2]
  x                = input   # float32 [5, 3]
  linear           = linear.default(x, fc1_weight, fc1_bias)   # float32 [5, 4]
  relu             = relu.default(linear)   # float32 [5, 4]
  linear_1         = linear.default(relu, fc2_weight, fc2_bias)   # float32 [5, 2]
+ fc2_lora_A       = self.fc2.lora_A.default.weight
+ fc2_lora_B       = self.fc2.lora_B.default.weight
+ fc2_lora_dtype   = relu.dtype
+ fc2_lora_A_1     = fc2_lora_A.to(fc2_lora_dtype)
+ fc2_lora_B_1     = fc2_lora_B.to(fc2_lora_dtype)
+ fc2_lora_a       = linear(relu, fc2_lora_A_1)
+ fc2_lora_b       = linear(fc2_lora_a, fc2_lora_B_1)
+ fc2_lora_scaling = self.fc2.lora_scaling.default()
+ fc2_lora_s       = mul(fc2_lora_b, fc2_lora_scaling)
+ fc2_lora_y       = add(linear_1, fc2_lora_s)
+ fc2_lora_dtype_1 = linear_1.dtype
+ fc2_lora_y_1     = fc2_lora_y.to(fc2_lora_dtype_1)
  return (fc2_lora_y_1,)""",
    )
    torch.testing.assert_close(run(region, X), expected(torch.relu(model.fc1(X)), model.fc2, spec))


def test_transposed_layer() -> None:
    layer = Conv1D(4, 3)
    region = region_of(nn.Sequential(layer))
    (spec,) = adapt(region)
    insert(region, spec)
    delta = spec.scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(run(region, X), X @ (layer.weight + delta.T) + layer.bias)


def test_template() -> None:
    graph = fx.Graph()
    graph.output(graph.call_module(SELF_CALL, (graph.placeholder("input"),)))
    region = Region(graph, (Instance("h.0.fc", nn.Linear(3, 4)), Instance("h.1.fc", nn.Linear(5, 6))))
    InsertBranches((Branch("", "default"),)).run(region)
    show(
        region,
        """\
  input_1      = input
  base_forward = self.base_forward(input_1)
+ lora_A       = self.lora_A.default.weight
+ lora_B       = self.lora_B.default.weight
+ lora_dtype   = input_1.dtype
+ lora_A_1     = lora_A.to(lora_dtype)
+ lora_B_1     = lora_B.to(lora_dtype)
+ lora_a       = linear(input_1, lora_A_1)
+ lora_b       = linear(lora_a, lora_B_1)
+ lora_scaling = self.lora_scaling.default()
+ lora_s       = mul(lora_b, lora_scaling)
+ lora_y       = add(base_forward, lora_s)
+ lora_dtype_1 = base_forward.dtype
+ lora_y_1     = lora_y.to(lora_dtype_1)
  return lora_y_1""",
    )


# ---- dtypes ----


@pytest.mark.parametrize("dtype", ["base", "adapter"])
@pytest.mark.parametrize("base", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [torch.float64, torch.float32, torch.bfloat16])
def test_output_keeps_the_base_dtype(dtype: BranchDtype, base: torch.dtype, factors: torch.dtype) -> None:
    region = region_of(TwoLayers().to(base))
    insert(region, *adapt(region, dtype=factors), dtype=dtype)
    x = X.to(base).requires_grad_()
    y = run(region, x)
    assert y.dtype == base
    y.sum().backward()
    for name, parameter in region.module.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name


def test_branch_dtype_decides_where_it_is_computed() -> None:
    """Of a bfloat16 base with float32 factors: `adapter` keeps digits in the branch that `base` rounds away."""
    model = nn.Sequential(nn.Linear(3, 4)).bfloat16()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    seen: dict[str, Tensor] = {}
    for dtype in ("base", "adapter"):
        region = region_of(model)
        (spec,) = adapt(region)
        insert(region, spec, dtype=dtype)
        (s,) = [node for node in region.graph.nodes if node.target is torch.mul]
        region.graph.output_node().args = (s,)
        seen[dtype] = run(region, X.bfloat16())
    assert {name: value.dtype for name, value in seen.items()} == {"base": torch.bfloat16, "adapter": torch.float32}


@pytest.mark.parametrize("dtype", ["base", "adapter"])
def test_zero_b_changes_no_bit(dtype: BranchDtype) -> None:
    model = TwoLayers().bfloat16()
    region = region_of(model)
    x = X.bfloat16()
    before = run(region, x)
    insert(region, *adapt(region), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    assert torch.equal(run(region, x), before)


def test_scale_is_read_and_not_a_constant() -> None:
    region = region_of(TwoLayers())
    base = run(region, X)
    (spec,) = adapt(region, "fc2")
    insert(region, spec)
    module = fx.GraphModule(region.module, region.graph)
    before = module(X) - base
    region.module.fc2.lora_scaling["default"].value = 3 * spec.scaling
    torch.testing.assert_close(module(X) - base, 3 * before)


# ---- metadata ----


def test_metadata() -> None:
    region = exported(TwoLayers(), X)
    (one,) = adapt(region, "fc1", adapter="one", dropout=0.1)
    (two,) = adapt(region, "fc1", adapter="two")
    base_nodes = list(region.graph.nodes)
    insert(region, one, two)
    assert all(lora_meta(node) is None for node in base_nodes)
    inserted = [node for node in region.graph.nodes if node not in base_nodes]
    assert {(lora_meta(node).site, lora_meta(node).call) for node in inserted} == {("fc1", 0)}
    roles = [(lora_meta(node).adapter, lora_meta(node).role) for node in inserted]
    assert roles == [
        *(("one", role) for role in ("A", "B", "lora_dropout", "dtype", "A", "B", "a", "b", "lora_scaling", "s")),
        ("", "y"),
        *(("two", role) for role in ("A", "B", "dtype", "A", "B", "a", "b", "lora_scaling", "s")),
        *(("", "y"), ("", "dtype"), ("", "y")),
    ]
    (site,) = [node for node in base_nodes if node.name == "linear"]
    assert all(node.meta["nn_module_stack"] == site.meta["nn_module_stack"] for node in inserted)
    assert all("val" not in node.meta for node in inserted)


def test_lora_meta_of_a_base_node() -> None:
    assert lora_meta(fx.Graph().placeholder("x")) is None
    node = fx.Graph().placeholder("x")
    node.meta["lora"] = LoraMeta("fc", 0, "default", "a")
    assert lora_meta(node) == LoraMeta("fc", 0, "default", "a")


# ---- no change, and refusals ----


def test_no_branches_no_change() -> None:
    region = region_of(TwoLayers())
    before = print_graph(region.graph)
    assert not InsertBranches(()).run(region).modified
    assert print_graph(region.graph) == before


def test_unknown_site() -> None:
    with pytest.raises(PassError, match=r"no call of 'fc3' in the graph. Did you mean 'fc\d' or 'fc\d'\?"):
        InsertBranches((Branch("fc3", "default"),)).run(region_of(TwoLayers()))


def test_site_that_is_never_called() -> None:
    model = TwoLayers()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(PassError, match="no call of 'spare' in the graph"):
        InsertBranches((Branch("spare", "default"),)).run(region_of(model))


def test_branches_twice() -> None:
    region = region_of(TwoLayers())
    (spec,) = adapt(region, "fc1")
    insert(region, spec)
    with pytest.raises(PassError, match="^'fc1' already has branches; drop them first$"):
        insert(region, spec)


def test_a_factor_is_no_site() -> None:
    """The products with the factors are linear layers too, but not for other adapters."""
    region = region_of(TwoLayers())
    insert(region, *adapt(region, "fc1"))
    with pytest.raises(PassError, match="no call of 'fc1.lora_A.default' in the graph"):
        InsertBranches((Branch("fc1.lora_A.default", "other"),)).run(region)
