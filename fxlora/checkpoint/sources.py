"""A tensor of the base that a merge reads: where it is, and how weights are made of it if it is quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fxlora.checkpoint.safetensors_io import Entry


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the base.

    Attributes:
        path: the file.
        name: in that file.
        entry: its dtype and shape there.
        start: position of its first byte in the file.
        decoder: what makes weights of its numbers; None if they are the weights.
    """

    path: Path
    name: str
    entry: Entry
    start: int
    decoder: Decoder | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights as they are read: float64 for decoded ones; None if torch has no such dtype."""
        return self.entry.torch_dtype if self.decoder is None else torch.float64


Read = Callable[[Source, int, int], Tensor]
"""Some rows of a tensor as the file has them, along its first dimension, from one up to another. A scalar is one row."""


class Decoder(Protocol):
    """Makes weights of a quantized tensor."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weights, `(rows, columns)`."""
        ...

    def rows(self, source: Source, read: Read, start: int, stop: int) -> Tensor:
        """The weights of some rows, float64, `(stop - start, columns)`.

        Args:
            source: the quantized tensor.
            read: reads rows of it, and of the tensors beside it.
            start: the first row.
            stop: one after the last.
        """
        ...
