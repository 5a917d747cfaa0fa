"""`merge-branches`: fold `scaling · B A` into the base weights, each entry rounded once, all weights or none.

`fold` is the arithmetic, on tensors alone; the pass applies it to the parameters of a live model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, fx, nn

from passes.base import PassResult, Region
from passes.branches import BranchSpec, deltas, has_factors, part_shapes, site_kind
from passes.branches.tokens import replaced
from passes.errors import MergeError, PassError
from passes.leaves import TOKENS, part_path
from passes.nodes import lora_meta
from passes.operands import peel
from passes.sites import find_sites, weight_path

aten = torch.ops.aten


def fold(weight: Tensor, deltas: Iterable[Tensor]) -> Tensor:
    """`weight` plus the sum of `deltas`, accumulated in float64 and rounded once to the weight's dtype.

    Args:
        weight: floating point, any shape.
        deltas: float64 tensors of that shape; their order does not change the result's correctness, only the last
            bits of a float64 sum.

    Returns:
        A new tensor of the weight's dtype and device. Entries whose delta is exactly zero keep their bits.

    Raises:
        MergeError: when a finite entry would become NaN or infinite.
    """
    total: Tensor | None = None
    for delta in deltas:
        total = delta if total is None else total + delta
    if total is None:
        return weight.clone()
    assert total.shape == weight.shape and total.dtype == torch.float64
    total = total.to(weight.device)
    merged = torch.where(total == 0, weight, round_once(weight + total, weight.dtype))
    if not bool((merged.isfinite() | ~weight.isfinite()).all()):
        raise MergeError("the merged weight would have NaN or infinite entries")
    return merged


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to `dtype` as if directly, to the nearest, ties to even.

    torch's own cast to bfloat16 or float16 goes through float32 and so rounds twice. Rounding to odd on the way
    (Boldo and Melquiond, "When double rounding is odd", 2005) makes the two steps equal one.
    """
    if dtype in (torch.float64, torch.float32):
        return value.to(dtype)
    nearest = value.to(torch.float32)
    error = value - nearest.double()
    even = (nearest.view(torch.int32) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float32)
    odd = torch.where((error != 0) & even, torch.nextafter(nearest, towards), nearest)
    return odd.to(dtype)


@dataclass(frozen=True)
class MergeBranches:
    """Fold adapters into the weights of a model: the region's one instance is the model.

    Attributes:
        specs: the branches to fold; several of one site are summed, in the order of their adapters' names, before
            rounding: so the order in which they are given does not matter.
        originals: if given, receives what is replaced, by parameter path.
        on_folded: if given, called with the name of each site once its merged weight is computed.
    """

    name: ClassVar[str] = "merge-branches"
    specs: tuple[BranchSpec, ...]
    originals: dict[str, Tensor] | None = field(default=None, compare=False)
    on_folded: Callable[[str], None] | None = field(default=None, compare=False)

    def run(self, region: Region) -> PassResult:
        """Compute every merged weight, then write them all.

        Raises:
            MergeError: when a weight is shared with something else, is on the meta device, is quantized, or would
                become NaN or infinite. No weight is changed then.
        """
        model = region.module
        check_not_shared(region, self.specs)
        by_site = foldable(sorted(self.specs, key=lambda spec: spec.adapter))
        merged: list[tuple[Change, Tensor]] = []
        for site, specs in by_site.items():
            merged += [(change, change.fold()) for change in changes(model, site, specs)]
            if self.on_folded is not None:
                self.on_folded(site)
        for change, value in merged:
            if self.originals is not None:
                self.originals[change.path] = change.parameter.detach().clone()
            with torch.no_grad():
                change.parameter.copy_(value)
        return PassResult(bool(merged), f"{len(merged)} weights")


def foldable(specs: Iterable[BranchSpec]) -> dict[str, list[BranchSpec]]:
    """Branches by site, in their order; one that is tied to another site has the very update that is folded there."""
    by_site: dict[str, list[BranchSpec]] = {}
    for spec in specs:
        if not spec.tied_to:
            by_site.setdefault(spec.site, []).append(spec)
    return by_site


@dataclass(frozen=True, slots=True)
class Change:
    """What a fold does to one tensor of a model.

    Attributes:
        site: the layer's name.
        adapters: names of the adapters, for messages.
        path: of the parameter.
        parameter: the parameter itself.
        before: the value that is folded into.
        deltas: float64 tensors to add.
    """

    site: str
    adapters: str
    path: str
    parameter: nn.Parameter
    before: Tensor
    deltas: tuple[Tensor, ...]

    def fold(self, function: Callable[[Tensor, Iterable[Tensor]], Tensor] = fold) -> Tensor:
        """The merged value.

        Args:
            function: `fold`, or one that rounds to another dtype.

        Raises:
            MergeError: when a finite entry would become NaN or infinite; says where.
        """
        try:
            return function(self.before, self.deltas)
        except MergeError as error:
            raise _broken(self.path, self.adapters, error) from error


def _broken(path: str, adapters: str, error: MergeError) -> MergeError:
    return MergeError(
        f"'{path.removesuffix('.weight')}': {error}. Adapter {adapters} is broken or its scaling too large; nothing was "
        "changed"
    )


