"""Several adapters in one graph: a batch whose rows use different ones, and slots between which one switches by a copy.

The graph's forms are in `passes.branches.forms`. This module registers what they read, fills the slots, and says which
adapters and inputs cannot be served so. `LoraModel` has thin methods for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from fxlora._passes import (
    FORM_CONTAINERS,
    ROW_DROPOUT,
    SLOTS,
    SWITCH,
    Branch,
    BranchForm,
    BranchSpec,
    Mode,
    RowDropout,
    RowsError,
    Stage,
    Switch,
    arrange,
    base_weight,
    can_stack,
    did_you_mean,
    factors,
    part_shapes,
    slot_values,
    stacked_parts,
)
from fxlora.errors import AdapterError
from fxlora.registered import container_of

if TYPE_CHECKING:
    from fxlora.model import LoraModel
    from fxlora.plan import Plan

BASE = "__base__"
"""The name, in `adapter_names`, of a row that uses no adapter; peft's."""


class Transient:
    """What belongs to one object in one process, and starts anew in a copy of a model.

    Attributes:
        renderings: forms of the model's graphs that were made before, to be put in place again.
        open: number of `adapter_rows` contexts that are open.
        trace: the stages of all pipeline runs with their graphs, if passes are traced.
    """

    def __init__(self) -> None:
        self.renderings: dict[Any, Any] = {}
        self.open = 0
        self.trace: list[Stage] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """What the slots of a model are for.

    Attributes:
        order: names of the adapters, one slot for each.
        specs: a branch for each adapter at each site that has slots, also where the adapter has none: such a slot is zero.
        r: the rank that every slot can hold at least.
    """

    order: tuple[str, ...]
    specs: tuple[BranchSpec, ...]
    r: int


class SlotStack(nn.Module):
    """Stacked copies of the factors of several adapters at one site; see `passes.rows`. Not in the state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name in ("scale", "ratios"):  # as wide as they are without slots; `LoraModel` fills them again
            if name in self._buffers:
                buffer = self.get_buffer(name)
                self.register_buffer(
                    name, buffer.to(torch.promote_types(buffer.dtype, torch.float32)), persistent=False
                )
        return self

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self.named_buffers())


# ---- what the graphs read ----


@dataclass(frozen=True, slots=True)
class _Site:
    """One form at one site, with the branches that it is made of."""

    name: str
    owner: nn.Module
    form: BranchForm
    specs: tuple[BranchSpec, ...]


def _sites(model: nn.Module, specs: Sequence[BranchSpec], order: Sequence[str], mode: Mode) -> Iterator[_Site]:
    by_site: dict[str, list[BranchSpec]] = {}
    for adapter in order:
        for spec in specs:
            if spec.adapter == adapter:
                by_site.setdefault(spec.site, []).append(spec)
    for site, found in by_site.items():
        own = {spec.adapter: spec for spec in found}
        for form in arrange([Branch.of(spec) for spec in found], mode):
            owner = model.get_submodule(found[0].owner)
            yield _Site(site, owner, form, tuple(own[adapter] for adapter in form.adapters))


def register(model: LoraModel, specs: Sequence[BranchSpec], order: tuple[str, ...], mode: Mode) -> Switch:
    """Register what the forms of a mode read beside the adapters' own parameters, and return the switch."""
    sites = list(_sites(model, specs, order, mode))
    device = next((parameter.device for parameter in model.parameters()), None)
    switch = Switch(order, [site.form.adapters for site in sites], device, in_place=mode == "slots")
    for site in sites:
        leaves: dict[str, nn.Module] = {SWITCH: switch}
        if site.form.stacked and any(spec.dropout for spec in site.specs):
            leaves[ROW_DROPOUT] = RowDropout([spec.dropout for spec in site.specs])
        for container, leaf in leaves.items():
            container_of(site.owner, container)[site.form.owner] = leaf.train(site.owner.training)
    return switch


def add_switch(module: nn.Module, switch: Switch) -> None:
    """Let a module read the switch that has no branch of its own."""
    if SWITCH not in module._modules:
        container_of(module, SWITCH)[switch.order[0]] = switch


def unregister(model: nn.Module) -> None:
    """Remove what `register` and `fill` registered."""
    for module in list(model.modules()):
        for container in FORM_CONTAINERS:
            if container in module._modules:
                delattr(module, container)


# ---- rows ----


