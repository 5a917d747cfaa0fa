"""What a layer kind must provide, and the plain data that describes one branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, fx

from passes.sites import CallSite, branch_owner

BranchDtype = Literal["base", "adapter"]
"""`base`: the small factors are cast to the activation's dtype. `adapter`: the activation is cast to the factors'."""


@dataclass(frozen=True, slots=True)
class BranchSpec:
    """All that is to be known of one adapter's branch at one site, without a graph or a tensor.

    Attributes:
        site: qualified name of the layer in the model.
        adapter: the adapter's name.
        kind: key of `KINDS`.
        in_features: size of the layer's input.
        out_features: size of the layer's output.
        transposed: whether the base weight is stored `(in, out)`.
        r: the rank.
        scaling: the factor on the branch: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
        dropout: probability of dropping an input element in training; 0 for no dropout.
        init: how the factors start, as peft's `init_lora_weights`.
        is_parameter: whether the site is a bare parameter and not a layer.
    """

    site: str
    adapter: str
    kind: str
    in_features: int
    out_features: int
    transposed: bool
    r: int
    scaling: float
    dropout: float = 0.0
    init: bool | str = True
    is_parameter: bool = False

    @property
    def owner(self) -> str:
        """Path of the module under which the factors are registered."""
        return branch_owner(self.site, is_parameter=self.is_parameter)

    @property
    def num_parameters(self) -> int:
        """Number of entries in both factors."""
        return self.r * (self.in_features + self.out_features)


class Kind(Protocol):
    """The tensor functions of one layer kind."""

    def params(self, spec: BranchSpec) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors by container name (`lora_A`, `lora_B`)."""
        ...

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        """Fresh float32 factors on the CPU, drawn from torch's generator in peft's order."""
        ...

    def build(self, graph: fx.Graph, site: CallSite, adapter: str, dropout: bool, dtype: BranchDtype) -> fx.Node:
        """Add the branch's nodes at the graph's insertion point and return the scaled result."""
        ...

    def delta(self, spec: BranchSpec, factors: dict[str, Tensor]) -> Tensor:
        """The float64 update of the base weight, in the base weight's layout, scaling included."""
        ...
