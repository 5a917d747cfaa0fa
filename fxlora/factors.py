"""The tensors of an adapter before they are registered: fresh draws, and the dtype and device they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxlora._passes import KINDS, BranchSpec, base_weight, has_factors, part_shapes, shared_parts, variant_parts
from fxlora.compound import OUT_PROJ, compound_of
from fxlora.config import LoraConfig
from fxlora.initialisers import Initial, start
from fxlora.plan import Plan

Factors = dict[str, dict[str, Tensor]]
"""By site, then by part name (`lora_A`, `lora_B`, …)."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a new adapter starts from.

    Attributes:
        factors: its factors.
        base: base weights by path that change with it, and are as before when it goes.
        taken: base weights by path that its files have and that were asked for: they stay when it goes.
    """

    factors: Factors
    base: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    taken: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def draw(model: nn.Module, plan: Plan, originals: Mapping[str, Tensor] | None = None) -> Drawn:
    """Initial factors, in the plan's order, so that one seed gives the values that peft draws.

    Nothing is drawn for a model on the meta device.

    Args:
        model: whose weights they are for.
        plan: the branches.
        originals: weights by path that count in place of the model's own, into which adapters are merged.

    Raises:
        ConfigError: when an initialiser cannot start a layer; names it.
    """
    drawn = Drawn({})
    sites = {spec.site: spec for spec in plan.branches}
    for spec in plan.branches:
        path, weight = base_weight(model, spec.site)
        weight = (originals or {}).get(path, weight)
        if weight.is_meta:
            own = part_shapes(spec).items()
            parts = {name: place(torch.empty(shape, device="meta"), weight, plan.config) for name, shape in own}
            drawn.factors.setdefault(spec.site, {}).update(parts)
            continue
        _draw_in_advance(model, spec, sites)
        initial = start(spec, weight) if _draws(spec) else Initial({})
        parts = {name: place(tensor, weight, plan.config) for name, tensor in initial.parts.items()}
        if spec.tied_to:
            source = drawn.factors[spec.tied_to]
            source.update(parts)
            parts = {name: source[name] for name in shared_parts(spec)}
        base = weight if initial.weight is None else initial.weight
        parts.update({name: part for name, part in _others(spec, base, parts, plan.config) if name not in parts})
        drawn.factors.setdefault(spec.site, {}).update(parts)
        if initial.weight is not None:
            drawn.base[path] = initial.weight
    return drawn


def _draws(spec: BranchSpec) -> bool:
    """Whether a branch has factors that it draws, be it for the embedding that it is tied to."""
    return has_factors(spec) and (not spec.tied_to or spec.kind == "tied")


def _others(spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor], config: LoraConfig) -> list[tuple[str, Tensor]]:
    """The parts that come from the base weight."""
    values = variant_parts(spec, weight, parts).items()
    if not has_factors(spec):
        return [(name, place(tensor, weight, config)) for name, tensor in values]
    # rounding magnitudes to the base's dtype would make the fresh adapter change its output
    return list(values)


def _draw_in_advance(model: nn.Module, spec: BranchSpec, sites: dict[str, BranchSpec]) -> None:
    """The draws that peft makes and throws away: where it wraps an attention, it makes the output projection's twice."""
    attention = compound_of(model, spec.site)
    out = sites.get(f"{attention}.{OUT_PROJ}")
    if out is not None and out is not spec and not _is_wrapped(model, spec.site):
        KINDS[out.kind].init(out)


def _is_wrapped(model: nn.Module, site: str) -> bool:
    """Whether another adapter has a branch at a site already."""
    state = getattr(model, "_lora", None)
    return state is not None and any(spec.site == site for plan in state.adapters.values() for spec in plan.branches)


def place(factor: Tensor, weight: Tensor, config: LoraConfig) -> Tensor:
    """A factor on the base weight's device, in the dtype that the configuration asks for, or else peft's.

    It takes the base weight's dtype first, also where float32 is kept for half-precision bases: that rounding is part
    of peft's initial values.
    """
    if config.adapter_dtype is not None:
        return factor.to(weight.device, getattr(torch, config.adapter_dtype))
    dtype = weight.dtype if weight.dtype.is_floating_point else factor.dtype
    placed = factor.to(weight.device, dtype)
    return placed.float() if config.autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16) else placed
