"""What a layer kind and a variant must provide, and the plain data that describes one branch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, fx, nn

from passes.callsite import CallSite, Form, Layer, Options, branch_owner
from passes.nodes import BranchBuilder
from passes.rows import Layout

CROSS_GROUPS = "cross_groups"
"""The option of a grouped convolution whose A reads the inputs of all groups."""


Part = Literal["weight", "A", "B"]
"""One of the three matrices of `W + B A`."""

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
        transposed: whether a linear's weight is stored `(in, out)`.
        r: the rank.
        scaling: the factor on the branch: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).
        dropout: probability of dropping an input element in training; 0 for no dropout.
        init: how the factors start, as peft's `init_lora_weights`.
        is_parameter: whether the site is a bare parameter and not a layer.
        options: what else the kind must know of the layer; see `Layer`.
        form: whether the branch is added to the layer's output, or to its weight.
        variant: key of `VARIANTS`, or of `ROWS` for a branch without factors; empty for plain LoRA.
        bias: whether the branch has a bias of its own (`lora_bias`).
        frozen: parts that are never trained.
        calls: which calls of the layer get the branch, counted from 0 in graph order; empty for all.
        tied_to: the site whose parts this branch shares, since both layers have one weight; empty for none.
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
    options: Options = ()
    form: Form = "output"
    variant: str = ""
    bias: bool = False
    frozen: tuple[str, ...] = ()
    calls: tuple[int, ...] = ()
    tied_to: str = ""

    @property
    def owner(self) -> str:
        """Path of the module under which the factors are registered."""
        return branch_owner(self.site, is_parameter=self.is_parameter)

    @property
    def layer(self) -> Layer:
        """The layer that the branch is for."""
        return Layer(self.kind, self.in_features, self.out_features, self.transposed, self.options, self.form)

    @property
    def num_parameters(self) -> int:
        """Number of entries of all parts of its own: those that it shares are counted where they come from."""
        from passes.branches import part_shapes, shared_parts

        shared = shared_parts(self)
        return sum(math.prod(shape) for part, shape in part_shapes(self).items() if part not in shared)

    def option(self, name: str, default: Any = None) -> Any:
        """One of the layer's options."""
        return dict(self.options).get(name, default)


@dataclass(frozen=True, slots=True)
class Branch:
    """What a graph must know of a branch; all that may differ between instances of one graph stays out of it.

    Attributes:
        site: the call site's name, relative to the region's instance.
        adapter: the adapter's name.
        dropout: whether there is a dropout module.
        kind: key of `KINDS`.
        form: whether it is added to the output or to the weight.
        variant: key of `VARIANTS`, or of `ROWS` for a branch without factors; empty for plain LoRA.
        bias: whether it has a bias of its own.
        options: of the layer.
        transposed: of the layer.
        calls: which calls of the site get it; empty for all.
    """

    site: str
    adapter: str
    dropout: bool = False
    kind: str = "linear"
    form: Form = "output"
    variant: str = ""
    bias: bool = False
    options: Options = ()
    transposed: bool = False
    calls: tuple[int, ...] = ()

    @classmethod
    def of(cls, spec: BranchSpec, site: str | None = None) -> Branch:
        """The branch of a spec, at a site named `site` in the region if that differs from the model's name."""
        name = spec.site if site is None else site
        return cls(
            name, spec.adapter, bool(spec.dropout), spec.kind, spec.form, spec.variant, spec.bias, spec.options,
            spec.transposed, spec.calls,
        )  # fmt: skip

    @property
    def layer(self) -> Layer:
        """The layer as far as a graph must know it: without its sizes."""
        return Layer(self.kind, 0, 0, self.transposed, self.options, self.form)


@dataclass(frozen=True, slots=True)
class Match:
    """A node that a kind recognises as its operation.

    Attributes:
        x: the input operand.
        weight: the weight operand; casts and transposes below it are looked through.
        spelling: how the graph writes the call, for people.
        layer: from the weight's shape, and whether it is transposed below the operand, to the layer; None if the
            shape does not fit.
        bias: the bias operand, None if there is none.
    """

    x: object
    weight: object
    spelling: str
    layer: Callable[[tuple[int, ...], bool], Layer | None]
    bias: object = None


