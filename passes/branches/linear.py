"""LoRA on a linear layer: `y' = y + scaling · B(A(dropout(x)))`, `W' = W + scaling · B A` (arXiv:2106.09685, eq. 3)."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.branches.base import BranchSpec, Function, Match, Method, Part, Stacked
from passes.callsite import CallSite, Layer
from passes.leaves import BIAS_B, FACTOR_A, FACTOR_B
from passes.nodes import BranchBuilder
from passes.operands import arg
from passes.rows import stacked_product

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """The linear kind; also for weights stored `(in, out)`, whose update is transposed."""

    factor_names: ClassVar[tuple[str, str]] = (FACTOR_A, FACTOR_B)
    float_input: ClassVar[bool] = True
    has_rows: ClassVar[bool] = True
    can_have_bias: ClassVar[bool] = True

    def layer(self, module: nn.Module) -> Layer | None:
        """`nn.Linear` and its subclasses, and transformers' `Conv1D`."""
        if isinstance(module, nn.Linear):
            return Layer("linear", module.in_features, module.out_features)
        if any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__):
            # not from the weight, which is a stand-in while a model is traced
            return Layer("linear", cast(int, module.nx), cast(int, module.nf), transposed=True)
        return None

    def match(self, node: fx.Node) -> Match | None:
        """`linear`, `addmm` and matrix products, of torch and of ATen."""
        for spelling, pattern in _SPELLINGS:
            found = pattern(node)
            if found is not None:
                x, weight, bias, transposed = found
                return Match(x, weight, spelling, _layer_maker(transposed), bias)
        return None

    def weight_shape(self, layer: Layer) -> tuple[int, ...]:
        """`(out, in)`, or `(in, out)` if transposed."""
        shape = (layer.out_features, layer.in_features)
        return shape[::-1] if layer.transposed else shape

    def factor_shapes(self, spec: BranchSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A: `(r, in)`; B: `(out, r)`."""
        return (spec.r, spec.in_features), (spec.out_features, spec.r)

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        """Kaiming-uniform A and zero B; `"gaussian"`: A ~ N(0, 1/r²); False: both as a new `nn.Linear`."""
        return draw_factors(spec, *self.factor_shapes(spec))

    def update(self, layer: Layer) -> Function:
        """`B A`, `(out, in)`, or its transpose for a weight stored `(in, out)`."""
        return linear_update, (layer.transposed,)

    def operation(self, layer: Layer) -> Function:
        """`x Wᵀ`, or `x W` for a weight stored `(in, out)`."""
        return (torch.matmul if layer.transposed else F.linear), ()

    def build(
        self, add: BranchBuilder, site: CallSite, x: fx.Node, A: fx.Node, B: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """`linear(linear(x, A), B)`."""
        a = add.call("a", F.linear, x, A)
        return add.call("b", F.linear, a, B, *([] if bias is None else [bias]))

    def can_stack(self, layer: Layer) -> bool:
        """Always."""
        return True

    def build_stack(self, add: BranchBuilder, site: CallSite, x: fx.Node, stack: Stacked) -> fx.Node:
        """Two products for the whole batch."""
        return add.call("stacked", stacked_product, x, stack.A, stack.B, stack.scale, stack.select, stack.layout)

    def row_view(self, layer: Layer, part: Literal["weight", "A", "B"]) -> Method | None:
        """A weight stored `(in, out)` is transposed."""
        return ("t", ()) if part == "weight" and layer.transposed else None

    def channel_dim(self, layer: Layer) -> int:
        """The last."""
        return -1

    def as_matrices(self, layer: Layer, part: Part, tensor: Tensor) -> Tensor:
        """As they are, but for a weight stored `(in, out)`."""
        return tensor.t() if part == "weight" and layer.transposed else tensor

    def from_matrices(self, layer: Layer, part: Part, matrices: Tensor) -> Tensor:
        """Likewise."""
        return self.as_matrices(layer, part, matrices)


def linear_update(A: Tensor, B: Tensor, transposed: bool) -> Tensor:
    """`B A`, or its transpose."""
    return (B @ A).t() if transposed else B @ A


def draw_factors(spec: BranchSpec, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, Tensor]:
    """Initial factors of the given shapes, and the branch's bias if it has one.

    peft makes two modules, which draw their weights (and a bias), and then draws A again: the same draws are made
    here, so that one seed gives one adapter in both.
    """
    factors = {FACTOR_A: torch.empty(a), FACTOR_B: torch.empty(b)}
    if spec.bias:
        factors[BIAS_B] = torch.empty(spec.out_features)
    if torch.get_default_device().type == "meta":
        return factors
    for name in (FACTOR_A, FACTOR_B):
        nn.init.kaiming_uniform_(factors[name], a=math.sqrt(5))
    if spec.bias:
        bound = 1 / math.sqrt(math.prod(b[1:]))
        nn.init.uniform_(factors[BIAS_B], -bound, bound)
    if spec.init is False:
        return factors
    if spec.init == "gaussian":
        nn.init.normal_(factors[FACTOR_A], std=1 / spec.r)
    else:
        nn.init.kaiming_uniform_(factors[FACTOR_A], a=math.sqrt(5))
    for name in factors.keys() - {FACTOR_A}:
        nn.init.zeros_(factors[name])
    return factors


# ---- spellings ----

_Found = tuple[Any, Any, Any, bool]
"""(x, weight operand, bias operand, whether the operator multiplies by the weight untransposed)."""


def _layer_maker(transposed: bool) -> Any:
    def make(shape: tuple[int, ...], flipped: bool) -> Layer | None:
        if len(shape) != 2:
            return None
        stored = transposed ^ flipped
        in_features, out_features = shape if stored else reversed(shape)
        return Layer("linear", in_features, out_features, stored)

    return make


def _linear(node: fx.Node) -> _Found | None:
    if node.target in (F.linear, aten.linear.default):
        return arg(node, 0, "input"), arg(node, 1, "weight"), arg(node, 2, "bias"), False
    return None


def _addmm(node: fx.Node) -> _Found | None:
    if node.target not in (torch.addmm, aten.addmm.default):
        return None
    if any(node.kwargs.get(name, 1) != 1 for name in ("beta", "alpha")):
        return None
    return arg(node, 1, "mat1"), arg(node, 2, "mat2"), arg(node, 0, "input", "self"), True


def _matmul(node: fx.Node) -> _Found | None:
    functions = (torch.matmul, torch.mm, operator.matmul, aten.mm.default, aten.matmul.default)
    if node.target in functions or (node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__")):
        return arg(node, 0, "input", "self"), arg(node, 1, "mat2", "other"), None, True
    return None


_SPELLINGS = (("linear", _linear), ("addmm", _addmm), ("matmul", _matmul))