def checked_names(model: LoraModel, adapter_names: object) -> tuple[str, ...]:
    """The names of the adapters of a batch's rows.

    Raises:
        TypeError: for anything but a list of strings.
        AdapterError: for an unknown name, or where rows cannot have different adapters; says where and why.
    """
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a list of names, one for each row of the batch, not {adapter_names!r}")
    names = tuple(cast("Sequence[str]", adapter_names))
    state = model._lora
    if not names:
        raise AdapterError("adapter_names is empty; it needs a name for each row of the batch")
    for name in dict.fromkeys(names):
        if name != BASE and name not in state.adapters:
            known = [*state.adapters, BASE]
            raise AdapterError(
                f"adapter_names: no adapter is called '{name}'; there is {', '.join(known)}.{did_you_mean(name, known)}"
            )
    if state.merged:
        raise AdapterError(
            f"adapter_names cannot be used while {', '.join(state.merged)} is merged into the weights that all rows share; call "
            "unmerge_adapter first"
        )
    for name in dict.fromkeys(names):
        if name != BASE:
            model._check_rows(state.adapters[name], uniform=len(set(names)) == 1)
    return names


def check_in_graph(plan: Plan, *, uniform: bool) -> None:
    """Refuse an adapter that one graph cannot give to some rows of a batch only.

    Raises:
        AdapterError: naming the layer.
    """
    if plan.saved:
        raise AdapterError(
            f"adapter_names: adapter '{plan.adapter}' has a copy of the whole module '{plan.saved[0].module}', and a captured "
            "graph runs one copy for all rows; use set_adapter, or capture='modules', which runs each copy on its rows"
        )
    in_weight = [spec.site for spec in plan.branches if spec.form == "weight"]
    if in_weight and not uniform:
        raise AdapterError(
            f"adapter_names: adapter '{plan.adapter}' is added to the weight of '{in_weight[0]}', which all rows of a graph "
            "share. Give all rows this adapter, or use capture='modules', which runs such a layer on each adapter's rows"
        )


