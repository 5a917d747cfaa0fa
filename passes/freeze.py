"""`freeze-base`: only the parameters that are named keep requiring gradients."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from passes.base import PassResult, Region


@dataclass(frozen=True)
class FreezeBase:
    """Set `requires_grad` of every parameter of the region's instances.

    Attributes:
        trainable: qualified names of the parameters to train; all others are frozen.
    """

    name: ClassVar[str] = "freeze-base"
    trainable: Set[str]

    def run(self, region: Region) -> PassResult:
        """Freeze and unfreeze; the graph is not looked at."""
        changed = 0
        for instance in region.instances:
            for path, parameter in instance.module.named_parameters():
                changed += _set(parameter, instance.qualify(path) in self.trainable)
        return PassResult(bool(changed), f"{changed} parameters switched")


def _set(parameter: nn.Parameter, trainable: bool) -> bool:
    if parameter.requires_grad == trainable:
        return False
    parameter.requires_grad_(trainable)
    return True
