"""`merge_checkpoint(strict=False)`: what the base has nothing for is left out with a warning; what is broken is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fxlora import CheckpointError, merge_checkpoint
from tests.checkpoint.test_adapter import A1, PREFIX, filled, renamed
from tests.checkpoint.test_lenient_reading import B1, Edit, configure, edit, warnings
from tests.checkpoint.test_merged import WEIGHTS, refused, save_adapter, save_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", target_modules=["fc1", "fc2"])


def changed(base: Path, out: Path) -> set[str]:
    before, after = load_file(base / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


UNKNOWN: dict[str, tuple[Edit, set[str], list[str]]] = {
    "another layer": (
        lambda t: t.update({f"{PREFIX}fc9.lora_A.weight": torch.ones(2, 8), f"{PREFIX}fc9.lora_B.weight": torch.ones(8, 2)}),
        {"fc1.weight", "fc2.weight"}, ["fc9.lora_A.weight", "fc9.lora_B.weight"],
    ),
    "a renamed layer": (
        lambda t: [renamed(key, key.replace("fc1", "dense"))(t) for key in (A1, B1)],
        {"fc2.weight"}, ["dense.lora_A.weight", "dense.lora_B.weight"],
    ),
    "another part": (
        lambda t: t.update({f"{PREFIX}fc1.lora_magnitude_vector": torch.ones(16)}),
        {"fc1.weight", "fc2.weight"}, ["fc1.lora_magnitude_vector"],
    ),
    "no factor": (
        lambda t: t.update({f"{PREFIX}fc1.lora_C.weight": torch.ones(2)}), {"fc1.weight", "fc2.weight"}, ["fc1.lora_C.weight"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_base_has_nothing_for(
    name: str, base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, expected, keys = UNKNOWN[name]
    merge_checkpoint(base, adapter, tmp_path / "whole")
    edit(adapter, change)
    refused(tmp_path, CheckpointError, "strict=False", lambda: merge_checkpoint(base, adapter, tmp_path / "out"))
    caplog.clear()
    merge_checkpoint(base, adapter, tmp_path / "out", strict=False)
    (warning,) = [text for text in warnings(caplog) if "not used" in text]
    assert all(f"'{PREFIX}{key}'" in warning for key in keys) and str(adapter) in warning
    assert changed(base, tmp_path / "out") == expected
    whole, out = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(whole[weight], out[weight]) for weight in expected)


def test_a_file_that_fits_is_merged_as_ever(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge_checkpoint(base, adapter, tmp_path / "strict")
    caplog.set_level(logging.WARNING)
    merge_checkpoint(base, adapter, tmp_path / "lenient", strict=False)
    assert not [text for text in warnings(caplog) if "not used" in text]
    first, second = (tmp_path / name / WEIGHTS for name in ("strict", "lenient"))
    assert first.read_bytes() == second.read_bytes()


BROKEN: dict[str, tuple[Edit, str]] = {
    "one factor": (lambda t: t.pop(B1), "no lora_B"),
    "one factor of another layer": (
        lambda t: t.update({f"{PREFIX}fc9.lora_A.weight": torch.ones(2, 8)}), "'fc9' has no lora_B"
    ),
    "another rank": (lambda t: t.update({A1: torch.ones(3, 8)}), r"\(3, 8\)"),
    "NaN": (filled(torch.nan), "NaN"),
    "NaN in what is left out": (
        lambda t: t.update({f"{PREFIX}fc9.lora_A.weight": torch.full((2, 8), torch.nan)}), "NaN"
    ),
    "base weight": (lambda t: t.update({f"{PREFIX}fc1.weight": torch.ones(16, 8)}), "of the base model"),
    "another model": (
        lambda t: [renamed(key, key.replace("fc", "dense"))(t) for key in list(t)], "none of its tensors is for this base"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_in_any_case(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    change, words = BROKEN[name]
    edit(adapter, change)
    refused(tmp_path, CheckpointError, words, lambda: merge_checkpoint(base, adapter, tmp_path / "out", strict=False))


def test_magnitudes_are_left_out_and_not_half_used(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", use_dora=True)
    configure(adapter, use_dora=False)
    merge_checkpoint(base, adapter, tmp_path / "out", strict=False)
    edit(adapter, lambda t: t.pop(f"{PREFIX}fc1.lora_magnitude_vector"))
    merge_checkpoint(base, adapter, tmp_path / "plain")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()
