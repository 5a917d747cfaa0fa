"""How many bytes autograd keeps between forward and backward, from shapes alone: under FakeTensor, nothing is computed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from fxlora.capture.inputs import Example, training_mode
from fxlora.model import LoraModel


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that are alive between forward and backward, beside parameters and buffers.

    Attributes:
        full: when all parameters of the model are trained.
        frozen: when none is, and gradients flow from the first layer with LoRA on: what the frozen base keeps of it.
        lora: when the adapter alone is trained.
    """

    full: int
    frozen: int
    lora: int

    @property
    def saved_by_freezing(self) -> int:
        """What need not be kept, since the base gets no gradients."""
        return self.full - self.frozen

    @property
    def kept_for_branches(self) -> int:
        """What is kept for the gradients of what is trained."""
        return self.lora - self.frozen


def predict_activations(model: nn.Module, lora: LoraModel, trained: Iterable[str], example: Example) -> Activations:
    """The bytes of one forward in training: for full tuning, for the frozen base alone, and for LoRA.

    Args:
        model: not changed; may be on the meta device, and is taken to be on the CPU then.
        lora: the same model with the adapter, of which only shapes count: see `on_meta`.
        trained: names of the modules whose results need gradients since something in them is trained.
        example: one call; the sizes of its tensors count, their values do not, and their device may be any.

    Raises:
        Exception: what the model raises when it runs without values, as where a branch depends on data.
    """
    full, frozen = on_meta(model), on_meta(model).requires_grad_(False)
    for parameter in full.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    start_gradients(frozen, trained)
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    device = torch.device("cpu") if device.type == "meta" else device
    return Activations(*(_alive(each, example, device) for each in (full, frozen, lora)))


def start_gradients(model: nn.Module, names: Iterable[str]) -> None:
    """Let the results of some modules require gradients, as if something in them were trained."""

    def require(module: nn.Module, args: Any, output: Any) -> None:
        for each in pytree.tree_leaves(output):
            if isinstance(each, Tensor) and each.is_floating_point() and not each.requires_grad:
                each.requires_grad_()

    for name in names:
        model.get_submodule(name).register_forward_hook(require)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model without values, as trainable as the model; no tensor is copied on the way."""

    def like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta")

    return _copy_with(model, like)


def _copy_with(model: nn.Module, new: Callable[[Tensor], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(new(parameter.detach()), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = new(buffer.detach())
    return copy.deepcopy(model, memo)


def _alive(model: nn.Module, example: Example, device: torch.device) -> int:
    def like(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _copy_with(model, like)
        args, kwargs = pytree.tree_map_only(Tensor, like, (example.args, dict(example.kwargs)))
        given = [*fake.parameters(), *fake.buffers(), *pytree.tree_leaves((args, kwargs))]
        known = {tensor.untyped_storage()._cdata for tensor in given if isinstance(tensor, Tensor)}
        alive: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            alive[storage._cdata] = storage  # held, so that no other one gets its number
            return tensor

        with _quietly(), training_mode(fake, True), saved_tensors_hooks(keep, lambda tensor: tensor):
            for output in pytree.tree_leaves(Example(args, kwargs).run(fake)):
                if isinstance(output, Tensor):
                    keep(output)
    return sum(storage.nbytes() for number, storage in alive.items() if number not in known)


@contextmanager
def _quietly() -> Generator[None]:
    """Torch logs the stack of an operator that has no shapes for these inputs, beside raising it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
