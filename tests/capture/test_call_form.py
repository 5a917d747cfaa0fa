"""Symbolic captures of forwards with optional arguments: one form of call, and every other is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxlora import CaptureError, LoraConfig, lora_transform
from tests.models.checks import randomise

CONFIG = LoraConfig(r=2, target_modules=["fc"])
X, MASK = torch.randn(3, 8), torch.rand(3, 8)


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        power: int = 1,
        scale: float = 2.0,
        *,
        mode: str = "plain",
        state: Any = (),
        **more: Any,
    ) -> Any:
        x = self.fc(x) ** power * scale
        if mask is not None:
            x = x * mask
        if mode == "tanh":
            x = x.tanh()
        for each in state:
            x = x + each
        return {"x": x} if more.get("as_dict") else x


def captured(example: Any, model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    model = model or Options()
    return model, lora_transform(model, CONFIG, capture="symbolic", example_inputs=example)


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"x": X}, {"x": X[:2]}),
    ({"x": X, "mask": MASK}, {"x": X[:2], "mask": MASK[:2]}),
    ({"x": X, "mask": None, "power": 2}, {"x": X[:2], "power": 2}),
    ({"x": X, "mask": MASK, "scale": 3.0}, {"x": X[:2], "mask": MASK[:2], "scale": 5.0}),
    ({"x": X, "scale": 3.0}, {"x": X[:2]}),  # a number with a fraction is an input, and may be left out
    ({"x": X, "mode": "tanh", "state": []}, {"x": X[:2], "mode": "tanh", "state": []}),
]


@pytest.mark.parametrize(("example", "call"), FORMS)
def test_calls_of_the_form_are_the_models(example: dict[str, Any], call: dict[str, Any]) -> None:
    model, lora = captured(example)
    for each in (lora, copy.deepcopy(lora), pickle.loads(pickle.dumps(lora)), lora.unload()):
        for training in (True, False):
            assert torch.equal(each.train(training)(**call), model.train(training)(**call))
            assert torch.equal(each(**example), model(**example))
    assert torch.equal(captured(tuple(example.values())[:1])[1](call["x"]), model(call["x"]))


@pytest.mark.parametrize(
    ("example", "call", "words"),
    [
        (
            {"x": X},
            {"x": X, "mask": MASK},
            r"'mask' is a tensor of sizes \(3, 8\), .* traced with None .* give 'mask' so",
        ),
        ({"x": X, "mask": MASK}, {"x": X}, "'mask' is left out .* give it"),
        ({"x": X, "mask": MASK}, {"x": X, "mask": None}, "'mask' is left out or holds None"),
        ({"x": X}, {"x": X, "power": 2}, "'power' is 2, but the model was traced with 1 there.*capture='modules'"),
        ({"x": X}, {"x": X, "power": True}, "'power' is True"),  # although it equals 1
        ({"x": X, "power": 2}, {"x": X}, "'power' is 1, but the model was traced with 2"),
        ({"x": X, "mode": "tanh"}, {"x": X, "mode": "plain"}, "'mode' is 'plain'"),
        ({"x": X}, {"x": X, "state": (MASK,)}, r"'state' is \(tensor"),
    ],
)
def test_calls_of_another_form_are_refused(example: dict[str, Any], call: dict[str, Any], words: str) -> None:
    _, lora = captured(example)
    for each in (lora, copy.deepcopy(lora), pickle.loads(pickle.dumps(lora)), lora.unload()):
        with pytest.raises(ValueError, match=words):
            each(**call)


def test_further_keywords_are_refused() -> None:
    _, lora = captured({"x": X})
    with pytest.raises(TypeError, match="as_dict"):
        lora(x=X, as_dict=True)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (None, "optional argument 'mask'.*pass example_inputs"),
        ({"x": X, "as_dict": True}, r"give values to \*more"),
        ({"y": X}, "does not take the example_inputs"),
        ({"x": X, "state": (MASK, None)}, "'state' of example_inputs holds None"),
        ({"x": X, "state": (MASK,)}, "cannot be traced.*test_call_form.py, line"),  # its length is not known
    ],
)
def test_what_a_trace_cannot_hold_is_refused(example: Any, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        captured(example)


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, twice: bool, *others: Tensor) -> Tensor:
        x = self.fc(x)
        return sum(others, self.fc(x) if twice else x)


def test_required_flags_are_fixed_and_starred_arguments_stay_empty() -> None:
    model, lora = captured((X, True), Arguments())
    assert torch.equal(lora(X[:2], True), model(X[:2], True))
    with pytest.raises(ValueError, match="'twice' is False"):
        lora(X, False)
    with pytest.raises(TypeError, match="positional"):
        lora(X, True, X)
    with pytest.raises(CaptureError, match=r"give values to \*others"):
        captured((X, True, X), Arguments())
    with pytest.raises(CaptureError, match=r"takes \*others, of which a trace sees nothing; pass example_inputs"):
        captured(None, Arguments())


class Recurrent(nn.Module):
    """A pair of states, which a trace takes apart, and noise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, states: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.fc(x)
        if states is not None:
            h, c = states
            x = x * h + c
        return x + torch.randn(x.shape[0], 1) if self.training else x


def test_containers_of_tensors_are_inputs_of_both_graphs() -> None:
    model, lora = captured({"x": X, "states": (MASK, X)}, Recurrent())
    assert lora.two_graphs
    randomise(lora)
    assert not torch.equal(lora.eval()(X, (MASK, X)), model.eval()(X, (MASK, X)))
    plain = lora.unload()
    for training in (True, False):
        outputs = []
        for each in (model, plain):
            torch.manual_seed(1)
            outputs.append(each.train(training)(X[:2], (X[:2], MASK[:2])))
        assert torch.equal(*outputs)
        for states in (None, (X, None)):
            with pytest.raises(ValueError, match="'states' is left out or holds None"):
                plain(X, states)


def test_auto_takes_a_capture_that_takes_every_call() -> None:
    model = Options()
    lora = lora_transform(model, CONFIG, example_inputs={"x": X})
    assert lora.capture == "modules" and "optional argument 'mask'" in lora._lora.reason
    assert lora(X, MASK).shape == (3, 8)


def test_the_check_compiles() -> None:
    model, lora = captured({"x": X, "mask": MASK})
    torch._dynamo.reset()
    compiled = torch.compile(lora, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X, MASK), model(X, MASK))
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="'power' is 3"):
        lora(X, MASK, 3)
