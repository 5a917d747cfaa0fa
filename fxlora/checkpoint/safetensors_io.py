"""Safetensors files, written tensor by tensor and byte for byte alike, and read strictly.

The header is made and parsed here: the safetensors library accepts duplicate names, creates files that only their
owner can read, and wants all tensors at once. What it writes for the same tensors is the same, bit by bit.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxlora.checkpoint.header import BITS, MAX_HEADER, HeaderError, parse
from fxlora.errors import CheckpointError
from fxlora.files import open_plain

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""By the format's names, in the order in which the library puts the tensors of a file: last ones first."""

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(_DTYPES)}
METADATA = {"format": "pt"}
"""What transformers and peft want to see in a file's header."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says of a tensor. `dtype` is the format's name, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> Entry:
        """The entry of a tensor, or of what it becomes in another dtype.

        Raises:
            CheckpointError: when the format has no such dtype.
        """
        wanted = dtype or tensor.dtype
        if wanted not in _NAMES:
            raise CheckpointError(f"safetensors files cannot hold {wanted}; convert the tensor first")
        return cls(_NAMES[wanted], tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype, None if torch has none or it is not known here."""
        return _DTYPES.get(self.dtype)

    @property
    def num_entries(self) -> int:
        """Number of the tensor's elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return -(-self.num_entries * BITS[self.dtype] // 8)


# ---- writing ----


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Where everything is in a file that is to be written.

    Attributes:
        header: the bytes before the data.
        starts: the position of each tensor's first byte in the file, in the file's order.
        nbytes: size of the file.
    """

    header: bytes
    starts: dict[str, int]
    nbytes: int

    @classmethod
    def of(cls, entries: Mapping[str, Entry], metadata: Mapping[str, str] = METADATA) -> FileLayout:
        """The layout that the library gives to these tensors, whatever their order here."""
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        offsets: dict[str, int] = {}
        offset = 0
        for name in sorted(entries, key=lambda name: (-_RANK[entries[name].dtype], name)):
            entry, end = entries[name], offset + entries[name].nbytes
            header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
            offsets[name], offset = offset, end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = struct.pack("<Q", len(text)) + text
        return cls(start, {name: len(start) + at for name, at in offsets.items()}, len(start) + offset)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = METADATA) -> None:
    """Write tensors to a new file. Views and tensors that share memory are written out, each by itself.

    Args:
        path: the file; its permissions are those of any new file.
        tensors: by name, any shape, strides, device and dtype of the format.
        metadata: texts for the header, written in the order of their names.

    Raises:
        CheckpointError: for a tensor without plain data, or of a dtype that the format lacks.
    """
    for name, tensor in tensors.items():
        check_plain(tensor, f"'{name}'")
    write_tensors(path, {name: Entry.of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__, metadata)


def write_tensors(
    path: Path,
    entries: Mapping[str, Entry],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """Write a file whose tensors are made one after another: only one of them needs to be in memory.

    Args:
        path: the file.
        entries: dtype and shape of each tensor by name.
        load: called once for each name, in the file's order; gives the tensor.
        metadata: texts for the header.
    """
    layout = FileLayout.of(entries, metadata)
    with open(path, "wb") as file:
        file.write(layout.header)
        for name in layout.starts:
            tensor = load(name)
            assert Entry.of(tensor) == entries[name], f"{name}: announced {entries[name]}, got {Entry.of(tensor)}"
            _write_data(file, tensor)


def check_plain(tensor: Tensor, what: str) -> None:
    """Refuse tensors whose data is not a plain array in memory.

    Raises:
        CheckpointError: beginning with `what`.
    """
    if tensor.is_meta:
        raise CheckpointError(f"{what} is on the meta device and has no data; load real weights first")
    if is_traceable_wrapper_subclass(tensor):
        raise CheckpointError(
            f"{what} is a {type(tensor).__name__}, not a plain tensor; gather or dequantize it first (a gathered state "
            "dict can be passed to save_pretrained as state_dict)"
        )


def _write_data(file: BinaryIO, tensor: Tensor) -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are written on little-endian machines only")
    data = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    size = data.numel() * data.element_size()
    if size:
        file.write((ctypes.c_char * size).from_address(data.data_ptr()))


# ---- reading ----


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file, checked in full against the file's size.

    Attributes:
        path: the file.
        entries: dtype and shape of each tensor, in the order of the header.
        metadata: the header's texts.
        offsets: by tensor, the bytes of the file that are its data. Together they are all that follows the header.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    offsets: dict[str, range]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An open safetensors file whose header was checked.

    Attributes:
        header: what the file holds, and where.
    """

    header: Header
    _file: Any

    @property
    def path(self) -> Path:
        """The file."""
        return self.header.path

    @property
    def entries(self) -> dict[str, Entry]:
        """Dtype and shape of each tensor, in the order of the header."""
        return self.header.entries

    @property
    def metadata(self) -> dict[str, str]:
        """The header's texts."""
        return self.header.metadata

    def load(self, name: str) -> Tensor:
        """A tensor, on the CPU. It may be a view of the file: clone it to keep it.

        Raises:
            CheckpointError: when torch has no such dtype.
        """
        try:
            return cast(Tensor, self._file.get_tensor(name))
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: '{name}' cannot be read: {error}") from error


@contextmanager
def open_tensors(path: Path) -> Generator[TensorFile]:
    """Open a safetensors file for reading.

    Raises:
        CheckpointError: as `read_header`.
    """
    header = read_header(path)
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}. Copy or download it again") from error
    with cast(Any, opened) as file:
        yield TensorFile(header, file)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; of the data nothing is read.

    Raises:
        CheckpointError: when the file does not exist, is no plain file, is truncated or corrupt, or breaks a rule of
            `fxlora.checkpoint.header`. Names the file, the tensor and the remedy.
    """
    text, size = _header_text(path)
    try:
        entries, offsets, metadata = parse(text, size, Entry)
    except HeaderError as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}. {error.remedy}") from error
    return Header(path, entries, metadata, offsets)


_NOT_SAFETENSORS = {
    b"PK\x03\x04": "is a zip archive, as torch.save writes them, whose pickle can run code when it is read, and is refused; "
    "load it where you trust it and save its tensors with safetensors",
    b"\x80": "is a pickle, which can run code when it is read, and is refused; load it where you trust it and save its "
    "tensors with safetensors",
    b"version ": "is a pointer of Git LFS and not the file itself; run git lfs pull, or download the file",
}
"""By their first bytes, files of other kinds under the name of one of safetensors."""


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header as it is in the file, and the file's size."""
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) == 8 and length <= min(size - 8, MAX_HEADER):
                text = file.read(length)
                if len(text) == length:
                    return text, size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for first, reason in _NOT_SAFETENSORS.items():
        if start.startswith(first):
            raise CheckpointError(f"{path} {reason}")
    raise CheckpointError(
        f"{path} is truncated or corrupt: it has {size:,} bytes"
        + (f", and its header should have {length:,}" if len(start) == 8 else "")
        + ". Copy or download it again"
    )
