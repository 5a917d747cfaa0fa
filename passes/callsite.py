"""What a layer is (`Layer`) and where a graph calls it (`CallSite`): plain data that kinds and passes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from passes.leaves import PARAMETERS

Options = tuple[tuple[str, Any], ...]
"""What a kind must know of a layer beside its sizes (a convolution's stride, …): hashable, sorted by name."""

Form = Literal["output", "weight"]
"""Where a branch is added: to the output of the layer's operation, or to the weight before the operation reads it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer or parameter that can have a branch.

    Attributes:
        kind: the layer kind, a key of `passes.branches.KINDS`.
        in_features: size of the layer's input: features, channels, or entries of a vocabulary.
        out_features: size of its output.
        transposed: whether a linear's weight is stored `(in, out)`, as in GPT-2's Conv1D, and not `(out, in)`.
        options: what else the kind must know.
        form: `"weight"` for a layer whose own forward hides the operation, so that only its weight can be adapted.
    """

    kind: str
    in_features: int
    out_features: int
    transposed: bool = False
    options: Options = ()
    form: Form = "output"


@dataclass(frozen=True, slots=True, eq=False)
class CallSite:
    """One call of a layer in a region's graph: `y = op(x, W, b)`. For the form `"weight"`: one read of a parameter.

    Attributes:
        name: qualified name of the layer, relative to the region's instance. A bare parameter's own name when the
            weight belongs to no layer.
        layer: its kind, sizes and options.
        node: the node that computes `y`; for the form `"weight"` the node that reads `W`.
        x: the node of the input; None for the form `"weight"`.
        weight: path of `W` relative to the instance.
        spelling: how the graph writes the call, for people.
        bias: the bias as a node, or its path relative to the instance; None if there is none.
        call: 0 for the first call of this layer in the graph, 1 for the second, …
    """

    name: str
    layer: Layer
    node: fx.Node
    x: fx.Node | None
    weight: str
    spelling: str
    bias: fx.Node | str | None = None
    call: int = 0

    @property
    def owner(self) -> str:
        """Path of the module under which the branches' factors are registered."""
        return branch_owner(self.name, is_parameter=self.weight == self.name)

    @property
    def kind(self) -> str:
        """Key of `KINDS`."""
        return self.layer.kind

    @property
    def in_features(self) -> int:
        """Size of the layer's input."""
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return self.layer.out_features

    @property
    def transposed(self) -> bool:
        """Whether a linear's weight is stored `(in, out)`."""
        return self.layer.transposed


def branch_owner(site: str, *, is_parameter: bool) -> str:
    """The module that holds a site's factors: the layer itself, or a holder beside a bare parameter."""
    if not is_parameter:
        return site
    module, _, leaf = site.rpartition(".")
    return ".".join(part for part in (module, PARAMETERS, leaf) if part)
