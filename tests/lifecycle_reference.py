"""What a model with adapters should be after each call of its lifecycle: plain dicts of tensors, and sums.

Nothing here knows fxlora. An output is that of the plain model with `W + s B A` (or DoRA's rescaling of it) in place of
W, in float64, and gradients flow through that sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SITES = ("emb", "conv", "fc1", "fc2")


class Net(nn.Module):
    """An embedding, a convolution and two linear layers, in float64: the smallest model with all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv = nn.Embedding(6, 4), nn.Conv1d(4, 3, 2)
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.emb(ids).transpose(1, 2))).transpose(1, 2)
        return self.fc2(torch.tanh(self.fc1(x)))


IDS = torch.tensor([[0, 3, 5, 1], [2, 2, 4, 0]])


def run(tensors: dict[str, Tensor]) -> Tensor:
    """`Net` as a function of its weights."""
    x = F.embedding(IDS, tensors["emb.weight"]).transpose(1, 2)
    x = torch.tanh(F.conv1d(x, tensors["conv.weight"], tensors["conv.bias"])).transpose(1, 2)
    return F.linear(torch.tanh(F.linear(x, tensors["fc1.weight"], tensors["fc1.bias"])), tensors["fc2.weight"])


@dataclass
class Adapter:
    """One adapter.

    Attributes:
        sites: its targets.
        r: its rank.
        alpha: its `lora_alpha`.
        rslora: whether its scale is `alpha / sqrt(r)`.
        dora: whether its updated weights are rescaled to magnitudes.
        factors: by site and name (A, B, m).
        scale: the scale now.
        trained: whether its factors require gradients.
    """

    sites: tuple[str, ...]
    r: int
    alpha: float
    rslora: bool
    dora: bool
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scale: float = 0.0
    trained: bool = False

    def __post_init__(self) -> None:
        self.scale = self.scale or self.configured

    @property
    def configured(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def delta(self, site: str, weight: Tensor) -> Tensor:
        """What the adapter adds to a weight."""
        parts = self.factors[site]
        update = self.scale * product(site, parts["A"], parts["B"])
        if not self.dora:
            return update
        moved = weight + update
        rows = (moved.t() if site == "emb" else moved.flatten(1)).norm(dim=1).detach()
        ratio = parts["m"].flatten() / rows
        shape = (1, -1) if site == "emb" else (-1, *[1] * (weight.dim() - 1))
        return ratio.view(shape) * moved - weight


def product(site: str, A: Tensor, B: Tensor) -> Tensor:
    """B A in the layout of the site's weight."""
    if site == "emb":
        return (B @ A).t()
    return torch.einsum("or,r...->o...", B.flatten(1), A)


@dataclass
class Reference:
    """The state of a model with adapters.

    Attributes:
        base: the original weights.
        adapters: by name, in the order in which they were added.
        active: names of those in use.
        enabled: whether any is in use.
        merged: names of those that are folded into the weights.
    """

    base: dict[str, Tensor]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    merged: tuple[str, ...] = ()

    # ---- what can be seen ----

    def weights(self) -> dict[str, Tensor]:
        """The base weights as they should be now: with the merged adapters."""
        found = dict(self.base)
        for site in SITES:
            path = f"{site}.weight"
            deltas = [
                self.adapters[n].delta(site, self.base[path]) for n in self.merged if site in self.adapters[n].sites
            ]
            found[path] = self.base[path] + sum(deltas, torch.zeros_like(self.base[path])).detach()
        return found

    def output(self, names: Iterable[str] | None = None) -> Tensor:
        """The output of the model, or what it would be with these adapters in use."""
        running = self.active if names is None else tuple(names)
        running = tuple(name for name in running if name not in self.merged) if self.enabled else ()
        tensors = self.weights()
        for site in SITES:
            weight = tensors[f"{site}.weight"]
            own = [self.adapters[name] for name in running if site in self.adapters[name].sites]
            tensors[f"{site}.weight"] = weight + sum(
                (each.delta(site, weight) for each in own), torch.zeros_like(weight)
            )
        return run(tensors)

    # ---- what can be done ----

    def set_adapter(self, names: Iterable[str], *, trained: bool = True) -> None:
        self.merged = ()
        self.active = tuple(names)
        self.train_only(self.active if trained else ())

    def train_only(self, names: Iterable[str]) -> None:
        chosen = set(names)
        for name, adapter in self.adapters.items():
            adapter.trained = name in chosen

    def delete(self, name: str) -> None:
        del self.adapters[name]
        if name in self.active:
            self.active = tuple(each for each in self.active if each != name) or tuple(sorted(self.adapters)[:1])
            self.train_only(self.active)

    def step(self, rate: float) -> dict[tuple[str, str, str], Tensor | None]:
        """One step of gradient descent on the factors that are trained; the gradients, by adapter, site and name."""
        leaves = {
            (name, site, part): tensor.requires_grad_()
            for name, adapter in self.adapters.items()
            if adapter.trained
            for site, parts in adapter.factors.items()
            for part, tensor in parts.items()
        }
        output = self.output()
        used = bool(leaves) and output.requires_grad
        found = (
            torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True)
            if used
            else [None] * len(leaves)
        )
        for (name, site, part), gradient in zip(leaves, found, strict=True):
            tensor = self.adapters[name].factors[site][part].detach()
            self.adapters[name].factors[site][part] = tensor if gradient is None else tensor - rate * gradient
        return dict(zip(leaves, found, strict=True))


def loss(output: Tensor) -> Tensor:
    """A loss that weighs all outputs differently."""
    return (output * torch.arange(1.0, output.numel() + 1, dtype=output.dtype).view_as(output)).sum() / output.numel()
