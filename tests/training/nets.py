"""A small model that trains in a second, and the same adapter on it in fxlora and in peft."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxlora import LoraConfig, LoraModel, lora_transform


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.fc1 = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.fc2(self.norm(torch.relu(self.fc1(self.embed(tokens))))))


def ours(capture: Any = "modules", **config: Any) -> LoraModel:
    torch.manual_seed(0)
    net = Net()
    torch.manual_seed(1)
    return lora_transform(
        net, LoraConfig(**config), capture=capture, example_inputs=(torch.zeros(2, 3, dtype=torch.long),)
    )


def theirs(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(net, peft.LoraConfig(**config))


def train(model: nn.Module, optimizer: Optimizer, steps: int = 5, first: int = 0) -> float:
    loss = torch.zeros(())
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        tokens, classes = (torch.randint(0, n, (8, 6), generator=generator) for n in (20, 5))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), classes.flatten())
        loss.backward()
        optimizer.step()
    return loss.item()


def by_our_names(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of a peft model under the names that they have in ours."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for part in ("base_model.model.", "base_layer.", "original_module.", "token_adapter."):
            name = name.replace(part, "")
        last = name.rsplit(".", 2)[-2]
        found[f"{name}.weight" if last.startswith(("lora_embedding", "trainable_tokens")) else name] = parameter
    return found