def changes(
    model: nn.Module, site: str, specs: Sequence[BranchSpec], originals: Mapping[str, Tensor] | None = None
) -> Iterator[Change]:
    """What the branches of one site change when they are folded: the weight, and the bias if a branch has one.

    Args:
        model: whose parameters are read, not changed.
        site: name of the layer or bare parameter.
        specs: its branches; their order is that of the summation.
        originals: values to fold into in place of the parameters' own, by path.

    Raises:
        MergeError: when a tensor is on the meta device, quantized or missing, or cannot hold the update.
    """
    path, weight = base_weight(model, site)
    _check_real(site, weight)
    values = originals or {}
    adapters = ", ".join(spec.adapter for spec in specs)
    start = values.get(path, weight.detach())
    with_rows = _with_rows(model, path, start, specs)
    summands: dict[str, list[Tensor]] = {}
    for spec in specs:
        if spec.calls:
            raise MergeError(
                f"'{site}': adapter '{spec.adapter}' is at some calls of this layer only, which one weight cannot hold; "
                "run it unmerged"
            )
        try:
            # a change of rows is counted from the rows that are there by now: what rounding left of them, mostly zero
            found = deltas(spec, start if has_factors(spec) else with_rows, factors(model, spec))
        except PassError as error:
            raise MergeError(f"'{site}': {error}; nothing was changed") from error
        for name, delta in found.items():
            summands.setdefault(name, []).append(delta)
    for name, parts in summands.items():
        where = path if name == "weight" else f"{site}.{name}".lstrip(".")
        parameter = parameter_at(model, where)
        if parameter is None:
            raise MergeError(
                f"'{site}': the adapter has a bias (lora_bias) and the layer has none that could take it; give the layer a "
                "zero bias before the transform, or run the adapter unmerged"
            )
        before = with_rows if name == "weight" else values.get(where, parameter.detach())
        yield Change(site, adapters, where, parameter, before, tuple(parts))


def _with_rows(model: nn.Module, path: str, weight: Tensor, specs: Iterable[BranchSpec]) -> Tensor:
    """The weight with the trained rows of all branches that have such, so that a fold keeps their bits."""
    for spec in specs:
        if not has_factors(spec):
            try:
                weight = replaced(spec, weight, factors(model, spec)[TOKENS].double(), round_once)
            except MergeError as error:
                raise _broken(path, spec.adapter, error) from error
    return weight


def _check_real(site: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise MergeError(f"'{site}': the weight is on the meta device; load real weights, then merge")
    if not weight.is_floating_point():
        raise MergeError(f"'{site}': the weight is {weight.dtype}; dequantize the layer, then merge")


def base_weight(model: nn.Module, site: str) -> tuple[str, nn.Parameter]:
    """(path, parameter) of a site's weight: the layer's `weight`, or the bare parameter that the site is.

    Raises:
        AttributeError: when there is none.
    """
    path = weight_path(model, site)
    weight = parameter_at(model, path)
    if weight is None:
        raise AttributeError(f"there is no parameter '{path}'")
    return path, weight


def parameter_at(model: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter registered at a path, also where its module's class computes another value under that name."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner)._parameters.get(name)


def factors(model: nn.Module, spec: BranchSpec) -> dict[str, Tensor]:
    """The parts of one branch as they are registered in a model, detached."""
    owner = model.get_submodule(spec.owner)
    return {part: owner.get_parameter(part_path(part, spec.adapter)).detach() for part in part_shapes(spec)}


def check_not_shared(region: Region, specs: Iterable[BranchSpec]) -> None:
    """Refuse to change a weight that is also used elsewhere.

    Layers that share a weight may be folded where one branch is tied to the other, with an equal update. A branch of the
    form `"weight"` is in every use of its parameter, so that only other parameters can share it.

    Raises:
        MergeError: naming the site and the other use.
    """
    model, specs = region.module, tuple(specs)
    owners: dict[int, list[tuple[str, range]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(_storage(parameter), []).append((f"{prefix}.{name}".lstrip("."), _bytes(parameter)))
    other_uses, sites = uses_beside_sites(region), find_sites(region)
    for spec in specs:
        if spec.tied_to:
            continue
        site, alike = spec.site, [spec, *(each for each in specs if _alike(each, spec))]
        weight = base_weight(model, site)[1]
        covered = {(each.site, site_kind(each)) for each in alike}
        sharing = {name for name, held in owners[_storage(weight)] if _overlap(held, _bytes(weight))}
        others = sharing - {weight_path(model, each.site) for each in alike}
        if spec.form == "output":
            tied = [each for each in sites if len(alike) > 1 and (each.name, each.kind) in covered]
            nodes = {each.node.name for each in tied if not _is_read(each.x)}
            others = others or other_uses.get(id(weight), set()) - nodes
        if others:
            raise MergeError(
                f"'{site}': its weight is shared with '{min(others)}', which a merge would change too. Untie "
                "them first (give one end its own copy of the parameter), or leave this layer out of the targets; "
                "nothing was changed"
            )


def _is_read(value: object) -> bool:
    found = peel(value)[0]
    return isinstance(found, fx.Node) and found.op == "get_attr"


def _alike(tied: BranchSpec, spec: BranchSpec) -> bool:
    """Whether a branch that is tied to another one changes their weight by the same update."""
    if tied.adapter != spec.adapter or tied.tied_to != spec.site or has_factors(tied) != has_factors(spec):
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
    for key in set(weights.values()):
        own = [site for node, site in sites.items() if weights[node] == key]
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
