"""The forms in which a site's branches are put into a graph.

- `plain`: one branch for each active adapter, in canonical form. Another choice of adapters is another graph.
- `rows`: all adapters at once, from their own parameters; each row of a batch may use another one (see `passes.rows`).
- `slots`: all adapters at once, from stacked copies of their factors: the choice among them is a copy into a buffer.

In the last two the branches that can be stacked are computed as one; each of the others is multiplied by its gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from passes.branches.base import Branch, BranchDtype, BranchSpec, Kind, Method, Stacked, as_rows
from passes.branches.registry import KINDS, VARIANTS, has_factors
from passes.branches.single import build_branch, layer_at
from passes.branches.tokens import ROWS
from passes.callsite import CallSite
from passes.leaves import BIAS_B
from passes.nodes import BranchBuilder
from passes.rows import Layout, add_channels, gated, gated_weight, layout_of, stack_parts

Mode = Literal["plain", "rows", "slots"]
FactorRole = Literal["A", "B"]
FACTORS: tuple[FactorRole, ...] = ("A", "B")


@dataclass(frozen=True, slots=True)
class BranchForm:
    """One or several branches that are added to a site's output together.

    Attributes:
        branches: in the order of their adapters.
        mode: how.
        stacked: whether they are computed as one.
    """

    branches: tuple[Branch, ...]
    mode: Mode = "plain"
    stacked: bool = False

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(branch.adapter for branch in self.branches)

    @property
    def label(self) -> str:
        """What stands for the adapters in the metadata of nodes; a name has no slash."""
        return "/".join(self.adapters)

    @property
    def owner(self) -> str:
        """The adapter under whose name the form's own leaf modules are registered."""
        return self.adapters[0]

    def build(self, graph: fx.Graph, site: CallSite, dtype: BranchDtype) -> fx.Node:
        """Add the nodes at the graph's insertion point and return what is to be added to `site.node`."""
        if self.stacked:
            end = _build_stack(graph, site, self, dtype)
        else:
            end = build_branch(graph, site, self.branches[0], dtype)
            if self.mode != "plain":
                end = _gate(graph, site, self, end)
        end.meta["lora"] = replace(end.meta["lora"], last=True)
        return end

    def join(self, add: BranchBuilder, total: fx.Node, s: fx.Node) -> fx.Node:
        """Add the node that adds a result `s` to the base's output, or to its sum with other branches."""
        branch = self.branches[0]
        if not has_factors(branch):
            return ROWS[branch.variant].join(add, total, s, branch.adapter)
        return add.call("y", torch.add, total, s)


def arrange(branches: Iterable[Branch], mode: Mode) -> tuple[BranchForm, ...]:
    """The forms of one site's branches, in the order of the first adapter of each."""
    groups: dict[object, list[Branch]] = {}
    for branch in branches:
        alike = replace(branch, adapter="", dropout=False)
        key = alike if mode != "plain" and can_stack(branch) else branch
        groups.setdefault(key, []).append(branch)
    return tuple(
        BranchForm(tuple(group), mode, stacked=mode != "plain" and can_stack(group[0])) for group in groups.values()
    )


def can_stack(branch: Branch) -> bool:
    """Whether a branch can be computed together with those of other adapters."""
    return branch.form == "output" and has_factors(branch) and KINDS[branch.kind].can_stack(branch.layer)


def _gate(graph: fx.Graph, site: CallSite, form: BranchForm, end: fx.Node) -> fx.Node:
    """One adapter's branch for the rows that use it."""
    end.meta["lora"] = replace(end.meta["lora"], last=False)
    add = BranchBuilder(graph, site, form.owner)
    select = add.switch(form.adapters)
    if site.x is None:
        return add.call("gated", gated_weight, end, select)
    return add.call("gated", gated, end, select, layout_of(site.node))


def _build_stack(graph: fx.Graph, site: CallSite, form: BranchForm, dtype: BranchDtype) -> fx.Node:
    """`scale · B A x` of all slots, with one product for each of A and B."""
    first = form.branches[0]
    site = layer_at(site, first)
    add, kind, x = BranchBuilder(graph, site, form.owner, form.label), KINDS[first.kind], site.x
    assert x is not None
    layout: Layout = layout_of(x)
    select = add.switch(form.adapters)
    like = add.dtype(x if kind.float_input else site.node) if dtype == "base" else None
    tensors = _slots(add, first) if form.mode == "slots" else _stacks(graph, site, form, select, like)
    if dtype == "adapter" and kind.float_input:
        x = add.cast(x, add.dtype(tensors["A"]), "x")
    dropped = any(branch.dropout for branch in form.branches)
    if dropped:
        x = add.row_dropout(x, select, layout)
    if like is not None and form.mode == "slots":
        tensors.update({part: add.cast(tensors[part], like, part) for part in FACTORS})
    stack = Stacked(tensors["A"], tensors["B"], tensors["scale"], select, layout)
    s = kind.build_stack(add, site, x, stack)
    channels = kind.channel_dim(site.layer)
    if first.bias:
        s = add.call("biased", add_channels, s, tensors["bias"], stack.scale, select, layout, channels)
    if first.variant:
        variant = VARIANTS[first.variant]
        leaf = next((branch.adapter for branch in form.branches if branch.dropout), form.owner)
        own = BranchBuilder(graph, site, leaf, form.label)
        y = variant.build_base(own, kind, site, x, dropped)
        s = variant.build_stack(add, kind, site, y, s, tensors["ratios"], stack)
    return s


