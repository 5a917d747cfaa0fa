"""Weighted sums of adapters: the arithmetic of `add_weighted_adapter`.

With weights wᵢ, scalings sᵢ and updates Δᵢ = sᵢ Bᵢ Aᵢ, for each site:

- `linear`: A = Σ sign(wᵢ) √|wᵢ sᵢ| Aᵢ, B = Σ √|wᵢ sᵢ| Bᵢ. Equal ranks only; has cross terms, as in peft.
- `cat`: A is all wᵢ sᵢ Aᵢ stacked, B all Bᵢ side by side: exactly Σ wᵢ Δᵢ.
- `svd`: the best approximation of Σ wᵢ Δᵢ of the given rank (Eckart and Young, 1936), singular values in B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fxlora._passes import FACTOR_A, FACTOR_B, KINDS, BranchSpec, has_factors, resolve
from fxlora.errors import AdapterError
from fxlora.factors import Factors
from fxlora.host.saved_modules import running_copies
from fxlora.plan import Plan, exact_targets

if TYPE_CHECKING:
    from fxlora.model import LoraModel

Part = tuple[float, Tensor, Tensor]
"""(w·s, A, B) of one adapter at one site."""

_LATER = ("ties", "dare_ties", "dare_linear", "magnitude_prune")


def check_combinable(plans: Iterable[Plan]) -> None:
    """Refuse adapters of which more than factors would have to be summed.

    Raises:
        AdapterError: when one trains biases of the base, or two have copies of one module.
    """
    plans = list(plans)
    running_copies(plans)
    for plan in plans:
        if plan.config.bias != "none":
            raise AdapterError(
                f"adapter '{plan.adapter}' trains biases of the base (bias='{plan.config.bias}'), of which there is no sum"
            )


def combine(
    model: LoraModel, adapters: list[str], weights: list[float], name: str, kind: str, svd_rank: int | None
) -> tuple[Plan, Factors]:
    """Plan and factors of the combined adapter; the model is not changed.

    Raises:
        AdapterError: for an unknown combination, a wrong number of weights, or unequal ranks with `linear`.
        NotImplementedError: for a combination, or adapters with trainable tokens or tied factors, not there yet.
    """
    if len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"{len(adapters)} adapters need as many weights, not {len(weights)}")
    kind = "linear" if len(adapters) == 1 else kind
    if kind not in _COMBINE:
        if kind.removesuffix("_svd") in _LATER:
            raise NotImplementedError(f"combination_type='{kind}' is not supported yet; what works now: {_known()}")
        raise AdapterError(f"unknown combination_type '{kind}'; what works: {_known()}")
    plans = [model._lora.adapters[each] for each in adapters]
    for spec in [spec for plan in plans for spec in plan.branches]:
        plain = has_factors(spec) and not (spec.tied_to or spec.variant or spec.bias)
        if not plain or len(KINDS[spec.kind].weight_shape(spec.layer)) != 2 or not KINDS[spec.kind].float_input:
            raise NotImplementedError(
                f"'{spec.site}' of adapter '{spec.adapter}' has more than two plain factors of a matrix (trainable tokens or "
                "tied factors, DoRA, lora_bias, an embedding, a convolution or experts), which cannot be combined yet; what "
                "works instead: merge_adapter with several adapters"
            )
    by_site: dict[str, list[tuple[float, BranchSpec]]] = {}
    for weight, plan in zip(weights, plans, strict=True):
        for spec in plan.branches:
            by_site.setdefault(spec.site, []).append((weight, spec))
    rank = _rank(kind, plans, svd_rank)
    factors: Factors = {}
    branches: list[BranchSpec] = []
    for site, parts in by_site.items():
        r = sum(spec.r for _, spec in parts) if kind == "cat" else rank
        tensors = [(weight * spec.scaling, *_factors(model, spec)) for weight, spec in parts]
        a, b = _COMBINE[kind](tensors, r)
        factors[site] = {FACTOR_A: a, FACTOR_B: b}
        dropout = plans[0].config.lora_dropout
        branches.append(replace(parts[0][1], adapter=name, r=r, scaling=1.0, dropout=dropout))
    sites = [spec.site for spec in branches if not spec.is_parameter]
    ranks = {spec.site: spec.r for spec in branches if spec.r != rank}
    config = plans[0].config.replace(
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={f"^{site}": r for site, r in ranks.items()},
        alpha_pattern={f"^{site}": r for site, r in ranks.items()},
        target_modules=exact_targets(sites, [path for path, _ in model.named_modules()]) if sites else [],
        target_parameters=[spec.site for spec in branches if spec.is_parameter] or None,
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
    )
    copies = running_copies(plans)
    for saved in copies:
        copied = model.get_submodule(saved.path)
        factors[saved.module] = {each: cast(Tensor, resolve(copied, each)).detach() for each in saved.tensors}
    config = config.replace(modules_to_save=[saved.module for saved in copies] or None)
    return Plan(name, config, tuple(branches), saved=tuple(replace(s, adapter=name) for s in copies)), factors


def _known() -> str:
    return ", ".join(map(repr, _COMBINE))


def _rank(kind: str, plans: list[Plan], svd_rank: int | None) -> int:
    ranks = [plan.config.r for plan in plans]
    every = {spec.r for plan in plans for spec in plan.branches}
    if kind == "linear" and len(every) > 1:
        raise AdapterError(f"'linear' needs adapters of one rank, these have {sorted(every)}; use 'cat' or 'svd'")
    if kind == "cat":
        return sum(ranks)
    return next(iter(every)) if kind == "linear" else svd_rank or max(ranks)


def _factors(model: LoraModel, spec: BranchSpec) -> tuple[Tensor, Tensor]:
    owner = model.get_submodule(spec.owner)
    a, b = (owner.get_parameter(f"{name}.{spec.adapter}.weight").detach() for name in (FACTOR_A, FACTOR_B))
    return a, b


def _linear(parts: list[Part], r: int) -> tuple[Tensor, Tensor]:
    scales = [abs(scale) ** 0.5 for scale, _, _ in parts]
    signs = [1.0 if scale >= 0 else -1.0 for scale, _, _ in parts]
    a = torch.stack([sign * s * a for sign, s, (_, a, _) in zip(signs, scales, parts, strict=True)]).sum(0)
    b = torch.stack([s * b for s, (_, _, b) in zip(scales, parts, strict=True)]).sum(0)
    return a, b


def _cat(parts: list[Part], r: int) -> tuple[Tensor, Tensor]:
    return torch.cat([scale * a for scale, a, _ in parts], 0), torch.cat([b for _, _, b in parts], 1)


def _svd(parts: list[Part], r: int) -> tuple[Tensor, Tensor]:
    delta = torch.stack([scale * (b.double() @ a.double()) for scale, a, b in parts]).sum(0)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    a, b = vh[:r], u[:, :r] * s[:r]
    missing = r - a.shape[0]
    if missing > 0:  # a rank above the weight's sizes
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])], 0)
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
    return a.to(parts[0][1].dtype).contiguous(), b.to(parts[0][2].dtype).contiguous()


_COMBINE: dict[str, Callable[[list[Part], int], tuple[Tensor, Tensor]]] = {
    "linear": _linear,
    "cat": _cat,
    "svd": _svd,
}
