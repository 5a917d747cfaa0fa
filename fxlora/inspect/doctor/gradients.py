"""Checks with a batch: one forward and one backward pass, and what became of each parameter's gradient.

The model stays as it is: parameters, gradients, buffers, modes and the random state.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxlora.capture.inputs import Example, undisturbed
from fxlora.inspect.doctor.patient import Patient, is_zero
from fxlora.inspect.doctor.report import Finding
from fxlora.inspect.doctor.trace import Cut, Trace
from fxlora.inspect.doctor.values import bad_gradients

Loss = Callable[[Any], Tensor]
"""From a model's output to the loss."""

_REASONS = {
    "no_grad": (
        "gradients are switched off there by torch.no_grad()",
        "take the no_grad block, decorator or set_grad_enabled(False) away, or leave these layers out of the targets",
    ),
    "inference_mode": (
        "it runs under torch.inference_mode() there",
        "take the inference_mode block away, or leave these layers out of the targets",
    ),
    "checkpoint": (
        "reentrant gradient checkpointing gives no gradient to a segment of which no input requires one",
        "call fxlora.enable_input_require_grads(model), or use checkpointing with use_reentrant=False",
    ),
    "detached": (
        "the result has no history there: detach(), .data, or a function without a derivative",
        "take it off the way to the loss, or leave these layers out of the targets",
    ),
    "opaque": (
        "it gives back what has no history: a function of one's own without a derivative, an extension or numpy",
        "give it a derivative (torch.autograd.Function), or leave these layers out of the targets",
    ),
    "not differentiable": (
        "the result has integers or truth values, which have no gradient, or leaves torch",
        "use a differentiable form, such as softmax in place of argmax, or leave these layers out of the targets",
    ),
}


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward and backward pass.

    Attributes:
        trace: what the forward pass did.
        gradients: by id of the parameter; None where there is none.
    """

    trace: Trace
    gradients: dict[int, Tensor | None]


def gradients(patient: Patient, example: Example, loss: Loss | None) -> tuple[list[Finding], int | None]:
    """The findings of a training step on a batch, and the bytes that it saved for the backward pass."""
    trained = [each for each in patient.whole.parameters() if each.requires_grad]
    if not trained:
        return [], None
    try:
        first = _run(patient, example, loss, training=True)
    except Exception as error:  # noqa: BLE001 (whatever a model raises is what the report is about)
        text = " ".join(str(error).split())[:300]
        finding = Finding(
            "error",
            "batch-fails",
            f"the model cannot be trained on this batch: {type(error).__name__}: {text}",
            "a training step raises the same error",
            "call the model on the batch yourself for the whole traceback; a batch is a tensor, a tuple of arguments or a "
            "dict of keyword arguments",
        )
        return [finding], None
    found = [
        *_read_elsewhere(patient, first),
        *_absent(patient, first, lambda: _run(patient, example, loss, training=False)),
        *_zero(patient, first),
    ]
    bad = [name for name, each in _named(patient) if not _is_finite(first.gradients.get(id(each)))]
    return [*found, *([bad_gradients(bad)] if bad else [])], first.trace.saved_bytes


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(gradient.isfinite().all())


def _named(patient: Patient) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that require gradients, by their names in the transformed model, then those around it."""
    inside = {id(each): name for name, each in patient.lora.named_parameters()}
    for name, each in patient.whole.named_parameters():
        if each.requires_grad:
            yield inside.get(id(each), name), each


# ---- the pass ----


def _run(patient: Patient, example: Example, loss: Loss | None, *, training: bool) -> _Pass:
    model = patient.whole.module if _is_parallel(patient.whole) else patient.whole
    model = cast(nn.Module, model)
    parameters = [each for each in model.parameters() if each.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code hides what it runs
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(undisturbed(model, training))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_own_gradients(parameters))
        trace = Trace(model, patient.called_weights().values())
        value = recording_run(trace, model, _usable(example), loss)
        if value.requires_grad:
            value.backward()
        return _Pass(trace, {id(each): each.grad for each in parameters})


def _usable(example: Example) -> Example:
    """The example with tensors that autograd takes: those made under `inference_mode` it refuses."""
    values = pytree.tree_map_only(Tensor, lambda each: each.clone() if each.is_inference() else each, example.args)
    named = pytree.tree_map_only(Tensor, lambda each: each.clone() if each.is_inference() else each, example.kwargs)
    return Example(values, named)


def recording_run(trace: Trace, model: nn.Module, example: Example, loss: Loss | None) -> Tensor:
    """The loss of one recorded forward pass."""
    with trace.recording():
        output = example.run(model)
        return _loss_of(output) if loss is None else loss(output)


def _is_parallel(model: nn.Module) -> bool:
    return isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))


@contextmanager
def _own_gradients(parameters: list[nn.Parameter]) -> Generator[None]:
    """Start without gradients and put those back that were there; hooks that step an optimizer do not run."""
    before = [(each, each.grad) for each in parameters]
    hooks = [cast("dict[int, Any]", each._post_accumulate_grad_hooks or {}) for each in parameters]
    kept = [dict(each) for each in hooks]
    for each in parameters:
        each.grad = None
    for own in hooks:
        own.clear()
    try:
        yield
    finally:
        for each, gradient in before:
            each.grad = gradient
        for own, calls in zip(hooks, kept, strict=True):
            own.update(calls)


