"""Arithmetic in the dtype of its operands, also where the model runs under autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast for the tensor's device; none where it is off anyway, and a graph needs no modes."""
    device = tensor.device.type
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


_WITH_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Devices; Dynamo of torch 2.11 cannot trace `torch.amp.is_autocast_available`."""
