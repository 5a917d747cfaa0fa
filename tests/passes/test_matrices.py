"""Every kind as matrices: the update is their product, and nothing is lost on the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from passes.branches import KINDS
from passes.branches.base import CROSS_GROUPS, BranchSpec
from passes.branches.conv import conv_layer
from passes.branches.parameter import parameter_layer, shaped_layer
from passes.callsite import Layer

LAYERS = {
    "linear": Layer("linear", 5, 7),
    "linear, (in, out)": Layer("linear", 5, 7, transposed=True),
    "embedding": Layer("embedding", 11, 4, options=(("max_norm", None),)),
    "tied": Layer("tied", 4, 11),
    "conv1d": conv_layer((6, 4, 3), 4),
    "conv2d": conv_layer((6, 4, 3, 2), 4),
    "conv3d": conv_layer((6, 4, 3, 1, 2), 4),
    "grouped": conv_layer((6, 2, 3, 3), 4),
    "matrix": parameter_layer((7, 5)),
    "experts": parameter_layer((3, 7, 5)),
    "experts, (in, out)": parameter_layer((3, 5, 7), transposed_experts=True),
    "shaped": shaped_layer((4, 6, 3, 3)),
}


def spec_of(layer: Layer, r: int) -> BranchSpec:
    return BranchSpec(
        "site", "a", layer.kind, layer.in_features, layer.out_features, layer.transposed, r, 1.0, options=layer.options
    )


@pytest.mark.parametrize("name", LAYERS)
def test_the_update_is_the_product(name: str) -> None:
    layer = LAYERS[name]
    assert layer is not None
    kind, spec = KINDS[layer.kind], spec_of(layer, 2)
    A, B = (torch.randn(shape, dtype=torch.float64) for shape in kind.factor_shapes(spec))
    a, b = kind.as_matrices(layer, "A", A), kind.as_matrices(layer, "B", B)
    assert a.shape[-2] == b.shape[-1] == 2
    function, extra = kind.update(layer)
    update = function(A, B, *extra)
    assert update.shape == kind.weight_shape(layer)
    torch.testing.assert_close(kind.from_matrices(layer, "weight", b @ a), update)
    torch.testing.assert_close(kind.as_matrices(layer, "weight", update), b @ a)
    assert torch.equal(kind.from_matrices(layer, "A", a), A) and torch.equal(kind.from_matrices(layer, "B", b), B)


@pytest.mark.parametrize("name", LAYERS)
def test_factors_of_another_rank(name: str) -> None:
    layer = LAYERS[name]
    assert layer is not None
    kind = KINDS[layer.kind]
    A, B = (torch.randn(shape) for shape in kind.factor_shapes(spec_of(layer, 2)))
    a, b = kind.as_matrices(layer, "A", A), kind.as_matrices(layer, "B", B)
    more = (torch.cat([a, a, a], -2), torch.cat([b, b, b], -1))
    found = (kind.from_matrices(layer, "A", more[0]), kind.from_matrices(layer, "B", more[1]))
    assert tuple(tuple(each.shape) for each in found) == kind.factor_shapes(spec_of(layer, 6))
    function, extra = kind.update(layer)
    torch.testing.assert_close(function(*found, *extra), 3 * function(A, B, *extra))


def test_across_groups_there_is_a_matrix_for_each_group() -> None:
    layer = replace(conv_layer((6, 2, 3, 3), 4), options=(*conv_layer((6, 2, 3, 3), 4).options, (CROSS_GROUPS, True)))
    kind, spec = KINDS["conv"], spec_of(layer, 4)
    A, B = (torch.randn(shape) for shape in kind.factor_shapes(spec))
    a, b = kind.as_matrices(layer, "A", A), kind.as_matrices(layer, "B", B)
    assert (a.shape, b.shape) == ((2, 2, 36), (2, 3, 2))
    assert torch.equal(kind.from_matrices(layer, "A", a), A) and torch.equal(kind.from_matrices(layer, "B", b), B)
    weight = kind.from_matrices(layer, "weight", b @ a)
    x = torch.randn(2, 4, 5, 5)
    branch = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, A), B, groups=2)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, weight), branch, rtol=1e-4, atol=1e-4)
    assert torch.equal(kind.as_matrices(layer, "weight", weight), b @ a)
