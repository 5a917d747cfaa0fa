"""DoRA's branch in graphs of Dynamo's and of regions: what is lowered, what is left alone, which layers share a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.base import Region, copy_graph
from passes.branches.dora import magnitude_ratio, rescale, without_bias
from passes.fuse_siblings import FuseSiblings, fuse_siblings
from passes.fuse_swiglu import FuseSwiglu, fuse_swiglu
from passes.lower import LowerBranches
from passes.printer import print_graph
from tests.passes.helpers import TwoLayers, adapt, exported, insert, region_of, run
from tests.passes.lowered import (
    captured,
    dora_parameters,
    dora_swiglu,
    doras,
    linears,
    rescaled,
    targets,
    without_biases,
    write,
)

assert_expected_inline = pytest.importorskip("expecttest").assert_expected_inline

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def canonical(x: Tensor, *layer: Any) -> Tensor:
    return rescaled(x, *layer)


def under_autocast(x: Tensor, *layer: Any) -> Tensor:
    """The norm is computed without it: in a context within the context."""
    with torch.autocast("cpu", torch.bfloat16):
        return rescaled(x, *layer)


def dropout_that_is_off(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, *_: Any
) -> Tensor:
    s = torch.mul(F.linear(F.linear(F.dropout(x, 0.5, training=False), A), B), scale)
    return _added(F.linear(x, W, bias), s, bias, W[:, 0])


def sums_the_other_way(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, *_: Any
) -> Tensor:
    y, s = F.linear(x, W, bias), torch.mul(F.linear(F.linear(x, A), B), scale)
    ratio = magnitude_ratio(W[:, 0], W[:, 1])
    less_one, factor = (ratio - 1).to(y.dtype).view(-1), ratio.to(y.dtype).view(-1)
    return (s * factor + without_bias(y, bias, -1) * less_one) + y


def _added(y: Tensor, s: Tensor, bias: Tensor | None, m: Tensor, removed: Tensor | None = None) -> Tensor:
    base = without_bias(y, bias if removed is None else removed, -1)
    return torch.add(y, rescale(s, base, magnitude_ratio(m, m + 2), -1)).to(y.dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("function", [canonical, under_autocast, dropout_that_is_off, sums_the_other_way])
def test_lowered(function: Callable[..., Any], bias: bool) -> None:
    found = captured(function, X, *dora_parameters(bias=bias)[0])
    graph, count = found.lowered()
    assert count == len(targets(graph, doras)) == 1 and not targets(graph, linears, torch.mul)
    tolerance = 0.05 if function is under_autocast else 1e-5
    for one, two in zip(found.run(graph), found.run(found.gm.graph), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def dropout(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, *_: Any) -> Tensor:
    s = torch.mul(F.linear(F.linear(F.dropout(x, 0.5), A), B), scale)
    return _added(F.linear(x, W, bias), s, bias, W[:, 0])


def dropout_on_both(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, *_: Any) -> Tensor:
    """As DoRA has it in training."""
    dropped = F.dropout(x, 0.5)
    s = torch.mul(F.linear(F.linear(dropped, A), B), scale)
    return torch.add(F.linear(x, W, bias), rescale(s, F.linear(dropped, W), magnitude_ratio(W[:, 0], W[:, 1]), -1))


def bias_left_in(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, *_: Any) -> Tensor:
    s = torch.mul(F.linear(F.linear(x, A), B), scale)
    return torch.add(y := F.linear(x, W, bias), rescale(s, y, magnitude_ratio(W[:, 0], W[:, 1]), -1))


def another_bias(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, m: Tensor, _: Any) -> Tensor:
    s = torch.mul(F.linear(F.linear(x, A), B), scale)
    return _added(F.linear(x, W, bias), s, bias, W[:, 0], removed=m)


def other_ratios(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, m: Tensor, _: Any) -> Tensor:
    y, s = F.linear(x, W, bias), torch.mul(F.linear(F.linear(x, A), B), scale)
    less_one, factor = (m - 1).to(y.dtype).view(-1), bias.to(y.dtype).view(-1)
    return torch.add(y, less_one * without_bias(y, bias, -1) + factor * s)


def two_less(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, m: Tensor, _: Any) -> Tensor:
    y, s = F.linear(x, W, bias), torch.mul(F.linear(F.linear(x, A), B), scale)
    less_two, factor = (m - 2).to(y.dtype).view(-1), m.to(y.dtype).view(-1)
    return torch.add(y, less_two * without_bias(y, bias, -1) + factor * s)


def a_ratio_for_each_token(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, *_: Any) -> Tensor:
    y, s = F.linear(x, W, bias), torch.mul(F.linear(F.linear(x, A), B), scale)
    ratio = x.repeat(1, 2)[:, :4]
    return torch.add(y, (ratio - 1) * without_bias(y, bias, -1) + ratio * s)


def another_reader_of_what_is_added(
    x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, scale: Tensor, *_: Any
) -> Any:
    y, s = F.linear(x, W, bias), torch.mul(F.linear(F.linear(x, A), B), scale)
    added = rescale(s, without_bias(y, bias, -1), magnitude_ratio(W[:, 0], W[:, 1]), -1)
    return torch.add(y, added), added


LEFT_ALONE = [
    *(dropout, dropout_on_both, bias_left_in, another_bias, other_ratios, two_less, a_ratio_for_each_token),
    another_reader_of_what_is_added,
]


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_left_alone(function: Callable[..., Any]) -> None:
    found = captured(function, X, *dora_parameters()[0])
    before = str(found.gm.graph)
    graph, count = found.lowered()
    assert count == 0 and str(graph) == before


def with_dora(region: Region, **options: Any) -> Region:
    insert(region, *adapt(region, variant="dora", **options))
    return region


def test_a_region() -> None:
    model = TwoLayers()
    model.fc2 = nn.Linear(4, 2, bias=False)
    region = with_dora(region_of(model))
    right = run(region, X)
    assert LowerBranches(write).run(region).summary == "2 layers are one operator each"
    region.graph.lint()
    torch.testing.assert_close(run(region, X), right)
    assert_expected_inline(
        print_graph(region.graph),
        """\
  x                    = input
