"""`reduce_rank`: an adapter's updates approximated by ones of lower rank, with the error of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxlora._passes import CROSS_GROUPS, KINDS, BranchSpec, has_factors
from fxlora.algebra.derive import (
    add_the_rest,
    common_rank,
    derived_plan,
    matrices,
    put,
    read,
    start,
    summands,
    update,
)
from fxlora.algebra.lowrank import SVD, SiteRank, check_rank_choice, product_norm, section, table, total
from fxlora.errors import AdapterError
from fxlora.factors import Factors
from fxlora.plan import Plan
from fxlora.rendering import Rendered, Section, json_data

if TYPE_CHECKING:
    from fxlora.model import LoraModel


@dataclass(frozen=True, slots=True)
class RankReport(Rendered):
    """What `reduce_rank` did.

    Attributes:
        source: the adapter that was approximated.
        adapter: the new one.
        sites: rank and error at each site, in the order of the adapter's branches.
    """

    source: str
    adapter: str
    sites: tuple[SiteRank, ...]

    @property
    def total(self) -> SiteRank:
        """All sites as one."""
        return total(self.sites)

    def __str__(self) -> str:
        return f"{self._heading}\n{table(self.sites)}"

    @property
    def _heading(self) -> str:
        return f"'{self.adapter}' approximates '{self.source}'"

    def sections(self) -> list[Section]:
        """The table under what was done."""
        return [section(self.sites, self._heading)]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        figures = {
            "source": self.source,
            "adapter": self.adapter,
            "sites": [site.to_dict() for site in self.sites],
            "total": self.total.to_dict(),
        }
        return json_data(figures)


def reduced(
    model: LoraModel, source: str, name: str, r: int | None, max_error: float | None
) -> tuple[Plan, Factors, RankReport]:
    """Plan, factors and errors of the approximation; the model is not changed.

    Raises:
        ConfigError: for a rank or an error that cannot work.
        AdapterError: when the adapter has something beside its updates that cannot be taken over, or is broken.
    """
    check_rank_choice(r, max_error)
    found = {site: parts[0].spec for site, parts in summands(model, {source: 1.0}).items()}
    if not found:
        raise AdapterError(f"adapter '{source}' has no factors whose rank could be reduced")
    decompositions = {site: _decomposed(model, spec) for site, spec in found.items()}
    ranks = {site: _rank(found[site], svd, r, max_error) for site, svd in decompositions.items()}
    common = common_rank(ranks.values()) if r is None else r
    plan = derived_plan(model, [model._lora.adapters[source]], name, common, ranks)
    fresh, sites = start(model, plan), list[SiteRank]()
    for spec in plan.branches:
        if has_factors(spec) and not spec.tied_to:
            A, B = decompositions[spec.site].factors(spec.r // _groups(spec))
            put(fresh, spec, A, B, read(model, found[spec.site])[0].dtype)
            sites.append(_measured(model, found[spec.site], spec, fresh))
    add_the_rest(model, plan, {source: 1.0}, fresh)
    return plan, fresh, RankReport(source, name, tuple(sites))


def _decomposed(model: LoraModel, spec: BranchSpec) -> SVD:
    if not all(bool(factor.isfinite().all()) for factor in read(model, spec)):
        raise AdapterError(f"'{spec.site}': adapter '{spec.adapter}' has NaN or infinite entries; it is broken")
    if spec.variant:
        return SVD.of(KINDS[spec.kind].as_matrices(spec.layer, "weight", update(model, spec)))
    A, B = matrices(model, spec)
    return SVD.of_product(A.double() * spec.scaling, B)


def _groups(spec: BranchSpec) -> int:
    """Into how many matrices a convolution's rank is divided."""
    return spec.option("groups") if spec.option(CROSS_GROUPS) else 1


def _rank(spec: BranchSpec, svd: SVD, r: int | None, max_error: float | None) -> int:
    """The rank to have: never more than before, since nothing would be gained."""
    most = svd.S.shape[-1] if spec.variant else min(svd.S.shape[-1], spec.r // _groups(spec))
    wanted = most if r is None else -(-r // _groups(spec))
    if max_error is not None:
        wanted = min(wanted, svd.rank_for(max_error))
    return min(wanted, most) * _groups(spec)


def _measured(model: LoraModel, before: BranchSpec, spec: BranchSpec, fresh: Factors) -> SiteRank:
    """The error of the factors as they are stored, rounded to their dtype."""
    kind, parts = KINDS[spec.kind], fresh[spec.site]
    name_a, name_b = kind.factor_names
    A = kind.as_matrices(spec.layer, "A", parts[name_a]).double()
    B = kind.as_matrices(spec.layer, "B", parts[name_b]).double()
    if before.variant:
        change = kind.as_matrices(spec.layer, "weight", update(model, before))
        norm, error = float(change.norm()), float((change - B @ A).norm())
        return SiteRank(spec.site, spec.r, min(change.shape[-2:]), norm, error)
    first_a, first_b = matrices(model, before)
    first_a, first_b = first_a.double() * before.scaling, first_b.double()
    difference = torch.cat([first_a, -A], -2), torch.cat([first_b, B], -1)
    return SiteRank(spec.site, spec.r, before.r, product_norm(first_a, first_b), product_norm(*difference))
