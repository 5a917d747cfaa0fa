"""Checks of what is trained: what requires gradients, and what the optimizer holds. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxlora.inspect.doctor.patient import Patient, bytes_of
from fxlora.inspect.doctor.report import Finding
from fxlora.registered import trainable_names
from fxlora.rendering import human_bytes

_ADAM_FACTOR = 3
"""A trained entry takes its gradient and AdamW's two values, of its own size each."""


def training(patient: Patient) -> Iterator[Finding]:
    """Everything about what is trained."""
    yield from _base(patient)
    yield from _adapters(patient)
    if patient.optimizer is not None:
        yield from _optimizer(patient)


def everything_trainable(model: nn.Module) -> Iterator[Finding]:
    """The finding for a model whose parameters all require gradients."""
    parameters = dict(model.named_parameters())
    if parameters and all(parameter.requires_grad for parameter in parameters.values()):
        yield _trained_base(parameters, whole=True)


def _trained_base(trained: dict[str, nn.Parameter], *, whole: bool) -> Finding:
    size = human_bytes(_ADAM_FACTOR * sum(map(bytes_of, trained.values())))
    return Finding(
        "error" if whole else "warning",
        "everything-trainable" if whole else "base-trainable",
        f"{'all' if whole else 'some'} parameters of the base require gradients",
        f"they are trained too: gradients and AdamW's state of them take {size} more, and the adapter's files do not hold "
        "what they learn",
        "freeze them: call set_adapter, which trains the adapter alone, after any requires_grad_(True); or name the "
        "modules in modules_to_save, where they are meant to be trained and saved",
        tuple(trained),
    )


def _base(patient: Patient) -> Iterator[Finding]:
    base = {name: each for name, each in patient.lora.named_parameters() if not _is_adapters(patient, name)}
    trained = {name: each for name, each in base.items() if each.requires_grad}
    if trained:
        yield _trained_base(trained, whole=len(trained) == len(base))


def _is_adapters(patient: Patient, name: str) -> bool:
    return name in patient.trained or any(part.startswith("lora_") for part in name.split("."))


def _adapters(patient: Patient) -> Iterator[Finding]:
    state = patient.lora._lora
    meant = {name: plan for name, plan in state.adapters.items() if not plan.config.inference_mode}
    if not any(each.requires_grad for each in patient.whole.parameters()):
        yield Finding(
            "error" if meant and patient.lora.training else "warning" if meant else "note",
            "nothing-trainable",
            "no parameter requires gradients",
            "a training step would fail or change nothing; this is as it should be for inference alone",
            "call set_adapter with the adapter's name to train it (load_adapter has is_trainable=True for that)",
            tuple(state.active),
        )
        return
    if state.mode == "slots":
        yield Finding(
            "note",
            "slots-not-trained",
            "the adapters are in slots",
            "the graphs read copies of the factors, which are for inference: no gradient reaches the factors",
            "call leave_slots() before training",
            tuple(state.adapters),
        )
    yield from _frozen(patient)
    acting = patient.acting_names()
    idle = [name for name in patient.trained - acting if _requires(patient, name)]
    copies = {f"{each.path}.{name}" for each in state.copies for name in each.parameters}
    idle = sorted(set(idle) - copies)
    if idle:
        merged = bool(state.merged)
        yield Finding(
            "warning",
            "idle-adapter",
            "parameters of adapters that do not run now require gradients",
            "the adapter is merged into the weights" * merged
            or "the adapter is not active, or adapters are disabled: it gets no gradient",
            "call unmerge_adapter before training" if merged else "call set_adapter with the adapter's name",
            tuple(idle),
        )


def _frozen(patient: Patient) -> Iterator[Finding]:
    for name in patient.acting:
        plan = patient.lora._lora.adapters[name]
        own = trainable_names([plan])
        frozen = sorted(each for each in own if not _requires(patient, each) and patient.parameter(each) is not None)
        if frozen and not plan.config.inference_mode:
            yield Finding(
                "warning",
                "frozen-adapter",
                f"{'all' if len(frozen) == len(own) else len(frozen)} parameters of the active adapter '{name}' are frozen",
                "they do not require gradients, and keep their values while the rest is trained",
                f"call set_requires_grad('{name}') or set_adapter('{name}')",
                tuple(frozen),
            )


def _requires(patient: Patient, name: str) -> bool:
    parameter = patient.parameter(name)
    return parameter is not None and parameter.requires_grad


def _optimizer(patient: Patient) -> Iterator[Finding]:
    held = {id(tensor): tensor for tensor in patient.held()}
    names = {id(parameter): name for name, parameter in patient.whole.named_parameters()}
    wanted = {name: each for name, each in patient.whole.named_parameters() if each.requires_grad}
    missing = [name for name, each in wanted.items() if id(each) not in held]
    if missing:
        yield Finding(
            "error",
            "not-in-optimizer",
            f"{len(missing)} of {len(wanted)} parameters that require gradients are not in the optimizer",
            "no step changes them: the optimizer was made before the adapter, or from other parameters",
            "make the optimizer after the transform, from fxlora.parameter_groups(model)",
            tuple(missing),
        )
    strangers = [tensor for key, tensor in held.items() if key not in names]
    if strangers:
        yield Finding(
            "warning",
            "stale-in-optimizer",
            f"the optimizer holds {len(strangers)} tensors that are not in the model",
            "they are of another model or of one before a change, such as a transform, a load or a move: their steps "
            "have no effect, and they stay in memory",
            "make the optimizer anew, from fxlora.parameter_groups(model)",
            tuple(sorted({f"tensor of shape {tuple(tensor.shape)}" for tensor in strangers})),
        )
    frozen = {names[key]: tensor for key, tensor in held.items() if key in names and not tensor.requires_grad}
    if frozen:
        state = sum(_state_bytes(patient, tensor) for tensor in frozen.values())
        yield Finding(
            "warning",
            "frozen-in-optimizer",
            f"the optimizer holds {len(frozen)} parameters that are frozen",
            f"they get no gradient and no step; its state of them takes {human_bytes(state)}",
            "make the optimizer from fxlora.parameter_groups(model), which has what is trained and nothing else",
            tuple(frozen),
        )


def _state_bytes(patient: Patient, tensor: Tensor) -> int:
    state: dict[str, Any] = {} if patient.optimizer is None else patient.optimizer.state.get(tensor, {})
    return sum(bytes_of(value) for value in state.values() if isinstance(value, Tensor))
