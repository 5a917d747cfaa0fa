"""LoRA on a linear layer: `y' = y + scaling · B(A(dropout(x)))`, `W' = W + scaling · B A` (arXiv:2106.09685, eq. 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.branches.base import BranchDtype, BranchSpec
from passes.leaves import DROPOUT, FACTOR_A, FACTOR_B, SCALING
from passes.nodes import BranchBuilder
from passes.sites import CallSite


@dataclass(frozen=True)
class Linear:
    """The linear kind; also for weights stored `(in, out)`, whose update is transposed."""

    def params(self, spec: BranchSpec) -> dict[str, tuple[int, ...]]:
        """A: `(r, in)`; B: `(out, r)`."""
        return {FACTOR_A: (spec.r, spec.in_features), FACTOR_B: (spec.out_features, spec.r)}

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        """Kaiming-uniform A and zero B; `"gaussian"`: A ~ N(0, 1/r²); False: both as a new `nn.Linear`.

        peft makes two `nn.Linear`, which draw their weights, and then draws A again: the same draws are made here,
        so that one seed gives one adapter in both.
        """
        shapes = self.params(spec)
        if torch.get_default_device().type == "meta":
            return {name: torch.empty(shape) for name, shape in shapes.items()}
        factors = {name: torch.empty(shape) for name, shape in shapes.items()}
        for factor in factors.values():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if spec.init is False:
            return factors
        if spec.init == "gaussian":
            nn.init.normal_(factors[FACTOR_A], std=1 / spec.r)
        else:
            nn.init.kaiming_uniform_(factors[FACTOR_A], a=math.sqrt(5))
        nn.init.zeros_(factors[FACTOR_B])
        return factors

    def build(self, graph: fx.Graph, site: CallSite, adapter: str, dropout: bool, dtype: BranchDtype) -> fx.Node:
        """The canonical branch: cast, dropout, `linear(·, A)`, `linear(·, B)`, `mul(·, scaling)`."""
        add = BranchBuilder(graph, site, adapter)
        x = site.x
        factor_a, factor_b = add.parameter(FACTOR_A), add.parameter(FACTOR_B)
        if dtype == "adapter":
            x = add.cast(x, add.dtype(factor_a), "x")
        if dropout:
            x = add.module(DROPOUT, x)
        if dtype == "base":
            x_dtype = add.dtype(x)
            factor_a, factor_b = add.cast(factor_a, x_dtype, "A"), add.cast(factor_b, x_dtype, "B")
        a = add.call("a", F.linear, x, factor_a)
        b = add.call("b", F.linear, a, factor_b)
        return add.call("s", torch.mul, b, add.module(SCALING))

    def delta(self, spec: BranchSpec, factors: dict[str, Tensor]) -> Tensor:
        """`scaling · B A` in float64, `(out, in)`, or its transpose for a weight stored `(in, out)`."""
        product = factors[FACTOR_B].double() @ factors[FACTOR_A].double()
        product *= spec.scaling
        return product.T if spec.transposed else product
