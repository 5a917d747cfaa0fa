"""The head's end of LoRA on tied embeddings: `y' = y + scaling · A_Eᵀ(B_Eᵀ(x))` with the embedding's own A_E and B_E.

The embedding's update of `(V, D)` is `(B_E A_E)ᵀ`, and so is the head's: both see one `W' = W + scaling · (B_E A_E)ᵀ`.
The parts are the embedding's under their names, so that one parameter has one gradient and one optimizer state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.branches.base import BranchSpec, Function, Match, Method, Part, Stacked
from passes.branches.embedding import embedding_update
from passes.branches.linear import draw_factors
from passes.callsite import CallSite, Layer
from passes.leaves import EMBEDDING_A, EMBEDDING_B
from passes.nodes import BranchBuilder
from passes.rows import stacked_product


@dataclass(frozen=True)
class Tied:
    """A linear layer whose weight is an embedding's. What is A for an embedding is, transposed, B here."""

    factor_names: ClassVar[tuple[str, str]] = (EMBEDDING_B, EMBEDDING_A)
    float_input: ClassVar[bool] = True
    has_rows: ClassVar[bool] = True
    can_have_bias: ClassVar[bool] = False

    def layer(self, module: nn.Module) -> Layer | None:
        """None: whether a linear layer is tied shows in the model only."""
        return None

    def match(self, node: fx.Node) -> Match | None:
        """None: its calls are a linear layer's."""
        return None

    def weight_shape(self, layer: Layer) -> tuple[int, ...]:
        """`(V, D)`."""
        return layer.out_features, layer.in_features

    def factor_shapes(self, spec: BranchSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The embedding's B: `(D, r)`; its A: `(r, V)`."""
        return (spec.in_features, spec.r), (spec.r, spec.out_features)

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        """As for a linear layer, drawn into the embedding's factors in place of what they had; False leaves them.

        peft makes two layers, which draw weights that nothing uses, and then draws into the transposed factors.
        """
        b, a = self.factor_shapes(spec)
        draw_factors(replace(spec, init=False), b[::-1], a[::-1])
        if spec.init is False:
            return {}
        B, A = torch.empty(b), torch.zeros(a)
        if torch.get_default_device().type != "meta":
            if spec.init == "gaussian":
                nn.init.normal_(B.t(), std=1 / spec.r)
            else:
                nn.init.kaiming_uniform_(B.t(), a=math.sqrt(5))
        return {EMBEDDING_B: B, EMBEDDING_A: A}

    def update(self, layer: Layer) -> Function:
        """`(B_E A_E)ᵀ`, `(V, D)`."""
        return tied_update, ()

    def operation(self, layer: Layer) -> Function:
        """`x Wᵀ`."""
        return F.linear, ()

    def build(
        self, add: BranchBuilder, site: CallSite, x: fx.Node, A: fx.Node, B: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """`linear(linear(x, B_Eᵀ), A_Eᵀ)`."""
        return add.call("b", torch.matmul, add.call("a", torch.matmul, x, A), B)

    def can_stack(self, layer: Layer) -> bool:
        """Always."""
        return True

    def build_stack(self, add: BranchBuilder, site: CallSite, x: fx.Node, stack: Stacked) -> fx.Node:
        """As for a linear layer."""
        return add.call("stacked", stacked_product, x, stack.A, stack.B, stack.scale, stack.select, stack.layout)

    def row_view(self, layer: Layer, part: Literal["weight", "A", "B"]) -> Method | None:
        """The factors are transposed."""
        return None if part == "weight" else ("t", ())

    def channel_dim(self, layer: Layer) -> int:
        """The last."""
        return -1

    def as_matrices(self, layer: Layer, part: Part, tensor: Tensor) -> Tensor:
        """The factors are transposed."""
        return tensor if part == "weight" else tensor.t()

    def from_matrices(self, layer: Layer, part: Part, matrices: Tensor) -> Tensor:
        """Likewise."""
        return self.as_matrices(layer, part, matrices)


def tied_update(A: Tensor, B: Tensor) -> Tensor:
    """`(B_E A_E)ᵀ`, with the arguments in the order of `factor_names`."""
    return embedding_update(B, A)
