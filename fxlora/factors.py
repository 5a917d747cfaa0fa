"""The tensors of an adapter before they are registered: fresh draws, and the dtype and device they get."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxlora._passes import KINDS, BranchSpec, base_weight, has_factors, part_shapes, shared_parts, variant_parts
from fxlora.compound import OUT_PROJ, compound_of
from fxlora.plan import Plan

Factors = dict[str, dict[str, Tensor]]
"""By site, then by part name (`lora_A`, `lora_B`, …)."""


def draw(model: nn.Module, plan: Plan) -> Factors:
    """Initial factors, in the plan's order, so that one seed gives the values that peft draws.

    Nothing is drawn for a model on the meta device.
    """
    result: Factors = {}
    keep_float32 = plan.config.autocast_adapter_dtype
    sites = {spec.site: spec for spec in plan.branches}
    for spec in plan.branches:
        weight = base_weight(model, spec.site)[1]
        if weight.is_meta:
            own = part_shapes(spec).items()
            parts = {name: place(torch.empty(shape, device="meta"), weight, keep_float32) for name, shape in own}
            result.setdefault(spec.site, {}).update(parts)
            continue
        _draw_in_advance(model, spec, sites)
        drawn = KINDS[spec.kind].init(spec) if _draws(spec) else {}
        parts = {name: place(tensor, weight, keep_float32) for name, tensor in drawn.items()}
        if spec.tied_to:
            source = result[spec.tied_to]
            source.update(parts)
            parts = {name: source[name] for name in shared_parts(spec)}
        parts.update({name: part for name, part in _others(spec, weight, parts, keep_float32) if name not in parts})
        result.setdefault(spec.site, {}).update(parts)
    return result


def _draws(spec: BranchSpec) -> bool:
    """Whether a branch has factors that it draws, be it for the embedding that it is tied to."""
    return has_factors(spec) and (not spec.tied_to or spec.kind == "tied")


def _others(spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor], keep_float32: bool) -> list[tuple[str, Tensor]]:
    """The parts that come from the base weight."""
    values = variant_parts(spec, weight, parts).items()
    if not has_factors(spec):
        return [(name, place(tensor, weight, keep_float32)) for name, tensor in values]
    # rounding magnitudes to the base's dtype would make the fresh adapter change its output
    return list(values)


def _draw_in_advance(model: nn.Module, spec: BranchSpec, sites: dict[str, BranchSpec]) -> None:
    """The draws that peft makes and throws away: it makes the factors of an attention's output projection twice."""
    attention = compound_of(model, spec.site)
    out = sites.get(f"{attention}.{OUT_PROJ}")
    if out is not None and out is not spec:
        KINDS[out.kind].init(out)


def place(factor: Tensor, weight: Tensor, keep_float32: bool) -> Tensor:
    """A factor on the device and in the dtype that peft gives it.

    It takes the base weight's dtype first, also where float32 is kept for half-precision bases: that rounding is part
    of peft's initial values.
    """
    dtype = weight.dtype if weight.dtype.is_floating_point else factor.dtype
    placed = factor.to(weight.device, dtype)
    return placed.float() if keep_float32 and dtype in (torch.float16, torch.bfloat16) else placed