def stacked_parts(branch: Branch | BranchSpec) -> tuple[str, ...]:
    """Names of the tensors of a stack of such branches."""
    return ("A", "B", "scale", *(["bias"] if branch.bias else []), *(["ratios"] if branch.variant else []))


def _slots(add: BranchBuilder, branch: Branch) -> dict[str, fx.Node]:
    return {part: add.slots(part) for part in stacked_parts(branch)}


def _stacks(
    graph: fx.Graph, site: CallSite, form: BranchForm, select: fx.Node, dtype: fx.Node | None
) -> dict[str, fx.Node]:
    """The stacked tensors, from the adapters' own parameters."""
    first, kind = form.branches[0], KINDS[form.branches[0].kind]
    builders = [BranchBuilder(graph, site, branch.adapter, form.label) for branch in form.branches]
    add = BranchBuilder(graph, site, form.owner, form.label)
    parts = {role: [own.part(n, role) for own in builders] for n, role in zip(kind.factor_names, "AB", strict=True)}
    parts["scale"] = [own.scale() for own in builders]
    if first.bias:
        parts["bias"] = [own.part(BIAS_B, "bias") for own in builders]
    if first.variant:
        return _variant_stacks(add, builders, site, first, parts, dtype)
    views = {role: kind.row_view(site.layer, role) for role in FACTORS}
    return {
        name: add.call(name, stack_parts, select, *_stacking(name, views.get(name), dtype), *nodes)
        for name, nodes in parts.items()
    }


def _stacking(name: str, view: Method | None, dtype: fx.Node | None) -> tuple[str, Method | None, fx.Node | None]:
    """How tensors of a name are stacked: their role, how they become matrices, the dtype of the stack."""
    return (name, view, dtype) if name in FACTORS else ("other", None, None)


def _variant_stacks(
    add: BranchBuilder,
    builders: Sequence[BranchBuilder],
    site: CallSite,
    branch: Branch,
    parts: dict[str, list[fx.Node]],
    dtype: fx.Node | None,
) -> dict[str, fx.Node]:
    """The stacked tensors of branches whose B is multiplied by ratios, which every call computes anew."""
    kind, variant = KINDS[branch.kind], VARIANTS[branch.variant]
    found: dict[str, list[fx.Node]] = {**parts, "A": [], "B": [], "ratios": []}
    for number, own in enumerate(builders):
        factors = [parts[role][number] for role in FACTORS]
        if dtype is not None:
            factors = [own.cast(factor, dtype, role) for role, factor in zip(FACTORS, factors, strict=True)]
        named = dict(zip(kind.factor_names, factors, strict=True))
        ratio = variant.build_ratio(own, kind, site, named, parts["scale"][number])
        A, B = (_as_rows(own, kind, site, role, factor) for role, factor in zip(FACTORS, factors, strict=True))
        found["A"].append(A)
        found["B"].append(own.call("B", torch.mul, B, own.call("ratio", torch.unsqueeze, ratio, -1)))
        found["ratios"].append(ratio)
    return {
        name: add.call(name, stack_parts, None, *_stacking(name, None, dtype), *nodes) for name, nodes in found.items()
    }


def _as_rows(add: BranchBuilder, kind: Kind, site: CallSite, role: FactorRole, factor: fx.Node) -> fx.Node:
    view = kind.row_view(site.layer, role)
    return factor if view is None else add.method(role, view[0], factor, *view[1])


def slot_values(spec: BranchSpec, r: int, weight: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one slot of a stack holds for an adapter's branch; see `_stacks`.

    Args:
        spec: the branch.
        r: rank of the stack, at least that of the branch; the rest is zero.
        weight: the base weight.
        parts: the branch's tensors.

    Returns:
        `A (r, columns)`, `B (r, out)`, `scale ()`, and `bias (out,)`, `ratios (out,)` where the branch has them.
    """
    kind = KINDS[spec.kind]
    A, B = (as_rows(kind, spec.layer, role, parts[n]) for n, role in zip(kind.factor_names, FACTORS, strict=True))
    wide = torch.promote_types(A.dtype, torch.float32)
    values = {"A": A, "B": B.t(), "scale": torch.tensor(spec.scaling, dtype=wide)}
    if spec.variant:
        values["ratios"] = VARIANTS[spec.variant].channel_ratio(kind, spec, weight, parts)
        values["B"] = values["B"] * values["ratios"]
    if spec.bias:
        values["bias"] = parts[BIAS_B]
    for name in FACTORS:
        values[name] = torch.nn.functional.pad(values[name], (0, 0, 0, r - values[name].shape[0]))
    return values
