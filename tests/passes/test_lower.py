"""`lower`: what is a layer with a branch in graphs of Dynamo's and of regions, what is left alone, and equal numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.base import SELF_CALL, Instance, Region, copy_graph
from passes.lower import LowerBranches, functional_base, lower
from passes.printer import print_graph
from tests.passes.helpers import TwoLayers, adapt, exported, insert, region_of, run
from tests.passes.lowered import branched, captured, linears, parameters, targets, write

assert_expected_inline = pytest.importorskip("expecttest").assert_expected_inline

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def canonical(x: Tensor, *layer: Any) -> Tensor:
    return branched(x, *layer)


def own_dropout_before(x: Tensor, *layer: Any) -> Tensor:
    """The layer's input is the output of a dropout that is no branch's."""
    return branched(F.dropout(x, 0.5, training=False), *layer)


def reads_of_dtype_and_shape(x: Tensor, *layer: Any) -> Tensor:
    y = branched(x, *layer)
    return y.to(y.dtype).view(y.shape[0], -1)


def sum_the_other_way(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return F.linear(F.linear(x, A), B) * scale + F.linear(x, W, bias)


def sum_in_place(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    y = F.linear(x, W, bias)
    y += F.linear(F.linear(x, A), B) * scale
    return y


def two_adapters(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """The second stays as it is."""
    y = F.linear(x, W, bias)
    s = torch.mul(F.linear(F.linear(x, A), B), scale)
    t = torch.mul(F.linear(F.linear(x, A), B), scale)
    return torch.add(torch.add(y, s), t).to(y.dtype)


def by_keywords(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    a = F.linear(input=F.dropout(input=x, p=0.0), weight=A)
    return F.linear(input=x, weight=W, bias=bias) + F.linear(a, weight=B) * scale


LOWERED = [
    canonical,
    own_dropout_before,
    reads_of_dtype_and_shape,
    sum_the_other_way,
    sum_in_place,
    two_adapters,
    by_keywords,
]


@pytest.mark.parametrize("function", LOWERED)
def test_lowered(function: Callable[..., Any]) -> None:
    found = captured(function, X, *parameters()[0])
    graph, count = found.lowered()
    assert count == len(targets(graph, linears)) == 1
    for one, two in zip(found.run(graph), found.run(found.gm.graph), strict=True):
        torch.testing.assert_close(one, two)


def plain(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, W, bias)


def bias_of_the_branch(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, W, bias) + F.linear(F.linear(x, A), B, bias) * scale


def scaled_by_a_constant(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, W, bias) + F.linear(F.linear(x, A), B) * 2.0


def scaled_by_feature(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """As DoRA scales."""
    return F.linear(x, W, bias) + F.linear(F.linear(x, A), B) * bias


def scaled_in_the_middle(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, W, bias) + F.linear(F.linear(x, A) * scale, B)


def not_scaled(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, W, bias) + F.linear(F.linear(x, A), B)


def x_in_the_dtype_of_the_factors(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    y = F.linear(x, W, bias)
    s = torch.mul(F.linear(F.linear(x.to(torch.float64), A.double()), B.double()), scale)
    return torch.add(y, s).to(y.dtype)


def another_reader_of_y(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Any:
    y = F.linear(x, W, bias)
    return y + F.linear(F.linear(x, A), B) * scale, y.relu()


def another_reader_of_a(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Any:
    a = F.linear(x, A)
    return F.linear(x, W, bias) + F.linear(a, B) * scale, a


def another_input(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, W, bias) + F.linear(F.linear(x.relu(), A), B) * scale


def weighted_sum(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    return torch.add(F.linear(x, W, bias), F.linear(F.linear(x, A), B) * scale, alpha=2)


def x_written_between(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    y = F.linear(x, W, bias)
    x.add_(1)
    return y + F.linear(F.linear(x, A), B) * scale


def autocast_between(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, W, bias)
    return y + F.linear(F.linear(x, A), B) * scale


def dropout_in_place(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    y = F.linear(x, W, bias)
    return y + F.linear(F.linear(F.dropout(x, 0.5, training=True, inplace=True), A), B) * scale


def product_of_matrices(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """As transformers' Conv1D computes."""
    return torch.addmm(bias, x, W.t()) + F.linear(F.linear(x, A), B) * scale


LEFT_ALONE = [
    *(plain, bias_of_the_branch, scaled_by_a_constant, scaled_by_feature, scaled_in_the_middle, not_scaled),
    *(x_in_the_dtype_of_the_factors, another_reader_of_y, another_reader_of_a, another_input, weighted_sum),
    *(x_written_between, autocast_between, dropout_in_place, product_of_matrices),
]


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_left_alone(function: Callable[..., Any]) -> None:
    found = captured(function, X, *parameters()[0])
    before = str(found.gm.graph)
    graph, count = found.lowered()
    assert count == 0 and str(graph) == before


def test_layers_one_behind_the_other() -> None:
    """The second reads the first's result itself, which is another node after lowering."""

    def chain(x: Tensor, first: list[Any], second: list[Any]) -> Tensor:
        return branched(branched(x, *first), *second)

    first, second = parameters(1, 3, 4)[0], parameters(1, 4, 2)[0]
    found = captured(chain, X, first, second)
    graph, count = found.lowered()
    assert count == 2
    torch.testing.assert_close(found.run(graph), found.run(found.gm.graph))


