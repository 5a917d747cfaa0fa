"""Hosts that use a layer's weight without calling the layer: a replaced module loses its LoRA there, ours does not."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxlora import LoraConfig, lora_transform
from tests.models.checks import error
from tests.zoo import ARCHITECTURES

MAMBA = next(entry for entry in ARCHITECTURES if entry.name == "mamba")
X = torch.linspace(-1, 1, 80).view(2, 5, 8)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


class Fused(nn.Module):
    """What fused kernels do: they take the weights of layers that they never call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(8, 8, 3, groups=8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), self.conv.weight, self.conv.bias, groups=8).transpose(1, 2)
        return F.linear(F.silu(y), self.out.weight, self.out.bias)


HOSTS: dict[str, tuple[type[nn.Module], list[str], list[str]]] = {
    "fast path of an encoder layer": (Encoder, ["linear1", "linear2"], ["linear1", "linear2"]),
    "output projection": (Attention, ["out_proj"], ["out_proj"]),
    "fused kernel": (Fused, ["conv", "out"], ["out"]),
}


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(X)


@pytest.mark.filterwarnings("ignore")  # peft's advice
@pytest.mark.parametrize("name", HOSTS)
def test_plain_replacement_loses_the_lora_and_ours_does_not(name: str) -> None:
    kind, targets, for_peft = HOSTS[name]
    base = output(make(kind).requires_grad_(False))  # as LoRA freezes it: torch picks kernels by requires_grad
    theirs = peft.get_peft_model(make(kind), peft.LoraConfig(r=4, target_modules=for_peft))
    randomise(theirs)
    assert torch.equal(output(theirs), base)  # the LoRA had no effect at all
    ours = lora_transform(make(kind), LoraConfig(r=4, target_modules=targets), capture="modules", example_inputs=X)
    assert torch.equal(output(ours), base)
    randomise(ours)
    live = output(ours)
    assert (live - base).abs().max() > 0.05
    with_gradients = ours(X)
    assert with_gradients.requires_grad and error([with_gradients.detach()], [live]) < 1e-5
    ours.verify()
    assert error([output(ours.merge_and_unload())], [live]) < 1e-5


def test_mamba_mixers_are_adapted_in_the_weights_that_their_kernels_read() -> None:
    model: Any = MAMBA.model()
    ours: Any = lora_transform(model, LoraConfig(r=2, target_modules=["out_proj", "conv1d", "in_proj"]))
    forms = {spec.site.rpartition(".")[2]: spec.form for spec in ours._specs()}
    assert forms == {"in_proj": "output", "conv1d": "weight", "out_proj": "weight"}
    batch = MAMBA.batch()
    with torch.no_grad():
        base = MAMBA.model().requires_grad_(False)(**batch).logits
        assert torch.equal(ours(**batch).logits, base)
        randomise(ours)
        live = ours(**batch).logits
        assert (live - base).abs().max() > 1e-3
        spec = next(spec for spec in ours._specs() if spec.form == "weight")
        read, held = ours.get_submodule(spec.site).weight, ours.get_submodule(spec.site)._parameters["weight"]
        assert not torch.equal(read, held)  # what a kernel reads has the update, what a state dict holds has not
        torch.testing.assert_close(ours.merge_and_unload()(**batch).logits, live, rtol=1e-4, atol=1e-5)