def _loss_of(output: Any) -> Tensor:
    """The loss in an output, or if it has none a random combination of all that it holds.

    A plain sum would not do: that of a softmax or a normalised output is constant.
    """
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if isinstance(found, Tensor):
        return found
    tensors = [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor) and each.requires_grad]
    sums = [(each * torch.randn_like(each)).sum().abs().float() for each in tensors]
    return torch.stack([each.to(sums[0].device) for each in sums]).sum() if sums else torch.zeros(())


# ---- weights that are used without their layers ----


def _read_elsewhere(patient: Patient, first: _Pass) -> Iterator[Finding]:
    readers = first.trace.read_elsewhere
    found = {site: readers[id(weight)] for site, weight in patient.called_weights().items() if id(weight) in readers}
    if found:
        operation, module = next(iter(found.values()))
        reader = f"'{module}'" if module else "the model's own forward"
        yield Finding(
            "warning",
            "weight-read-elsewhere",
            f"the weights of adapted layers are used without calling these layers: '{operation}' in {reader} reads one",
            "there the base's weight acts alone, without the adapter; after a merge it would be the changed one",
            "call the layer there, leave it out of the targets, or transform with capture='symbolic' or 'export', which see "
            "every use of a weight",
            tuple(found),
        )


# ---- what became of the gradients ----


def _absent(patient: Patient, first: _Pass, again: Callable[[], _Pass]) -> Iterator[Finding]:
    idle = patient.trained - patient.acting_names() - _copied(patient)
    missing: dict[str, list[Tensor]] = {}
    places = _places(patient)
    for name, each in _named(patient):
        if name not in idle and first.gradients.get(id(each)) is None:
            missing.setdefault(places.get(name, name), []).append(each)
    cuts: dict[Cut, list[str]] = {}
    unread: list[str] = []
    unused: list[str] = []
    for place, parameters in missing.items():
        cut = first.trace.cut_after(parameters)
        if cut is not None:
            cuts.setdefault(cut, []).append(place)
        else:
            (unused if first.trace.reads(parameters) else unread).append(place)
    for cut, names in _grouped(cuts).items():
        yield _cut_finding(cut, names)
    if unused:
        yield Finding(
            "error",
            "no-gradient",
            "no gradient (None) reaches these layers: the loss does not depend on them",
            "they run, and nothing of what they compute goes into the loss, such as in a pooler or a head that the task "
            "does not use",
            "leave them out of the targets, or use their results in the loss",
            tuple(unused),
        )
    if unread:
        second = again()
        read = {site for site, each in patient.called_weights().items() if id(each) in first.trace.read_elsewhere}
        unread = [place for place in unread if place not in read and not second.trace.reads(missing[place])]
    if unread:
        yield Finding(
            "warning",
            "not-run",
            "no gradient (None) reaches these layers: they did not run on this batch",
            "the model goes another way for it (an expert that got no token, an input that was not given)",
            "use a batch that runs them, or leave them out of the targets",
            tuple(unread),
        )


def _grouped(cuts: dict[Cut, list[str]]) -> dict[Cut, list[str]]:
    """Cuts by checkpointing together: there is one in every block."""
    found: dict[Cut, list[str]] = {}
    first: dict[str, Cut] = {}
    for cut, names in cuts.items():
        key = first.setdefault(cut.reason, cut) if cut.reason == "checkpoint" else cut
        found.setdefault(key, []).extend(names)
    return found


def _cut_finding(cut: Cut, places: list[str]) -> Finding:
    why, remedy = _REASONS[cut.reason]
    inside = f"in '{cut.module}'" if cut.module else "in the model's own forward, or in the loss"
    line = f" ({cut.line})" if cut.line else ""
    return Finding(
        "error",
        "no-gradient",
        f"no gradient (None) reaches these layers: the way from the loss is cut at '{cut.operation}' {inside}{line}",
        why,
        remedy,
        tuple(places),
    )


def _copied(patient: Patient) -> set[str]:
    return {f"{saved.path}.{name}" for saved in patient.lora._lora.copies for name in saved.parameters}


def _places(patient: Patient) -> dict[str, str]:
    """The layer that each parameter of an adapter belongs to."""
    found = {name: spec.site for spec in patient.branches() for name in patient.parts(spec)}
    for saved in patient.lora._lora.copies:
        found |= {f"{saved.path}.{name}": saved.module for name in saved.parameters}
    return found


def _zero(patient: Patient, first: _Pass) -> Iterator[Finding]:
    acting = patient.acting
    fresh: list[str] = []
    zero: list[str] = []
    for spec, A, B in patient.with_factors():
        if spec.adapter not in acting or spec.scaling == 0:
            continue
        for factor, other in ((A, B), (B, A)):
            gradient = first.gradients.get(id(factor))
            if gradient is not None and not bool(gradient.any()):
                (fresh if is_zero(other) and not is_zero(factor) else zero).append(spec.site)
    if fresh:
        yield Finding(
            "note",
            "fresh-adapter",
            "the gradient of one factor is exactly zero, as the other factor is zero",
            "this is healthy before the first step: the branch starts as nothing, and the other factor moves first",
            "none is needed",
            tuple(dict.fromkeys(fresh)),
        )
    if zero:
        yield Finding(
            "warning",
            "zero-gradient",
            "the gradient is exactly zero, though a path from the loss exists",
            "what enters the layers is zero, what follows is multiplied by zero or is dead (a ReLU below zero), or in float16 "
            "the gradient is too small to be held",
            "look at the layers' inputs and outputs on this batch; use bfloat16, or a GradScaler with float16",
            tuple(dict.fromkeys(zero)),
        )
