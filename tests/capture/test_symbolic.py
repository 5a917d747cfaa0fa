"""A symbolic trace is taken only where it is sound."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxlora import CaptureError, LoraConfig, lora_transform
from fxlora._passes import print_graph
from fxlora.capture import symbolic
from fxlora.capture.graph_module import CapturedModule, LoraGraphModule
from fxlora.capture.inputs import Example, same_outputs
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.zoo import MLP, Residual

CONFIG = LoraConfig(r=2, target_modules=["fc"])
X = torch.randn(3, 8)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.calls = 0
        self.register_buffer("mean", torch.zeros(8))


class MakesTensor(Base):
    def forward(self, x: Any) -> Any:
        return self.fc(x) + torch.ones(8)


class AsksType(Base):
    def forward(self, x: Any) -> Any:
        return self.fc(x) if isinstance(x, torch.Tensor) else x


class AsksIsTensor(Base):
    def forward(self, x: Any) -> Any:
        return self.fc(x) if torch.is_tensor(x) else x


class CountsCalls(Base):
    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.fc(x)


class WritesBuffer(Base):
    def forward(self, x: Any) -> Any:
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return self.fc(x)


class Branches(Base):
    def forward(self, x: Any) -> Any:
        return self.fc(x) if x.sum() > 0 else x


class StarArguments(Base):
    def forward(self, *xs: Any) -> Any:
        return self.fc(xs[0])


class PythonRandom(Base):
    def forward(self, x: Any) -> Any:
        return self.fc(x) * random.random()


class NumpyRandom(Base):
    def forward(self, x: Any) -> Any:
        return self.fc(x) * float(numpy.random.rand())


class TorchRandom(Base):
    def forward(self, x: Any) -> Any:
        return self.fc(x) * torch.rand(()).item()


class LayerDrop(Base):
    def forward(self, x: Any) -> Any:
        return x if self.training and random.random() < 0.5 else self.fc(x)


class Remembers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Any) -> Any:
        self.seen.append(self.fc(x))
        return self.seen[-1]


class CountsInADict(Base):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"inner": {"calls": 0}}

    def forward(self, x: Any) -> Any:
        self.state["inner"]["calls"] += 1
        return self.fc(x) * (1 if self.state["inner"]["calls"] < 10 else 0)


_CALLS: list[int] = []


class AsksTheWorld(Base):
    def forward(self, x: Any) -> Any:
        _CALLS.append(0)
        return self.fc(x) * len(_CALLS)


class RunsWithoutGradients(Base):
    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            x = self.fc(x)
        return self.fc(x)


class IsDecorated(Base):
    @torch.inference_mode()
    def forward(self, x: Any) -> Any:
        return self.fc(x)


class CastsByItself(Base):
    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.fc(x)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (RunsWithoutGradients, "runs a part under torch.no_grad()"),
        (IsDecorated, "runs a part under torch.inference_mode()"),
        (CastsByItself, "runs a part under torch.autocast()"),
        (MakesTensor, "makes a tensor of its own"),
        (AsksType, "isinstance"),
        (AsksIsTensor, "isinstance"),
        (CountsCalls, "changes 'CountsCalls.calls'"),
        (WritesBuffer, "cannot be traced|changes"),
        (Branches, "cannot be traced"),
        (StarArguments, r"\*xs"),
        (PythonRandom, "draws from Python's random"),
        (NumpyRandom, "draws from numpy's random"),
        (TorchRandom, "draws from torch's generator"),
        (LayerDrop, "draws from Python's random"),
        (Remembers, "changes 'Remembers.seen'"),
        (CountsInADict, "changes 'CountsInADict.(state|inner|calls)'"),
        (AsksTheWorld, "two different graphs"),
    ],
)
def test_unsound_traces_are_refused(cls: type[nn.Module], words: str) -> None:
    model = cls()
    before, generators = snapshot(model), (random.getstate(), torch.get_rng_state())
    plain = copy.deepcopy({name: value for name, value in vars(model).items() if name in ("seen", "state", "calls")})
    with pytest.raises(CaptureError, match=words):
        lora_transform(model, CONFIG, capture="symbolic")
    assert_unchanged(model, before)
    assert {name: vars(model)[name] for name in plain} == plain
    assert random.getstate() == generators[0] and torch.equal(torch.get_rng_state(), generators[1])


def test_outputs_are_compared_on_examples() -> None:
    model = MLP().eval()
    captured = symbolic.capture(model, None)
    with torch.no_grad():
        captured.fc2 = nn.Linear(16, 4)
    with pytest.raises(CaptureError, match="computes something else"):
        same_outputs(model, captured, Example((X,), {}))


def test_a_hook_on_a_target_leads_to_modules() -> None:
    """Its output would be the base's in a trace; it is the branch's in a model whose layers stay."""
    model = MLP().eval()
    model.fc1.register_forward_hook(lambda module, args, output: output * 2)
    lora = lora_transform(model, {"target_modules": ["fc1"]})
    assert lora.capture == "modules"
    nn.init.normal_(lora.get_parameter("fc1.lora_B.default.weight"))
    live = lora(X)
    torch.testing.assert_close(lora.merge_and_unload()(X), live)


def test_missing_methods_are_explained() -> None:
    with pytest.raises(AttributeError, match="'predict'.*capture='modules' keeps"):
        lora_transform(MLP(), {"target_modules": ["fc1"]}, capture="symbolic").predict  # noqa: B018


def test_hooks_are_refused() -> None:
    model = Residual()
    model.blocks[0].register_forward_hook(lambda *args: None)
    with pytest.raises(CaptureError, match=r"'blocks\.0' has hooks"):
        lora_transform(model, {"target_modules": ["head"]}, capture="symbolic")
    lora = lora_transform(model, {"target_modules": ["head"]})
    assert lora._lora.capture == "modules" and "hooks" in lora._lora.reason


def test_parameters_are_shared_and_the_original_stays_usable() -> None:
    model = MLP().eval()
    expected = model(X)
    names = [name for name, _ in model.named_modules()]
    lora = lora_transform(model, {"target_modules": ["fc1"]}, capture="symbolic")
    own = dict(lora.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    nn.init.normal_(lora.get_parameter("fc1.lora_B.default.weight"))
    assert torch.equal(model(X), expected) and not torch.equal(lora(X), expected)
    assert [name for name, _ in model.named_modules()] == names


def test_meta_device() -> None:
    with torch.device("meta"):
        model = MLP()
    lora = lora_transform(model, {"target_modules": ["fc1"], "lora_alpha": 4}, capture="symbolic")
    assert all(parameter.is_meta for parameter in lora.parameters())
    real = lora.to_empty(device="cpu")
    assert real.get_submodule("fc1.lora_scaling.default").scale.item() == 0.5


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(), Half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.fc(x), 0.5, self.training)


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_a_partial_eval_holds(capture: Any) -> None:
    """Each module's own mode decides, also after pickling."""
    model = FunctionalDropout()
    lora = lora_transform(model, CONFIG, capture=capture, example_inputs=X)
    for each in (lora, copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        for first, second in [(True, False), (False, True), (True, True), (False, False)]:
            for module in (model, each):
                module.get_submodule("first").train(first)
                module.get_submodule("second").train(second)
            torch.manual_seed(1)
            expected = model(X)
            torch.manual_seed(1)
            assert torch.equal(each(X), expected)


def test_pickle_keeps_graph_adapters_and_branches() -> None:
    lora = lora_transform(MLP().eval(), {"target_modules": ["fc1"], "lora_dropout": 0.1}, capture="symbolic")
    nn.init.normal_(lora.get_parameter("fc1.lora_B.default.weight"))
    restored = pickle.loads(pickle.dumps(lora))
    assert isinstance(restored, LoraGraphModule)
    assert print_graph(restored.graph) == print_graph(lora.graph)
    assert torch.equal(restored(X), lora(X))
    restored.add_adapter("second", {"target_modules": ["fc2"]})
    restored.set_adapter(["default", "second"])
    restored.verify()
    plain = restored.unload()
    assert type(plain).__mro__[1] is CapturedModule
    assert torch.equal(plain(X), lora.unload()(X))


def test_shells_refuse_to_be_called() -> None:
    lora = lora_transform(FunctionalDropout(), CONFIG, capture="symbolic")
    with pytest.raises(NotImplementedError, match="this Half is part of a captured graph"):
        lora.get_submodule("first")(X)
