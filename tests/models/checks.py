"""What a capture of a model must keep, measured; used by the tests and by `benchmarks/captures.py`."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxlora import CaptureError, LoraConfig, LoraModel, lora_transform
from tests.zoo import Entry


@dataclass
class Outcome:
    """Measurements of one model under one capture; errors are relative to the largest value."""

    model: str
    capture: str
    refused: str = ""
    sites: int = 0
    seconds: float = 0.0
    eval_equal: bool = False
    train_equal: bool = False
    init_equal: bool | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    merged_error: float = 0.0
    keys_equal: bool = False


def tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors in a model's output."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run(model: nn.Module, batch: dict[str, Any], *, training: bool = False) -> list[Tensor]:
    """Outputs in one mode; a copy runs in training, so that running statistics stay as they are."""
    model = copy.deepcopy(model) if training else model
    model.train(training)
    torch.manual_seed(3)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds differently, and LoRA switches it off
    try:
        with torch.no_grad():
            return tensors(model(**batch))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def error(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of the reference `b`."""
    assert len(a) == len(b)
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for x, y in zip(a, b, strict=True))


def randomise(model: nn.Module) -> None:
    """The same random B in every model that has the same sites."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].removeprefix("base_model.model.")):
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of the factors, by name, for a fixed weighting of all outputs."""
    model.eval()
    generator = torch.Generator().manual_seed(11)
    outputs = tensors(model(**batch))
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    return {
        name.removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name and parameter.grad is not None
    }


def measure(entry: Entry, capture: Any, *, peft: bool = True) -> Outcome:
    """Transform the model and compare with the base, and with peft where it can do the same."""
    outcome, batch = Outcome(entry.name, capture), entry.batch()
    # frozen as LoRA freezes it: torch picks kernels by requires_grad
    base = entry.model().requires_grad_(False)
    expected = {training: run(base, batch, training=training) for training in (False, True)}
    model = entry.model()
    keys = list(model.state_dict())
    torch.manual_seed(5)
    start = time.perf_counter()
    try:
        lora = lora_transform(
            model, LoraConfig(r=4, lora_alpha=8, target_modules=entry.targets), capture=capture, example_inputs=batch
        )
    except CaptureError as refusal:
        outcome.refused = str(refusal)
        return outcome
    outcome.seconds = time.perf_counter() - start
    outcome.sites = len(lora._specs())
    outcome.eval_equal = same(run(lora, batch), expected[False])
    outcome.train_equal = same(run(lora, batch, training=True), expected[True])
    outcome.keys_equal = [key for key in lora.state_dict() if "lora_" not in key] == keys
    if peft:
        _compare_with_peft(entry, lora, batch, outcome)
    randomise(lora)
    unmerged = run(lora, batch)
    outcome.merged_error = error(run(lora.merge_and_unload(), batch), unmerged)
    return outcome


def _compare_with_peft(entry: Entry, lora: LoraModel, batch: dict[str, Any], outcome: Outcome) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns on Conv1D, tied weights and more
        theirs = get_peft_model(
            entry.model_with_seed_kept(), PeftConfig(r=4, lora_alpha=8, target_modules=entry.targets)
        )
    own, other = dict(lora.named_parameters()), dict(theirs.named_parameters())
    names = [name for name in own if "lora_" in name]
    assert sorted(names) == sorted(n.removeprefix("base_model.model.") for n in other if "lora_" in n)
    outcome.init_equal = all(torch.equal(own[name], other[f"base_model.model.{name}"]) for name in names)
    randomise(lora)
    randomise(theirs)
    outcome.output_error = error(run(lora, batch), run(theirs, batch))
    ours, reference = gradients(lora, batch), gradients(theirs, batch)
    assert set(ours) == set(reference)
    outcome.gradient_error = error([ours[name] for name in names], [reference[name] for name in names])
