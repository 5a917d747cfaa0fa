"""Layer kinds and variants: the parts of a branch, their initial values, the branch in a graph, and the fold.

A kind is pure tensor and node functions; a variant wraps them. Adding either is a file here and a line below.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from passes.branches.base import CROSS_GROUPS, Branch, BranchDtype, BranchSpec, Kind, Part, Variant, as_rows
from passes.branches.conv import Conv
from passes.branches.dora import Dora
from passes.branches.embedding import Embedding
from passes.branches.linear import Linear
from passes.branches.parameter import Parameter
from passes.branches.tied import Tied
from passes.branches.tokens import ROWS, Rows, current_rows, row_change, row_shape, token_ids
from passes.callsite import CallSite, Layer
from passes.leaves import BIAS_B, CONTAINERS, PARAMETERS, SAVED, TOKEN_IDS, TOKENS, TokenIds
from passes.nodes import BranchBuilder

KINDS: dict[str, Kind] = {
    "linear": Linear(),
    "embedding": Embedding(),
    "conv": Conv(),
    "parameter": Parameter(),
    "tied": Tied(),
}

SITE_KINDS = {"tied": "linear"}
"""Kinds whose branches are at call sites of another kind, and of which one."""

VARIANTS: dict[str, Variant] = {"dora": Dora()}


def site_kind(branch: BranchSpec | Branch) -> str:
    """The kind of the call sites that a branch is for."""
    return SITE_KINDS.get(branch.kind, branch.kind)


def has_factors(branch: BranchSpec | Branch) -> bool:
    """Whether a branch has its kind's two factors, and so a scaling; a branch of `ROWS` has neither."""
    return branch.variant not in ROWS


def shared_parts(spec: BranchSpec) -> tuple[str, ...]:
    """The parts that a branch has from the site that it is tied to."""
    if not spec.tied_to:
        return ()
    return KINDS[spec.kind].factor_names if has_factors(spec) else (TOKENS,)


def containers() -> frozenset[str]:
    """Names under which a site's adapters keep their parts and leaves, those of all registered kinds among them."""
    return frozenset((*CONTAINERS, *(name for kind in KINDS.values() for name in kind.factor_names)))


def is_inserted(name: str) -> bool:
    """Whether a qualified name is of something that adapters added to a model."""
    return not {*containers(), PARAMETERS, SAVED}.isdisjoint(name.split("."))


