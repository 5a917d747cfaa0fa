"""LoRA on a convolution: `y' = y + scaling · B(A(dropout(x)))`, where B is a convolution of kernel size 1.

Base weight `(out, in / groups, *kernel)`. With one group A is `(r, in, *kernel)` and B `(out, r, 1, …)`, as in peft;
A has the layer's stride, padding, padding mode and dilation, so that the branch equals its fold.

With several groups A is `(r, in / groups, *kernel)`: the update is the matrix `B A` of shape `(out, in / groups · k)`,
which the layer's weight can hold for any rank. peft's A has all inputs there, also those of other groups, and cannot be
folded; such factors are the option `cross_groups`, for adapters that peft trained. Files have the compact form as one
of peft's: see `fxlora.checkpoint.grouped`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from passes.base import original_forward
from passes.branches.base import CROSS_GROUPS, BranchSpec, Function, Match, Method, Part, Stacked
from passes.branches.linear import draw_factors
from passes.callsite import CallSite, Layer, Options
from passes.errors import PassError
from passes.leaves import FACTOR_A, FACTOR_B
from passes.nodes import BranchBuilder
from passes.operands import arg
from passes.rows import masked_ranks

aten = torch.ops.aten


@dataclass(frozen=True)
class Conv:
    """Convolutions in one, two and three dimensions."""

    factor_names: ClassVar[tuple[str, str]] = (FACTOR_A, FACTOR_B)
    float_input: ClassVar[bool] = True
    has_rows: ClassVar[bool] = True
    can_have_bias: ClassVar[bool] = True

    def layer(self, module: nn.Module) -> Layer | None:
        """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`; a subclass with a forward of its own has the branch in its weight."""
        plain = next((cls for cls in _FUNCTIONS if isinstance(module, cls)), None)
        if plain is None or not isinstance(module, _ConvNd):
            return None
        options = _options(
            module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
        )
        form = "output" if original_forward(module) is plain.forward else "weight"
        return Layer("conv", module.in_channels, module.out_channels, False, options, form)

    def match(self, node: fx.Node) -> Match | None:
        """`conv1d`, `conv2d`, `conv3d` of torch and of ATen."""
        dims = _OPERATORS.get(node.target)
        if dims is None:
            return None
        stride, padding, dilation = (
            _expand(arg(node, 3 + index, name, default=default), dims)
            for index, (name, default) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1)))
        )
        groups = arg(node, 6, "groups", default=1)
        if not all(isinstance(value, (int, str)) for part in (stride, padding, dilation) for value in part):
            return None  # sizes that the graph computes

        def layer(shape: tuple[int, ...], flipped: bool) -> Layer | None:
            if len(shape) != dims + 2:
                return None
            options = _options(shape[2:], stride, padding, dilation, groups, "zeros")
            return Layer("conv", shape[1] * groups, shape[0], False, options)

        return Match(arg(node, 0, "input"), arg(node, 1, "weight"), f"conv{dims}d", layer, arg(node, 2, "bias"))

    def weight_shape(self, layer: Layer) -> tuple[int, ...]:
        """`(out, in / groups, *kernel)`."""
        values = dict(layer.options)
        return layer.out_features, layer.in_features // values["groups"], *values["kernel_size"]

    def factor_shapes(self, spec: BranchSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A: `(r, in / groups, *kernel)`; B: `(out, r, 1, …)`. Across groups A: `(r, in, *kernel)`, B: `(out, r / groups, 1, …)`."""
        values = dict(spec.options)
        kernel, groups = values["kernel_size"], values["groups"]
        ones = (1,) * len(kernel)
        if values.get(CROSS_GROUPS):
            return (spec.r, spec.in_features, *kernel), (spec.out_features, spec.r // groups, *ones)
        return (spec.r, spec.in_features // groups, *kernel), (spec.out_features, spec.r, *ones)

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        """As for a linear layer."""
        return draw_factors(spec, *self.factor_shapes(spec))

    def update(self, layer: Layer) -> Function:
        """`(out, in / groups, *kernel)`."""
        if dict(layer.options).get(CROSS_GROUPS):
            raise PassError(
                "this adapter of a grouped convolution was trained by peft, whose branch reads the inputs of all groups: "
                "the layer's weight cannot hold it. Run it unmerged, or train it again with fxlora"
            )
        return conv_update, ()

    def operation(self, layer: Layer) -> Function:
        """The convolution without its bias."""
        return convolve, _settings(layer)

    def build(
        self, add: BranchBuilder, site: CallSite, x: fx.Node, A: fx.Node, B: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """`conv1×1(conv(x, A), B)`; with groups one convolution by the update, which costs less than its factors do."""
        settings = _settings(site.layer)
        *geometry, groups, padding_mode = settings
        values = dict(site.layer.options)
        if groups > 1 and not values.get(CROSS_GROUPS):
            weight = add.call("w", conv_update, A, B)
            b = add.call("g", convolve, x, weight, *settings)
            return b if bias is None else add.call("bias", add_bias, b, bias)
        a = add.call("a", convolve, x, A, *geometry, 1, padding_mode)
        return add.call("b", pointwise, a, B, bias, groups)

    def can_stack(self, layer: Layer) -> bool:
        """With one group."""
        return dict(layer.options)["groups"] == 1

    def build_stack(self, add: BranchBuilder, site: CallSite, x: fx.Node, stack: Stacked) -> fx.Node:
        """One convolution by the kernels of all slots, the outputs of other rows' slots set to zero, and one by all of B."""
        *geometry, _, padding_mode = _settings(site.layer)
        kernels = add.call("kernels", stacked_kernels, stack.A, dict(site.layer.options)["kernel_size"])
        a = add.call("a", convolve, x, kernels, *geometry, 1, padding_mode)
        a = add.call(
            "masked", masked_ranks, a, stack.scale, stack.A, stack.select, stack.layout, self.channel_dim(site.layer)
        )
        return add.call("stacked", pointwise, a, add.call("points", stacked_points, stack.B, len(geometry[0])), None, 1)

    def row_view(self, layer: Layer, part: Literal["weight", "A", "B"]) -> Method | None:
        """All but the first dimension are one."""
        return "flatten", (1,)

    def channel_dim(self, layer: Layer) -> int:
        """The one before the positions."""
        return -1 - len(dict(layer.options)["kernel_size"])

    def as_matrices(self, layer: Layer, part: Part, tensor: Tensor) -> Tensor:
        """All but the first dimension are one; across groups one matrix for each group, with the columns of all inputs."""
        values = dict(layer.options)
        rows = tensor.flatten(1)
        return rows.unflatten(0, (values["groups"], -1)) if values.get(CROSS_GROUPS) else rows

    def from_matrices(self, layer: Layer, part: Part, matrices: Tensor) -> Tensor:
        """Likewise. Across groups the weight is that of a convolution with one group."""
        values = dict(layer.options)
        kernel, across = values["kernel_size"], values.get(CROSS_GROUPS)
        rows = matrices.flatten(0, 1) if across else matrices
        if part == "B":
            return rows.reshape(*rows.shape, *[1] * len(kernel))
        return rows.reshape(rows.shape[0], layer.in_features // (1 if across else values["groups"]), *kernel)


_FUNCTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}

_OPERATORS: dict[Any, int] = {
    operator: dims
    for dims, operators in {
        1: (F.conv1d, aten.conv1d.default, aten.conv1d.padding),
        2: (F.conv2d, aten.conv2d.default, aten.conv2d.padding),
        3: (F.conv3d, aten.conv3d.default, aten.conv3d.padding),
    }.items()
    for operator in operators
}


def conv_layer(weight: tuple[int, ...], in_features: int) -> Layer:
    """The convolution that has a weight of this shape and so many inputs, as far as its update depends on it."""
    return Layer(
        "conv", in_features, weight[0], False, _options(weight[2:], 1, 0, 1, in_features // weight[1], "zeros")
    )


def _expand(value: Any, dims: int) -> tuple[Any, ...]:
    """One value for each dimension; a padding by name (`"same"`) stays alone."""
    if isinstance(value, str):
        return (value,)
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def _options(
    kernel_size: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int, padding_mode: str
) -> Options:
    dims = len(kernel_size)
    return (
        ("dilation", _expand(dilation, dims)),
        ("groups", groups),
        ("kernel_size", tuple(kernel_size)),
        ("padding", _expand(padding, dims)),
        ("padding_mode", padding_mode),
        ("stride", _expand(stride, dims)),
    )


def _settings(layer: Layer) -> tuple[Any, ...]:
    values = dict(layer.options)
    return tuple(values[name] for name in ("stride", "padding", "dilation", "groups", "padding_mode"))


def convolve(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[Any],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    """A convolution without bias, as `nn.ConvNd` computes it for any padding and padding mode."""
    function = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
    named = padding[0] if isinstance(padding[0], str) else None
    if padding_mode == "zeros":
        return function(x, weight, None, stride, named or padding, dilation, groups)
    if named is None:
        sides = [side for pad in reversed(padding) for side in (pad, pad)]
    else:
        totals = [0 if named == "valid" else d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return function(F.pad(x, sides, mode=padding_mode), weight, None, stride, 0, dilation, groups)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """A convolution of kernel size 1."""
    return (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x, weight, bias, groups=groups)


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """`y` plus one value for each channel."""
    return y + bias.view(-1, *[1] * (y.dim() - 2)) if y.dim() > 2 else y + bias


def stacked_kernels(A: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """`(S, r, in · k)` as the weight of one convolution: `(S · r, in, *kernel)`."""
    return A.reshape(A.shape[0] * A.shape[1], -1, *kernel_size)


def stacked_points(B: Tensor, dims: int) -> Tensor:
    """`(S, r, out)` as the weight of one convolution of kernel size 1: `(out, S · r, 1, …)`."""
    return B.flatten(0, 1).t().reshape(B.shape[2], -1, *[1] * dims)


def conv_update(A: Tensor, B: Tensor) -> Tensor:
    """`B A` of the matrices, as a weight: `(out, in / groups, *kernel)`."""
    return (B.flatten(1) @ A.flatten(1)).view(B.shape[0], *A.shape[1:])
