"""Models with heads, and helpers that give our model and peft's the same trained values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

PREFIX = "base_model.model."
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Two layers, a head that is a sequence with running statistics, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 6, bias=False)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU())
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.fc2(self.norm(self.fc1(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def peft_model(model: nn.Module, **config: Any) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**config))


def peft_from(model: nn.Module, directory: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, directory).eval()


def train(model: nn.Module) -> set[str]:
    """Move every trainable parameter by values that depend on its name only; the names."""
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        name = name.removeprefix(PREFIX).replace(".base_layer", "")
        if parameter.requires_grad:
            names.add(name)
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return names


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(*args, **kwargs)
    output = output if isinstance(output, Tensor) else output[0]
    output.double().pow(2).sum().backward()
    return {
        name.removeprefix(PREFIX).replace(".base_layer", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
