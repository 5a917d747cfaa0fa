"""The tensors of an adapter before they are registered: fresh draws, and the dtype and device they get."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxlora._passes import KINDS, base_weight
from fxlora.plan import Plan

Factors = dict[str, dict[str, Tensor]]
"""By site, then by container name (`lora_A`, `lora_B`)."""


def draw(model: nn.Module, plan: Plan) -> Factors:
    """Initial factors, in the plan's order, so that one seed gives the values that peft draws.

    Nothing is drawn for a model on the meta device.
    """
    result: Factors = {}
    for spec in plan.branches:
        weight = base_weight(model, spec.site)[1]
        if weight.is_meta:
            shapes = KINDS[spec.kind].params(spec)
            drawn = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        else:
            drawn = KINDS[spec.kind].init(spec)
        keep_float32 = plan.config.autocast_adapter_dtype
        result[spec.site] = {name: place(tensor, weight, keep_float32) for name, tensor in drawn.items()}
    return result


def place(factor: Tensor, weight: Tensor, keep_float32: bool) -> Tensor:
    """A factor on the device and in the dtype that peft gives it.

    It takes the base weight's dtype first, also where float32 is kept for half-precision bases: that rounding is part
    of peft's initial values.
    """
    dtype = weight.dtype if weight.dtype.is_floating_point else factor.dtype
    placed = factor.to(weight.device, dtype)
    return placed.float() if keep_float32 and dtype in (torch.float16, torch.bfloat16) else placed