def note_inputs(model: nn.Module, switch: Switch, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Check that a call's inputs have a row for each name, and note how many tokens a row has.

    Raises:
        RowsError: when the number of rows differs.
    """
    choice = switch.choice
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
    choice.lengths = tuple(value.shape[1] for value in tensors if value.dim() > 1)
    main = kwargs.get(getattr(model, "main_input_name", ""))
    main = main if isinstance(main, Tensor) and main.dim() > 0 else next(iter(tensors), None)
    count = choice.count
    if main is not None and count and main.shape[0] not in (count, count * choice.copies):
        raise RowsError(
            f"adapter_names has {count} names, but the batch has {main.shape[0]} rows; it needs one for each"
        )


def with_place(error: RowsError, model: nn.Module) -> RowsError:
    """The error with the name of the module in which it was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    frame, place = error.__traceback__, ""
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        place = names.get(id(owner), place) if isinstance(owner, nn.Module) else place
        frame = frame.tb_next
    for container in (SWITCH, ROW_DROPOUT):
        place = place.partition(f".{container}")[0]
    return RowsError(f"'{place}': {error}") if place else error


def repeats(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How many sequences `generate` makes of each row."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    values = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(values)


# ---- slots ----


def plan_slots(model: LoraModel, r: int | None, extra: Sequence[BranchSpec]) -> SlotPlan:
    """A slot for each adapter at each site where one of them has a branch, or may have one later.

    Args:
        model: the model.
        r: rank of the slots; the largest of the adapters' if None.
        extra: branches at further sites.

    Raises:
        AdapterError: when an adapter cannot be in a slot, or its rank is above `r`.
    """
    state = model._lora
    order = tuple(state.adapters)
    for plan in state.adapters.values():
        check_in_slots(plan)
    own = {(spec.site, spec.adapter): spec for plan in state.adapters.values() for spec in plan.branches}
    largest = max((spec.r for spec in own.values() if can_stack(Branch.of(spec))), default=0)
    if r is not None and r < largest:
        raise AdapterError(f"slots of rank {r} cannot hold an adapter of rank {largest}; give r={largest} or more")
    templates: dict[str, BranchSpec] = {}
    for spec in (*own.values(), *extra):
        templates.setdefault(spec.site, spec)
    specs: list[BranchSpec] = []
    for adapter in order:
        for site, template in templates.items():
            spec = own.get((site, adapter))
            if spec is None and can_stack(Branch.of(template)):
                spec = _empty(template, state.adapters[adapter])
            if spec is not None:
                specs.append(replace(spec, dropout=0.0))
    return SlotPlan(order, tuple(specs), r or largest)


def check_in_slots(plan: Plan) -> None:
    """Refuse an adapter that a switch cannot turn off.

    Raises:
        AdapterError: naming the module of which it has a copy.
    """
    if plan.saved:
        raise AdapterError(
            f"slots: adapter '{plan.adapter}' has a copy of the whole module '{plan.saved[0].module}', and which copy runs is "
            "part of the graph; delete the adapter, or use set_adapter without slots"
        )


def _empty(template: BranchSpec, plan: Plan) -> BranchSpec:
    """The branch that an adapter would have at a site."""
    stacked = [spec for spec in plan.branches if can_stack(Branch.of(spec))]
    variant = stacked[0].variant if stacked else ""
    bias = bool(stacked) and stacked[0].bias
    return replace(template, adapter=plan.adapter, variant=variant, bias=bias, calls=(), scaling=0.0, tied_to="")


def create(model: LoraModel, slots: SlotPlan) -> None:
    """Register the stacks of the slots, and fill them."""
    for site in _sites(model, slots.specs, slots.order, "slots"):
        if site.form.stacked:
            values = [_values(model, spec, slots.r) for spec in site.specs]
            stacks = {part: torch.stack([each[part] for each in values]) for part in stacked_parts(site.specs[0])}
            container_of(site.owner, SLOTS)[site.form.owner] = SlotStack(stacks)


def fill(model: LoraModel, slots: SlotPlan, adapters: Sequence[str]) -> None:
    """Copy the factors of some adapters into their slots; graphs keep the buffers."""
    for site in _sites(model, slots.specs, slots.order, "slots"):
        if not site.form.stacked:
            continue
        stack = site.owner.get_submodule(f"{SLOTS}.{site.form.owner}")
        for place, spec in enumerate(site.specs):
            if spec.adapter in adapters:
                for part, value in _values(model, spec, slots.r).items():
                    stack.get_buffer(part)[place].copy_(value)


def _values(model: LoraModel, slot: BranchSpec, r: int) -> dict[str, Tensor]:
    """What a slot holds: the adapter's factors, or zeros where it has none at this site."""
    weight = base_weight(model, slot.site)[1]
    plan = model._lora.adapters[slot.adapter]
    own = next((spec for spec in plan.branches if spec.site == slot.site), None)
    with torch.no_grad():
        if own is None:
            values = slot_values(slot, r, weight, _no_parts(slot, weight))
            values["scale"].zero_()
            if "ratios" in values:
                values["ratios"] = torch.ones_like(values["ratios"])
        else:
            values = slot_values(own, r, weight, factors(model, own))
    dtype = weight.dtype if weight.is_floating_point() and model._lora.branch_dtype == "base" else None
    half = {part: value.to(dtype) for part, value in values.items() if part in ("A", "B") and dtype is not None}
    return {part: value.detach().to(weight.device) for part, value in {**values, **half}.items()}


def _no_parts(spec: BranchSpec, weight: Tensor) -> dict[str, Tensor]:
    return {part: torch.zeros(shape, device=weight.device) for part, shape in part_shapes(replace(spec, r=1)).items()}


def misfit(slots: SlotPlan, old: Plan, new: Plan) -> str | None:
    """Why an adapter cannot take another one's slot; None if it can."""
    places = {spec.site: spec for spec in slots.specs if spec.adapter == old.adapter}
    kept = {spec.site: spec for spec in old.branches if not can_stack(Branch.of(spec))}
    for spec in new.branches:
        place = places.get(spec.site)
        if place is None:
            return f"there is no slot at '{spec.site}'; name it in use_slots(target_modules=…)"
        if not can_stack(Branch.of(spec)):
            if (
                replace(spec, scaling=0.0, init=True, frozen=())
                != replace(kept.get(spec.site, spec), scaling=0.0, init=True, frozen=())
                or spec.site not in kept
            ):
                return f"'{spec.site}' has no stack, so that only an adapter of the same shape fits there"
        elif spec.r > slots.r:
            return (
                f"its rank at '{spec.site}' is {spec.r}, and the slots have {slots.r}; use_slots(r={spec.r}) makes room"
            )
        elif (spec.kind, spec.variant, spec.bias, spec.calls) != (place.kind, place.variant, place.bias, place.calls):
            return f"'{spec.site}' has another form there (use_dora, lora_bias and call_sites must agree)"
    missing = [site for site in kept if site not in {spec.site for spec in new.branches}]
    return f"it has nothing at '{missing[0]}', which has no stack" if missing else None
