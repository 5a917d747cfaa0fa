"""`freeze-base`: only the parameters that are named keep requiring gradients."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from passes.base import Instance, PassResult, Region


@dataclass(frozen=True)
class FreezeBase:
    """Set `requires_grad` of every parameter of the region's instances.

    Attributes:
        trainable: qualified names of the parameters to train; all others are frozen. A tied parameter may be named
            by any of its names.
    """

    name: ClassVar[str] = "freeze-base"
    trainable: AbstractSet[str]

    def run(self, region: Region) -> PassResult:
        """Freeze and unfreeze; the graph is not looked at."""
        changed = 0
        for instance in region.instances:
            for parameter, names in parameter_names(instance).items():
                changed += _set(parameter, not names.isdisjoint(self.trainable))
        return PassResult(bool(changed), f"{changed} parameters switched")


def parameter_names(instance: Instance) -> dict[nn.Parameter, set[str]]:
    """Every parameter of an instance with all its qualified names: a tied one has several."""
    names: dict[nn.Parameter, set[str]] = {}
    for path, parameter in instance.module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(instance.qualify(path))
    return names


def _set(parameter: nn.Parameter, trainable: bool) -> bool:
    if parameter.requires_grad == trainable:
        return False
    parameter.requires_grad_(trainable)
    return True
