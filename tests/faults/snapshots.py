"""Everything that a failed call must leave alone, as comparable data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Classes, names, values, flags and modes of a whole model."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        "flags": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "modes": [(name, module.training) for name, module in model.named_modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values = (before.pop("values"), after.pop("values"))
    assert after == before
    assert list(values[0]) == list(values[1])
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
