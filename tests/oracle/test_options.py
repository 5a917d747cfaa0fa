"""Fields of the configuration, initialisers and dtypes beside peft; what is not supported yet is skipped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from fxlora import MergeError, lora_transform
from tests.models.checks import error, same
from tests.oracle import parity
from tests.oracle.cases import ALL, FIELDS, INITIALISERS, VARIANTS, VECTOR, Case, Layer

OTHER_VARIANTS = [case for case in VARIANTS if "DoRA" not in case.name]
PLACES = [(case, capture) for case in [*OTHER_VARIANTS, *INITIALISERS, *FIELDS] for capture in ALL]
SLOW = ("target_modules: None", "task_type")
"""A whole Llama, whose export takes seconds; tests/models has it."""

PLACES = [(case, capture) for case, capture in PLACES if capture == "modules" or case.name not in SLOW]


@pytest.mark.parametrize(("case", "capture"), PLACES, ids=[f"{case.name}-{capture}" for case, capture in PLACES])
def test_option(case: Case, capture: str) -> None:
    parity.check(case, capture)


HALF = [case for case in FIELDS if "branch_dtype='adapter'" in case.name]


@pytest.mark.parametrize("capture", ALL)
@pytest.mark.parametrize("case", HALF, ids=[case.name for case in HALF])
def test_branch_dtype_adapter_has_pefts_bits(case: Case, capture: str) -> None:
    outcome = parity.measure(case, capture, files=False)
    assert (outcome.forward, outcome.training, outcome.gradients) == (0, 0, 0)


AUTOCAST = [case for case in [*OTHER_VARIANTS, *FIELDS] if case.name in ("lora_bias, nn.Conv2d", "r", "fan_in_fan_out")]


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
@pytest.mark.parametrize("case", AUTOCAST, ids=[case.name for case in AUTOCAST])
def test_autocast(case: Case, capture: Any, tmp_path: Path) -> None:
    initial = parity.peft_side(case).initial
    theirs = parity.trained_peft(case, initial)
    parity.quietly(theirs.save_pretrained)(tmp_path)
    ours = lora_transform(case.model(), tmp_path, capture=capture).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert same(parity.run(ours, case), parity.run(theirs, case))


def test_a_bias_of_a_branch_on_a_layer_without_bias() -> None:
    """Unmerged it works as in peft; no bias of the layer could take it in a merge, which both refuse."""
    case = Case(
        "lora_bias without a bias", "variant", lambda: Layer(torch.nn.Linear(8, 6, bias=False)), VECTOR,
        {"target_modules": ["layer"], "lora_bias": True}, by_weight=False,
    )  # fmt: skip
    theirs = parity.peft_side(case)
    assert theirs.failure.startswith("merge: RuntimeError")
    outcome = parity.measure(case, "modules", files=False)
    assert any("give the layer a zero bias" in note for note in outcome.notes)
    model: Any = parity.ours(case, "modules")
    with pytest.raises(MergeError, match="give the layer a zero bias"):
        model.merge_adapter()


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns(field: str, tmp_path: Path) -> None:
    """The first match in the mapping's order wins, and our file keeps that order; peft sorts it when it saves."""
    pattern = {"fc.": 2, "fc2": 7, "^fc1": 5}
    settings = {"target_modules": ["fc1", "fc2"], field: pattern}
    case = Case(field, "field", FIELDS[0].make, FIELDS[0].inputs, settings, by_weight=False)
    outcome = parity.measure(case, "modules")
    assert outcome.initial and outcome.file_bits and (outcome.forward, outcome.to_peft) == (0, 0)
    trained = parity.trained_peft(case, parity.peft_side(case).initial)
    trained.save_pretrained(tmp_path)
    if field == "rank_pattern":
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(case.model(), tmp_path)
    else:
        again = peft.PeftModel.from_pretrained(case.model(), tmp_path).eval()
        assert error(parity.run(again, case), parity.run(trained, case)) > 0.01


def test_the_adapter_of_a_deep_copy_is_its_own() -> None:
    case = FIELDS[0]
    model: Any = parity.ours(case, "modules")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    assert same(parity.run(model, case), parity.run(case.model().requires_grad_(False), case))
    assert error(parity.run(copied, case), parity.run(model, case)) > 0.01


def test_files_have_pefts_keys_and_values(tmp_path: Path) -> None:
    """For every case that both libraries can hold, one seed gives one file."""
    compared = 0
    for case in [*OTHER_VARIANTS, *INITIALISERS, *FIELDS]:
        try:
            model = parity.ours(case, "modules")
        except NotImplementedError:
            continue
        model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
        ours = load_file(tmp_path / "ours" / parity.WEIGHTS)
        theirs = parity.peft_side(case).initial
        if not case.other_factors:
            assert ours.keys() == theirs.keys(), case.name
            assert all(ours[key].dtype == theirs[key].dtype for key in ours), case.name
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), case.name
            compared += 1
    assert compared > 20
