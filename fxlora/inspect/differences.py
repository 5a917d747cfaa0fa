"""How far the results of two runs are apart, and how far two right computations may be.

The bound is taken from the error that the first run makes against float64. Called by `compare`.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxlora._passes import base_weight, has_factors
from fxlora.inspect.counterparts import Side
from fxlora.inspect.running import Record, gradients
from fxlora.model import LoraModel

SAFETY = 16.0
"""How many times the error against float64 two right computations may be apart."""
ON_THE_WAY_BACK = 4.0
"""How many times more for gradients, in which the differences of both ways meet."""
_BLIND = 8.0
"""How many times more where float64 did not run, so that errors that add up over layers are not known."""


@dataclass(eq=False, slots=True)
class Runs:
    """Both runs, the first in float64 too, what the dtypes of both allow, and parameters with another meaning."""

    a: Record
    b: Record
    reference: Record | None
    unit: float
    unit_a: float
    why_not: str = ""
    apart: AbstractSet[str] = frozenset()

    @classmethod
    def of(cls, run: Any, a: Any, b: Any, backward: bool) -> Runs:
        """Run both, and the first in float64 if it can be.

        Args:
            run: runs a side, as it is or in float64: `run(side, wide)`.
            a: a graph with its module, or a model; what `b` should equal.
            b: another.
            backward: keep gradients too.
        """
        modules = [cast(nn.Module, side.module if isinstance(side, Side) else side) for side in (a, b)]
        reference: Record | None = None
        why_not = ""
        with torch.set_grad_enabled(backward), _requiring_gradients(modules, backward):
            records = [_with_gradients(run(side, False), backward) for side in (a, b)]
            try:
                reference = _with_gradients(run(a, True), backward)
            except Exception as error:  # noqa: BLE001 (kernels without float64, dtypes that a graph does not let go, …)
                why_not = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        units = [_unit(module, record) for module, record in zip(modules, records, strict=True)]
        apart = _redefined(modules[0]) ^ _redefined(modules[1])
        return cls(records[0], records[1], reference, max(units), units[0], why_not, apart)

    def gap(self, p: Any, q: Any) -> tuple[Gap, float]:
        """How far two results are apart, and how far they may be."""
        one, other = self.a.values.get(p, []), self.b.values.get(q, [])
        wide = self.reference.values.get(p) if self.reference is not None else None
        return Gap.of(one, other, wide), self.bound(one, wide)

    def agree(self, p: Any, q: Any) -> bool:
        """Whether two results are no further apart than they may be."""
        gap, bound = self.gap(p, q)
        return gap.error <= bound

    def bound(self, one: list[Tensor], wide: list[Tensor] | None) -> float:
        """What rounding explains: from the error of the first run against float64, and the size of the values."""
        if not any(each.is_floating_point() for each in one):
            return 0.0
        error = Gap.of(one, wide).error if wide is not None else 0.0
        error = error * self.unit / self.unit_a if error < float("inf") else 0.0
        blind = _BLIND if self.reference is None else 1.0
        return SAFETY * blind * max(error, self.unit * size(wide or one))


def _with_gradients(record: Record, wanted: bool) -> Record:
    if wanted:
        record.gradients = gradients(record)
    record.live.clear()
    return record


def _redefined(model: nn.Module) -> set[str]:
    """The base's parameters of which an adapter computes more than a sum: folded in, their gradients are others."""
    if not isinstance(model, LoraModel):
        return set()
    specs = [spec for plan in model._lora.adapters.values() for spec in plan.branches]
    found = {base_weight(model, spec.site)[0] for spec in specs if spec.variant or not has_factors(spec)}
    replaced = tuple(f"{saved.module}." for saved in model._lora.copies)
    return found | {name for name, _ in model.named_parameters() if name.startswith(replaced)}


def _unit(module: nn.Module, record: Record) -> float:
    """The coarsest precision of a model's parameters, or of its outputs if it has none."""
    tensors = [p for p in module.parameters() if p.is_floating_point()] or record.outputs
    return max((torch.finfo(each.dtype).eps for each in tensors), default=torch.finfo(torch.float32).eps)


class _requiring_gradients:
    """All floating parameters that the models have in common require gradients within this context."""

    def __init__(self, modules: list[nn.Module], wanted: bool) -> None:
        names = [{name for name, p in module.named_parameters() if p.is_floating_point()} for module in modules]
        common = names[0] & names[1] if wanted else set[str]()
        self._parameters = [p for module in modules for name, p in module.named_parameters() if name in common]
        self._before = [p.requires_grad for p in self._parameters]

    def __enter__(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def __exit__(self, *error: object) -> None:
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.requires_grad_(before)


@dataclass(frozen=True, slots=True)
class Gap:
    """The largest difference of two results, where it is, and the values there."""

    error: float
    position: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, one: list[Tensor], other: list[Tensor], wide: list[Tensor] | None = None) -> Gap:
        """The largest difference of the tensors of two results; `wide` is the float64 reference's."""
        if [each.shape for each in one] != [each.shape for each in other]:
            return cls(float("inf"))
        worst = cls(0.0)
        for index, gap in enumerate(_differences(one, other)):
            error = float(gap.max()) if gap.numel() else 0.0
            if error > worst.error:
                flat = int(gap.argmax())
                position = tuple(int(each) for each in torch.unravel_index(torch.tensor(flat), gap.shape))
                references = [wide[index]] if wide is not None and wide[index].shape == gap.shape else []
                values = [float(each.reshape(-1)[flat]) for each in (one[index], other[index], *references)]
                worst = cls(error, position, tuple(values))
        return worst


def _differences(one: list[Tensor], other: list[Tensor]) -> Iterator[Tensor]:
    for a, b in zip(one, other, strict=True):
        x, y = (each.to(torch.complex128 if each.is_complex() else torch.float64).cpu() for each in (a, b))
        gap = (x - y).abs()
        same = (x == y) | (x.isnan() & y.isnan())
        yield torch.where(same, 0.0, torch.nan_to_num(gap, nan=float("inf"), posinf=float("inf")))


def size(tensors: list[Tensor]) -> float:
    """The largest absolute value."""
    sizes = [torch.nan_to_num(each.detach().abs().double(), posinf=0.0).max() for each in tensors if each.numel()]
    return max((float(each) for each in sizes), default=0.0)
