"""The leaf modules: the scale keeps its value through conversions, and nothing of it is saved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from passes.leaves import Factor, Scaling

THIRD = 1 / 3
EXACT = torch.tensor(THIRD, dtype=torch.float32)


def test_factor_is_no_linear_layer() -> None:
    factor = Factor(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert not isinstance(factor, nn.Linear)
    assert list(factor.state_dict()) == ["weight"]
    assert factor.weight.requires_grad
    assert repr(factor) == "Factor((2, 3), torch.bfloat16)"


def test_scaling() -> None:
    scaling = Scaling(THIRD)
    assert scaling.value == THIRD
    assert torch.equal(scaling(), EXACT) and scaling().shape == ()
    assert not scaling.state_dict() and not list(scaling.parameters())
    assert repr(scaling) == "Scaling(0.333333)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_keeps_the_scale_in_float32_or_wider(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "scale": Scaling(THIRD)}).to(dtype)
    assert model["fc"].weight.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(model["scale"](), torch.tensor(THIRD, dtype=wide))


def test_there_and_back_again() -> None:
    scaling = Scaling(THIRD).half().bfloat16().float()
    assert torch.equal(scaling(), EXACT)


def test_from_the_meta_device() -> None:
    scaling = Scaling(THIRD, torch.device("meta"))
    assert scaling().item() == torch.tensor(1 / 3).item()  # real: no state dict will bring it
    assert torch.equal(scaling.to_empty(device="cpu")(), EXACT)
    assert scaling.to("meta")().is_meta
    assert torch.equal(scaling.to_empty(device="cpu")(), EXACT)


def test_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        scaling = Scaling(THIRD, torch.device("cpu"))
    assert torch.equal(scaling(), EXACT)


def test_change_is_in_place() -> None:
    scaling = Scaling(1.0)
    buffer = scaling.scale
    scaling.value = THIRD
    assert scaling.value == THIRD
    assert scaling.scale is buffer and torch.equal(buffer, EXACT)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_keep_the_value(duplicate: Callable[[Scaling], Scaling]) -> None:
    scaling = Scaling(1.0)
    copied = duplicate(scaling)
    copied.value = THIRD
    assert torch.equal(copied.bfloat16()(), EXACT)
    assert scaling.value == 1.0 and scaling().item() == 1.0
