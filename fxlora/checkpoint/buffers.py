"""What one thread of a merge has for itself: memory that is used again and again, and open files."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxlora.checkpoint.file_ranges import Files


@dataclass(slots=True)
class Worker:
    """One thread's files and buffers."""

    files: Files
    _buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def buffer(self, use: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for one use: `(numel,)`, with whatever was there. Fresh pages cost as much as filling them."""
        nbytes = numel * dtype.itemsize
        if use not in self._buffers or self._buffers[use].numel() < nbytes:
            self._buffers[use] = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffers[use][:nbytes].view(dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which must live as long as this is used."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
