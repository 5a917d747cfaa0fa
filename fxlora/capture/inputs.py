"""Example inputs, and running a model on them without leaving a mark on it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxlora.errors import CaptureError


@dataclass(frozen=True, slots=True)
class Example:
    """One call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: object) -> Self | None:
        """From what a user passes as `example_inputs`: a tensor, a tuple of arguments, or a dict of keywords."""
        if inputs is None:
            return None
        if isinstance(inputs, Tensor):
            return cls((inputs,), {})
        if isinstance(inputs, Mapping):  # a tokenizer's result too
            return cls((), dict(cast("Mapping[str, Any]", inputs)))
        if isinstance(inputs, Sequence):
            return cls(tuple(cast("Sequence[Any]", inputs)), {})
        raise CaptureError(
            f"example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, not "
            f"{type(inputs).__name__}"
        )

    def run(self, model: nn.Module) -> Any:
        """Call the model."""
        return model(*self.args, **self.kwargs)


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Generator[None]:
    """Put the whole model into one mode, and each module back into its own afterwards."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def undisturbed(model: nn.Module, training: bool) -> Generator[None]:
    """Run a model in one mode without gradients; modes, buffers and the random state are restored."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with training_mode(model, training), torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def same_outputs(model: nn.Module, captured: nn.Module, example: Example) -> None:
    """Refuse a capture whose outputs differ from the model's, in training or evaluation.

    On a CUDA device a model whose outputs in training are random is compared in evaluation only: there a captured
    attention may run another kernel than the model's, which draws its dropout otherwise.

    Raises:
        CaptureError: with the mode and the largest difference.
    """
    on_cuda = any(parameter.is_cuda for parameter in model.parameters())
    for training in (True, False):
        expected, found = (_outputs(each, example, training) for each in (model, captured))
        if training and on_cuda and not _equal(expected, _outputs(model, example, training, seed=1)):
            continue
        mode = "training" if training else "evaluation"
        if len(expected) != len(found):
            raise CaptureError(f"in {mode} the captured graph returns {len(found)} values, the model {len(expected)}")
        for before, after in zip(expected, found, strict=True):
            _compare(before, after, mode)


def _outputs(model: nn.Module, example: Example, training: bool, seed: int = 0) -> list[Any]:
    with undisturbed(model, training):
        torch.manual_seed(seed)
        return pytree.tree_leaves(example.run(model))


def _equal(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


def _compare(before: object, after: object, mode: str) -> None:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        if type(before) is not type(after) or (isinstance(before, (int, float, str, bool)) and before != after):
            raise CaptureError(f"in {mode} the captured graph returns {after!r}, the model {before!r}")
        return
    try:
        torch.testing.assert_close(after, before, equal_nan=True)
    except AssertionError as error:
        summary = " ".join(str(error).split())[:200]
        raise CaptureError(f"in {mode} the captured graph computes something else: {summary}") from error


def kept_attributes(model: nn.Module) -> dict[str, Any]:
    """Attributes of the original that its captured form keeps: the configurations of transformers' models."""
    names = ("config", "generation_config")
    return {name: getattr(model, name) for name in names if hasattr(model, name)}
