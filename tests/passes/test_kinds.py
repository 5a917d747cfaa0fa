"""A new layer kind is one file and one registration: this file makes one up, and everything else works with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from fxlora import LoraConfig, NoTargetError, lora_transform
from passes.branches import KINDS
from passes.branches.base import BranchSpec, Function, Match, Method, Part
from passes.callsite import CallSite, Layer
from passes.nodes import BranchBuilder
from tests.models.checks import error

# ---- the layer, and what would be the one file ----


class ScaledLinear(nn.Module):
    """`y = gain · x W`, with W stored `(in, out)` and one gain for each input."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out) / math.sqrt(fan_in))
        self.gain = nn.Parameter(torch.rand(fan_in) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_linear(x, self.weight, self.gain)


def scaled_linear(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    return (x * gain) @ weight


def scaled_update(A: Tensor, B: Tensor) -> Tensor:
    return A @ B


@dataclass(frozen=True)
class Scaled:
    """Factors `A (in, r)` and `B (r, out)` under names of their own: `y' = y + s · (gain · x A) B`."""

    factor_names: ClassVar[tuple[str, str]] = ("lora_left", "lora_right")
    float_input: ClassVar[bool] = True
    has_rows: ClassVar[bool] = True
    can_have_bias: ClassVar[bool] = False

    def layer(self, module: nn.Module) -> Layer | None:
        if not isinstance(module, ScaledLinear):
            return None
        fan_in, fan_out = module._parameters["weight"].shape  # pyright: ignore
        return Layer("scaled", fan_in, fan_out)

    def match(self, node: fx.Node) -> Match | None:
        return None

    def weight_shape(self, layer: Layer) -> tuple[int, ...]:
        return layer.in_features, layer.out_features

    def factor_shapes(self, spec: BranchSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (spec.in_features, spec.r), (spec.r, spec.out_features)

    def init(self, spec: BranchSpec) -> dict[str, Tensor]:
        left, right = self.factor_shapes(spec)
        return {"lora_left": torch.randn(left), "lora_right": torch.zeros(right)}

    def update(self, layer: Layer) -> Function:
        return scaled_update, ()

    def operation(self, layer: Layer) -> Function:
        return torch.matmul, ()

    def build(
        self, add: BranchBuilder, site: CallSite, x: fx.Node, A: fx.Node, B: fx.Node, bias: fx.Node | None
    ) -> fx.Node:
        gain = add.base(f"{site.name}.gain".lstrip("."), "gain")
        return add.call("b", torch.matmul, add.call("a", scaled_linear, x, A, gain), B)

    def row_view(self, layer: Layer, part: Literal["weight", "A", "B"]) -> Method | None:
        return "t", ()

    def channel_dim(self, layer: Layer) -> int:
        return -1

    def as_matrices(self, layer: Layer, part: Part, tensor: Tensor) -> Tensor:
        return tensor.t()

    def from_matrices(self, layer: Layer, part: Part, matrices: Tensor) -> Tensor:
        return matrices.t()


# ---- what works with it ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = ScaledLinear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "scaled", Scaled())


def test_without_the_registration_it_is_no_target() -> None:
    with pytest.raises(NoTargetError, match="'first', a ScaledLinear, which is not a supported layer"):
        lora_transform(net(), LoraConfig(target_modules=["first"]), capture="modules")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_one_registration_is_enough(capture: Any, use_dora: bool, tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "last"], "use_dora": use_dora}
    base = net().requires_grad_(False)(X)
    model: Any = lora_transform(net(), LoraConfig(**settings), capture=capture, example_inputs=X).eval()
    assert torch.equal(model(X), base)
    assert [spec.kind for spec in model._specs()] == ["scaled", "linear"]
    names = [name for name in model.state_dict() if name.startswith("first.")]
    parts = [f"first.{part}.default.weight" for part in ("lora_left", "lora_right")]
    assert names == ["first.weight", "first.gain", *parts, *["first.lora_magnitude_vector.default.weight"] * use_dora]

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    losses: list[float] = []
    for _ in range(20):
        loss = (model(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.verify()

    trained = model(X).detach()
    model.save_pretrained(tmp_path)
    keys = [key for key in load_file(tmp_path / "adapter_model.safetensors") if ".first." in key]
    assert len(keys) == (3 if use_dora else 2)
    again: Any = lora_transform(net(), tmp_path, capture=capture, example_inputs=X).eval()
    assert torch.equal(again(X), trained)
    again.add_adapter("other", LoraConfig(**settings))
    again.set_adapter(["default", "other"])
    assert torch.equal(again(X), trained)
    again.delete_adapter("other")
    if not use_dora:
        again.reduce_rank("default", 3, "same")
        again.set_adapter("same")
        assert error([again(X)], [trained]) < 2e-6
        again.set_adapter("default")
        again.delete_adapter("same")
    before = again.get_parameter("first.weight").clone()
    again.merge_adapter()
    assert error([again(X)], [trained]) < 2e-6
    again.unmerge_adapter()
    assert torch.equal(again.get_parameter("first.weight"), before)
    again.merge_adapter()
    plain = again.merge_and_unload()
    assert list(plain.state_dict()) == list(net().state_dict())
    assert error([plain(X)], [trained]) < 2e-6
