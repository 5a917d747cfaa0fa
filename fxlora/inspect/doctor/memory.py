"""Where the memory of training goes, and why it is not lower."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fxlora.inspect.doctor.patient import Patient, bytes_of
from fxlora.inspect.doctor.report import Finding, Memory
from fxlora.rendering import human_bytes

_MUCH = 0.5
"""The share of the whole from which one part of it is worth a note."""


def measured(patient: Patient, activations: int | None) -> Memory:
    """The memory of training, without what a library keeps for itself."""
    parameters = list(patient.whole.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    size = sum(map(bytes_of, trained))
    states = [] if patient.optimizer is None else list(patient.optimizer.state.values())
    kept = sum(bytes_of(value) for state in states for value in state.values() if isinstance(value, Tensor))
    weights = sum(map(bytes_of, [*parameters, *patient.whole.buffers()]))
    return Memory(weights, size, size, kept or 2 * size, activations)


def memory(patient: Patient, found: Memory) -> Iterator[Finding]:
    """The notes on memory."""
    yield from _copies(patient, found)
    total = found.weights + found.gradients + found.optimizer + (found.activations or 0)
    checkpoints = any(getattr(module, "gradient_checkpointing", False) is True for module in patient.whole.modules())
    if found.activations and found.trained and found.activations > _MUCH * total and not checkpoints:
        yield Finding(
            "note",
            "activations-dominate",
            f"one step on this batch saves {human_bytes(found.activations)} for the backward pass, "
            f"{found.activations / total:.0%} of all",
            "LoRA saves the gradients and the optimizer's state of the base, not what layers keep of their inputs",
            "use gradient checkpointing (model.gradient_checkpointing_enable()), a smaller or shorter batch, or fewer "
            "targets; the first adapted layer decides how far back gradients go",
        )


def _copies(patient: Patient, found: Memory) -> Iterator[Finding]:
    sizes: dict[str, int] = {}
    for saved in patient.lora._lora.copies:
        own = [patient.parameter(f"{saved.path}.{name}") for name in saved.parameters]
        sizes[saved.module] = sum(bytes_of(each) for each in own if each is not None and each.requires_grad)
    if sum(sizes.values()) > _MUCH * found.trained and sum(sizes.values()):
        yield Finding(
            "note",
            "whole-modules-trained",
            f"modules that are trained whole are {sum(sizes.values()) / found.trained:.0%} of what is trained",
            f"modules_to_save copies them: {human_bytes(sum(sizes.values()))} for the copies, as much for gradients, and "
            "twice as much for AdamW",
            "give embeddings and output layers LoRA as targets, or train some rows with trainable_token_indices",
            tuple(sizes),
        )
