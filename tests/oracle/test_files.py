"""Our files in peft and peft's here, for every case of the parity table: tensors and configuration, bit for bit.

Also where peft then computes something else than the definition says: files are its format, and it must read ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fxlora import CheckpointError
from tests.oracle import parity
from tests.oracle.cases import CASES, Case

CONFIG = "adapter_config.json"
NOT_HERE = {
    "activated LoRA (aLoRA)", "block-diagonal (BD-LoRA)", "KaSA", "VeLoRA", "MonteCLoRA", "'eva'", "'corda'", "'loftq'",
    "'lora_ga'",
}  # fmt: skip
"""Cases of fields that are refused, with a message, until they are there."""

NOT_IN_PEFT = {
    "nn.ConvTranspose1d", "nn.ConvTranspose2d, groups", "nn.Bilinear", "nn.MultiheadAttention, kdim and vdim",
    "nn.RNNCell", "nn.GRUCell", "nn.LSTMCell", "nn.LSTM", "nn.LSTM, projections", "nn.GRU",
}  # fmt: skip
"""Layers for which peft has no adapter."""

PEFT_ALONE = {"DoRA, nn.Conv2d, groups"}
"""What peft's factors cannot be here: see `fxlora.checkpoint.grouped`."""

BOTH = [case for case in CASES if case.name not in NOT_HERE | NOT_IN_PEFT]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def test_no_case_is_left_out() -> None:
    assert len(CASES) == len(BOTH) + len(NOT_HERE) + len(NOT_IN_PEFT)
    assert {case.name for case in CASES} >= PEFT_ALONE


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_our_file_in_peft(case: Case, tmp_path: Path) -> None:
    model = parity.ours(case, case.captures[-1])
    parity.shift_in_place(model)
    model.save_pretrained(tmp_path / "ours")
    theirs = parity.peft_reading(case, tmp_path / "ours")
    parity.quietly(theirs.save_pretrained)(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_their_file_here(case: Case, tmp_path: Path) -> None:
    initial = parity.peft_side(case).initial
    parity.quietly(parity.trained_peft(case, initial).save_pretrained)(tmp_path / "theirs")
    if case.name in PEFT_ALONE:
        with pytest.raises(CheckpointError, match="mixes the groups"):
            parity.our_reading(case, tmp_path / "theirs", case.captures[-1])
        return
    model = parity.our_reading(case, tmp_path / "theirs", case.captures[-1])
    model.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


def assert_same_files(ours: Path, theirs: Path) -> None:
    a, b = (load_file(directory / parity.WEIGHTS) for directory in (ours, theirs))
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype and torch.equal(tensor, b[key]), key
    assert fields(ours) == fields(theirs)


def fields(directory: Path) -> dict[str, Any]:
    """A configuration, without the order of names, which means nothing.

    Where weights are tied, also without the names: peft replaces and adds some when it loads its own files too.
    """
    values = json.loads((directory / CONFIG).read_text())
    if values["ensure_weight_tying"]:
        values |= {"target_modules": None, "modules_to_save": None}
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        if isinstance(values[name], list):
            values[name] = sorted(values[name])
    return values
