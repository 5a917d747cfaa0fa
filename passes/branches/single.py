"""One adapter's branch in a graph, in canonical form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from passes.branches.base import CROSS_GROUPS, Branch, BranchDtype
from passes.branches.registry import KINDS, VARIANTS, has_factors
from passes.branches.tokens import ROWS
from passes.callsite import CallSite
from passes.leaves import BIAS_B
from passes.nodes import BranchBuilder


def build_branch(graph: fx.Graph, site: CallSite, branch: Branch, dtype: BranchDtype) -> fx.Node:
    """Add a branch's nodes at the graph's insertion point and return what is to be added to `site.node`.

    The canonical form for the output: cast, dropout, the kind's two products, `mul(·, scaling)`, then the variant.
    For the weight: the product `B A` in the weight's layout, `mul(·, scaling)`.
    """
    site = layer_at(site, branch)
    add, kind = BranchBuilder(graph, site, branch.adapter), KINDS[branch.kind]
    if not has_factors(branch):
        return ROWS[branch.variant].build(add, site, branch)
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
    return s


def layer_at(site: CallSite, branch: Branch) -> CallSite:
    """The call site with what no graph shows of its layer: how the branch's factors lie in their parameters."""
    across = tuple(option for option in branch.options if option[0] == CROSS_GROUPS)
    layer = site.layer
    layer = replace(layer, options=(*layer.options, *across), transposed=layer.transposed or branch.transposed)
    return replace(site, layer=layer)
