"""One small net with every layer kind that peft combines, and adapters in it with equal factors in both libraries."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxlora import LoraConfig, lora_transform
from fxlora._passes import base_weight, deltas, factors
from tests.host.tied import quiet

LAYERS = ["linear", "turned", "embedding", "conv", "pointwise"]
IDS = torch.randint(0, 30, (4, 9), generator=torch.Generator().manual_seed(4))


class Net(nn.Module):
    """Embedding, Linear, transformers' Conv1D, Conv2d of sizes 3 and 1; all sizes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.linear = nn.Linear(12, 20)
        self.turned = Conv1D(14, 20)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.pointwise = nn.Conv2d(6, 5, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """`(4, 9)` ids to `(4, 5, 9, 14)`."""
        x = self.turned(torch.tanh(self.linear(self.embedding(ids))))
        return self.pointwise(torch.tanh(self.conv(x[:, None])))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def randomise(ours: Any, theirs: Any = None, scale: float = 0.3) -> None:
    """Random factors in all adapters of ours, and the same in peft's model."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
                if theirs is not None:
                    their_parameter(theirs, name.removesuffix(".weight")).copy_(parameter)


def their_parameter(theirs: Any, name: str) -> nn.Parameter:
    """peft's parameter for a name of ours without `.weight`: embeddings' factors are bare there."""
    path = f"base_model.model.{name}"
    return theirs.get_parameter(path if "embedding_" in name else f"{path}.weight")


def pair(configs: dict[str, dict[str, Any]], capture: Any = "modules", make: Any = net, **options: Any) -> Any:
    """(ours, peft's) with adapters of these configurations and equal factors."""
    (first, config), *rest = configs.items()
    ours = lora_transform(make(), LoraConfig(**config), adapter_name=first, capture=capture, **options)
    with quiet():
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**config), adapter_name=first)
    for name, other in rest:
        ours.add_adapter(name, LoraConfig(**other))
        with quiet():
            theirs.add_adapter(name, peft.LoraConfig(**other))
    randomise(ours, theirs)
    return ours.eval(), theirs.eval()


def combine_both(
    models: Any, adapters: list[str], weights: list[float], kind: str, seed: int = 7, **options: Any
) -> None:
    """The same call in both libraries, each after the same seed."""
    ours, theirs = models
    torch.manual_seed(seed)
    ours.add_weighted_adapter(adapters, weights, "sum", kind, **options)
    torch.manual_seed(seed)
    with quiet():
        theirs.base_model.add_weighted_adapter(adapters, weights, "sum", kind, **options)


def factors_of(models: Any, site: str, adapter: str = "sum") -> list[tuple[Tensor, Tensor]]:
    """(A, B) at a site, ours and peft's."""
    ours, theirs = models
    names = ("lora_embedding_A", "lora_embedding_B") if site == "embedding" else ("lora_A", "lora_B")
    return [
        tuple(ours.get_parameter(f"{site}.{name}.{adapter}.weight").detach() for name in names),  # type: ignore[list-item]
        tuple(their_parameter(theirs, f"{site}.{name}.{adapter}").detach() for name in names),  # type: ignore[list-item]
    ]


def product(A: Tensor, B: Tensor) -> Tensor:
    """`B A` in float64."""
    return B.double().flatten(1) @ A.double().flatten(1)


def update_of(model: Any, adapter: str, site: str) -> Tensor:
    """What an adapter adds to a weight of ours, in float64 and the weight's layout."""
    spec = next(s for s in model._lora.adapters[adapter].branches if s.site == site)
    return deltas(spec, base_weight(model, site)[1], factors(model, spec))["weight"]


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to what was expected unless that is zero."""
    return float((found.double() - expected.double()).norm()) / (float(expected.double().norm()) or 1.0)
