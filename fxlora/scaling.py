"""The scales of adapters: setting, multiplying and resetting them, all branches or none.

A scale is changed in place, in the leaf that graphs read, so that compiled graphs stay valid. The adapter's plan holds
the same value, for merging and for `verify`. Files hold neither: they have the configuration's alpha.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from fxlora._passes import SCALING, BranchSpec, Scaling, has_factors
from fxlora.compound import compound_of
from fxlora.errors import AdapterError
from fxlora.plan import configured_scaling
from fxlora.serving import fill

if TYPE_CHECKING:
    from fxlora.model import LoraModel

Scales = dict[str, float]
"""The scale of each branch of an adapter, by site."""


def configured(model: LoraModel, adapter: str) -> Scales:
    """The scales that an adapter's configuration gives: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    config = model._lora.adapters[adapter].config
    return {
        spec.site: configured_scaling(config, compound_of(model, spec.site) or spec.site, spec.r)
        for spec in _scaled(model, adapter)
    }


def current(model: LoraModel, adapter: str) -> Scales:
    """The scales of an adapter as they are now."""
    return {spec.site: spec.scaling for spec in _scaled(model, adapter)}


def multiplied(scales: Scales, factor: float) -> Scales:
    """Scales times a factor."""
    return {site: factor * scale for site, scale in scales.items()}


def divided(scales: Scales, divisor: float) -> Scales:
    """Scales over a divisor other than 0."""
    return {site: scale / divisor for site, scale in scales.items()}


def put(model: LoraModel, scales: Mapping[str, Scales], call: str) -> None:
    """Give adapters new scales, all of them or none.

    Args:
        model: the transformed model.
        scales: by adapter and site.
        call: what the user called, for messages.

    Raises:
        AdapterError: while one of the adapters is merged; for a scale that float32 cannot hold.
    """
    check_not_merged(model, scales)
    largest = max((abs(scale) for own in scales.values() for scale in own.values()), default=0.0, key=_size)
    if not largest <= torch.finfo(torch.float32).max:
        raise AdapterError(
            f"{call} makes a scaling of {largest:g}, which float32 cannot hold; use a finite number of ordinary size"
        )
    for adapter, own in scales.items():
        plan = model._lora.adapters[adapter]
        branches: list[BranchSpec] = []
        for spec in plan.branches:
            if spec.site in own and has_factors(spec):
                spec = replace(spec, scaling=own[spec.site])
                leaf = cast(Scaling, model.get_submodule(f"{spec.owner}.{SCALING}.{adapter}"))
                leaf.value = spec.scaling
            branches.append(spec)
        model._lora.adapters[adapter] = replace(plan, branches=tuple(branches))
    if model._lora.slots is not None:
        fill(model, model._lora.slots, list(scales))


def _size(scale: float) -> float:
    return math.inf if math.isnan(scale) else scale


def check_factor(factor: object, call: str) -> float:
    """A factor as a float.

    Raises:
        AdapterError: when it is no finite number.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
        raise AdapterError(f"{call}: the factor must be a finite number, not {factor!r}")
    return float(factor)


def check_not_merged(model: LoraModel, adapters: Iterable[str]) -> None:
    """Refuse to change what the weights hold already.

    Raises:
        AdapterError: naming a merged adapter.
    """
    merged = [name for name in adapters if name in model._lora.merged]
    if merged:
        raise AdapterError(f"adapter '{merged[0]}' is merged; call unmerge_adapter first")


def _scaled(model: LoraModel, adapter: str) -> list[BranchSpec]:
    return [spec for spec in model._lora.adapters[adapter].branches if has_factors(spec)]


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Generator[None]:
    """Within this context the scales of all adapters, active or not, are multiplied, as with peft's function.

    A multiplier between 0 and 1 is WiSE-FT (arXiv:2109.01903) for LoRA. Adapters that are added within keep their
    scales; those that are merged within are merged with their own scales at the end.

    Args:
        model: a transformed model.
        multiplier: a finite number.

    Raises:
        TypeError: when the multiplier is no number.
        AdapterError: when it is not finite; when the model has no adapter; while one is merged.

    Example:
        >>> import fxlora, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> model = fxlora.lora_transform(model, fxlora.LoraConfig(r=2, target_modules=["0"]))
        >>> with fxlora.rescale_adapter_scale(model, 0.5):
        ...     halved = model(torch.ones(1, 8))
    """
    from fxlora.model import LoraModel

    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"rescale_adapter_scale: multiplier must be a number, not {multiplier!r}")
    call = f"rescale_adapter_scale(model, {multiplier!r})"
    factor = check_factor(multiplier, call)
    if not isinstance(model, LoraModel) or not model._lora.adapters:
        raise AdapterError("the model has no adapter whose scale could be changed; lora_transform gives it one")
    before = {name: current(model, name) for name in model._lora.adapters}
    plans = {name: model._lora.adapters[name].config for name in before}
    put(model, {name: multiplied(own, factor) for name, own in before.items()}, call)
    try:
        yield
    finally:
        if hasattr(model, "_lora"):  # else it was unloaded within
            adapters = model._lora.adapters
            # one that was deleted within, and another added under its name, keeps its own scale
            left = {n: own for n, own in before.items() if n in adapters and adapters[n].config is plans[n]}
            merged = list(model._lora.merged)
            if merged:
                model.unmerge_adapter()
            put(model, left, call)
            if merged:
                model.merge_adapter(merged)


__all__ = ["rescale_adapter_scale"]
