"""Healthy set-ups to break: small models of four architectures under each capture that fits, captured once and copied."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxlora import LoraConfig, LoraModel, lora_transform, parameter_groups
from fxlora._passes import Stage, lora_meta
from tests.zoo import ARCHITECTURES

Between = Callable[[Tensor], Tensor]
"""What a model's own code does with what goes from one block into the next."""


class Attention(nn.Module):
    """Attention written by hand, without a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q_proj(x) @ self.k_proj(x).transpose(-1, -2) / 3).softmax(-1)
        return self.o_proj(weights @ self.v_proj(x))


class Plain(nn.Module):
    """Two blocks of attention, and what the user does between them."""

    def __init__(self, between: Between | None = None) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.between is not None:
            x = self.between(x)
        return self.second(x)


@dataclass(frozen=True)
class Host:
    """A model to put LoRA on.

    Attributes:
        name: of the architecture.
        make: the model, with something between two of its blocks.
        inputs: of a call.
        targets: for LoRA.
        site: a layer that faults are put on.
        sibling: one of the same shape that reads the same input.
        before: the block whose layers get no gradient when it is cut between the blocks.
    """

    name: str
    make: Callable[[Between | None], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: tuple[str, ...]
    site: str
    sibling: str
    before: str

    def model(self, between: Between | None = None) -> nn.Module:
        """The base, the same each time."""
        torch.manual_seed(0)
        return self.make(between).eval()

    def batch(self) -> dict[str, Any]:
        """The inputs, the same each time."""
        torch.manual_seed(1)
        return self.inputs()


def _with_hook(name: str, block: str) -> Callable[[Between | None], nn.Module]:
    """A model of the zoo; what is between its blocks is done by a hook of the user's."""

    def make(between: Between | None) -> nn.Module:
        model = _ZOO[name].make()
        if between is not None:

            def hook(module: nn.Module, args: Any) -> Any:
                del module
                return between(args[0]), *args[1:]

            model.get_submodule(block).register_forward_pre_hook(hook)
        return model

    return make


_ZOO = {entry.name: entry for entry in ARCHITECTURES}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

HOSTS = {
    host.name: host
    for host in (
        Host(
            "llama",
            _with_hook("llama", "model.layers.1"),
            _ZOO["llama"].inputs,
            _ATTENTION,
            "model.layers.1.self_attn.k_proj",
            "model.layers.1.self_attn.v_proj",
            "model.layers.0",
        ),
        Host(
            "vit",
            _with_hook("vit", "layers.1"),
            _ZOO["vit"].inputs,
            _ATTENTION,
            "layers.1.attention.q_proj",
            "layers.1.attention.v_proj",
            "layers.0",
        ),
        Host(
            "t5",
            _with_hook("t5", "decoder.block.1"),
            _ZOO["t5"].inputs,
            ("q", "k", "v", "wi"),
            "decoder.block.1.layer.1.EncDecAttention.k",
            "decoder.block.1.layer.1.EncDecAttention.v",
            "decoder.block.0",
        ),
        Host(
            "plain", Plain, lambda: {"x": torch.randn(3, 5, 8)}, _ATTENTION, "second.k_proj", "second.v_proj", "first"
        ),
    )
}

SET_UPS = [
    *[("llama", capture) for capture in ("modules", "export")],
    *[("vit", capture) for capture in ("modules", "export")],
    *[("t5", capture) for capture in ("modules", "export")],
    *[("plain", capture) for capture in ("modules", "symbolic", "export")],
]
"""Names of hosts with their captures."""


@dataclass
class Case:
    """A set-up that a fault may change.

    Attributes:
        host: the architecture.
        capture: how the model was captured.
        model: with LoRA, as after some training; what a fault breaks.
        batch: the inputs.
        optimizer: what trains the model; None unless a fault is about it.
        config: of the adapter.
        whole: what the user runs, if it is more than the model.
        stages: of passes, if they are not the model's own.
        directory: for files.
        attempt: what the user tries, if that is what must fail.
    """

    host: Host
    capture: str
    model: LoraModel
    batch: dict[str, Any]
    config: dict[str, Any]
    optimizer: torch.optim.Optimizer | None = None
    whole: nn.Module | None = None
    stages: Sequence[Stage] = ()
    directory: Path | None = None
    attempt: Callable[[], object] | None = None

    @classmethod
    def of(cls, host: str, capture: str) -> Case:
        """A fresh copy of a set-up."""
        found = HOSTS[host]
        return cls(found, capture, copy.deepcopy(_captured(host, capture)), found.batch(), _config(found))

    @property
    def reference(self) -> LoraModel:
        """The healthy model."""
        return copy.deepcopy(_captured(self.host.name, self.capture))

    @property
    def site(self) -> str:
        """See `Host`."""
        return self.host.site

    @property
    def sites(self) -> list[str]:
        """All sites."""
        return [spec.site for spec in self.model._lora.adapters["default"].branches]

    def factor(self, part: str, site: str = "") -> nn.Parameter:
        """A factor's parameter."""
        return self.model.get_parameter(f"{site or self.site}.lora_{part}.default.weight")

    def again(self, base: nn.Module | None = None, **config: Any) -> None:
        """Make the model anew, from another base or with another configuration."""
        self.model = _transformed(base or self.host.model(), self.host, self.capture, {**self.config, **config})

    def train(self, steps: int = 2, loss: Callable[[Any], Tensor] | None = None) -> None:
        """Some steps of training with the optimizer, or an AdamW of all that is trained."""
        self.optimizer = self.optimizer or torch.optim.AdamW(parameter_groups(self.model), lr=1e-2)
        for _ in range(steps):
            output = self.model(**self.batch)
            tensors = [output] if isinstance(output, Tensor) else list(output.values())
            (loss(output) if loss else tensors[0].square().mean()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    # of a graph of the whole model

    @property
    def graph(self) -> fx.Graph:
        """The graph, of captures that have one."""
        return self.model.regions()[0].graph

    def node(self, role: str, site: str = "") -> fx.Node:
        """The first node of a role at a site."""
        return self.nodes(role, site)[0]

    def nodes(self, role: str = "", site: str = "") -> list[fx.Node]:
        """The nodes of a role at a site, all inserted ones without a role."""
        return [
            node
            for node in self.graph.nodes
            if (meta := lora_meta(node)) is not None and meta.site == (site or self.site) and role in ("", meta.role)
        ]


def _config(host: Host) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": list(host.targets)}


def _transformed(base: nn.Module, host: Host, capture: str, config: dict[str, Any]) -> LoraModel:
    example = host.batch() if capture == "export" else None
    return lora_transform(
        base,
        LoraConfig(**config),
        capture=cast(Any, capture),
        example_inputs=example,
        trace_passes=capture == "symbolic",
    )


@functools.cache
def _captured(host: str, capture: str) -> LoraModel:
    """The model with factors as after training."""
    found = HOSTS[host]
    model = _transformed(found.model(), found, capture, _config(found))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def switch_checkpointing_on(model: nn.Module, *, use_reentrant: bool) -> None:
    """As `gradient_checkpointing_enable`, which warns in newer versions of transformers."""
    name = "activation_checkpointing_enable"
    switch: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    switch({"use_reentrant": use_reentrant})