+ fc1_lora_A           = self.fc1.lora_A.default.weight
+ fc1_lora_B           = self.fc1.lora_B.default.weight
+ fc1_lora_dtype       = x.dtype
+ fc1_lora_A_1         = fc1_lora_A.to(fc1_lora_dtype)
+ fc1_lora_B_1         = fc1_lora_B.to(fc1_lora_dtype)
+ fc1_lora_scaling     = self.fc1.lora_scaling.default()
+ fc1_lora_weight      = self.fc1.weight
+ fc1_lora_weight_norm = self.fc1.lora_weight_norm.default()
+ fc1_lora_norm        = row_norms(fc1_lora_weight, fc1_lora_A_1, fc1_lora_B_1, fc1_lora_scaling, fc1_lora_weight_norm)
+ fc1_lora_m           = self.fc1.lora_magnitude_vector.default.weight
+ fc1_lora_ratio       = magnitude_ratio(fc1_lora_m, fc1_lora_norm)
  fc1_weight           = self.fc1.weight
  fc1_bias             = self.fc1.bias
  doras                = doras(x, [fc1_weight], [fc1_bias], [fc1_lora_A], [fc1_lora_B], [fc1_lora_scaling], [fc1_lora_ratio])
  getitem              = getitem(doras, 0)
  relu                 = relu(getitem)
