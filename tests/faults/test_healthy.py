"""No tool says that something is wrong with a healthy set-up, and set-ups of one model agree under all captures."""

from __future__ import annotations

import itertools

import pytest

from fxlora import compare
from tests.faults.seeded.healthy import SET_UPS, examine
from tests.faults.seeded.set_ups import HOSTS, Case

PAIRS = list(itertools.permutations(("modules", "symbolic", "export"), 2))


@pytest.mark.parametrize(("name", "capture", "use"), SET_UPS, ids=None)
def test_no_false_alarm(name: str, capture: str, use: str) -> None:
    assert examine(name, capture, use).alarms == ()


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=None)
def test_captures_of_one_model_agree(one: str, other: str) -> None:
    models = [Case.of("plain", capture).model for capture in (one, other)]
    found = compare(*models, HOSTS["plain"].batch(), backward=True)
    assert found.agrees and found.compared > 5 and found.gradients > 30, found
