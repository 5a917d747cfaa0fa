"""Reading safetensors files strictly, and writing them so that the same tensors give the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from fxlora.errors import CheckpointError

_LARGEST_HEADER = 100_000_000


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Args:
        path: the file.
        tensors: any dtypes and shapes; shared or strided storage is copied.
    """
    storages: set[int] = set()
    own: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    save_file(own, path, metadata={"format": "pt"})  # with one entry its order cannot vary
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # the library creates files for the owner only


def read_header(path: Path) -> dict[str, Any]:
    """The names, dtypes and shapes in a safetensors file, checked.

    Returns:
        By tensor name: a dict with `dtype` and `shape`.

    Raises:
        CheckpointError: when the file is missing, truncated, no safetensors file, or names a tensor twice.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(_LARGEST_HEADER, path.stat().st_size):
            raise CheckpointError(f"{path} is no safetensors file, or is cut short; write or fetch it again")
        text = file.read(size)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise CheckpointError(f"{path} has a broken header: {error}") from error
    header.pop("__metadata__", None)
    try:
        with safetensors.safe_open(path, "pt") as file:  # checks offsets and sizes
            file.keys()
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}; write or fetch it again") from error
    return cast("dict[str, Any]", header)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"'{name}' appears twice")
        result[name] = value
    return result


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: as `read_header`.
    """
    names = list(read_header(path))
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names}