+ fc2_lora_A           = self.fc2.lora_A.default.weight
+ fc2_lora_B           = self.fc2.lora_B.default.weight
+ fc2_lora_dtype       = relu.dtype
+ fc2_lora_A_1         = fc2_lora_A.to(fc2_lora_dtype)
+ fc2_lora_B_1         = fc2_lora_B.to(fc2_lora_dtype)
+ fc2_lora_scaling     = self.fc2.lora_scaling.default()
+ fc2_lora_weight      = self.fc2.weight
+ fc2_lora_weight_norm = self.fc2.lora_weight_norm.default()
+ fc2_lora_norm        = row_norms(fc2_lora_weight, fc2_lora_A_1, fc2_lora_B_1, fc2_lora_scaling, fc2_lora_weight_norm)
+ fc2_lora_m           = self.fc2.lora_magnitude_vector.default.weight
+ fc2_lora_ratio       = magnitude_ratio(fc2_lora_m, fc2_lora_norm)
  fc2_weight           = self.fc2.weight
  fc2_bias             = self.fc2.bias
  doras_1              = doras(relu, [fc2_weight], [fc2_bias], [fc2_lora_A], [fc2_lora_B], [fc2_lora_scaling], [fc2_lora_ratio])
  getitem_1            = getitem(doras_1, 0)
  return getitem_1""",
    )


def test_an_exported_region() -> None:
    region = with_dora(exported(TwoLayers(), X))
    right = run(region, X)
    assert LowerBranches(write).run(region).summary == "2 layers are one operator each"
    region.graph.lint()
    torch.testing.assert_close(run(region, X), right)


def test_a_region_with_dropout_stays() -> None:
    region = with_dora(region_of(TwoLayers()), dropout=0.5)
    before = print_graph(region.graph)
    assert not LowerBranches(write).run(region).modified
    assert print_graph(region.graph) == before


def each_on_x(x: Tensor, *layers: list[Any]) -> list[Tensor]:
    return [rescaled(x, *layer).relu() for layer in layers]


def test_the_ratios_of_siblings_move_to_the_first_call() -> None:
    found = captured(each_on_x, X, *dora_parameters(3))
    graph, _ = found.lowered()
    assert fuse_siblings(graph, doras) == 3
    graph.lint()
    (call,) = targets(graph, doras)
    assert [len(each) for each in call.args[1:]] == [3] * 6
    for one, two in zip(found.run(graph), found.run(found.gm.graph), strict=True):
        torch.testing.assert_close(one, two)


def test_plain_layers_and_such_with_dora_share_no_call() -> None:
    def both(x: Tensor, first: list[Any], second: list[Any]) -> Any:
        s = torch.mul(F.linear(F.linear(x, first[2]), first[3]), first[4])
        return F.linear(x, first[0]) + s, rescaled(x, *second)

    graph, count = captured(both, X, *dora_parameters(2)).lowered()
    assert count == 2
    assert fuse_siblings(graph, doras) == fuse_siblings(graph, linears) == 0


def ratio_of_the_first_output(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    y = rescaled(x, *first)
    return y, rescaled(x, *second[:5], second[5] * y.sum(), second[6])


def ratio_by_chance(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    """A random number drawn earlier is another one."""
    return rescaled(x, *first), rescaled(x, *second[:5], F.dropout(second[5]), second[6])


def written_between(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    y = rescaled(x, *first)
    second[5].mul_(2)
    return y, rescaled(x, *second)


def siblings_under_autocast(x: Tensor, first: list[Any], second: list[Any]) -> Any:
    """The second norm has a context of its own, out of which nothing is moved."""
    with torch.autocast("cpu", torch.bfloat16):
        return rescaled(x, *first), rescaled(x, *second)


@pytest.mark.parametrize(
    "function", [ratio_of_the_first_output, ratio_by_chance, written_between, siblings_under_autocast]
)
def test_kept_apart(function: Callable[..., Any]) -> None:
    graph, count = captured(function, X, *dora_parameters(2)).lowered()
    assert count == 2
    assert fuse_siblings(graph, doras) == 0
    graph.lint()


class Two(nn.Module):
    """Two layers that read x, with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(3, 4), nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.q(x)) * self.k(x)


def test_siblings_of_a_region() -> None:
    region = with_dora(region_of(Two()))
    LowerBranches(write).run(region)
    right = run(region, X)
    copy = Region(copy_graph(region.graph), region.instances)
    assert FuseSiblings(doras).run(copy).summary == "2 layers share a call"
    copy.graph.lint()
    torch.testing.assert_close(run(copy, X), right)


def block(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    return rescaled(F.silu(rescaled(x, *gate)) * rescaled(x, *up), *down)


def plain_down(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Tensor:
    """A block has DoRA in all of its layers, or in none."""
    h = F.silu(rescaled(x, *gate)) * rescaled(x, *up)
    return F.linear(h, down[0]) + F.linear(F.linear(h, down[2]), down[3]) * down[4]


def another_reader_of_the_product(x: Tensor, gate: list[Any], up: list[Any], down: list[Any]) -> Any:
    h = F.silu(rescaled(x, *gate)) * rescaled(x, *up)
    return rescaled(h, *down), h.shape[0], h.sum()


@pytest.mark.parametrize(("function", "count"), [(block, 1), (plain_down, 0), (another_reader_of_the_product, 0)])
def test_blocks(function: Callable[..., Any], count: int) -> None:
    shapes = ((3, 6), (3, 6), (6, 4))
    layers = [dora_parameters(1, columns, out, bias=False)[0] for columns, out in shapes]
    found = captured(function, X, *layers)
    graph, _ = found.lowered()
    fuse_siblings(graph, doras)
    assert fuse_swiglu(graph, doras, dora_swiglu) == len(targets(graph, dora_swiglu)) == count
    graph.lint()
    for one, two in zip(found.run(graph), found.run(found.gm.graph), strict=True):
        torch.testing.assert_close(one, two)


class Mlp(nn.Module):
    """A SwiGLU block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 4))
        for layer in (self.gate, self.up, self.down):
            layer.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_a_block_of_a_region() -> None:
    """The norm of down reads the dtype of its input, which is no more: that of the block's input is the same."""
    region = with_dora(region_of(Mlp()))
    right = run(region, X)
    LowerBranches(without_biases).run(region)
    FuseSiblings(doras).run(region)
    assert FuseSwiglu(doras, dora_swiglu).run(region).modified
    region.graph.lint()
    assert not targets(region.graph, F.silu, torch.mul)
    torch.testing.assert_close(run(region, X), right)
