"""Weighted sums of adapters: the arithmetic of `add_weighted_adapter`.

With weights wᵢ, scalings sᵢ and updates Δᵢ = sᵢ Bᵢ Aᵢ, for each site:

- `linear`: A = Σ sign(wᵢ sᵢ) √|wᵢ sᵢ| Aᵢ, B = Σ √|wᵢ sᵢ| Bᵢ. Equal ranks only; has cross terms, as in peft.
- `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`: the same with pruned factors: see `fxlora.algebra.prune`.
- `cat`: A is all wᵢ sᵢ Aᵢ stacked, B all Bᵢ side by side: exactly Σ wᵢ Δᵢ.
- `svd`: the best approximation of Σ wᵢ Δᵢ of the given rank, singular values in B.
- `ties_svd`, …: the best approximation of the pruned sum of the Δᵢ.

One seed gives what peft 0.21 gives: sites are visited in its order, after its draws for the new adapter. It differs
where peft loses something: rsLoRA (there the sum is multiplied by √r), `lora_bias` and trainable tokens (dropped there,
summed here), DoRA (magnitudes are dropped there; here the types that work on updates take the real ones, and the others
refuse), ranks that differ between sites. `svd` never makes an update, only its factors, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxlora._passes import CROSS_GROUPS, KINDS, BranchSpec, did_you_mean, has_factors
from fxlora.algebra.derive import (
    Summand,
    Summands,
    add_the_rest,
    derived_plan,
    largest_rank,
    matrices,
    put,
    read,
    start,
    summands,
    update,
)
from fxlora.algebra.lowrank import SVD
from fxlora.algebra.prune import MAJORITY_SIGNS, MajoritySign, Recipe, weighted_sum
from fxlora.errors import AdapterError
from fxlora.factors import Factors
from fxlora.logs import log
from fxlora.plan import Plan

if TYPE_CHECKING:
    from fxlora.model import LoraModel

RECIPES = {
    "linear": Recipe(),
    "ties": Recipe("magnitude", elect=True),
    "dare_linear": Recipe("random"),
    "dare_ties": Recipe("random", elect=True),
    "magnitude_prune": Recipe("magnitude"),
}
"""What is done with factors; with `_svd` after the name, with updates."""

COMBINATIONS = ("linear", "cat", "svd", *(f"{n}{end}" for n in list(RECIPES)[1:] for end in ("", "_svd")))
"""peft's combination types."""


@dataclass(frozen=True, slots=True)
class Combination:
    """How adapters are combined: peft's arguments of `add_weighted_adapter`.

    Attributes:
        kind: one of `COMBINATIONS`; of a single adapter it is always `linear`.
        svd_rank: rank for the types that end with `svd`; the largest rank of the adapters if None.
        svd_clamp: quantile of the entries of both factors beyond which they are clamped; None for no clamping.
        svd_driver: cuSOLVER's method for decompositions of whole updates on CUDA.
        density: share of the entries that pruning keeps.
        majority_sign: how TIES elects signs.
    """

    kind: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign: MajoritySign = "total"

    @property
    def on_updates(self) -> bool:
        """Whether whole updates are combined, and not factors."""
        return self.kind.endswith("svd")

    @property
    def recipe(self) -> Recipe:
        """What happens to tensors while they are summed."""
        return RECIPES.get(self.kind.removesuffix("_svd"), Recipe())


def combine(
    model: LoraModel, adapters: Sequence[str], weights: Sequence[float], name: str, how: Combination
) -> tuple[Plan, Factors]:
    """Plan and factors of the combined adapter; the model is not changed.

    Raises:
        AdapterError: for arguments that cannot work, ranks that differ where they must not, and adapters with something
            that has no sum.
    """
    pairs = _pairs(adapters, weights)
    how = _checked(how, single=len(pairs) == 1)
    found = summands(model, pairs)
    _check_variants(found, how)
    _check_device(model, found, how)
    plans = [model._lora.adapters[each] for each in pairs]
    r, ranks = _ranks(plans, found, how)
    plan = derived_plan(model, plans, name, r, ranks)
    fresh = start(model, plan)
    for spec in plan.branches:
        if has_factors(spec) and not spec.tied_to:
            _put_combined(model, fresh, spec, found[spec.site], how, ranks[spec.site])
    add_the_rest(model, plan, pairs, fresh)
    return plan, fresh


