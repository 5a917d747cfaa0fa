"""What docs/adapters.md shows, case by case: operations on adapters and mixed batches, beside peft or float64."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

from fxlora import LoraModel
from tests.oracle.adapters import Workshop
from tests.oracle.cases import ALL, Case
from tests.oracle.mixed import MIXED, Batches
from tests.oracle.operations import OPERATIONS, Operation

TABLE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")

NO_OPERATIONS = {"regions", "get_submodule", "get_parameter", "train", "pass_trace", "lowered_regions"}
"""Public names of `LoraModel` that do nothing with adapters: what a capture implements, what is looked at, and torch's own."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:The tensor attributes self.layer._flat_weights",  # torch's own, about what the base does
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("operations"))


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    return Batches(tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize("capture", ALL)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_operation(operation: Operation, capture: str, workshop: Workshop) -> None:
    workshop.check(operation, capture)


LARGE = ("Mixtral", "tied", "tying", "layer_replication")
"""Models of transformers, whose export takes seconds."""

PLACES = [
    pytest.param(case, capture, id=f"{case.name}-{capture}", marks=[pytest.mark.slow] if slow else [])
    for case in MIXED
    for capture in ALL
    for slow in [capture == "export" and any(part in case.name for part in LARGE)]
]


@pytest.mark.parametrize(("case", "capture"), PLACES)
def test_mixed_batch(case: Case, capture: str, batches: Batches) -> None:
    batches.check(case, capture)


def test_every_public_method_is_shown() -> None:
    own = [cls for cls in LoraModel.__mro__ if cls not in nn.Module.__mro__]
    public = {name for cls in own for name in vars(cls) if not name.startswith("_")}
    shown = {method for operation in OPERATIONS for method in operation.methods}
    assert shown <= public
    assert public - shown == NO_OPERATIONS


def test_the_table_has_every_case_and_nothing_wrong() -> None:
    names = re.findall(r"^\| (.+?) \| ", TABLE, re.MULTILINE)
    expected = [f"`{operation.name}`" for operation in OPERATIONS] + [case.name.replace("|", "/") for case in MIXED]
    assert [name for name in names if name not in ("operation", "case", "---")] == expected
    assert not re.search(r"\| NO", TABLE)
