"""LoRA on a bare parameter: `W' = W + scaling · B A`, for a matrix or for one matrix per expert.

Sizes are peft's for `target_parameters`. A matrix is `(out, in)`: A `(r, in)`, B `(out, r)`. Experts are `(E, out, in)`,
or `(E, in, out)` if transposed: A `(r · E, in)` with the experts' rows one after
another, B `(out, r · E)` with the expert as the fastest index of the columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from passes.branches.base import BranchSpec, Function, Match, Method
from passes.branches.linear import draw_factors, linear_update
from passes.callsite import CallSite, Layer
from passes.errors import PassError
from passes.leaves import FACTOR_A, FACTOR_B
from passes.nodes import BranchBuilder

EXPERTS = "experts"
SHAPE = "shape"
"""Of a weight with more than two dimensions: its matrix has all but the first as one."""


@dataclass(frozen=True)
class Parameter:
    """A parameter with two dimensions, or three: one matrix per expert."""

    factor_names: ClassVar[tuple[str, str]] = (FACTOR_A, FACTOR_B)
    float_input: ClassVar[bool] = True
    has_rows: ClassVar[bool] = False
    can_have_bias: ClassVar[bool] = False

    def layer(self, module: nn.Module) -> Layer | None:
        """Modules whose operation cannot be split into two factors: transposed convolutions, `nn.Bilinear`."""
        if isinstance(module, _ConvTransposeNd):
            shape = (module.in_channels, module.out_channels // module.groups, *module.kernel_size)
        elif isinstance(module, nn.Bilinear):
            shape = (module.out_features, module.in1_features, module.in2_features)
        else:
            return None
        return Layer("parameter", math.prod(shape[1:]), shape[0], False, ((SHAPE, shape),), "weight")

    def match(self, node: fx.Node) -> Match | None:
        """None: a parameter is found where it is read."""
        return None

    def weight_shape(self, layer: Layer) -> tuple[int, ...]:
        """`(out, in)`, `(E, out, in)` or, transposed, `(E, in, out)`."""
        values = dict(layer.options)
        experts = values.get(EXPERTS)
        if experts is None:
            return values.get(SHAPE, (layer.out_features, layer.in_features))
        matrix = (layer.out_features, layer.in_features)
        return experts, *(matrix[::-1] if layer.transposed else matrix)

    def factor_shapes(self, spec: BranchSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A: `(r · E, in)`; B: `(out, r · E)`."""
        rows = spec.r * spec.option(EXPERTS, 1)
        return (rows, spec.in_features), (spec.out_features, rows)

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        """As for a linear layer of rank `r · E`."""
        return draw_factors(spec, *self.factor_shapes(spec))

    def update(self, layer: Layer) -> Function:
        """In the parameter's layout."""
        values = dict(layer.options)
        if EXPERTS in values:
            return experts_update, (values[EXPERTS], layer.transposed)
        return (shaped_update, (values[SHAPE],)) if SHAPE in values else (linear_update, (False,))

    def operation(self, layer: Layer) -> Function:
        """None is known: the parameter is read by anything."""
        raise PassError("a bare parameter has no operation of its own")

    def build(
        self, add: BranchBuilder, site: CallSite, x: fx.Node, A: fx.Node, B: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """Refuses: the branch of a parameter is in the weight."""
        raise PassError(f"'{site.name}': the branch of a bare parameter belongs into its weight")

    def row_view(self, layer: Layer, part: Literal["weight", "A", "B"]) -> Method | None:
        """None."""
        return None

    def channel_dim(self, layer: Layer) -> int:
        """The last."""
        return -1


def parameter_layer(shape: tuple[int, ...], *, transposed_experts: bool = False) -> Layer | None:
    """A parameter of this shape as a layer, None unless it has two or three dimensions."""
    if len(shape) == 2:
        return Layer("parameter", shape[1], shape[0], form="weight")
    if len(shape) != 3:
        return None
    experts, first, second = shape
    sizes = (first, second) if transposed_experts else (second, first)
    return Layer("parameter", *sizes, transposed_experts, ((EXPERTS, experts),), "weight")


def shaped_update(A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`B A` in a shape."""
    return (B @ A).view(shape)


def experts_update(A: Tensor, B: Tensor, experts: int, transposed: bool) -> Tensor:
    """One product for each expert: `(E, out, in)`, or `(E, in, out)` if transposed."""
    a = A.reshape(experts, -1, A.shape[1])
    b = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
    return (b @ a).transpose(1, 2) if transposed else b @ a
