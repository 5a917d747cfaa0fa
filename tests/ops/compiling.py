"""The backend with a cheap compiler in Inductor's place, and what it made of a model: what the tests of it share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from fxlora import LoraConfig, LoraModel, lora_transform
from tests.zoo import Entry


@dataclass
class Recorder:
    """Compiles by AOT autograd alone, and keeps the graphs and the settings that it was given."""

    graphs: list[fx.GraphModule] = field(default_factory=list[fx.GraphModule])
    patches: list[dict[str, Any] | None] = field(default_factory=list["dict[str, Any] | None"])

    def __call__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any] | None = None
    ) -> Callable[..., Any]:
        """In place of `compile_fx`."""
        self.graphs.append(gm)
        self.patches.append(config_patches)
        compiler = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition)
        return compiler(gm, list(inputs))

    def calls(self, name: str) -> list[int]:
        """The numbers of layers in all calls of an operator of ours."""
        return [len(node.args[1]) for node in self.nodes() if str(node.target) == f"fxlora.{name}.default"]

    def nodes(self) -> Iterator[fx.Node]:
        """Those of all graphs, also of the graphs within."""
        for gm in self.graphs:
            for module in gm.modules():
                yield from module.graph.nodes if isinstance(module, fx.GraphModule) else ()


class Block(nn.Module):
    """Attention and SwiGLU: quicker to compile than a model of the zoo."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
        x = x + self.o_proj(h)
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


BLOCK = Entry("block", Block, dict, [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")])


def adapted(entry: Entry, *, train: bool = False, **settings: Any) -> LoraModel:
    """A model with random factors, captured as models of Hugging Face are."""
    config = {"r": 4, "target_modules": entry.targets, "init_lora_weights": False, **settings}
    model = lora_transform(entry.model(), LoraConfig(**config), capture="modules")
    return model.train(train)


def output(model: Callable[..., Any], batch: Any) -> Tensor:
    """The first output, from the same random state at each call."""
    torch.manual_seed(3)
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return found if isinstance(found, Tensor) else found[0]


def with_gradients(model: nn.Module, call: Callable[..., Any], batch: Any) -> list[Tensor]:
    """The first output and, of a loss that is a plain weighting of it, all gradients, in one vector."""
    model.zero_grad()
    y = output(call, batch)
    (y.float() * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return [y.detach(), torch.cat(gradients)]


def close(found: list[Tensor], right: list[Tensor], tolerance: float = 1e-5) -> bool:
    """Whether the norms of the errors are below the tolerance, relative to what is right."""
    assert len(found) == len(right) and all(each.norm() > 0 for each in right)
    return all(
        (one - two).float().norm() <= tolerance * two.float().norm() for one, two in zip(found, right, strict=True)
    )
