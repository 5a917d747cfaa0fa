"""Which implementation computes the low-rank terms: Triton's kernels or ATen's products, by device, dtype and shape."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

LARGEST_RANK = 64
"""Above it the products are no longer bound by memory, and cuBLAS is faster."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether Triton's kernels are used, and why or why not."""

    kernels: bool
    reason: str


@functools.cache
def _triton_works() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels can run on a device: a GPU of compute capability 8.0 or later, or the interpreter."""
    if not _triton_works():
        return False
    if device.type != "cuda":
        return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.version.hip is None


def composes(device: torch.device) -> bool:
    """Whether layers and branches are best left to torch's own operations: on CPUs, see `fxlora.ops.composed`."""
    return device.type == "cpu"


def choose(
    device: torch.device, dtype: torch.dtype, rows: int, outputs: tuple[int, ...], ranks: tuple[int, ...]
) -> Choice:
    """Choose for linear layers that share an input.

    Args:
        device: of the input.
        dtype: of the input.
        rows: of the input: tokens.
        outputs: features of each layer's output.
        ranks: of each layer's branch.
    """
    if not has_kernels(device):
        return Choice(False, f"no Triton kernels on {device.type}")
    if not rows:
        return Choice(False, "an empty batch")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice(False, f"{str(dtype).removeprefix('torch.')} activations: only 16-bit ones have kernels")
    if len(outputs) > 3:
        return Choice(False, f"{len(outputs)} layers share an input: the kernels take up to 3")
    if max(ranks) > LARGEST_RANK:
        return Choice(False, f"rank {max(ranks)} is above {LARGEST_RANK}: cuBLAS is faster")
    return Choice(True, "bound by memory: each input is read once")