def _pairs(adapters: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    if len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"{len(adapters)} adapters need as many weights, not {len(weights)}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterError(f"weights should be finite numbers, not {weight!r}")
    if len(set(adapters)) < len(adapters):
        twice = next(name for name in adapters if list(adapters).count(name) > 1)
        raise AdapterError(f"adapter '{twice}' is named twice; name it once, with the sum of its weights")
    return dict(zip(adapters, weights, strict=True))


def _checked(how: Combination, *, single: bool) -> Combination:
    """The combination that is used, all of its arguments checked."""
    if how.kind not in COMBINATIONS:
        raise AdapterError(
            f"unknown combination_type '{how.kind}'.{did_you_mean(how.kind, COMBINATIONS)} What works: "
            f"{', '.join(map(repr, COMBINATIONS))}"
        )
    if how.majority_sign not in MAJORITY_SIGNS:
        raise AdapterError(f"majority_sign_method should be 'total' or 'frequency', not {how.majority_sign!r}")
    if how.svd_rank is not None and (type(how.svd_rank) is not int or how.svd_rank < 1):
        raise AdapterError(f"svd_rank should be a positive integer, not {how.svd_rank!r}")
    if how.svd_clamp is not None and not 0 <= how.svd_clamp <= 1:
        raise AdapterError(f"svd_clamp is a quantile and should be in [0, 1], not {how.svd_clamp!r}")
    if how.density is not None and not 0 < how.density <= 1:
        raise AdapterError(
            f"density is the share of entries that is kept and should be in (0, 1], not {how.density!r}: with 0 nothing "
            "would be left"
        )
    if single and how.kind != "linear":
        log.info("one adapter is combined linearly, as in peft, and not by '%s'", how.kind)
        return Combination("linear")
    if how.recipe.prune and how.density is None:
        raise AdapterError(f"combination_type='{how.kind}' needs `density`, the share of entries to keep (such as 0.5)")
    return how


def _check_variants(found: Summands, how: Combination) -> None:
    for site, parts in found.items():
        for part in parts:
            if part.spec.variant and not how.on_updates:
                raise AdapterError(
                    f"'{site}': adapter '{part.spec.adapter}' is DoRA, whose magnitudes have no '{how.kind}' sum; use 'svd' "
                    "with several adapters, which approximates the sum of the changes of the weight, or reduce_rank for one"
                )


def _check_device(model: LoraModel, found: Summands, how: Combination) -> None:
    on_cuda = all(read(model, part.spec)[0].is_cuda for parts in found.values() for part in parts)
    if how.svd_driver is not None and not on_cuda:
        raise AdapterError(f"svd_driver={how.svd_driver!r} is for CUDA, and the adapters are elsewhere; leave it out")


def _ranks(plans: Sequence[Plan], found: Summands, how: Combination) -> tuple[int, dict[str, int]]:
    """The rank of the configuration, and that of each site."""
    if how.on_updates:
        r = how.svd_rank or max(largest_rank(plan.config) for plan in plans)
        for site, parts in found.items():
            groups = parts[0].spec.option("groups", 1)
            if parts[0].spec.option(CROSS_GROUPS) and r % groups:
                raise AdapterError(f"'{site}' has {groups} groups, and svd_rank {r} is no multiple of that")
        return r, dict.fromkeys(found, r)
    if how.kind == "cat":
        ranks = {site: sum(part.spec.r for part in parts) for site, parts in found.items()}
        return sum(largest_rank(plan.config) for plan in plans), ranks
    for site, parts in found.items():
        different = {part.spec.r: part.spec.adapter for part in parts}
        if len(different) > 1:
            sizes = ", ".join(f"'{adapter}' has {r}" for r, adapter in different.items())
            raise AdapterError(
                f"'{how.kind}' needs adapters of one rank, and at '{site}' {sizes}; use 'cat', or a type that ends with 'svd'"
            )
    return largest_rank(plans[0].config), {site: parts[0].spec.r for site, parts in found.items()}


# ---- one site ----


def _put_combined(
    model: LoraModel, fresh: Factors, spec: BranchSpec, parts: Sequence[Summand], how: Combination, rank: int
) -> None:
    A, B = _combined(model, spec, parts, how, rank)
    if not bool(A.isfinite().all() and B.isfinite().all()):
        names = ", ".join(f"'{part.spec.adapter}'" for part in parts)
        raise AdapterError(
            f"'{spec.site}': the combined factors have NaN or infinite entries; one of {names} is broken, or the weights "
            "are too large"
        )
    put(fresh, spec, A, B, _dtype(model, parts))


def _combined(
    model: LoraModel, spec: BranchSpec, parts: Sequence[Summand], how: Combination, rank: int
) -> tuple[Tensor, Tensor]:
    """A and B as matrices."""
    if how.kind == "cat":
        return _cat(model, parts)
    if how.on_updates:
        return _approximated(model, spec, parts, how, rank)
    kind = KINDS[spec.kind]
    summed_a, summed_b = _of_factors(model, parts, how)
    return kind.as_matrices(spec.layer, "A", summed_a), kind.as_matrices(spec.layer, "B", summed_b)


def _dtype(model: LoraModel, parts: Sequence[Summand]) -> torch.dtype:
    dtypes = [read(model, part.spec)[0].dtype for part in parts]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _cat(model: LoraModel, parts: Sequence[Summand]) -> tuple[Tensor, Tensor]:
    pairs = [(part, *matrices(model, part.spec)) for part in parts]
    stacked = torch.cat([A * part.weight * part.spec.scaling for part, A, _ in pairs], -2)
    return stacked, torch.cat([B for _, _, B in pairs], -1)


def _of_factors(model: LoraModel, parts: Sequence[Summand], how: Combination) -> tuple[Tensor, Tensor]:
    """Each factor summed by itself; the sign of a weight is in A."""
    products = [part.weight * part.spec.scaling for part in parts]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [root if product >= 0 else -root for root, product in zip(roots, products, strict=True)]
    pairs = [read(model, part.spec) for part in parts]
    dtype = pairs[0][0].dtype
    density = how.density or 1.0
    summed_a = weighted_sum([A for A, _ in pairs], signed, how.recipe, density, how.majority_sign)
    summed_b = weighted_sum([B for _, B in pairs], roots, how.recipe, density, how.majority_sign)
    return summed_a.to(dtype), summed_b.to(dtype)


def _approximated(
    model: LoraModel, spec: BranchSpec, parts: Sequence[Summand], how: Combination, rank: int
) -> tuple[Tensor, Tensor]:
    """The best approximation of the combined update. Clamping is relative to the vectors, so that it needs peft's own."""
    q = rank // spec.option("groups", 1) if spec.option(CROSS_GROUPS) else rank
    if how.kind == "svd" and how.svd_clamp is None and not any(part.spec.variant for part in parts):
        stacked, beside = _cat_exactly(model, parts)
        return SVD.of_product(_finite(stacked, spec), _finite(beside, spec)).factors(q)
    updates = [update(model, part.spec) for part in parts]
    device = updates[0].device
    total = weighted_sum(
        [each.to(device) for each in updates],
        [part.weight for part in parts],
        how.recipe,
        how.density or 1.0,
        how.majority_sign,
    )
    flat = KINDS[spec.kind].as_matrices(spec.layer, "weight", _finite(total, spec))
    A, B = SVD.of(flat, how.svd_driver).factors(q)
    return (A, B) if how.svd_clamp is None else _clamped(A, B, how.svd_clamp)


def _finite(tensor: Tensor, spec: BranchSpec) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise AdapterError(
            f"'{spec.site}': the update of one of the adapters has NaN or infinite entries; it is broken"
        )
    return tensor


def _cat_exactly(model: LoraModel, parts: Sequence[Summand]) -> tuple[Tensor, Tensor]:
    pairs = [(part, *matrices(model, part.spec)) for part in parts]
    stacked = torch.cat([A.double() * (part.weight * part.spec.scaling) for part, A, _ in pairs], -2)
    return stacked, torch.cat([B.double() for _, _, B in pairs], -1)


def _clamped(A: Tensor, B: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both factors cut to the interval from -h to h, where h is a quantile of all of their entries."""
    entries = torch.cat([B.flatten(), A.flatten()]).sort().values  # torch.quantile takes 16 million entries at most
    place = quantile * (entries.numel() - 1)
    below, above = entries[math.floor(place)], entries[math.ceil(place)]
    high = torch.lerp(below, above, place - math.floor(place))
    return A.clamp(-high, high), B.clamp(-high, high)
