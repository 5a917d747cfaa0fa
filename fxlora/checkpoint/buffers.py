"""What one thread of a merge has for itself: memory that is used again and again, and open files."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxlora._passes import Memory
from fxlora.checkpoint.file_ranges import Files


@dataclass(slots=True)
class Worker:
    """One thread's files and memory."""

    files: Files
    memory: Memory = field(default_factory=Memory)

    def buffer(self, use: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for one use: `(numel,)`, with whatever was there."""
        return self.memory.buffer(use, torch.Size((numel,)), dtype, torch.device("cpu"))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which must live as long as this is used."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
