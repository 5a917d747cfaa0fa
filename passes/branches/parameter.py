"""LoRA on a bare parameter: `W' = W + scaling · B A`, for a matrix or for one matrix per expert.

Where a graph multiplies the parameter by `einsum` or `bmm`, the branch is two products of the input with the
factors; anywhere else it is added to the weight.

Sizes are peft's for `target_parameters`. A matrix is `(out, in)`: A `(r, in)`, B `(out, r)`. Experts are `(E, out, in)`,
or `(E, in, out)` if transposed: A `(r · E, in)` with the experts' rows one after another, B `(out, r · E)` with the
expert as the fastest index of the columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from passes.branches.base import BranchSpec, Function, Match, Method, Part, Stacked
from passes.branches.linear import draw_factors, linear_update
from passes.callsite import CallSite, Layer
from passes.errors import PassError
from passes.leaves import FACTOR_A, FACTOR_B
from passes.nodes import BranchBuilder
from passes.operands import CASTS, arg

aten = torch.ops.aten

EXPERTS = "experts"
SHAPE = "shape"
"""Of a weight with more than two dimensions: its matrix has all but the first as one."""
EQUATION = "equation"
"""How a graph multiplies by the parameter: subscripts of the input, the weight and the output, as for `einsum`."""


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
        return shaped_layer(shape)

    def match(self, node: fx.Node) -> Match | None:
        """`einsum` of an input and a weight, and `bmm` with a stack of matrices."""
        found = _einsum(node) or _bmm(node)
        if found is None:
            return None
        x, operand, (x_dims, weight_dims, out_dims), spelling = found
        weight, swapped = _below(operand)
        if swapped:
            weight_dims = weight_dims[:-2] + weight_dims[-1] + weight_dims[-2]

        def layer(shape: tuple[int, ...], flipped: bool) -> Layer | None:
            dims = (x_dims, weight_dims, out_dims)
            if flipped or len(shape) != len(weight_dims) or not _splits(*dims):
                return None
            plain = parameter_layer(shape)
            return plain and replace(plain, options=(*plain.options, (EQUATION, dims)), form="output")

        return Match(x, weight, spelling, layer)

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
        """The input's product with the factor of the contracted dimension, then with the other."""
        values = dict(site.layer.options)
        return add.call("b", factored_product, x, A, B, values.get(EXPERTS), site.layer.transposed, *values[EQUATION])

    def can_stack(self, layer: Layer) -> bool:
        """Never: which dimension of an `einsum` has the ranks differs from call to call."""
        return False

    def build_stack(self, add: BranchBuilder, site: CallSite, x: fx.Node, stack: Stacked) -> fx.Node:
        """See `can_stack`."""
        raise PassError("the branches of a bare parameter cannot be stacked")

    def row_view(self, layer: Layer, part: Literal["weight", "A", "B"]) -> Method | None:
        """None."""
        return None

    def channel_dim(self, layer: Layer) -> int:
        """The last."""
        return -1

    def as_matrices(self, layer: Layer, part: Part, tensor: Tensor) -> Tensor:
        """One matrix for each expert; a weight of more than two dimensions has all but the first as one."""
        experts = dict(layer.options).get(EXPERTS)
        if experts is None:
            return tensor.flatten(1)
        if part == "weight":
            return tensor.mT if layer.transposed else tensor
        if part == "A":
            return tensor.reshape(experts, -1, tensor.shape[1])
        return tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1)

    def from_matrices(self, layer: Layer, part: Part, matrices: Tensor) -> Tensor:
        """Likewise."""
        values = dict(layer.options)
        if EXPERTS not in values:
            return matrices.reshape(values[SHAPE]) if part == "weight" and SHAPE in values else matrices
        if part == "weight":
            return matrices.mT if layer.transposed else matrices
        return matrices.flatten(0, 1) if part == "A" else matrices.permute(1, 2, 0).flatten(1)


def parameter_layer(shape: tuple[int, ...], *, transposed_experts: bool = False) -> Layer | None:
    """A parameter of this shape as a layer, None unless it has two or three dimensions."""
    if len(shape) == 2:
        return Layer("parameter", shape[1], shape[0], form="weight")
    if len(shape) != 3:
        return None
    experts, first, second = shape
    sizes = (first, second) if transposed_experts else (second, first)
    return Layer("parameter", *sizes, transposed_experts, ((EXPERTS, experts),), "weight")


def multiplied(layer: Layer, seen: Layer) -> Layer:
    """A parameter's layer with the branch in the output, for the product that a graph makes of it."""
    equation = (EQUATION, dict(seen.options)[EQUATION])
    return replace(layer, options=(*layer.options, equation), form="output")


