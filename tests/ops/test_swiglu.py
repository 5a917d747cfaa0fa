"""`lora_swiglu` by ATen against float64, with all fresh memory poisoned."""

from __future__ import annotations

import pytest

from tests.ops.cases import SWIGLU
from tests.ops.references import Case, swiglu_errors, worst


@pytest.mark.parametrize("case", SWIGLU, ids=str)
def test_numbers(case: Case, poisoned_memory: None) -> None:
    assert worst(case, swiglu_errors(case)) == ""
