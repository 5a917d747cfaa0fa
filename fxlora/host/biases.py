"""`bias="all"` and `bias="lora_only"`: biases of the base that an adapter trains in their place.

They are base parameters, so one adapter at most can train them. What they were before is kept in the model's state and
put back when that adapter goes without being merged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxlora._passes import BranchSpec, SavedModule, is_inserted, parameter_at
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError

if TYPE_CHECKING:
    from fxlora.plan import Plan

log = logging.getLogger("fxlora")

VALUE = "value"
"""Part name of a bias among the tensors of an adapter's files."""


def trained_biases(
    model: nn.Module, config: LoraConfig, branches: Iterable[BranchSpec], saved: Sequence[SavedModule]
) -> tuple[str, ...]:
    """Names of the base's biases that an adapter trains.

    `"all"` means every parameter called `bias`, but those of modules that are trained whole; `"lora_only"` those of the
    layers that have branches.
    """
    if config.bias == "none":
        return ()
    names = [
        name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias" and not is_inserted(name)
    ]
    if config.bias == "all":
        return tuple(name for name in names if not any(f"{name}.".startswith(f"{each.module}.") for each in saved))
    layers = {spec.site.rpartition(".")[0] if spec.is_parameter else spec.site for spec in branches}
    found = tuple(name for name in names if name.rpartition(".")[0] in layers)
    if not found:
        log.warning("bias='lora_only' trains no bias, since none of the %d targeted layers has one", len(layers))
    return found


def check_one_with_biases(config: LoraConfig, adapters: Mapping[str, Plan]) -> None:
    """Refuse a second adapter that trains biases of the base.

    Raises:
        AdapterError: naming the first.
    """
    other = next((name for name, plan in adapters.items() if plan.config.bias != "none"), None)
    if config.bias != "none" and other is not None:
        raise AdapterError(
            f"only 1 adapter with bias is supported, and '{other}' trains biases of the base already; set bias to 'none' "
            "for the new one"
        )


def install_biases(model: nn.Module, plan: Plan, values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put the biases of an adapter's files in place; what was there, by name.

    Args:
        model: the transformed model.
        plan: which biases.
        values: by bias, the value under `VALUE`; a bias that is not there keeps its own.
    """
    originals: dict[str, Tensor] = {}
    for name in plan.biases:
        parameter = parameter_at(model, name)
        assert parameter is not None
        originals[name] = parameter.detach().clone()
    set_biases(model, {name: values[name][VALUE] for name in plan.biases if name in values})
    return originals


def set_biases(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into biases by name."""
    with torch.no_grad():
        for name, value in values.items():
            parameter = parameter_at(model, name)
            assert parameter is not None
            parameter.copy_(value)