def test_factors_below_their_casts() -> None:
    """The operator gets the factors as they are registered; a move to another device stays where it is."""
    W, bias, A, B, scale = parameters(dtype=torch.float64)[0]

    def moved(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, W, bias) + F.linear(F.linear(x, A.to("cpu")), B) * scale

    for function, factors, cast in ((canonical, (A, B), False), (moved, (A.float(), B.float()), True)):
        found = captured(function, X, W, bias, *factors, scale)
        graph, count = found.lowered()
        (call,) = targets(graph, linears)
        assert count == 1 and (call.args[3][0].op == "call_method") is cast
        torch.testing.assert_close(found.run(graph), found.run(found.gm.graph))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_is_told_to_the_writer(p: float) -> None:
    def dropping(x: Tensor, *layer: Any) -> Tensor:
        return branched(x, *layer, p=p)

    graph, count = captured(dropping, X, *parameters()[0]).lowered()
    (call,) = targets(graph, linears)
    assert count == 1 and call.args[6] == p and (call.args[7] is not None) is bool(p)
    assert not targets(graph, F.dropout)


def test_dropout_of_a_region() -> None:
    region = region_with_branches(dropout=0.25)
    assert LowerBranches(write).run(region).modified
    assert [call.args[6] for call in targets(region.graph, linears)] == [0.5, 0.5]  # what the writer makes of any
    assert not [node for node in region.graph.nodes if "lora_dropout" in str(node.target)]


def region_with_branches(**options: Any) -> Region:
    region = region_of(TwoLayers())
    insert(region, *adapt(region, **options))
    return region


def test_a_region() -> None:
    region = region_with_branches()
    found = LowerBranches(write).run(region)
    assert found.modified and found.summary == "2 layers are one operator each"
    region.graph.lint()
    assert_expected_inline(
        print_graph(region.graph),
        """\
  x                = input
+ fc1_lora_A       = self.fc1.lora_A.default.weight
+ fc1_lora_B       = self.fc1.lora_B.default.weight
+ fc1_lora_scaling = self.fc1.lora_scaling.default()
  fc1_weight       = self.fc1.weight
  fc1_bias         = self.fc1.bias
  linears          = linears(x, [fc1_weight], [fc1_bias], [fc1_lora_A], [fc1_lora_B], [fc1_lora_scaling], 0.0, None)
  getitem          = getitem(linears, 0)
  relu             = relu(getitem)
+ fc2_lora_A       = self.fc2.lora_A.default.weight
+ fc2_lora_B       = self.fc2.lora_B.default.weight
+ fc2_lora_scaling = self.fc2.lora_scaling.default()
  fc2_weight       = self.fc2.weight
  fc2_bias         = self.fc2.bias
  linears_1        = linears(relu, [fc2_weight], [fc2_bias], [fc2_lora_A], [fc2_lora_B], [fc2_lora_scaling], 0.0, None)
  getitem_1        = getitem(linears_1, 0)
  return getitem_1""",
    )


def test_a_copy_is_lowered_and_the_canonical_graph_stays() -> None:
    region = region_with_branches()
    before = print_graph(region.graph)
    right = run(region, X)
    copy = Region(copy_graph(region.graph), region.instances)
    assert LowerBranches(write).run(copy).modified
    torch.testing.assert_close(run(copy, X), right)
    assert print_graph(region.graph) == before
    assert not LowerBranches(write).run(copy).modified  # a second time changes nothing


def test_an_exported_region() -> None:
    region = exported(TwoLayers(), X)
    insert(region, *adapt(region))
    right = run(region, X)
    assert LowerBranches(write).run(region).summary == "2 layers are one operator each"
    region.graph.lint()
    torch.testing.assert_close(run(region, X), right)


def test_nothing_without_branches() -> None:
    region = region_of(TwoLayers())
    before = print_graph(region.graph)
    assert not LowerBranches(write).run(region).modified
    assert print_graph(region.graph) == before


def test_branches_with_another_arithmetic_stay() -> None:
    region = region_of(TwoLayers())
    insert(region, *adapt(region), dtype="adapter")
    before = print_graph(region.graph)
    assert not LowerBranches(write).run(region).modified
    assert print_graph(region.graph) == before


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_that_do_more_than_a_linear_stay() -> None:
    """A forward hook, or a forward of a subclass: the operator would not run it."""
    for model in (TwoLayers(), TwoLayers()):
        region = region_of(model)
        insert(region, *adapt(region))
        model.fc1.register_forward_hook(lambda module, args, output: 2 * output)
        right = run(region, X)
        assert LowerBranches(write).run(region).summary == "1 layers are one operator each"
        torch.testing.assert_close(run(region, X), right)
    model = TwoLayers()
    model.fc2 = _Doubled(4, 2)
    region = region_of(model)
    insert(region, *adapt(region, "fc1"))
    assert LowerBranches(write).run(region).summary == "1 layers are one operator each"


def template(*layers: nn.Linear) -> Region:
    """The graph that modules capture makes of one layer, and the layers that run it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module(SELF_CALL, (x,)))
    return Region(graph, tuple(Instance(f"fc{index}", layer) for index, layer in enumerate(layers)))


def test_a_template() -> None:
    layers = nn.Linear(3, 4), nn.Linear(3, 4)
    region = template(*layers)
    insert(region, *adapt(region))
    assert LowerBranches(write).run(region).modified
    (call,) = targets(region.graph, linears)
    assert [call.args[1][0].target, call.args[2][0].target] == ["weight", "bias"]


def test_functional_base() -> None:
    graph = fx.Graph()
    x, W = graph.placeholder("x"), graph.placeholder("W")
    assert functional_base(x) is None
    assert functional_base(graph.call_function(torch.relu, (x,))) is None
    assert functional_base(graph.call_function(F.linear, (x, 3))) is None
    node = graph.call_function(torch.ops.aten.linear.default, (x, W))
    found = functional_base(node)
    assert found is not None and (found.x, found.weight, found.bias) == (x, W, None)
    assert lower(graph, functional_base, write) == 0
