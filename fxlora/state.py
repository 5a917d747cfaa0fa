"""`LoraState`: everything a transformed model knows of its adapters, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fxlora._passes import BranchDtype, Mode, SavedModule, Stage, Switch, Tied
from fxlora.factors import Factors
from fxlora.host.replication import Replication
from fxlora.host.saved_modules import running_copies
from fxlora.plan import Plan
from fxlora.serving import SlotPlan, Transient


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
        tied: what that merge did with weights that other layers have too.
        changed_base: what the initialisation of an adapter did to the base, by adapter, in the order of the adapters.
        biases: what the biases that an adapter trains were before it, by path.
        replication: how to undo `layer_replication`.
        stages: what the last pipeline run did.
        traced: whether pipelines keep copies of the graphs.
        mode: the form of the branches in the graphs.
        optimized: whether the code that runs has operators in place of branches, where it can.
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
    tied: Tied = "refuse"
    changed_base: dict[str, ChangedBase] = field(default_factory=lambda: dict[str, ChangedBase]())
    biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    replication: Replication | None = None
    stages: list[Stage] = field(default_factory=list[Stage])
    traced: bool = False
    mode: Mode = "plain"
    optimized: bool = False
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
