"""A small model with LoRA, and what is done to it, for the tests of `doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxlora import (
    LoraConfig,
    LoraModel,
    lora_transform,
    parameter_groups,
)

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
CAPTURES = ["modules", "symbolic", "export"]


class Net(nn.Module):
    """Three layers, with something done between the first two."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(self.between(self.first(x)))))


def lora(model: nn.Module | None = None, capture: Any = "modules", **config: Any) -> LoraModel:
    chosen: dict[str, Any] = {"r": 2, "target_modules": ["first", "second", "third"], **config}
    example = X if capture == "export" else None
    return lora_transform(model or Net(), LoraConfig(**chosen), capture=capture, example_inputs=example)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def fill(model: LoraModel) -> LoraModel:
    """Factors as after training."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model), lr=1e-2)
