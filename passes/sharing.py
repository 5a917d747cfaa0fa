"""Whether a weight is used by anything else than the layer that is folded: a merge would change that too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import fx, nn

from passes.base import Region
from passes.branches import BranchSpec, has_factors, site_kind
from passes.callsite import CallSite
from passes.errors import MergeError
from passes.nodes import lora_meta
from passes.operands import peel
from passes.sites import base_weight, find_sites, weight_path

aten = torch.ops.aten

Tied = Literal["refuse", "untie", "both"]
"""What a merge does with a weight that other layers have too: nothing at all, give the layer its own, or change all."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What else uses a site's weight.

    Attributes:
        parameters: paths of other parameters that are the same one, or overlap it in memory.
        uses: names of what reads it in the graph beside the site.
    """

    parameters: frozenset[str]
    uses: frozenset[str]


def check_sharing(region: Region, specs: Iterable[BranchSpec], tied: Tied) -> None:
    """Refuse to change weights that are also used elsewhere, unless it is said to change all uses.

    Raises:
        MergeError: naming the site and the other use; with `tied="both"`, where two uses have an update each.
    """
    specs = tuple(specs)
    if tied != "both":
        check_not_shared(region, specs)
        return
    sites: dict[int, str] = {}
    for site in foldable(specs):
        other = sites.setdefault(id(base_weight(region.module, site)[1]), site)
        if other != site:
            raise MergeError(
                f"'{other}' and '{site}' have one weight and an update each, so that tied='both' cannot say which one is "
                "meant; use tied='untie', or train with ensure_weight_tying; nothing was changed"
            )


def foldable(specs: Iterable[BranchSpec]) -> dict[str, list[BranchSpec]]:
    """Branches by site, in their order; one that is tied to another site has the very update that is folded there."""
    by_site: dict[str, list[BranchSpec]] = {}
    for spec in specs:
        if not spec.tied_to:
            by_site.setdefault(spec.site, []).append(spec)
    return by_site


def check_not_shared(region: Region, specs: Iterable[BranchSpec]) -> None:
    """Refuse to change a weight that is also used elsewhere.

    Raises:
        MergeError: naming the site and the other use.
    """
    for site, sharing in shared_weights(region, specs):
        raise MergeError(
            f"'{site}': its weight is shared with '{min(sharing.parameters or sharing.uses)}', which a merge would change "
            "too. Say what is wanted with tied='untie' (the layer gets a weight of its own) or tied='both' (all of them "
            "change), or leave this layer out of the targets; nothing was changed"
        )


def shared_weights(region: Region, specs: Iterable[BranchSpec]) -> Iterator[tuple[str, Sharing]]:
    """The sites whose weights are also used elsewhere, and by what.

    Layers that share a weight may be folded where one branch is tied to the other, with an equal update. A branch of the
    form `"weight"` is in every use of its parameter, so that only other parameters can share it.
    """
    model, specs = region.module, tuple(specs)
    owners: dict[int, list[tuple[str, range]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(_storage(parameter), []).append((f"{prefix}.{name}".lstrip("."), _bytes(parameter)))
    other_uses = uses_beside_sites(region)
    calls: dict[tuple[str, str], list[CallSite]] = {}
    for site in find_sites(region):
        calls.setdefault((site.name, site.kind), []).append(site)
    tied: dict[str, list[BranchSpec]] = {}
    for spec in specs:
        tied.setdefault(spec.tied_to, []).append(spec)
    for spec in tied.get("", ()):
        alike = [spec, *(each for each in tied.get(spec.site, ()) if _alike(each, spec))]
        weight = base_weight(model, spec.site)[1]
        sharing = {name for name, held in owners[_storage(weight)] if _overlap(held, _bytes(weight))}
        others = sharing - {weight_path(model, each.site) for each in alike}
        uses: set[str] = set()
        if spec.form == "output":
            covered = {(each.site, site_kind(each)) for each in alike} if len(alike) > 1 else ()
            own = [site for key in covered for site in calls.get(key, ()) if not _is_read(site.x)]
            uses = other_uses.get(id(weight), set()) - {site.node.name for site in own}
        if others or uses:
            yield spec.site, Sharing(frozenset(others), frozenset(uses))


def _is_read(value: object) -> bool:
    found = peel(value)[0]
    return isinstance(found, fx.Node) and found.op == "get_attr"


def _alike(tied: BranchSpec, spec: BranchSpec) -> bool:
    """Whether a branch that is tied to another one's site changes their weight by the same update."""
    if tied.adapter != spec.adapter or has_factors(tied) != has_factors(spec):
        return False
    return not has_factors(spec) or (tied.scaling == spec.scaling and not tied.variant and not spec.variant)


def _storage(parameter: nn.Parameter) -> int:
    """What tells shared memory: the storage, or the parameter itself where it has none."""
    if parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    try:
        return parameter.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # tensor subclasses without storage
        return id(parameter)


def _bytes(parameter: nn.Parameter) -> range:
    """Where in its storage a parameter lies: several may lie side by side in one, as cuDNN's recurrent weights do."""
    if parameter.layout != torch.strided or parameter.numel() == 0:
        return range(1)
    size = parameter.element_size()
    last = sum((n - 1) * stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True))
    start = int(parameter.storage_offset())
    return range(start * size, (start + int(last) + 1) * size)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def uses_beside_sites(region: Region) -> dict[int, set[str]]:
    """For each tensor that the base uses in the graph other than as one site's weight: the names of those uses."""
    sites = {site.node: site for site in find_sites(region)}
    weights = {node: id(region.resolve(site.weight)) for node, site in sites.items()}
    uses: dict[int, set[str]] = {}
    by_weight: dict[int, list[CallSite]] = {}
    for node, site in sites.items():
        by_weight.setdefault(weights[node], []).append(site)
    for key, own in by_weight.items():
        if len({site.kind for site in own}) > 1:  # a table of rows for one operation, a matrix for another
            uses[key] = {site.node.name for site in own}
    for node in region.graph.nodes:
        if node.op == "call_module" and node not in sites:
            module = region.resolve(cast(str, node.target))
            for parameter in module.parameters() if isinstance(module, nn.Module) else ():
                uses.setdefault(id(parameter), set()).add(str(node.target))
        elif node.op == "get_attr":
            key = id(region.resolve(cast(str, node.target)))
            for user, operand in _value_uses(node, node):
                if weights.get(user) != key or operand is sites[user].x:
                    uses.setdefault(key, set()).add(user.name)
    return uses


_METADATA = ("dtype", "device", "layout", "shape", "ndim", "requires_grad")
_METADATA_METHODS = ("size", "dim", "numel", "stride")
_METADATA_OPERATORS = (aten.sym_size.int, aten._assert_tensor_metadata.default)


def _value_uses(node: fx.Node, weight: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(user, operand) wherever a weight's values are used, through the casts and transposes of it."""
    for user in node.users:
        if lora_meta(user) is not None:
            continue
        if peel(user)[0] is weight:
            yield from _value_uses(user, weight)
        elif not _reads_metadata(user):
            yield user, node


def _reads_metadata(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in _METADATA
    return node.target in _METADATA_OPERATORS or (node.op == "call_method" and node.target in _METADATA_METHODS)