Function = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, which a graph can call, and what follows its tensors among its arguments."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """The nodes of several branches at one site as one stack; see `passes.rows`.

    Attributes:
        A: `(S, r, columns)`, the rows of each A as `Kind.row_view` gives them.
        B: `(S, r, rows)`, each B transposed.
        scale: `(S,)`.
        select: the selection.
        layout: of the batch's rows in the site's input.
    """

    A: fx.Node
    B: fx.Node
    scale: fx.Node
    select: fx.Node
    layout: Layout


class Kind(Protocol):
    """The functions of one layer kind. `A` and `B` are the parts that `factor_names` names, in that order."""

    factor_names: ClassVar[tuple[str, str]]
    float_input: ClassVar[bool]
    """Whether the input is a floating-point tensor, which can be dropped and cast."""
    has_rows: ClassVar[bool]
    """Whether each output belongs to one row of the weight (`row_view`, `channel_dim`)."""
    can_have_bias: ClassVar[bool]
    """Whether a branch can have a bias of its own."""

    def layer(self, module: nn.Module) -> Layer | None:
        """A module of this kind as a layer, None for any other module."""
        ...

    def match(self, node: fx.Node) -> Match | None:
        """A node that is this kind's operation, however it is spelled; None for any other node."""
        ...

    def weight_shape(self, layer: Layer) -> tuple[int, ...]:
        """Shape of the base weight."""
        ...

    def factor_shapes(self, spec: BranchSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        ...

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        """Fresh float32 parts on the CPU, drawn from torch's generator in peft's order."""
        ...

    def update(self, layer: Layer) -> Function:
        """`f(A, B, …)`: the product `B A` in the base weight's layout, without the scaling; differentiable."""
        ...

    def operation(self, layer: Layer) -> Function:
        """`f(x, W, …)`: the layer's own operation, without its bias."""
        ...

    def build(
        self, add: BranchBuilder, site: CallSite, x: fx.Node, A: fx.Node, B: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """Add the nodes of the unscaled branch `B(A(x)) + bias` and return its result."""
        ...

    def can_stack(self, layer: Layer) -> bool:
        """Whether the branches of several adapters can be computed as one stack."""
        ...

    def build_stack(self, add: BranchBuilder, site: CallSite, x: fx.Node, stack: Stacked) -> fx.Node:
        """Add the nodes of the scaled sum of the branches that each row has, without a bias."""
        ...

    def row_view(self, layer: Layer, part: Literal["weight", "A", "B"]) -> Method | None:
        """The method that makes the weight a matrix `(rows, columns)`, A `(r, columns)`, B `(rows, r)`; None if it is."""
        ...

    def channel_dim(self, layer: Layer) -> int:
        """The dimension of the output along which the rows of the weight lie, counted from the end."""
        ...

    def as_matrices(self, layer: Layer, part: Part, tensor: Tensor) -> Tensor:
        """A weight or factor for linear algebra: the update is `B A` of the results, for each of their leading indices.

        Args:
            layer: the layer.
            part: which of the three `tensor` is.
            tensor: as the layer or the branch has it.

        Returns:
            The weight as `(…, rows, columns)`, A as `(…, q, columns)`, B as `(…, rows, q)`.
        """
        ...

    def from_matrices(self, layer: Layer, part: Part, matrices: Tensor) -> Tensor:
        """The inverse of `as_matrices`, for any `q`."""
        ...


Method = tuple[str, tuple[Any, ...]]
"""A method of a tensor by its name, and its arguments."""


def as_rows(kind: Kind, layer: Layer, part: Literal["weight", "A", "B"], tensor: Tensor) -> Tensor:
    """A weight or factor as a matrix: see `Kind.row_view`."""
    view = kind.row_view(layer, part)
    return tensor if view is None else getattr(tensor, view[0])(*view[1])


class Variant(Protocol):
    """A way to use a kind's factors other than by adding `scaling · B A`. Variants never name a kind."""

    def part_shapes(self, kind: Kind, spec: BranchSpec) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts beside the kind's own."""
        ...

    def init(self, kind: Kind, spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Initial values of these parts, from the base weight and the kind's parts."""
        ...

    def leaves(self, kind: Kind, spec: BranchSpec, weight: Tensor) -> dict[str, nn.Module]:
        """The leaf modules that the graph calls, by container name."""
        ...

    def build(
        self, add: BranchBuilder, kind: Kind, site: CallSite, x: fx.Node, parts: dict[str, fx.Node], s: fx.Node,
        scaling: fx.Node, dropout: bool,
    ) -> fx.Node:  # fmt: skip
        """Add the nodes that turn the scaled branch `s` into what is added to the base's output."""
        ...

    def channel_ratio(self, kind: Kind, spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The factor on each of the layer's outputs without its bias, `(out,)`, which a stack of branches has ready."""
        ...

    def build_ratio(
        self, add: BranchBuilder, kind: Kind, site: CallSite, parts: dict[str, fx.Node], scaling: fx.Node
    ) -> fx.Node:
        """Add the nodes that compute this factor."""
        ...

    def build_base(self, add: BranchBuilder, kind: Kind, site: CallSite, x: fx.Node, dropout: bool) -> fx.Node:
        """Add the nodes of the output without the bias that the factor multiplies."""
        ...

    def build_stack(
        self, add: BranchBuilder, kind: Kind, site: CallSite, y: fx.Node, s: fx.Node, ratios: fx.Node, stack: Stacked
    ) -> fx.Node:
        """Add the nodes that turn a stack's scaled sum `s`, its B multiplied by the ratios, into what is added.

        `y` is the base's output without its bias, `ratios` are stacked `(S, out)`.
        """
        ...

    def row_ratio(self, parts: dict[str, Tensor], norms: Tensor) -> Tensor | None:
        """The factor on each row of `W + s B A` that makes the folded weight, from the norms of these rows; all float64.

        None if the variant does something else to the weight, which `delta` tells then.
        """
        ...

    def delta(self, kind: Kind, spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The float64 change of the base weight; the parts are float64 too."""
        ...