def part_shapes(spec: BranchSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of all parts of a branch, by part name, in the order in which files list them."""
    kind = KINDS[spec.kind]
    if not has_factors(spec):
        return {TOKENS: row_shape(spec)}
    shapes = dict(zip(kind.factor_names, kind.factor_shapes(spec), strict=True))
    if spec.bias:
        shapes[BIAS_B] = (spec.out_features,)
    if spec.variant:
        shapes.update(VARIANTS[spec.variant].part_shapes(kind, spec))
    return shapes


def variant_parts(spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Initial values of the parts that a variant adds to a kind's, or of rows; none for plain LoRA."""
    if not has_factors(spec):
        return {TOKENS: current_rows(spec, weight)}
    return VARIANTS[spec.variant].init(KINDS[spec.kind], spec, weight, parts) if spec.variant else {}


def variant_leaves(spec: BranchSpec, weight: Tensor) -> dict[str, nn.Module]:
    """The leaf modules that a variant's graph calls, by container name; none for plain LoRA."""
    if not has_factors(spec):
        return {TOKEN_IDS: TokenIds(token_ids(spec.options), weight.device)}
    return VARIANTS[spec.variant].leaves(KINDS[spec.kind], spec, weight) if spec.variant else {}


def deltas(spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a branch adds to its layer's tensors when it is folded, scaling included.

    Args:
        spec: the branch.
        weight: the original base weight.
        parts: the branch's tensors.

    Returns:
        float64 tensors: `weight` in the base weight's layout, and `bias` for a branch with a bias.
    """
    kind = KINDS[spec.kind]
    wide = {name: part.detach().double() for name, part in parts.items()}
    if not has_factors(spec):
        return {"weight": row_change(spec, weight, wide[TOKENS])}
    if spec.variant:
        return {"weight": VARIANTS[spec.variant].delta(kind, spec, weight, wide)}
    result = {"weight": plain_delta(kind, spec, wide)}
    if spec.bias:
        result["bias"] = wide[BIAS_B] * spec.scaling
    return result


def plain_delta(kind: Kind, spec: BranchSpec, parts: dict[str, Tensor]) -> Tensor:
    """`scaling · B A` in the base weight's layout, in the dtype of the parts."""
    A, B = (parts[name] for name in kind.factor_names)
    function, extra = kind.update(spec.layer)
    return function(A, B, *extra) * spec.scaling


def _as_factors_are(layer: Layer, branch: Branch) -> Layer:
    """A call site's layer with what no graph shows of it: how the factors lie in their parameters."""
    across = tuple(option for option in branch.options if option[0] == CROSS_GROUPS)
    return replace(layer, options=(*layer.options, *across), transposed=layer.transposed or branch.transposed)


def build_branch(graph: fx.Graph, site: CallSite, branch: Branch, dtype: BranchDtype) -> fx.Node:
    """Add a branch's nodes at the graph's insertion point and return what is to be added to `site.node`.

    The canonical form for the output: cast, dropout, the kind's two products, `mul(·, scaling)`, then the variant.
    For the weight: the product `B A` in the weight's layout, `mul(·, scaling)`.
    """
    site = replace(site, layer=_as_factors_are(site.layer, branch))
    add, kind = BranchBuilder(graph, site, branch.adapter), KINDS[branch.kind]
    if not has_factors(branch):
        end = ROWS[branch.variant].build(add, site, branch)
        end.meta["lora"] = replace(end.meta["lora"], last=True)
        return end
    parts = {name: add.part(name, role) for name, role in zip(kind.factor_names, "AB", strict=True)}
    if branch.bias:
        parts[BIAS_B] = add.part(BIAS_B, "bias")
    x = site.x
    if kind.float_input and x is not None:
        if dtype == "adapter":
            x = add.cast(x, add.dtype(parts[kind.factor_names[0]]), "x")
        if branch.dropout:
            x = add.dropout(x)
    if dtype == "base":
        like = add.dtype(x if kind.float_input and x is not None else site.node)
        parts = {name: add.cast(part, like, part.meta["lora"].role) for name, part in parts.items()}
    A, B = (parts[name] for name in kind.factor_names)
    if x is None:
        function, extra = kind.update(branch.layer)
        b = add.call("b", function, A, B, *extra)
    else:
        b = kind.build(add, site, x, A, B, parts.get(BIAS_B))
    scaling = add.scaling()
    s = add.call("s", torch.mul, b, scaling)
    if branch.variant and x is not None:
        s = VARIANTS[branch.variant].build(add, kind, site, x, parts, s, scaling, branch.dropout)
    s.meta["lora"] = replace(s.meta["lora"], last=True)
    return s


def join(add: BranchBuilder, total: fx.Node, s: fx.Node, branch: Branch) -> fx.Node:
    """Add the node that adds a branch's result `s` to the base's output, or to its sum with other branches."""
    if not has_factors(branch):
        return ROWS[branch.variant].join(add, total, s, branch.adapter)
    return add.call("y", torch.add, total, s)


__all__ = [
    "KINDS",
    "ROWS",
    "SITE_KINDS",
    "VARIANTS",
    "Branch",
    "BranchDtype",
    "BranchSpec",
    "Kind",
    "Part",
    "Rows",
    "Variant",
    "as_rows",
    "build_branch",
    "containers",
    "deltas",
    "has_factors",
    "join",
    "part_shapes",
    "plain_delta",
    "shared_parts",
    "site_kind",
    "variant_leaves",
    "variant_parts",
]
