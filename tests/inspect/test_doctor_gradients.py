"""`doctor` with a batch: it names the layers that get no gradient, and where the way from the loss is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxlora import (
    doctor,
    enable_input_require_grads,
)
from tests.inspect.doctoring import CAPTURES, Net, X, fill, lora
from tests.zoo import PLAIN


def _no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.tanh(x)


CUTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "detach": (lambda x: x.detach(), "'detach", "detach()"),
    "data": (lambda x: x.data * 1, "'data'", ".data"),
    "argmax": (lambda x: nn.functional.one_hot(x.argmax(-1), 8).float(), "argmax", "integers"),
    "no_grad": (_no_grad, "'torch.no_grad()'", "no_grad"),
    "python": (lambda x: torch.tensor(x.tolist()), "'tolist'", "leaves torch"),
}


@pytest.mark.parametrize("name", CUTS)
def test_where_a_gradient_is_cut(name: str) -> None:
    between, operation, why = CUTS[name]
    report = doctor(lora(Net(between)), X)
    (found,) = report.of_code("no-gradient")
    assert found.places == ("first",), str(report)
    assert operation in found.what and why in found.why
    line = (
        "doctoring.py:" if name == "no_grad" else "test_doctor_gradients.py:"
    )  # of the forward that is without, else of the operation
    assert line in found.what


class Rounding(torch.autograd.Function):
    """An operator without a derivative, of which torch's functions show nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.round()
        ctx.mark_non_differentiable(out)
        return out


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Rounding.apply(x)  # pyright: ignore[reportReturnType]


class Straight(torch.autograd.Function):
    """A rounding with a derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


def test_functions_of_ones_own() -> None:
    (found,) = doctor(lora(Net(Rounded())), X).of_code("no-gradient")
    assert found.places == ("first",) and "'Rounding' in 'between'" in found.what
    assert doctor(lora(Net(Straight.apply)), X).ok  # pyright: ignore[reportArgumentType]
    (found,) = doctor(lora(Net(lambda x: Straight.apply(x.detach()))), X).of_code("no-gradient")  # pyright: ignore[reportArgumentType, reportUnknownLambdaType]
    assert found.places == ("first",) and "'detach" in found.what


def _into_a_buffer(x: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros_like(x)
    with torch.no_grad():
        buffer[:] = x
    return buffer


def test_writing_into_a_buffer() -> None:
    (found,) = doctor(lora(Net(_into_a_buffer)), X).of_code("no-gradient")
    assert found.places == ("first",) and "'torch.no_grad()'" in found.what


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_detach_in_any_capture(capture: str) -> None:
    (found,) = doctor(lora(Net(lambda x: x.detach()), capture), X).of_code("no-gradient")
    assert found.places == ("first",) and "'detach" in found.what


class Inner(nn.Module):
    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.layer, self.mode = nn.Linear(8, 8), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.mode():
            x = self.layer(x)
        return x.clone()


class Outer(nn.Module):
    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.start, self.inner, self.end = nn.Linear(8, 8), Inner(mode), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.inner(self.start(x)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_module_that_switches_gradients_off_is_named(mode: Callable[[], Any]) -> None:
    model = lora(Outer(mode), target_modules=["start", "layer", "end"])
    (found,) = doctor(model, X).of_code("no-gradient")
    assert found.places == ("start", "inner.layer")
    assert "in 'inner'" in found.what and mode.__name__ in found.why


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Net(), Net()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)  # pyright: ignore[reportAssignmentType]
        return x


def test_checkpointing_without_gradients_of_inputs() -> None:
    model = lora(Checkpointed())
    (found,) = doctor(model, X).of_code("no-gradient")
    assert "reentrant" in found.why and "enable_input_require_grads" in found.remedy
    assert found.where.startswith("blocks.*.first (2)") and len(found.places) == 6
    with enable_input_require_grads(model):
        assert doctor(model, X).ok


def test_a_layer_that_the_loss_does_not_use() -> None:
    class Two(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return self.first(x), self.second(x), self.third(x)

    model = lora(Two())
    assert doctor(model, X).ok
    (found,) = doctor(model, X, loss=lambda output: (output[0] * output[2]).sum()).of_code("no-gradient")
    assert found.places == ("second",) and "does not depend" in found.what


def test_a_layer_that_is_bypassed() -> None:
    entry = next(each for each, _ in PLAIN if each.name == "functional-weight")
    model = lora(entry.model(), target_modules=entry.targets)
    report = doctor(model, entry.batch())
    (found,) = report.of_code("weight-read-elsewhere")
    assert found.places == ("proj",) and "'linear' in the model's own forward" in found.what
    assert "not-run" not in report.codes


def test_zero_gradients() -> None:
    report = doctor(fill(lora(Net(lambda x: x * 0.0))), X)
    assert report.of_code("zero-gradient")[0].places == ("first", "second")
    fresh = doctor(lora(), X)
    assert fresh.ok and fresh.of_code("fresh-adapter")[0].places == ("first", "second", "third")


def test_a_gradient_that_is_not_finite() -> None:
    (found,) = doctor(fill(lora()), X, loss=lambda y: (y * torch.inf).sum()).of_code("gradient-not-finite")
    assert "third.lora_B.default.weight" in found.places


def test_a_batch_that_the_model_does_not_take() -> None:
    (found,) = doctor(lora(), torch.randn(4, 7)).of_code("batch-fails")
    assert "RuntimeError" in found.what
    with pytest.raises(ValueError, match="batch must be a tensor"):
        doctor(lora(), 3)


def test_a_trained_copy_without_gradient() -> None:
    class Head(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + self.third(x).detach()

    model = lora(Head(), target_modules=["first"], modules_to_save=["third"])
    report = doctor(model, X)
    assert report.of_code("no-gradient")[0].places == ("third",)
    assert report.of_code("whole-modules-trained")[0].places == ("third",)
