"""Operations on adapters, and batches whose rows have adapters of their own, measured beside peft or float64.

For the tests of test_adapters.py and for `benchmarks.adapters`, which hold the same cases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxlora import FxloraError
from tests.models.checks import error
from tests.oracle.operations import ADAPTERS, LLAMA, OTHERS, WORDS, Operation, Seen
from tests.oracle.parity import DIFFERS, line, quietly
from tests.oracle.sides import Setup, Side

FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
    NotImplementedError,
    IndexError,
    AssertionError,
)
"""What peft raises where it cannot do something."""


@dataclass
class Shown:
    """One operation under one capture.

    Attributes:
        refused: our reason why this capture cannot.
        oracle: `peft`, or `float64` where peft cannot.
        peft_says: why it cannot.
        error: the largest error of all tensors that were compared; None if there are none.
        differing: names of what is not equal, or has other shapes.
    """

    operation: str
    group: str
    capture: str
    refused: str = ""
    oracle: str = ""
    peft_says: str = ""
    error: float | None = None
    differing: list[str] = field(default_factory=list[str])


class Workshop:
    """Everything that is made once for all operations: files, transformed models, and what peft does.

    Args:
        folder: for the adapters' files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._setups: dict[str, Setup] = {}
        self._theirs: dict[Operation, tuple[Seen, str]] = {}

    def setup(self, operation: Operation) -> Setup:
        """The model and the adapters of an operation."""
        name = operation.case.name
        if name not in self._setups:
            case = {WORDS.name: WORDS, LLAMA.name: LLAMA}[name]
            others = OTHERS if case is WORDS else None
            self._setups[name] = Setup(self._folder / name, case, ADAPTERS[name], others)
        return self._setups[name]

    def theirs(self, operation: Operation) -> tuple[Seen, str]:
        """What peft gives, and what it says where it gives nothing."""
        if operation not in self._theirs:
            try:
                found = quietly(_act)(operation, self.setup(operation).theirs()), ""
            except FAILURES as failure:
                found = {}, line(failure)
            self._theirs[operation] = found
        return self._theirs[operation]

    def expected(self, operation: Operation) -> tuple[Seen, str]:
        """What is right, and what peft says or does wrong if it is not peft's."""
        theirs, says = self.theirs(operation)
        if operation.reference is None:
            return theirs, says
        right = operation.reference(self.setup(operation).exact)
        if not says:
            off, differing = compared(theirs, right)
            wrong = off is not None and off > DIFFERS
            says = f"outputs differ from W + s·BA by {off:.0e}" if wrong else f"{differing} differ" if differing else ""
        return right, says

    def measure(self, operation: Operation, capture: Any) -> Shown:
        """An operation under a capture, beside peft or the float64 reference."""
        shown = Shown(operation.name, operation.group, capture)
        expected, shown.peft_says = self.expected(operation)
        shown.oracle = "float64" if shown.peft_says else "peft"
        try:
            found = _act(operation, self.setup(operation).ours(capture))
        except (FxloraError, NotImplementedError, AttributeError) as refusal:
            if capture in operation.captures:
                raise
            shown.refused = line(refusal)
            return shown
        shown.error, shown.differing = compared(found, expected)
        return shown

    def check(self, operation: Operation, capture: Any) -> Shown:
        """Measure, and hold it against what the operation promises."""
        shown = self.measure(operation, capture)
        assert bool(shown.refused) == (capture not in operation.captures), shown
        if operation.peft_says:
            assert re.search(operation.peft_says, shown.peft_says), shown
        else:
            assert not shown.peft_says, shown
        if not shown.refused:
            assert not shown.differing, shown
            assert shown.error is None or shown.error <= operation.tolerance, shown
        return shown


def _act(operation: Operation, side: Side) -> Seen:
    torch.manual_seed(9)
    return operation.act(side)


def compared(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float | None, list[str]]:
    """The largest error of tensors, by name or in lists, and the names of all that differs otherwise."""
    errors: list[float] = []
    differing = sorted(set(found) ^ set(expected))
    for name in found.keys() & expected.keys():
        ours, theirs = (_tensors(value) for value in (found[name], expected[name]))
        if ours is None or theirs is None:
            differing += [] if found[name] == expected[name] else [name]
        elif {key: value.shape for key, value in ours.items()} != {key: value.shape for key, value in theirs.items()}:
            differing.append(name)
        else:
            pairs = [(ours[key].double(), theirs[key].detach().double()) for key in theirs]
            errors.append(error([a for a, _ in pairs], [b for _, b in pairs]))
    return max(errors, default=None), differing


def _tensors(value: Any) -> dict[Any, Tensor] | None:
    """Tensors by key or place; None if something else is compared."""
    items = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else None
    return items if items and all(isinstance(each, Tensor) for each in items.values()) else None
