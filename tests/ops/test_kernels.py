"""Triton's kernels against float64: small cases by its interpreter, where triton is installed, and all on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxlora
from fxlora.ops import choice
from tests.ops.cases import (
    GPU_DORA,
    GPU_DORA_SWIGLU,
    GPU_LINEAR,
    GPU_SWIGLU,
    KERNEL_DORA,
    KERNEL_DORA_SWIGLU,
    KERNEL_LINEAR,
    KERNEL_SWIGLU,
)
from tests.ops.references import Case, runs_kernels, sibling_errors, swiglu_errors, worst

ROOT = Path(fxlora.__file__).parents[1]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which the kernels are tested themselves")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "tests.ops.interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_numbers_by_the_interpreter(interpreted: dict[str, Any]) -> None:
    errors = interpreted["errors"]
    assert len(errors) == sum(map(len, (KERNEL_LINEAR, KERNEL_DORA, KERNEL_SWIGLU, KERNEL_DORA_SWIGLU)))
    assert interpreted["by kernels"] >= len(errors) - 5  # the empty batches are not
    assert {case: error for case, error in errors.items() if error} == {}


def test_masks_by_the_interpreter(interpreted: dict[str, Any]) -> None:
    masks = interpreted["masks"]
    assert masks.pop("itself") == 1
    assert 0.95 < masks.pop("spectrum") < 1.03
    kept = [masks.pop(f"kept by sibling {index}") for index in range(3)]
    deviation = 0.5 / (257 * 302) ** 0.5
    assert all(abs(share - 0.5) < 4 * deviation for share in masks.values()), masks
    assert all(abs(share - 0.9) < 4 * 0.6 * deviation for share in kept), kept


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*GPU_LINEAR, *GPU_DORA], ids=str)
def test_linear_on_a_gpu(case: Case, poisoned_memory: None) -> None:
    assert worst(case, sibling_errors(case)) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*GPU_SWIGLU, *GPU_DORA_SWIGLU], ids=str)
def test_swiglu_on_a_gpu(case: Case, poisoned_memory: None) -> None:
    assert worst(case, swiglu_errors(case)) == ""


@pytest.mark.gpu
def test_large_cases_on_a_gpu_run_kernels() -> None:
    large = [
        case for case in (*GPU_LINEAR, *GPU_DORA) if case.lead == (4097,) and max(case.ranks) <= choice.LARGEST_RANK
    ]
    assert large
    assert all(runs_kernels(case) for case in large)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [(4, 4), (4, 4, 4)])
def test_x_at_an_odd_address(ranks: tuple[int, ...]) -> None:
    """Kernels with dropout read pairs of 16-bit numbers."""
    common = dict(lead=(1100,), columns=128, outputs=(64, 32), dtype=torch.bfloat16, p=0.1, layout="odd", device="cuda")
    case = Case(**common, ranks=ranks)
    assert worst(case, sibling_errors(case) if len(ranks) == 2 else swiglu_errors(case)) == ""


def test_what_is_chosen() -> None:
    """Without a GPU and the interpreter, ATen."""
    if choice.has_kernels(torch.device("cpu")):
        pytest.skip("the interpreter is on")
    assert not runs_kernels(Case(lead=(4096,), columns=64, outputs=(64,), ranks=(16,), dtype=torch.bfloat16))
