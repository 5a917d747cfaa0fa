"""`SeveralAdapters`: which adapters act, by other graphs, by rows of a batch, or by a switch among slots.

The part of `LoraModel` that chooses the form of the graphs (see `passes.branches.forms`); a capture rewrites them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

from fxlora._passes import BranchSpec, Choice, Mode, RowsError, Switch
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError
from fxlora.plan import Plan
from fxlora.serving import (
    BASE,
    SlotPlan,
    check_in_graph,
    checked_names,
    create,
    fill,
    note_inputs,
    plan_slots,
    register,
    unregister,
    with_place,
)
from fxlora.state import LoraState

if TYPE_CHECKING:
    from fxlora.model import LoraModel


class SeveralAdapters(nn.Module):
    """A model of whose adapters several can be in one graph."""

    _lora: LoraState

    # ---- what a capture implements ----

    def _rewrite(self, active: tuple[str, ...], mode: Mode) -> None:
        """Rewrite the graphs so that they hold the branches of exactly these adapters, all or nothing."""
        raise NotImplementedError

    def _register_rows(self, switch: Switch) -> None:
        """Let whatever reads the switch beside the branches find it."""

    def _check_rows(self, plan: Plan, *, uniform: bool) -> None:
        """Refuse an adapter that some rows of a batch cannot have alone."""
        check_in_graph(plan, uniform=uniform)

    def _plan(self, config: LoraConfig, adapter_name: str) -> Plan:
        """The plan of an adapter for this model."""
        raise NotImplementedError

    # ---- several adapters in one graph ----

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each row of the batch an adapter of its own: see `adapter_rows`."""
        state: LoraState | None = self.__dict__.get("_lora")
        if state is None:  # a capture runs a graph before it has adapters
            return super().__call__(*args, **kwargs)
        if adapter_names is not None:
            before = self._open_rows(adapter_names, 1)
            try:
                return self(*args, **kwargs)
            finally:
                self._close_rows(before)
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
        before = self._open_rows(adapter_names, copies)
        try:
            yield
        finally:
            self._close_rows(before)

    def _open_rows(self, adapter_names: Sequence[str], copies: int) -> Choice | None:
        """Begin a mixed batch; gives what was chosen before. None where adapters are disabled: as in peft, no row has one."""
        state = self._lora
        names = checked_names(self._lora_model, adapter_names)
        if not state.enabled:
            return None
        before = Choice() if state.switch is None else state.switch.choice
        if state.mode == "plain":
            self._enter_rows()
        assert state.switch is not None
        state.switch.choose(names, BASE, copies)
        state.transient.open += 1
        return before

    def _close_rows(self, before: Choice | None) -> None:
        state = self._lora
        if before is None or state.switch is None:
            return
        state.transient.open -= 1
        if state.transient.open:
            state.switch.choose(before.names, BASE, before.copies)
        elif state.slots is None and torch.is_grad_enabled():
            state.switch.close()  # the backward pass may run parts of the model again
        else:
            self._leave_rows()

    def _enter_rows(self) -> None:
        state = self._lora
        names = tuple(state.adapters)
        if state.switch is None:
            state.switch = register(self._lora_model, self._specs(), names, "rows")
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
        self._build_slots(plan_slots(self._lora_model, r, extra))

    def _build_slots(self, slots: SlotPlan) -> None:
        state = self._lora
        self.leave_slots()
        self._render(state.rendered)
        try:
            state.slots, state.switch = slots, register(self._lora_model, slots.specs, slots.order, "slots")
            self._register_rows(state.switch)
            create(self._lora_model, slots)
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

    def refresh_slots(self) -> None:
        """Copy all adapters into their slots again, after their parameters were changed from outside."""
        if self._lora.slots is not None:
            fill(self._lora_model, self._lora.slots, self._lora.slots.order)

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
                self._build_slots(plan_slots(self._lora_model, max(slots.r, needed), extra))

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`.

        Raises:
            AdapterError: for training in slots.
        """
        state = self.__dict__.get("_lora")
        if mode and state is not None and state.slots is not None:
            raise AdapterError("slots are copies, for inference; call leave_slots() before training")
        return super().train(mode)

    # ---- forms ----

    @property
    def _lora_model(self) -> LoraModel:
        return cast("LoraModel", self)

    def _specs(self) -> tuple[BranchSpec, ...]:
        return tuple(spec for plan in self._lora.adapters.values() for spec in plan.branches)

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


def _run_as_they_are(functions: Sequence[Any], *, with_callees: bool) -> None:
    """Make Dynamo run frames as they are; it compiles what they call, or leaves that alone too.

    It treats `nn.Module.__call__` so. Else all models and all forms of their graphs would share the few compiled versions
    that one code object may have.
    """
    frames = cast(Any, torch._C)._dynamo.eval_frame  # torch._dynamo itself takes seconds to import
    action = frames._FrameAction
    strategy = frames._FrameExecStrategy(action.SKIP, action.SKIP if with_callees else action.DEFAULT)
    for function in functions:
        frames.set_code_exec_strategy(function.__code__, strategy)


_run_as_they_are([SeveralAdapters.__call__, cast(Any, SeveralAdapters.adapter_rows).__wrapped__], with_callees=False)
_run_as_they_are(
    [SeveralAdapters._open_rows, SeveralAdapters._close_rows, SeveralAdapters._leave_rows, SeveralAdapters._render]
    + [note_inputs],
    with_callees=True,
)