def shaped_layer(shape: tuple[int, ...]) -> Layer:
    """A weight of more than two dimensions as the layer of its matrix, whose columns are all but the first of them."""
    return Layer("parameter", math.prod(shape[1:]), shape[0], False, ((SHAPE, shape),), "weight")


def shaped_update(A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`B A` in a shape."""
    return (B @ A).view(shape)


def experts_update(A: Tensor, B: Tensor, experts: int, transposed: bool) -> Tensor:
    """One product for each expert: `(E, out, in)`, or `(E, in, out)` if transposed."""
    left, right = _factors(A, B, experts, transposed)
    return left @ right


def _factors(A: Tensor, B: Tensor, experts: int | None, transposed: bool) -> tuple[Tensor, Tensor]:
    """The update as a product: `(…, first, r)` and `(…, r, second)`, for a weight `(…, first, second)`."""
    if experts is None:
        return B, A
    a = A.reshape(experts, -1, A.shape[1])
    b = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
    return (a.mT, b.mT) if transposed else (b, a)


def factored_product(
    x: Tensor, A: Tensor, B: Tensor, experts: int | None, transposed: bool, x_dims: str, weight_dims: str, out_dims: str
) -> Tensor:
    """`einsum(x, update)` without making the update: by the factor of the contracted dimension, then by the other."""
    left, right = _factors(A, B, experts, transposed)
    batch, first, second = weight_dims[:-2], weight_dims[-2], weight_dims[-1]
    rank = next(letter for letter in "rstuvwxyz" if letter not in x_dims + weight_dims + out_dims)
    steps = [(left, batch + first + rank), (right, batch + rank + second)]
    if second in x_dims and second not in out_dims:
        steps.reverse()
    (near, near_dims), (far, far_dims) = steps
    kept = "".join(d for d in x_dims if d in out_dims or d in batch) + "".join(d for d in batch if d not in x_dims)
    a = torch.einsum(f"{x_dims},{near_dims}->{kept}{rank}", x, near)
    return torch.einsum(f"{kept}{rank},{far_dims}->{out_dims}", a, far)


# ---- spellings ----

_Dims = tuple[str, str, str]
_Found = tuple[Any, Any, _Dims, str]
"""(x, weight operand, subscripts, spelling)."""


def _splits(x_dims: str, weight_dims: str, out_dims: str) -> bool:
    """Whether one of the weight's last two dimensions is summed over with the input's, and the other is the output's."""
    if len(weight_dims) not in (2, 3) or any(len(set(dims)) != len(dims) for dims in (x_dims, weight_dims, out_dims)):
        return False
    pair = weight_dims[-2:]
    summed = [d for d in pair if d in x_dims and d not in out_dims]
    made = [d for d in pair if d in out_dims and d not in x_dims]
    rest = [d for d in x_dims if d not in out_dims and d not in weight_dims]
    return len(summed) == len(made) == 1 and not rest


def _einsum(node: fx.Node) -> _Found | None:
    if node.target is torch.einsum:
        equation, operands = node.args[0], node.args[1:]
    elif node.target is aten.einsum.default:
        equation, operands = node.args[0], node.args[1]
    else:
        return None
    if isinstance(operands, (list, tuple)) and len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    dims = inputs.split(",")
    if not arrow or len(dims) != 2 or not (inputs.replace(",", "") + out).isalpha():
        return None
    pairs = list(zip(operands, dims, strict=True))
    for (x, x_dims), (weight, weight_dims) in (pairs, pairs[::-1]):
        if isinstance(_below(weight)[0], fx.Node) and _below(weight)[0].op == "get_attr":
            return x, weight, (x_dims, weight_dims, out), "einsum"
    return None


def _bmm(node: fx.Node) -> _Found | None:
    if node.target not in (torch.bmm, aten.bmm.default) and not (node.op == "call_method" and node.target == "bmm"):
        return None
    x, weight = arg(node, 0, "input", "self"), arg(node, 1, "mat2")
    return x, weight, ("eti", "eio", "eto"), "bmm"


def _below(operand: Any) -> tuple[Any, bool]:
    """Strip casts and swaps of the last two dimensions from a weight operand: (what is below, whether swapped)."""
    swapped = False
    while isinstance(operand, fx.Node) and operand.op in ("call_function", "call_method"):
        rest = list(operand.args[1:])
        if (
            operand.target in ("transpose", torch.transpose, aten.transpose.int)
            and sorted(map(str, rest)) in _LAST_TWO
            or (operand.target is getattr and rest == ["mT"])
            or operand.target is aten.mT.default
        ):
            swapped = not swapped
        elif operand.target not in CASTS:
            break
        operand = arg(operand, 0, "input", "self")
    return operand, swapped


_LAST_TWO = (["-1", "-2"], ["1", "2"])
"""Dimensions of a stack of matrices, as texts in order."""
