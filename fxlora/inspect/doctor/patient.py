"""What the checks look at: the transformed model in what was given, its parameters by name, and the optimizer.

Nothing here changes a model, and nothing fails on a broken one: what is missing is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxlora._passes import KINDS, BranchSpec, base_weight, has_factors, part_path, part_shapes
from fxlora.model import LoraModel
from fxlora.registered import trainable_names


@dataclass(frozen=True, slots=True)
class Patient:
    """A model with adapters, and what trains it.

    Attributes:
        whole: what was given: the model, or a wrapper around it.
        lora: the transformed model.
        optimizer: what trains it, if that is known.
        trained: names of all that the adapters train, in `lora`.
    """

    whole: nn.Module
    lora: LoraModel
    optimizer: torch.optim.Optimizer | None
    trained: frozenset[str]

    @classmethod
    def of(cls, whole: nn.Module, lora: LoraModel, optimizer: torch.optim.Optimizer | None) -> Patient:
        """The patient, with its names."""
        return cls(whole, lora, optimizer, frozenset(trainable_names(lora._lora.adapters.values())))

    @property
    def acting(self) -> tuple[str, ...]:
        """The adapters whose branches are in the graphs now."""
        return self.lora._lora.rendered

    def branches(self) -> list[BranchSpec]:
        """All branches of all adapters."""
        return [spec for plan in self.lora._lora.adapters.values() for spec in plan.branches]

    def parameter(self, name: str) -> nn.Parameter | None:
        """The parameter of that name, if it is there."""
        try:
            return self.lora.get_parameter(name)
        except AttributeError:
            return None

    def parts(self, spec: BranchSpec) -> dict[str, nn.Parameter]:
        """The parameters of a branch that are there, by their names in the model."""
        names = [f"{spec.owner}.{part_path(part, spec.adapter)}" for part in part_shapes(spec)]
        found = {name: self.parameter(name) for name in names}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def factors(self, spec: BranchSpec) -> tuple[nn.Parameter, nn.Parameter] | None:
        """A and B of a branch, if it has both and they have values."""
        if not has_factors(spec):
            return None
        A, B = (
            self.parameter(f"{spec.owner}.{part_path(part, spec.adapter)}") for part in KINDS[spec.kind].factor_names
        )
        return None if A is None or B is None or A.is_meta or B.is_meta else (A, B)

    def with_factors(self) -> Iterator[tuple[BranchSpec, nn.Parameter, nn.Parameter]]:
        """The branches that have factors of their own, with A and B."""
        for spec in self.branches():
            pair = None if spec.tied_to else self.factors(spec)
            if pair is not None:
                yield spec, *pair

    def called_weights(self) -> dict[str, nn.Parameter]:
        """The base weights of layers whose branches run where the layers are called, by site, if no graph tells more."""
        if self.lora.capture != "modules":
            return {}
        found: dict[str, nn.Parameter] = {}
        for spec in self.branches():
            if spec.form == "output" and spec.adapter in self.acting:
                with suppress(AttributeError):  # a structural check says so
                    found[spec.site] = base_weight(self.lora, spec.site)[1]
        return found

    def acting_names(self) -> frozenset[str]:
        """Names of what the adapters that act now train."""
        adapters = self.lora._lora.adapters
        return frozenset(trainable_names(adapters[name] for name in self.acting if name in adapters))

    def held(self) -> list[Tensor]:
        """The tensors that the optimizer holds."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [tensor for group in groups for tensor in group["params"]]

    def steps(self, parameter: Tensor) -> bool:
        """Whether the optimizer has a state for a parameter: it has trained it."""
        return self.optimizer is not None and bool(self.optimizer.state.get(parameter))


def is_zero(tensor: Tensor) -> bool:
    """Whether all entries are exactly zero."""
    return not tensor.is_meta and not bool(tensor.detach().any())


def bytes_of(tensor: Tensor) -> int:
    """Size of a tensor's entries."""
    return tensor.numel() * tensor.element_size()
