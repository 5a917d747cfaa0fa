"""What an adapter registers in a model: its factors and leaf modules at their sites, and their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import fx, nn

from fxlora._passes import (
    DROPOUT,
    FORM_CONTAINERS,
    SCALING,
    BranchSpec,
    Factor,
    FreezeBase,
    Instance,
    Region,
    Scaling,
    base_weight,
    containers,
    has_factors,
    part_path,
    part_shapes,
    shared_parts,
    variant_leaves,
)
from fxlora.factors import Factors
from fxlora.host.saved_modules import attach_copies, detach_copies
from fxlora.plan import Plan


def attach(model: nn.Module, plan: Plan, factors: Factors) -> None:
    """Register an adapter's factors, dropout and scaling at its sites; on any error, none of them."""
    try:
        for spec in plan.branches:
            owner = _owner(model, spec)
            weight = base_weight(model, spec.site)[1]
            parts = factors[spec.site]
            shared = shared_parts(spec)
            for part in part_shapes(spec):
                container, _, leaf = part.partition(".")
                if part in shared:
                    factor = model.get_submodule(f"{spec.tied_to}.{container}.{spec.adapter}")
                    container_of(owner, container)[spec.adapter] = factor
                elif not leaf:
                    container_of(owner, container)[spec.adapter] = Factor(parts[part], parts.get(f"{container}.bias"))
            leaves: dict[str, nn.Module] = {}
            if has_factors(spec):
                leaves[SCALING] = Scaling(spec.scaling, weight.device, weight.dtype)
            if spec.dropout:
                leaves[DROPOUT] = nn.Dropout(spec.dropout)
            for container, module in {**leaves, **variant_leaves(spec, weight)}.items():
                container_of(owner, container)[spec.adapter] = module.train(owner.training)
        attach_copies(model, plan, factors)
    except BaseException:
        detach(model, plan)
        raise


def detach(model: nn.Module, plan: Plan) -> None:
    """Remove all that `attach` registered, and the containers that are empty then."""
    detach_copies(model, plan)
    for spec in plan.branches:
        try:
            owner = model.get_submodule(spec.owner)
        except AttributeError:
            continue
        own = containers() - set(FORM_CONTAINERS)
        for container in [name for name, _ in owner.named_children() if name in own]:
            holder = cast(nn.ModuleDict, getattr(owner, container))
            if spec.adapter in holder:
                del holder[spec.adapter]
            if not holder:
                delattr(owner, container)
        if spec.is_parameter and not list(owner.children()):
            _prune(model, spec.owner)


def _prune(model: nn.Module, path: str) -> None:
    """Remove a bare parameter's holder, and the holder of holders if it is empty then."""
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    delattr(parent, leaf)
    if not list(parent.children()) and leaf != parent_path:
        grandparent, _, name = parent_path.rpartition(".")
        delattr(model.get_submodule(grandparent), name)


def _owner(model: nn.Module, spec: BranchSpec) -> nn.Module:
    if not spec.is_parameter:
        return model.get_submodule(spec.owner)
    holder_path, _, leaf = spec.owner.rpartition(".")
    module_path, _, holder_name = holder_path.rpartition(".")
    module = model.get_submodule(module_path)
    if not hasattr(module, holder_name):
        module.add_module(holder_name, nn.Module())
    holder = module.get_submodule(holder_name)
    if not hasattr(holder, leaf):
        holder.add_module(leaf, nn.Module())
    return holder.get_submodule(leaf)


def container_of(owner: nn.Module, name: str) -> nn.ModuleDict:
    """The container of that name in a module, made if need be."""
    if name not in owner._modules:
        owner.add_module(name, nn.ModuleDict().train(owner.training))
    return cast(nn.ModuleDict, owner._modules[name])


def factor_names(plans: Iterable[Plan]) -> list[str]:
    """Qualified names of the parameters of some adapters."""
    return [
        f"{spec.owner}.{part_path(part, spec.adapter)}"
        for plan in plans
        for spec in plan.branches
        for part in part_shapes(spec)
    ]


def trainable_names(plans: Iterable[Plan]) -> set[str]:
    """Qualified names of all parameters that some adapters train: factors, copies of modules, biases of the base."""
    plans = list(plans)
    specs = [spec for plan in plans for spec in plan.branches]
    kept = {f"{spec.owner}.{part_path(part, spec.adapter)}" for spec in specs for part in spec.frozen}
    copies = [f"{saved.path}.{name}" for plan in plans for saved in plan.saved for name in saved.parameters]
    return {*factor_names(plans), *copies, *(name for plan in plans for name in plan.biases)} - kept


def freeze(model: nn.Module, trainable: set[str]) -> None:
    """Freeze every parameter of a model but those named."""
    FreezeBase(trainable).run(Region(fx.Graph(), (Instance("", model),)))
