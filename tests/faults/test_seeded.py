"""Each seeded fault is found by its tool at the right place, and no tool says anything of a healthy set-up.

`python -m benchmarks.seeded_faults` writes the same as docs/faults.md.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.faults.seeded.set_ups import Case
from tests.faults.seeded.tools import FAULTS, TOOLS, Fault, seed

for module in ("of_training", "of_values", "of_graphs"):
    importlib.import_module(f"tests.faults.seeded.{module}")

HERE = [("llama", "modules"), ("t5", "modules"), ("vit", "export"), ("plain", "symbolic")]
"""Each architecture and each capture once; the table has all of both."""
SEEDED = [(fault, host, capture) for fault in FAULTS for host, capture in fault.set_ups if (host, capture) in HERE]


@pytest.mark.parametrize(
    ("fault", "host", "capture"),
    SEEDED,
    ids=[f"{fault.put.__name__}-{fault.tool}-{host}-{capture}" for fault, host, capture in SEEDED],
)
def test_a_fault_is_found_where_it_is(fault: Fault, host: str, capture: str) -> None:
    outcome = seed(fault, host, capture)
    assert outcome.found is not None, f"{fault.tool} does not find it"
    assert outcome.right_place, f"{fault.tool} names {outcome.found.places}, not {outcome.places}"
    assert not outcome.others, f"{fault.tool} also says {outcome.others}"


@pytest.mark.parametrize(("host", "capture"), HERE)
@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_said_of_the_set_up_before(tool: str, host: str, capture: str, tmp_path: Path) -> None:
    case = Case.of(host, capture)
    case.directory = tmp_path
    case.model.save_pretrained(tmp_path)
    case.attempt = lambda: case.reference.load_adapter(tmp_path, "other")
    if tool != "bisect_passes" or capture == "symbolic":  # the others have no trace of passes
        assert TOOLS[tool](case) == []


def test_the_table_is_wide_enough() -> None:
    assert len({fault.what for fault in FAULTS}) >= 40
    assert {fault.tool for fault in FAULTS} == TOOLS.keys()
