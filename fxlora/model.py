"""`LoraModel`: what a user does with adapters, the same for every capture.

A subclass knows how its graphs are run: it implements `regions`, `_render` (put the branches of the active adapters
into the graphs) and `_strip` (give the plain model back). Method names and behaviour are those of peft's `PeftModel`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from fxlora._passes import (
    DROPOUT,
    ROW_DROPOUT,
    SCALING,
    SLOTS,
    SWITCH,
    BranchDtype,
    BranchSpec,
    CallSite,
    Factor,
    FreezeBase,
    Instance,
    MergeBranches,
    MergeError,
    Mode,
    Region,
    RowsError,
    SavedModule,
    Scaling,
    Stage,
    Switch,
    Verify,
    WeightNorm,
    base_weight,
    check_not_shared,
    containers,
    did_you_mean,
    has_factors,
    parameter_at,
    part_path,
    part_shapes,
    print_graph,
    resolve,
    shared_parts,
    token_ids,
    variant_leaves,
)
from fxlora.compound import compound_of
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError, ConfigError
from fxlora.factors import Drawn, Factors, draw
from fxlora.host.biases import check_one_with_biases, install_biases, set_biases
from fxlora.host.replication import Replication
from fxlora.host.saved_modules import attach_copies, check_copies, detach_copies, put_in_place, running_copies
from fxlora.plan import Plan, configured_scaling
from fxlora.serving import (
    BASE,
    SlotPlan,
    Transient,
    check_in_graph,
    check_in_slots,
    checked_names,
    create,
    fill,
    note_inputs,
    plan_slots,
    register,
    unregister,
    with_place,
)

if TYPE_CHECKING:
    from torch import fx

log = logging.getLogger("fxlora")

_BIASES_STAY = "biases of the base were trained, and keep their trained values while adapters are disabled"


@dataclass(frozen=True, slots=True)
class ChangedBase:
    """What the initialisation of an adapter replaced in the base, by path, and the factors that it started from."""

    replaced: dict[str, Tensor]
    initial: Factors


@dataclass
class LoraState:
    """Everything a transformed model knows of its adapters.

    Attributes:
        capture: how the graphs were captured, and why so.
        branch_dtype: which side is cast where dtypes differ.
        base_class: (name, module) of the original model's class.
        trained_before: names of the parameters that required gradients before the transform.
        adapters: the plan of each adapter, in the order in which they were added.
        active: names of the adapters in use.
        enabled: False inside `disable_adapter`.
        merged: names of the adapters that are folded into the weights now.
        originals: the weights that a merge replaced, by path.
        changed_base: what the initialisation of an adapter did to the base, by adapter, in the order of the adapters.
        biases: what the biases that an adapter trains were before it, by path.
        replication: how to undo `layer_replication`.
        stages: what the last pipeline run did.
        mode: the form of the branches in the graphs.
        slots: what the slots hold, in the form `"slots"`.
        switch: what chooses among adapters that are in one graph.
        transient: what a copy of the model does not have.
    """

    capture: str
    reason: str
    branch_dtype: BranchDtype
    base_class: tuple[str, str]
    trained_before: tuple[str, ...] = ()
    adapters: dict[str, Plan] = field(default_factory=dict[str, Plan])
    active: tuple[str, ...] = ()
    enabled: bool = True
    merged: tuple[str, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    changed_base: dict[str, ChangedBase] = field(default_factory=lambda: dict[str, ChangedBase]())
    biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    replication: Replication | None = None
    stages: list[Stage] = field(default_factory=list[Stage])
    mode: Mode = "plain"
    slots: SlotPlan | None = None
    switch: Switch | None = None
    transient: Transient = field(default_factory=Transient)

    @property
    def rendered(self) -> tuple[str, ...]:
        """Adapters whose branches belong into the graphs now."""
        return tuple(name for name in self.active if name not in self.merged) if self.enabled else ()

    @property
    def copies(self) -> tuple[SavedModule, ...]:
        """Trained copies that run now, in place of their originals; a merge changes nothing about them."""
        runs = self.enabled and self.mode != "rows"  # where rows differ, no copy is anyone's
        return running_copies(self.adapters[name] for name in self.active) if runs else ()


class LoraModel(nn.Module):
    """A model with LoRA adapters. Made by `lora_transform`, not by calling this class."""

    _lora: LoraState

    # ---- what a capture implements ----

    def regions(self) -> list[Region]:
        """The graphs that run now, with the modules that run them."""
        raise NotImplementedError

    def _rewrite(self, active: tuple[str, ...], mode: Mode) -> None:
        """Rewrite the graphs so that they hold the branches of exactly these adapters, all or nothing."""
        raise NotImplementedError

    def _strip(self) -> nn.Module:
        """The model without LoRA, once no adapter is left."""
        raise NotImplementedError

    def _place(self, plan: Plan) -> Plan:
        """The plan with each branch where it can be run: in an output, or in a weight that is read and not called."""
        raise NotImplementedError

    def _register_rows(self, switch: Switch) -> None:
        """Let whatever reads the switch beside the branches find it."""

    def _check_rows(self, plan: Plan, *, uniform: bool) -> None:
        """Refuse an adapter that some rows of a batch cannot have alone."""
        check_in_graph(plan, uniform=uniform)

    def _sites_graph(self) -> fx.Graph:
        """The graph in which a merge looks for other uses of a weight."""
        return self.regions()[0].graph

    # ---- reading ----

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The configuration of each adapter, by name."""
        return {name: plan.config for name, plan in self._lora.adapters.items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters in use."""
        return list(self._lora.active)

    @property
    def active_adapter(self) -> str:
        """Name of the adapter in use, the first if there are several."""
        if not self._lora.active:
            raise AdapterError("no adapter is active; choose one with set_adapter")
        return self._lora.active[0]

    @property
    def capture(self) -> str:
        """How the graphs were captured: `symbolic`, `export` or `modules`."""
        return self._lora.capture

    def print_graph(self) -> str:
        """The graphs that run now as text, inserted nodes marked with `+`; for templates, which layers run them."""
        parts: list[str] = []
        for region in self.regions():
            names = [instance.name for instance in region.instances]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts += [f"# {names[0]}{more}"] if names[0] else []
            parts.append(print_graph(region.graph))
        return "\n".join(parts)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(number of trainable entries, number of all entries) over all parameters, shared ones counted once."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print the counts in peft's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def verify(self) -> None:
        """Check graphs, factors and scales against the adapters' plans.

        Raises:
            VerifyError: names the site that is wrong, or that has vanished since the transform.
        """
        for region in self.regions():
            self._verifier(region, self._shown(), self._lora.mode).run(region)
        check_copies(self, self._lora.adapters.values())

    def get_submodule(self, target: str) -> nn.Module:
        """The registered module of that name, also where a trained copy runs in place of one around it."""
        module = resolve(self, target)
        if not isinstance(module, nn.Module):
            raise AttributeError(f"'{target}' is no module")  # noqa: TRY004 (as in torch)
        return module

    def get_parameter(self, target: str) -> nn.Parameter:
        """The registered parameter of that name, also where its module's class gives another value under it."""
        parameter = resolve(self, target)
        if not isinstance(parameter, nn.Parameter):
            raise AttributeError(f"'{target}' is no parameter")  # noqa: TRY004 (as in torch)
        return parameter

    # ---- adapters ----

    def add_adapter(self, adapter_name: str, peft_config: object) -> None:
        """Add an adapter, frozen and not active, as peft does.

        Args:
            adapter_name: a new name without a dot.
            peft_config: anything that `lora_transform` takes as a configuration.

        Raises:
            AdapterError: when the name is taken or cannot be used.
            NoTargetError: when a target matches nothing.
        """
        check_adapter_name(adapter_name, self._lora.adapters)
        plan = self._plan(LoraConfig.from_any(peft_config), adapter_name)
        self._add(plan, draw(self, plan))

    def load_adapter(self, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False) -> None:
        """Add an adapter from the files that `save_pretrained` or peft wrote.

        Args:
            model_id: directory with `adapter_config.json` and `adapter_model.safetensors`.
            adapter_name: a new name.
            is_trainable: whether its factors shall be trained once it is active.

        Raises:
            AdapterError: when the name is taken.
            CheckpointError: when a file is missing or broken, or its tensors do not fit this model.
        """
        from fxlora.checkpoint.adapter import fit_plan, read_drawn

        check_adapter_name(adapter_name, self._lora.adapters)
        config = LoraConfig.from_pretrained(model_id).replace(inference_mode=not is_trainable)
        plan = fit_plan(Path(model_id), self, self._plan(config, adapter_name))
        self._add(plan, read_drawn(Path(model_id), self, plan))

    def _plan(self, config: LoraConfig, adapter_name: str) -> Plan:
        from fxlora.plan import plan

        check_one_with_biases(config, self._lora.adapters)
        self._check_layers(config)
        return self._place(plan(self, config, adapter_name=adapter_name, sites=self._sites()))

    def _sites(self) -> list[CallSite]:
        """Call sites that a whole graph shows beyond the module tree."""
        return []

    def _add(self, plan: Plan, drawn: Drawn, *, activate: bool = False) -> None:
        """Register a planned adapter; on any error the model is as before."""
        if drawn.base:
            self._check_base_may_change(plan)
        if self._lora.slots is not None:
            check_in_slots(plan)
        with self._without_slots():
            self._add_to_graphs(plan, drawn, activate=activate)

    def _add_to_graphs(self, plan: Plan, drawn: Drawn, *, activate: bool) -> None:
        state = self._lora
        before = (dict(state.adapters), state.active)
        replaced = self._swap(drawn.base)
        biases: dict[str, Tensor] = {}
        try:
            attach(self, plan, drawn.factors)
            biases = install_biases(self, plan, drawn.factors)
            state.adapters[plan.adapter] = plan
            if activate:
                state.active = (*state.active, plan.adapter)
                check_rows([state.adapters[name] for name in state.active])
            self._render(state.rendered)
        except BaseException:
            state.adapters, state.active = before
            set_biases(self, biases)
            detach(self, plan)
            self._swap(replaced)
            raise
        if replaced:
            initial = {
                site: {part: t.detach().clone() for part, t in parts.items()} for site, parts in drawn.factors.items()
            }
            state.changed_base[plan.adapter] = ChangedBase(replaced, initial)
        state.biases.update(biases)
        trained = trainable_names([plan]) if activate and not plan.config.inference_mode else set[str]()
        for path in {*factor_names([plan]), *trainable_names([plan])}:
            self.get_parameter(path).requires_grad_(path in trained)

    def _check_base_may_change(self, plan: Plan) -> None:
        """Refuse an initialisation that would change a base weight under something else.

        Raises:
            AdapterError: while adapters are merged.
            ConfigError: when a weight is shared.
        """
        init = plan.config.init_lora_weights
        if self._lora.merged:
            raise AdapterError(f"init_lora_weights={init!r} changes base weights; call unmerge_adapter first")
        try:
            check_not_shared(Region(self._sites_graph(), (Instance("", self),)), plan.branches)
        except MergeError as error:
            raise ConfigError(f"init_lora_weights={init!r} changes base weights, but {error}") from error

    def _give_back_base(self, adapter: str) -> None:
        """Undo what an adapter's initialisation did to the base; what later ones did to it stays."""
        state = self._lora
        changed = state.changed_base.pop(adapter, None)
        if changed is None:
            return
        values = dict(changed.replaced)
        for later in state.changed_base.values():
            for path in later.replaced.keys() & values.keys():
                current = cast(nn.Parameter, parameter_at(self, path)).detach()
                shift = values[path].double() - later.replaced[path].double()
                later.replaced[path], values[path] = values[path], (current.double() + shift).to(current.dtype)
        self._swap(values)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use these adapters, and no others; they become trainable (unless `inference_mode`), the others frozen.

        Raises:
            AdapterError: for an unknown name.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(dict.fromkeys(adapter_name))
        self._check_known(names)
        running_copies(self._lora.adapters[name] for name in names)
        if self._lora.merged:
            log.warning("set_adapter takes the merged adapters %s out of the weights first", self._lora.merged)
            self.unmerge_adapter()
        self._activate(names)
        chosen = trainable_names(self._lora.adapters[name] for name in names)
        for path in trainable_names(self._lora.adapters.values()):
            self.get_parameter(path).requires_grad_(path in chosen and not inference_mode)

    def _activate(self, names: tuple[str, ...]) -> None:
        state = self._lora
        check_rows([state.adapters[name] for name in names])
        before = state.active
        state.active = names
        try:
            self._render(state.rendered)
        except BaseException:
            state.active = before
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first of the others becomes active.

        What its initialisation did to the base (PiSSA, OLoRA) is undone.

        Raises:
            AdapterError: for an unknown name, or while the adapter is merged.
        """
        state = self._lora
        self._check_known([adapter_name])
        changes_base = bool(state.adapters[adapter_name].biases) or adapter_name in state.changed_base
        if adapter_name in state.merged or (changes_base and state.merged):
            raise AdapterError(f"adapter '{adapter_name}' is merged; call unmerge_adapter first")
        with self._without_slots():
            self._delete(adapter_name)

    def _delete(self, adapter_name: str) -> None:
        state = self._lora
        remaining = tuple(name for name in state.active if name != adapter_name)
        others = [name for name in state.adapters if name != adapter_name]
        if remaining != state.active:
            self._activate(remaining or tuple(others[:1]))
        self._restore_biases([adapter_name])
        detach(self, state.adapters.pop(adapter_name))
        self._give_back_base(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """Within this context the model is the base model; merged adapters are taken out for its time.

        Biases that an adapter trains (`bias="all"`, `"lora_only"`) keep their trained values, as in peft.
        """
        state = self._lora
        merged, enabled, active = state.merged, state.enabled, state.active
        if merged:
            self.unmerge_adapter()
        state.enabled = False
        if state.biases:
            log.warning(_BIASES_STAY)
        try:
            self._render(())
            yield
        finally:
            state.enabled = enabled
            self._render(state.rendered)
            if merged and state.active == active:  # another choice of adapters ends the merge, as it does outside
                self.merge_adapter(list(merged))

    def disable_adapter_layers(self) -> None:
        """Be the base model from now on; merged adapters are taken out of the weights."""
        if self._lora.merged:
            self.unmerge_adapter()
        if self._lora.biases:
            log.warning(_BIASES_STAY)
        self._lora.enabled = False
        self._render(())

    def enable_adapter_layers(self) -> None:
        """Use the active adapters again, after `disable_adapter_layers` or in a copy made inside `disable_adapter`."""
        self._lora.enabled = True
        self._render(self._lora.rendered)

    def set_scale(self, adapter_name: str, factor: float) -> None:
        """Make an adapter's scaling `factor` times what its configuration says. Compiled graphs stay valid.

        As in peft, files do not hold this factor: `save_pretrained` writes the configuration's alpha.

        Raises:
            AdapterError: for an unknown name, a factor that is not finite, or while the adapter is merged.
        """
        self._check_known([adapter_name])
        if adapter_name in self._lora.merged:
            raise AdapterError(f"adapter '{adapter_name}' is merged; call unmerge_adapter first")
        plan = self._lora.adapters[adapter_name]
        scaled = [spec for spec in plan.branches if has_factors(spec)]
        names = [compound_of(self, spec.site) or spec.site for spec in scaled]
        configured = [configured_scaling(plan.config, n, s.r) for n, s in zip(names, scaled, strict=True)]
        changed = [replace(spec, scaling=factor * each) for spec, each in zip(scaled, configured, strict=True)]
        leaves = [cast(Scaling, self.get_submodule(f"{spec.owner}.{SCALING}.{adapter_name}")) for spec in changed]
        largest = max((abs(spec.scaling) for spec in changed), default=0.0)
        if not largest <= torch.finfo(torch.float32).max:
            raise AdapterError(f"set_scale({factor!r}) makes a scaling of {largest:g}, which float32 cannot hold")
        for leaf, spec in zip(leaves, changed, strict=True):
            leaf.value = spec.scaling
        rest = [spec for spec in plan.branches if not has_factors(spec)]
        self._lora.adapters[adapter_name] = replace(plan, branches=(*changed, *rest))
        if self._lora.slots is not None:
            fill(self, self._lora.slots, [adapter_name])

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter that is a weighted sum of others: `linear`, `cat` (exact) or `svd` (best of its rank).

        Args:
            adapters: names of the adapters to combine.
            weights: one factor for each.
            adapter_name: the new adapter's name; it is not activated.
            combination_type: how; see `fxlora.weighted`.
            svd_rank: rank for `svd`; the largest rank of the adapters if None.

        Raises:
            AdapterError: for an unknown or taken name, or weights that do not fit.
            NotImplementedError: for one of peft's other combination types.
        """
        from fxlora.weighted import check_combinable, combine

        self._check_known(adapters)
        check_adapter_name(adapter_name, self._lora.adapters)
        check_combinable(self._lora.adapters[name] for name in adapters)
        plan, factors = combine(self, list(adapters), list(weights), adapter_name, combination_type, svd_rank)
        self._add(plan, Drawn(factors))

    # ---- several adapters in one graph ----

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each row of the batch an adapter of its own: see `adapter_rows`."""
        state: LoraState | None = self.__dict__.get("_lora")
        if state is None:  # a capture runs a graph before it has adapters
            return super().__call__(*args, **kwargs)
        if adapter_names is not None:
            with self.adapter_rows(adapter_names):
                return self(*args, **kwargs)
        if not state.transient.open:
            if state.mode == "rows" or (state.switch is not None and state.switch.choice.count):
                self._leave_rows()
            return super().__call__(*args, **kwargs)
        if state.switch is None:
            return super().__call__(*args, **kwargs)
        try:
            note_inputs(self, state.switch, args, kwargs)
            return super().__call__(*args, **kwargs)
        except RowsError as error:
            raise with_place(error, self) from error

    @contextmanager
    def adapter_rows(self, adapter_names: Sequence[str], *, copies: int = 1) -> Generator[None]:
        """Within this context each row of a batch uses an adapter of its own, in evaluation and in training.

        All rows are computed together, with the factors of each row's adapter gathered for batched products. A pass
        that needs the adapters again in its backward pass (gradient checkpointing) has that inside the context too.

        Args:
            adapter_names: for each row the name of an adapter, active or not, or `"__base__"` for none.
            copies: into how many rows in sequence each row is repeated, as `generate` does for its beams.

        Raises:
            TypeError: for anything but a list of names.
            AdapterError: for an unknown name, while adapters are merged, or where rows cannot have different adapters.
        """
        state = self._lora
        names = checked_names(self, adapter_names)
        if not state.enabled:  # as in peft, without adapters no row has one
            yield
            return
        before = None if state.switch is None else state.switch.choice
        if state.mode == "plain":
            self._enter_rows()
        assert state.switch is not None
        state.switch.choose(names, BASE, copies)
        state.transient.open += 1
        try:
            yield
        finally:
            state.transient.open -= 1
            if state.transient.open and before is not None:
                state.switch.choose(before.names, BASE, before.copies)
            elif state.slots is None and torch.is_grad_enabled():
                state.switch.close()  # the backward pass may run parts of the model again
            else:
                self._leave_rows()

    def _enter_rows(self) -> None:
        state = self._lora
        names = tuple(state.adapters)
        if state.switch is None:
            state.switch = register(self, self._specs(), names, "rows")
            self._register_rows(state.switch)
        self._show(names, "rows")

    def _leave_rows(self) -> None:
        """Let the active adapters act again. The other form, and what it reads, stay ready for the next batch."""
        state = self._lora
        assert state.switch is not None
        if state.slots is None:
            state.switch.open({})
            self._show(state.rendered, "plain")
        else:
            self._render(state.rendered)

    def use_slots(self, r: int | None = None, target_modules: list[str] | str | None = None) -> None:
        """Hold all adapters in one graph, as stacked copies of their factors, and switch among them by copies.

        From here on `set_adapter`, `disable_adapter`, `set_scale` and `hotswap_adapter` neither recompile a compiled model
        nor need another export: they copy into buffers that the graph reads. For inference only, since the copies are
        not trained. Each call computes the branches of all adapters.

        Args:
            r: rank of the slots, for adapters that are swapped in later; the largest rank of the adapters if None.
            target_modules: layers that have slots beside those of the adapters, as in a configuration.

        Raises:
            AdapterError: in training mode, while adapters are merged, with adapters that have copies of whole modules
                (`modules_to_save`), or for a rank that is too small.
            NoTargetError: when a name matches no layer.
        """
        state = self._lora
        if self.training:
            raise AdapterError("slots are copies, for inference; call eval() first")
        if state.merged:
            raise AdapterError(f"{', '.join(state.merged)} is merged into the weights; call unmerge_adapter first")
        if not state.adapters:
            raise AdapterError("there is no adapter to hold in slots; add one first")
        extra: tuple[BranchSpec, ...] = ()
        if target_modules is not None:
            first = next(iter(state.adapters.values()))
            config = LoraConfig(r=first.config.r, target_modules=target_modules)
            extra = self._plan(config, first.adapter).branches
        self._build_slots(plan_slots(self, r, extra))

    def _build_slots(self, slots: SlotPlan) -> None:
        state = self._lora
        self.leave_slots()
        self._render(state.rendered)
        try:
            state.slots, state.switch = slots, register(self, slots.specs, slots.order, "slots")
            create(self, slots)
            self._show(slots.order, "slots")
        except BaseException:
            unregister(self)
            state.slots = state.switch = None
            raise
        self._render(state.rendered)

    def leave_slots(self) -> None:
        """Go back to graphs of the active adapters alone, which can be trained."""
        if self._lora.slots is not None:
            self._lora.slots = None
            self._render(self._lora.rendered)

    def hotswap_adapter(self, model_id: str | Path, adapter_name: str = "default") -> None:
        """Replace an adapter by one from files; see `fxlora.hotswap_adapter`."""
        from fxlora.hotswap import hotswap_adapter

        hotswap_adapter(self, model_id, adapter_name)

    def refresh_slots(self) -> None:
        """Copy all adapters into their slots again, after their parameters were changed from outside."""
        if self._lora.slots is not None:
            fill(self, self._lora.slots, self._lora.slots.order)

    @contextmanager
    def _without_slots(self) -> Generator[None]:
        """Within this context the number of adapters may change; slots are made anew afterwards."""
        slots = self._lora.slots
        if self._lora.mode == "rows":
            self._render(self._lora.rendered)
        self.leave_slots()
        self._lora.transient.renderings.clear()
        if self._lora.switch is not None:
            unregister(self)
            self._lora.switch = None
        try:
            yield
        finally:
            if slots is not None and self._lora.adapters:
                extra = [spec for spec in slots.specs if spec.adapter == slots.order[0]]
                needed = max(spec.r for spec in self._specs())
                self._build_slots(plan_slots(self, max(slots.r, needed), extra))

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`.

        Raises:
            AdapterError: for training in slots.
        """
        state = self.__dict__.get("_lora")
        if mode and state is not None and state.slots is not None:
            raise AdapterError("slots are copies, for inference; call leave_slots() before training")
        return super().train(mode)

    # ---- merging ----

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True) -> None:
        """Fold adapters into the base weights, each weight rounded once; `unmerge_adapter` restores the bits.

        Args:
            adapter_names: which; the active ones if None.
            safe_merge: accepted for peft's sake. A merge that would make NaN or infinite weights is always refused.

        Raises:
            AdapterError: for an unknown name.
            MergeError: when a weight is shared with another layer, or would not be finite. Nothing is changed then.
        """
        del safe_merge
        state = self._lora
        names = tuple(state.active if adapter_names is None else dict.fromkeys(adapter_names))
        self._check_known(names)
        if not state.enabled:
            raise AdapterError("adapters are disabled here; merge them outside of disable_adapter()")
        new = [name for name in names if name not in state.merged]
        if not new:
            return
        wanted = (*state.merged, *new)
        check_rows([state.adapters[name] for name in dict.fromkeys((*wanted, *state.active))])
        earlier = dict(state.originals)
        # from the original weights, so that the result does not depend on the order of merging
        current = self._swap(earlier)
        replaced: dict[str, Tensor] = {}
        try:
            self._fold(wanted, replaced)
            state.merged, state.originals = wanted, replaced
            self._render(state.rendered)
        except BaseException:
            self._swap(replaced)
            self._swap(current)
            state.merged, state.originals = tuple(n for n in wanted if n not in new), earlier
            raise

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights: these have their original bits again."""
        state = self._lora
        self._swap(state.originals)
        state.originals, state.merged = {}, ()
        self._render(state.rendered)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Fold adapters into the base weights and return the model without any LoRA.

        The adapters' trained copies of modules take these modules' places, and biases keep their trained values.

        Args:
            progressbar: accepted for peft's sake; folding is quick.
            safe_merge: as in `merge_adapter`.
            adapter_names: which adapters to fold; the active ones if None.

        Returns:
            The original model object for `modules` capture; the captured graph for the others. Its state dict has
            the original's names, and its parameters require gradients where the original's did.
        """
        del progressbar
        state = self._lora
        names = tuple(dict.fromkeys([*state.merged, *(state.active if adapter_names is None else adapter_names)]))
        self._check_known(names)
        copies = running_copies(state.adapters[name] for name in names)
        for name in [each for each in state.changed_base if each not in names and not state.merged]:
            self._give_back_base(name)
        self.merge_adapter(adapter_names, safe_merge)
        state.originals = {}
        self._restore_biases([name for name in state.adapters if name not in state.merged])
        return self._remove_all(copies)

    def unload(self) -> nn.Module:
        """The model without any LoRA and with its original weights, biases and layers, bit for bit.

        As in peft, modules of `modules_to_save` stay as the active adapter trained them: delete that adapter first to
        have the original ones.

        Raises:
            AdapterError: inside `disable_adapter`.
        """
        if not self._lora.enabled:
            raise AdapterError("adapters are disabled here; unload outside of disable_adapter()")
        state = self._lora
        copies = state.copies
        if state.merged:
            self.unmerge_adapter()
        self._restore_biases(list(state.adapters))
        for name in list(state.changed_base):
            self._give_back_base(name)
        replication = state.replication
        model = self._remove_all(copies)
        if replication is not None:
            replication.undo(model)
        return model

    def _remove_all(self, copies: Sequence[SavedModule]) -> nn.Module:
        state = self._lora
        trained = {saved.module: self.get_submodule(saved.path) for saved in copies}
        self.leave_slots()
        state.active = ()
        self._render(())
        for name in list(state.adapters):
            detach(self, state.adapters.pop(name))
        put_in_place(self, trained)
        for path, parameter in self.named_parameters():
            parameter.requires_grad_(path in state.trained_before)
        hooks = self._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _renew_after_loading]:
            del hooks[key]
        return self._strip()

    def _restore_biases(self, names: Iterable[str]) -> None:
        """Undo what adapters trained of the base's biases."""
        state = self._lora
        paths = [path for name in names for path in state.adapters[name].biases]
        set_biases(self, {path: state.biases.pop(path) for path in paths})

    def _fold(self, names: Sequence[str], replaced: dict[str, Tensor]) -> None:
        specs = tuple(spec for name in names for spec in self._lora.adapters[name].branches)
        MergeBranches(specs, replaced).run(Region(self._sites_graph(), (Instance("", self),)))
        self._renew_weight_norms()

    def _swap(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put weights in place by path, and return what was there."""
        with torch.no_grad():
            parameters = {path: cast(nn.Parameter, parameter_at(self, path)) for path in weights}
            before = {path: parameter.detach().clone() for path, parameter in parameters.items()}
            for path, value in weights.items():
                parameters[path].copy_(value)
        if weights:
            self._renew_weight_norms()
        return before

    def _renew_weight_norms(self) -> None:
        """Make the norms of base weights anew, after these have changed."""
        for spec in [spec for spec in self._specs() if spec.variant]:
            for container, leaf in variant_leaves(spec, base_weight(self, spec.site)[1]).items():
                if isinstance(leaf, WeightNorm):
                    place = cast(WeightNorm, self.get_submodule(f"{spec.owner}.{container}.{spec.adapter}"))
                    if (place.squared.device, place.squared.dtype) == (leaf.squared.device, leaf.squared.dtype):
                        place.squared.copy_(leaf.squared)  # in place: compiled graphs keep the buffer
                    else:
                        place.squared = leaf.squared
        self.refresh_slots()

    # ---- files ----

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        convert_to_plain: bool = False,
        path_initial_model_for_weight_conversion: str | Path | None = None,
    ) -> None:
        """Write the adapters, and only them, as peft does: "default" into the directory, others below it.

        Args:
            save_directory: created if need be; an adapter's files in it are replaced as one.
            safe_serialization: must be True; pickled weights are not written.
            selected_adapters: names; all adapters if None.
            state_dict: where to take the tensors from, such as one that was gathered from several processes.
            is_main_process: False writes nothing.
            convert_to_plain: write adapters whose initialisation changed the base (PiSSA, OLoRA) as plain LoRA of twice
                the rank, which needs the original base only.
            path_initial_model_for_weight_conversion: the same, with the initial factors from an adapter that was saved
                before training, as in peft.

        Raises:
            AdapterError: for an unknown name.
            CheckpointError: when the directory cannot be written.
        """
        from fxlora.checkpoint.adapter import initial_factors, save_adapters

        names = list(self._lora.adapters) if selected_adapters is None else list(selected_adapters)
        self._check_known(names)
        if not safe_serialization:
            raise NotImplementedError("adapters are written as safetensors only; leave safe_serialization at True")
        initial: dict[str, Factors] = {}
        if convert_to_plain or path_initial_model_for_weight_conversion is not None:
            where = path_initial_model_for_weight_conversion
            plans = [self._lora.adapters[name] for name in names]
            changing = [plan for plan in plans if plan.adapter in self._lora.changed_base or where is not None]
            path = None if where is None else Path(where)
            initial = {plan.adapter: initial_factors(self, plan, path) for plan in changing or plans}
        if is_main_process:
            save_adapters(self, Path(save_directory), names, state_dict, initial)

    # ---- helpers ----

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        result = super()._apply(fn, recurse)
        if "_lora" in self.__dict__:
            self._renew_weight_norms()
        return result

    def _check_known(self, names: Sequence[str]) -> None:
        known = self._lora.adapters
        for name in names:
            if name not in known:
                raise AdapterError(
                    f"no adapter is called '{name}'; there is {', '.join(known) or 'none'}.{did_you_mean(name, known)}"
                )

    def _check_layers(self, config: LoraConfig) -> None:
        """A later adapter has the layers that the first one made."""
        others = [plan.config.layer_replication for plan in self._lora.adapters.values()]
        wanted = config.layer_replication
        if wanted and [list(pair) for pair in wanted] not in [[list(p) for p in other or ()] for other in others]:
            raise AdapterError(
                "`layer_replication` rebuilds the model, which only the first adapter can; start from the base model"
            )

    def _specs(self) -> tuple[BranchSpec, ...]:
        return tuple(spec for plan in self._lora.adapters.values() for spec in plan.branches)

    def _verifier(self, region: Region, active: tuple[str, ...], mode: Mode) -> Verify:
        slots = self._lora.slots
        shown = slots.specs if mode == "slots" and slots is not None else None
        return Verify(self._specs(), active, mode=mode, shown=shown)

    def _branches_of(self, active: tuple[str, ...], mode: Mode) -> list[BranchSpec]:
        """The branches in the graphs while these adapters are shown in this form, adapter by adapter."""
        slots = self._lora.slots
        specs = slots.specs if mode == "slots" and slots is not None else self._specs()
        return [spec for name in active for spec in specs if spec.adapter == name]

    def _shown(self) -> tuple[str, ...]:
        """The adapters whose branches are in the graphs now."""
        state = self._lora
        return state.rendered if state.mode == "plain" else tuple(state.adapters)

    def _render(self, active: tuple[str, ...]) -> None:
        """Make these adapters the ones that act, all or nothing: by other graphs, or by a switch among slots."""
        state = self._lora
        if state.transient.open:
            raise AdapterError("which adapters act cannot change inside adapter_rows(); leave it first")
        if state.slots is not None:
            assert state.switch is not None
            state.switch.open(dict.fromkeys(active, 1.0))
            return
        state.transient.renderings.clear()
        self._show(active, "plain")
        if state.switch is not None:
            unregister(self)
            state.switch = None

    def _show(self, active: tuple[str, ...], mode: Mode) -> None:
        before, self._lora.mode = self._lora.mode, mode
        try:
            self._rewrite(active, mode)
        except BaseException:
            self._lora.mode = before
            raise


def watch_loading(model: LoraModel) -> None:
    """From now on make anew what was computed from the base's weights when these are loaded, also as part of a whole."""
    model.register_load_state_dict_post_hook(_renew_after_loading)


def _renew_after_loading(model: LoraModel, incompatible_keys: object) -> None:
    del incompatible_keys
    model._renew_weight_norms()


def check_adapter_name(name: object, taken: Mapping[str, object]) -> None:
    """Refuse a name that cannot be part of a parameter's path, or that is taken.

    Raises:
        AdapterError: with the reason.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError(f"an adapter's name must be a string that is not empty, not {name!r}")
    if "/" in name or "\\" in name:
        raise AdapterError(f"an adapter's name cannot contain a slash, since it is the name of a folder: '{name}'")
    if "." in name:
        raise AdapterError(f"an adapter's name cannot contain a dot, since it is part of parameter paths: '{name}'")
    if hasattr(nn.ModuleDict, name) or name == "training":
        raise AdapterError(f"'{name}' cannot be an adapter's name: torch.nn.ModuleDict has an attribute of that name")
    if name == BASE:
        raise AdapterError(f"'{BASE}' cannot be an adapter's name: adapter_names has it for rows without an adapter")
    if name in taken:
        raise AdapterError(f"Adapter with name '{name}' already exists; delete_adapter removes it")


def check_rows(plans: Iterable[Plan]) -> None:
    """Refuse adapters that cannot be used together: one replaces rows of a weight that another one changes too.

    Raises:
        AdapterError: naming the layer and both adapters.
    """
    specs = [spec for plan in plans for spec in plan.branches]
    for spec in [spec for spec in specs if not has_factors(spec)]:
        for other in specs:
            if other.site != spec.site or other.adapter == spec.adapter:
                continue
            common = set(token_ids(spec.options)).intersection(() if has_factors(other) else token_ids(other.options))
            if has_factors(other) or common:
                what = "has LoRA" if has_factors(other) else f"has token {min(common)} too"
                raise AdapterError(
                    f"'{spec.site}': adapter '{spec.adapter}' trains rows of this weight, and '{other.adapter}' {what} "
                    "there; use one of them at a time"
                )


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
                    _container(owner, container)[spec.adapter] = factor
                elif not leaf:
                    _container(owner, container)[spec.adapter] = Factor(parts[part], parts.get(f"{container}.bias"))
            leaves: dict[str, nn.Module] = {}
            if has_factors(spec):
                leaves[SCALING] = Scaling(spec.scaling, weight.device)
            if spec.dropout:
                leaves[DROPOUT] = nn.Dropout(spec.dropout)
            for container, module in {**leaves, **variant_leaves(spec, weight)}.items():
                _container(owner, container)[spec.adapter] = module.train(owner.training)
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
        own = containers() - {SWITCH, ROW_DROPOUT, SLOTS}  # these belong to a form of the graphs
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


def _container(owner: nn.Module, name: str) -> nn.ModuleDict:
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
    from torch import fx

    FreezeBase(trainable).run(Region(fx.Graph(), (Instance("", model),)))
