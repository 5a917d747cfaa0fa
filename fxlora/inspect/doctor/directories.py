"""An adapter's files examined on the model of a directory, of which only the configuration is read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fxlora.config import LoraConfig
from fxlora.errors import FxloraError
from fxlora.host.skeleton import skeleton
from fxlora.inspect.doctor.examine import doctor
from fxlora.inspect.doctor.report import DoctorReport, Finding
from fxlora.transform import lora_transform


def examine_directories(model: Path, adapter: Path | None = None) -> DoctorReport:
    """Examine a saved adapter on a model whose weights are not read.

    Args:
        model: a Hugging Face model directory.
        adapter: directory of the adapter; None for a fresh one with the default targets.

    Returns:
        The findings, as if the adapter were to be trained on; an adapter that does not fit is one of them.

    Raises:
        CheckpointError: when `model` has no `config.json`.
    """
    host = _without_values(skeleton(model))
    try:
        config = LoraConfig() if adapter is None else adapter
        lora = lora_transform(host, config, capture="modules", is_trainable=True, load_base_weights=adapter is not None)
    except (FxloraError, NotImplementedError) as error:
        finding = Finding(
            "error",
            "does-not-fit",
            str(error),
            "the adapter cannot be put on this model",
            "see the message; `fxlora explain MODEL --config ADAPTER` shows what its targets match",
            () if adapter is None else (str(adapter),),
        )
        return DoctorReport.of(type(host).__name__, [finding], ("model",))
    return doctor(lora)


def _without_values(model: nn.Module) -> nn.Module:
    """A model on the meta device as one of zeros, which take no memory until they are written, on most systems."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                wanted = dtype if isinstance(dtype, torch.dtype) and each.is_floating_point() else each.dtype
                value = nn.Parameter(torch.zeros(each.shape, dtype=wanted), requires_grad=each.requires_grad)
                module._parameters[name] = made.setdefault(id(each), value)
        for name, each in module._buffers.items():
            if each is not None:
                module._buffers[name] = torch.zeros(each.shape, dtype=each.dtype)
    return model
