"""Hot swap: give a loaded adapter's name and place to another one from files.

Where the new adapter has the old one's shape, tensors are copied in place. In slots (see `fxlora.serving`) so they are for
any adapter that fits, zero-padded to the slots' rank, so that compiled and exported graphs stay as they are. Otherwise
the graphs are rewritten, as by `delete_adapter` and `load_adapter`, but nothing else about the adapter changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from fxlora._passes import SCALING, Branch, BranchSpec, Scaling, can_stack, factors, has_factors, part_path, part_shapes
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError
from fxlora.factors import Factors
from fxlora.plan import Plan
from fxlora.registered import attach, detach
from fxlora.serving import fill, misfit

if TYPE_CHECKING:
    from fxlora.model import LoraModel


def hotswap_adapter(model: LoraModel, model_id: str | Path, adapter_name: str = "default") -> None:
    """Replace an adapter by one that `save_pretrained` or peft wrote. On any error the model is as before.

    The adapter stays active or not, and trainable or not, as it was.

    Args:
        model: a transformed model.
        model_id: directory of the new adapter; its rank, scaling and targets may differ.
        adapter_name: whose place it takes.

    Raises:
        AdapterError: for an unknown name, while the adapter is merged, for adapters that change more than layers'
            outputs (`modules_to_save`, `bias`, PiSSA), or where the new one does not fit into the slots; says what does not.
        CheckpointError: when a file is missing or broken, or its tensors do not fit this model.
    """
    from fxlora.checkpoint.adapter import fit_plan, read_drawn

    model._check_known([adapter_name])
    state = model._lora
    old = state.adapters[adapter_name]
    if adapter_name in state.merged:
        raise AdapterError(f"adapter '{adapter_name}' is merged; call unmerge_adapter first")
    directory = Path(model_id)
    config = LoraConfig.from_pretrained(directory).replace(inference_mode=old.config.inference_mode)
    _check_only_factors(model, old, config)
    new = fit_plan(directory, model, model._plan(config, adapter_name))
    if state.slots is not None:
        why = misfit(state.slots, old, new)
        if why:
            raise AdapterError(f"the adapter in {directory} does not fit into the slot of '{adapter_name}': {why}")
    drawn, _ = read_drawn(directory, model, new)
    if drawn.base:
        raise AdapterError(f"the adapter in {directory} changes base weights; use delete_adapter and load_adapter")
    trained = any(parameter.requires_grad for parameter in _parameters(model, old.branches))
    if _same_shape(old.branches, new.branches):
        _copy(model, new.branches, drawn.factors)
        state.adapters[adapter_name] = new
    elif state.slots is not None:
        _replace_stacked(model, old, new, drawn.factors)
    else:
        _replace(model, old, new, drawn.factors)
    if state.slots is not None:
        fill(model, state.slots, [adapter_name])
    for spec in new.branches:
        for part in part_shapes(spec):
            path = f"{spec.owner}.{part_path(part, adapter_name)}"
            model.get_parameter(path).requires_grad_(trained and part not in spec.frozen)


def _check_only_factors(model: LoraModel, old: Plan, config: LoraConfig) -> None:
    if old.saved or config.modules_to_save:
        raise AdapterError(
            "hotswap_adapter cannot exchange copies of whole modules (modules_to_save); use delete_adapter and load_adapter"
        )
    if old.biases or config.bias != "none":
        raise AdapterError("hotswap_adapter cannot exchange trained biases; use delete_adapter and load_adapter")
    if old.adapter in model._lora.changed_base:
        raise AdapterError(
            f"the initialisation of '{old.adapter}' changed base weights, which hotswap_adapter would leave so; use "
            "delete_adapter and load_adapter"
        )


def _parameters(model: LoraModel, specs: Iterable[BranchSpec]) -> list[torch.nn.Parameter]:
    return [
        model.get_parameter(f"{spec.owner}.{part_path(part, spec.adapter)}")
        for spec in specs
        for part in part_shapes(spec)
        if part not in spec.frozen
    ]


def _same_shape(old: tuple[BranchSpec, ...], new: tuple[BranchSpec, ...]) -> bool:
    """Whether all that differs is in the factors and scalings."""

    def shapes(specs: tuple[BranchSpec, ...]) -> dict[str, BranchSpec]:
        return {spec.site: replace(spec, scaling=0.0, init=True, frozen=()) for spec in specs}

    return shapes(old) == shapes(new)


def _copy(model: LoraModel, specs: Iterable[BranchSpec], values: Factors) -> None:
    """Copy factors and scalings into the registered ones."""
    with torch.no_grad():
        for spec in specs:
            for part in part_shapes(spec):
                parameter = model.get_parameter(f"{spec.owner}.{part_path(part, spec.adapter)}")
                parameter.copy_(values[spec.site][part])
            if has_factors(spec):
                leaf = model.get_submodule(f"{spec.owner}.{SCALING}.{spec.adapter}")
                cast(Scaling, leaf).value = spec.scaling


def _replace_stacked(model: LoraModel, old: Plan, new: Plan, values: Factors) -> None:
    """New parameters for branches that graphs read from stacks; copies for the others, which graphs read themselves."""

    def parts(plan: Plan) -> tuple[Plan, tuple[BranchSpec, ...]]:
        stacked = tuple(spec for spec in plan.branches if can_stack(Branch.of(spec)))
        return replace(plan, branches=stacked), tuple(spec for spec in plan.branches if spec not in stacked)

    (before, _), (after, others) = parts(old), parts(new)
    _exchange(model, before, after, values)
    _copy(model, others, values)
    model._lora.adapters[old.adapter] = new


def _replace(model: LoraModel, old: Plan, new: Plan, values: Factors) -> None:
    """New parameters for all branches, and graphs that have them."""
    state, kept = model._lora, _kept(model, old)
    with model._without_slots():
        model._render(())  # a layer that only the old adapter has must not read it any more
        try:
            _exchange(model, old, new, values)
            state.adapters[old.adapter] = new
            model._render(state.rendered)
        except BaseException:
            if state.adapters[old.adapter] is new:
                model._render(())
                _exchange(model, new, old, kept)
                state.adapters[old.adapter] = old
            model._render(state.rendered)
            raise


def _exchange(model: LoraModel, old: Plan, new: Plan, values: Factors) -> None:
    kept = _kept(model, old)
    detach(model, old)
    try:
        attach(model, new, values)
    except BaseException:
        attach(model, old, kept)
        raise


def _kept(model: LoraModel, plan: Plan) -> Factors:
    return {spec.site: factors(model, spec) for spec in plan.branches}
