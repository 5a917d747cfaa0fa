"""LoRA on an embedding: `y' = y + scaling · embedding(i, Aᵀ) Bᵀ`, `W' = W + scaling · (B A)ᵀ`.

Base weight `(V, D)`; A `(r, V)`, B `(D, r)`, as in peft, which starts A at zero and B at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.base import original_forward
from passes.branches.base import BranchSpec, Function, Match, Method, Part, Stacked
from passes.callsite import CallSite, Layer, Options
from passes.errors import PassError
from passes.leaves import EMBEDDING_A, EMBEDDING_B
from passes.nodes import BranchBuilder
from passes.operands import arg
from passes.rows import stacked_lookup

aten = torch.ops.aten

EMBED_SCALE = "embed_scale"
"""The attribute by which scaled embeddings of transformers (Gemma, BART) multiply their output."""

_LOOKUP = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


@dataclass(frozen=True)
class Embedding:
    """The embedding kind."""

    factor_names: ClassVar[tuple[str, str]] = (EMBEDDING_A, EMBEDDING_B)
    float_input: ClassVar[bool] = False
    has_rows: ClassVar[bool] = True
    can_have_bias: ClassVar[bool] = False

    def layer(self, module: nn.Module) -> Layer | None:
        """`nn.Embedding`; a subclass with a forward of its own keeps it, and has the branch in its weight.

        A subclass that only multiplies by its `embed_scale` has the branch in its output, multiplied likewise.
        """
        if not isinstance(module, nn.Embedding):
            return None
        options: Options = tuple((name, getattr(module, name)) for name in _LOOKUP)
        own = original_forward(module) is not nn.Embedding.forward
        scaled = own and hasattr(module, EMBED_SCALE)
        if scaled:
            options = ((EMBED_SCALE, True), *options)
        form = "weight" if own and not scaled else "output"
        return Layer("embedding", module.num_embeddings, module.embedding_dim, False, options, form)

    def match(self, node: fx.Node) -> Match | None:
        """`embedding` of torch and of ATen."""
        if node.target is F.embedding:
            values = {name: arg(node, 2 + index, name) for index, name in enumerate(_LOOKUP)}
            x, weight = arg(node, 0, "input"), arg(node, 1, "weight")
        elif node.target is aten.embedding.default:
            padding_idx = arg(node, 2, "padding_idx", default=-1)
            values = {"padding_idx": None if padding_idx == -1 else padding_idx}
            values.update(scale_grad_by_freq=arg(node, 3, "scale_grad_by_freq"), sparse=arg(node, 4, "sparse"))
            x, weight = arg(node, 1, "indices"), arg(node, 0, "weight")
        else:
            return None
        defaults = {"norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}
        options: Options = tuple((name, values.get(name) or defaults.get(name)) for name in _LOOKUP)
        if values.get("padding_idx") == 0:
            options = (("padding_idx", 0), *options[1:])

        def layer(shape: tuple[int, ...], flipped: bool) -> Layer | None:
            return None if flipped or len(shape) != 2 else Layer("embedding", *shape, False, options)

        return Match(x, weight, "embedding", layer)

    def weight_shape(self, layer: Layer) -> tuple[int, ...]:
        """`(V, D)`."""
        return layer.in_features, layer.out_features

    def factor_shapes(self, spec: BranchSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A: `(r, V)`; B: `(D, r)`."""
        return (spec.r, spec.in_features), (spec.out_features, spec.r)

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        """Zero A and B ~ N(0, 1); False: both ~ N(0, 1). peft draws both and then B again."""
        A, B = (torch.empty(shape) for shape in self.factor_shapes(spec))
        if torch.get_default_device().type != "meta":
            nn.init.normal_(A)
            nn.init.normal_(B)
            if spec.init is not False:
                nn.init.zeros_(A)
                nn.init.normal_(B)
        return {EMBEDDING_A: A, EMBEDDING_B: B}

    def update(self, layer: Layer) -> Function:
        """`(B A)ᵀ`, `(V, D)`."""
        if dict(layer.options).get("max_norm") is not None:
            raise PassError(
                "this embedding has a max_norm: each lookup rescales rows of W and of A apart, and those of a merged "
                "weight together, which gives other outputs. Run it unmerged, or set max_norm=None before the transform"
            )
        return embedding_update, ()

    def operation(self, layer: Layer) -> Function:
        """The lookup. `max_norm` is left to the base, whose rows it changes in place."""
        values = dict(layer.options)
        return lookup, (values["padding_idx"], values["scale_grad_by_freq"], values["sparse"])

    def build(
        self, add: BranchBuilder, site: CallSite, x: fx.Node, A: fx.Node, B: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        """`linear(embedding(x, Aᵀ), B)`, times the layer's `embed_scale` if it has one."""
        values = dict(site.layer.options)
        rows = add.method("A", "t", A)
        a = add.call("a", F.embedding, x, rows, *(values[name] for name in _LOOKUP))
        return _scaled(add, site, add.call("b", F.linear, a, B))

    def can_stack(self, layer: Layer) -> bool:
        """Unless the lookup changes or counts what it reads."""
        values = dict(layer.options)
        return values["max_norm"] is None and not values["scale_grad_by_freq"] and not values["sparse"]

    def build_stack(self, add: BranchBuilder, site: CallSite, x: fx.Node, stack: Stacked) -> fx.Node:
        """A lookup in all columns of A at once, then a product for the whole batch."""
        padding_idx = dict(site.layer.options)["padding_idx"]
        s = add.call(
            "stacked", stacked_lookup, x, stack.A, stack.B, stack.scale, stack.select, stack.layout, padding_idx
        )
        return _scaled(add, site, s)

    def row_view(self, layer: Layer, part: Literal["weight", "A", "B"]) -> Method | None:
        """The weight is transposed: a row for each entry of an embedding vector."""
        return ("t", ()) if part == "weight" else None

    def channel_dim(self, layer: Layer) -> int:
        """The last."""
        return -1

    def as_matrices(self, layer: Layer, part: Part, tensor: Tensor) -> Tensor:
        """The weight is transposed."""
        return tensor.t() if part == "weight" else tensor

    def from_matrices(self, layer: Layer, part: Part, matrices: Tensor) -> Tensor:
        """Likewise."""
        return self.as_matrices(layer, part, matrices)


def _scaled(add: BranchBuilder, site: CallSite, b: fx.Node) -> fx.Node:
    """The branch times the layer's `embed_scale`, if it has one."""
    if EMBED_SCALE not in dict(site.layer.options):
        return b
    path = ".".join(part for part in (site.name, EMBED_SCALE) if part)
    return add.call("scaled", scale_like, b, add.base(path, EMBED_SCALE))


def embedding_update(A: Tensor, B: Tensor) -> Tensor:
    """`(B A)ᵀ`."""
    return (B @ A).t()


def lookup(x: Tensor, weight: Tensor, padding_idx: int | None, scale_grad_by_freq: bool, sparse: bool) -> Tensor:
    """Rows of a weight."""
    return F.embedding(x, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def scale_like(value: Tensor, scale: Tensor | float) -> Tensor:
    """`value` times a layer's `embed_scale`, cast first as such layers do."""
    return value * (scale.to(value.dtype) if isinstance(scale, Tensor) else scale)
