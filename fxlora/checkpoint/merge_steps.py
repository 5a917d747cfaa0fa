"""The work of a `MergePlan` in pieces of bounded size, each of which makes a range of bytes of one output file.

Which pieces there are depends on the plan alone. `fxlora.checkpoint.merge_run` does them, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fxlora._passes import Fold, Loss
from fxlora.checkpoint.base_view import rows_of
from fxlora.checkpoint.buffers import Worker, bytes_of
from fxlora.checkpoint.changes import Change
from fxlora.checkpoint.file_ranges import Files
from fxlora.checkpoint.merge_plan import Output
from fxlora.checkpoint.rounding import convert
from fxlora.checkpoint.safetensors_io import FileLayout
from fxlora.checkpoint.sources import Source

BLOCK = 1 << 20
"""Entries that are computed at a time. A row is never divided."""
_COPY = 1 << 24
"""Bytes that are copied at a time."""


Rounding = Literal["sample", "all"]
"""How much of what rounding takes is measured: some rows of each weight, spread evenly, or all of it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of bytes of an output file.

    Attributes:
        start: position in the file.
        nbytes: its length.
        first: what the task counts, such as entries, from where the piece begins.
    """

    start: int
    nbytes: int
    first: int


class Task(Protocol):
    """Pieces of one file that are made alike."""

    @property
    def name(self) -> str:
        """Of the tensor, for messages."""
        ...

    @property
    def source(self) -> Path:
        """The file of the base, for messages."""
        ...

    @property
    def pieces(self) -> Sequence[Piece]:
        """In the order of the file."""
        ...

    def prepare(self, files: Files) -> None:
        """What is to be done once, before the first piece."""
        ...

    def make(self, piece: Piece, worker: Worker) -> memoryview | None:
        """Write a piece; returns its bytes, valid until the next call of the same worker, or None if it has not read them."""
        ...


Losses = dict[str, dict[int, Loss]]
"""What rounding takes, by tensor, and by the piece's `first`."""


def tasks(
    outputs: Sequence[Output],
    layout: FileLayout,
    path: Path,
    losses: Losses | None = None,
    rounding: Rounding | None = None,
) -> list[Task]:
    """All that makes one file, apart from its header, in the order of the file.

    Args:
        outputs: the tensors of the file.
        layout: of the file.
        path: of the file.
        losses: receives what rounding takes of updates, piece by piece.
        rounding: how much of it is to be measured.
    """
    by_name = {output.name: output for output in outputs}
    result: list[Task] = []
    copies: list[tuple[Source, int]] = []
    for name, start in layout.starts.items():
        output = by_name[name]
        if output.change is None and output.source.decoder is None and output.entry == output.source.entry:
            if copies and not _follows(copies[-1][0], output.source):
                result.append(_copy_of(copies, path))
                copies = []
            copies.append((output.source, start))
            continue
        if copies:
            result.append(_copy_of(copies, path))
            copies = []
        result.append(_Tensor(output, path, start, {} if losses is None else losses.setdefault(name, {}), rounding))
    return [*result, _copy_of(copies, path)] if copies else result


# ---- unchanged tensors ----


def _follows(first: Source, second: Source) -> bool:
    return first.path == second.path and first.start + first.entry.nbytes == second.start


def _copy_of(copies: Sequence[tuple[Source, int]], path: Path) -> _Copy:
    (source, start), nbytes = copies[0], sum(source.entry.nbytes for source, _ in copies)
    return _Copy(source, path, _cut(start, nbytes, 1, _COPY))


@dataclass(frozen=True, slots=True)
class _Copy:
    """A range of the base's bytes that stays as it is: one tensor, and those that follow it in both files."""

    tensor: Source
    path: Path
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def source(self) -> Path:
        return self.tensor.path

    def prepare(self, files: Files) -> None:
        pass

    def make(self, piece: Piece, worker: Worker) -> None:
        worker.files.copy(self.source, self.tensor.start + piece.first, self.path, piece.start, piece.nbytes)


def _cut(start: int, numel: int, itemsize: int, step: int) -> tuple[Piece, ...]:
    return tuple(
        Piece(start + first * itemsize, min(step, numel - first) * itemsize, first) for first in range(0, numel, step)
    )


# ---- others ----


class _Tensor:
    """A tensor that is computed: converted, replaced, or folded into."""

    def __init__(
        self, output: Output, path: Path, start: int, losses: dict[int, Loss], rounding: Rounding | None
    ) -> None:
        dtype = output.entry.torch_dtype
        assert dtype is not None
        self.name, self.source = output.name, output.source.path
        self._tensor, self._path, self._dtype = output.source, path, dtype
        self._change = output.change or Change()
        self._shape = output.entry.shape
        folds = self._change.folds
        storage = self._change.storage(self._shape) if folds else (1, output.entry.num_entries, 1)
        if output.source.decoder is not None:  # which makes whole rows
            storage = (1, *output.source.decoder.shape)
        self._rows, self._columns = storage[1:]
        self._fold: Fold | None = None
        self._losses, self._rounding = losses, rounding
        group = self._rows * self._columns
        step = max(1, BLOCK // max(1, self._columns)) * self._columns
        self.pieces = tuple(
            replace(piece, first=piece.first + i * group)
            for i in range(storage[0])
            for piece in _cut(start + i * group * dtype.itemsize, group, dtype.itemsize, step)
        )

    def prepare(self, files: Files) -> None:
        if not self._change.folds:
            return

        def read(group: int, first: int, last: int) -> Tensor:
            rows = torch.empty((last - first) * self._columns, dtype=self._before)
            return self._read(files, (group * self._rows + first) * self._columns, rows).view(-1, self._columns)

        self._fold = self._change.fold(self._shape, self._before, read, self._dtype)

    def make(self, piece: Piece, worker: Worker) -> memoryview:
        numel = piece.nbytes // self._dtype.itemsize
        out = worker.buffer("after", numel, self._dtype)
        before = self._read(worker.files, piece.first, worker.buffer("before", numel, self._before))
        if self._fold is None:
            out.copy_(convert(before, self._dtype))
        else:
            group, row = divmod(piece.first // self._columns, self._rows)
            loss = self._loss(piece)
            self._fold.into(
                out.view(-1, self._columns), before.view(-1, self._columns), group, row, loss, worker.memory
            )
        view = bytes_of(out)
        worker.files.write(self._path, piece.start, view)
        return view

    def _loss(self, piece: Piece) -> Loss | None:
        if self._rounding is None:
            return None
        loss = Loss() if self._rounding == "all" else Loss.sample(math.prod(self._shape))
        self._losses[piece.first] = loss
        return loss

    @property
    def _before(self) -> torch.dtype:
        dtype = self._tensor.dtype if self._change.value is None else self._change.value.dtype
        assert dtype is not None
        return dtype

    def _read(self, files: Files, first: int, out: Tensor) -> Tensor:
        """Entries of what the tensor starts from, in `out` or in memory that must not be written."""
        value = self._change.value
        if value is not None:
            return value.reshape(-1)[first : first + out.numel()]
        if self._tensor.decoder is not None:
            rows = first // self._columns, (first + out.numel()) // self._columns
            return self._tensor.decoder.rows(self._tensor, partial(rows_of, files), *rows).view(-1)
        files.read_into(self._tensor.path, self._tensor.start + first * out.itemsize, bytes_of(out))
        return out
