"""Arithmetic in the dtype of its operands, also where the model runs under autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast for the tensor's device."""
    device = tensor.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()
