"""`doctor`: runs the checks on a model, and on what it does with a batch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from fxlora.capture.inputs import Example
from fxlora.errors import AdapterError, CaptureError
from fxlora.inspect.doctor.gradients import Loss, gradients
from fxlora.inspect.doctor.memory import measured, memory
from fxlora.inspect.doctor.patient import Patient
from fxlora.inspect.doctor.report import DoctorReport, Finding
from fxlora.inspect.doctor.structure import structure
from fxlora.inspect.doctor.training import everything_trainable, training
from fxlora.inspect.doctor.values import values
from fxlora.model import LoraModel

_NOT_TRAINED = {"missing-parameter", "no-adapter", "slots-not-trained"}
"""What makes it useless to look for gradients."""


def doctor(
    model: nn.Module,
    batch: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
) -> DoctorReport:
    """Say what is wrong with a model that shall be trained, or was: what, where, why, and what to do.

    Without a batch nothing is run. With one there is a forward and a backward pass in training mode, uncompiled, and for
    each adapter without a gradient the operation and the module where the way from the loss is cut. The model stays as it
    is: parameters, gradients, buffers, modes and the random state.

    Args:
        model: a transformed model, also compiled, in `DistributedDataParallel` or inside of another module.
        batch: a tensor, a tuple of arguments or a dict of keyword arguments, for a call of `model`.
        optimizer: what trains the model; its parameters and its state are looked at.
        loss: from the model's output to the loss; the output's `loss` if None, or a random combination of all outputs.

    Returns:
        The findings, worst first, and where the memory of training goes.

    Raises:
        AdapterError: when `model` holds several transformed models.

    Example:
        >>> import fxlora, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model = fxlora.lora_transform(model, fxlora.LoraConfig(r=2, target_modules=["0", "2"]))
        >>> report = fxlora.doctor(model, torch.randn(4, 8), optimizer=optimizer)
        >>> [(finding.severity, finding.code) for finding in report.findings][0]
        ('error', 'not-in-optimizer')
    """
    example = _example(batch)
    examined = ("model", *(["batch"] if example else []), *(["optimizer"] if optimizer is not None else []))
    found = [each for each in model.modules() if isinstance(each, LoraModel)]
    if len(found) > 1:
        raise AdapterError(f"{type(model).__name__} has several transformed models; give one of them")
    if not found:
        return DoctorReport.of(type(model).__name__, [_plain(model), *everything_trainable(model)], ("model",))
    patient = Patient.of(model, found[0], optimizer)
    findings = list(structure(patient))
    findings += list(itertools.chain(training(patient), values(patient)))
    useless = any(finding.code in _NOT_TRAINED for finding in findings)
    activations = None
    if example is not None and not useless:
        more, activations = gradients(patient, example, loss)
        findings += more
    size = measured(patient, activations)
    findings += memory(patient, size)
    return DoctorReport.of(_subject(patient.lora), dict.fromkeys(findings), examined, size)


def _example(batch: Any) -> Example | None:
    try:
        return Example.of(batch)
    except CaptureError as error:
        raise AdapterError(str(error).replace("example_inputs", "batch")) from error


def _plain(model: nn.Module) -> Finding:
    peft = any(type(each).__module__.startswith("peft.") for each in model.modules())
    return Finding(
        "error",
        "not-transformed",
        f"this {type(model).__name__} has no adapters of fxlora" + " (its layers are peft's)" * peft,
        "nothing of LoRA runs in it" if not peft else "peft's layers run in it, which are not looked at",
        "use what lora_transform(model, config) returns" + ", on the model without peft's layers" * peft,
    )


def _subject(lora: LoraModel) -> str:
    state = lora._lora
    adapters = ", ".join(f"'{name}'{'' if name in state.active else ' (not active)'}" for name in state.adapters)
    return f"{state.base_class[0]}, capture '{state.capture}', adapters: {adapters or 'none'}"
