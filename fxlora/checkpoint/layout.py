"""The layout of a model checkpoint: one file of weights or shards with an index, and the files beside them.

Knows names and sizes, not what the weights mean.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from fxlora.checkpoint.leftovers import settle
from fxlora.checkpoint.manifest import MANIFEST_NAME
from fxlora.checkpoint.safetensors_io import Entry, read_header
from fxlora.config import CONFIG_NAME
from fxlora.errors import CheckpointError, ConfigError, shown
from fxlora.files import MAX_INDEX, inside, open_plain, read_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_READ_BY_LOADERS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data"),
    ".index.json",
)
_FILE_NAME = re.compile(r"(?!\.\.?$)[^/\\\x00:]+")
"""No path, on any operating system."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


# ---- writing ----


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `"5GB"` (decimal units, as in transformers).

    Raises:
        ConfigError: when it is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", size.upper()) if isinstance(size, str) else None
    number = int(float(match[1]) * _UNITS[match[2]]) if match else size
    if not isinstance(number, int) or isinstance(number, bool) or number <= 0:
        raise ConfigError(f"`max_shard_size` should be a number of bytes or a text such as '5GB', not {size!r}")
    return number


def split(entries: Mapping[str, Entry], max_bytes: int) -> dict[str, list[str]]:
    """The names that go into each file, in the order given: a file is full when the next tensor would not fit.

    A tensor larger than `max_bytes` has a file for itself.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, entry in entries.items():
        if groups[-1] and used + entry.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += entry.nbytes
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, start=1)}


def write_index(directory: Path, shards: Mapping[str, Iterable[str]], metadata: Mapping[str, Any]) -> None:
    """Write the index that says which shard holds a tensor."""
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    text = json.dumps({"metadata": dict(metadata), "weight_map": weight_map}, indent=2, sort_keys=True)
    (directory / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def stays(name: str) -> bool:
    """Whether a file that is in a directory already stays when a checkpoint is written into it.

    Weights that a loader would take for part of the new checkpoint do not.
    """
    return _READ_BY_LOADERS.fullmatch(name) is None


def refuse_adapter_directory(directory: str | Path) -> None:
    """Refuse to write merged weights beside an adapter, which loaders would apply a second time.

    Raises:
        CheckpointError: when there is an `adapter_config.json`.
    """
    if (Path(directory) / CONFIG_NAME).exists():
        raise CheckpointError(
            f"'{directory}' holds an adapter ({CONFIG_NAME}); transformers would apply it again to merged weights written "
            "there. Choose another directory"
        )


def copy_companions(source: Path, destination: Path, excluded: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights: configuration, tokenizer, code, licence.

    Left out are weights in any format, an adapter's configuration, manifests, hidden entries, directories that are links or hold
    weights of their own, and `excluded`.

    Raises:
        CheckpointError: for what is no file or cannot be read, and for a link that leads out of the directory.
    """
    for directory, subdirectories, names in os.walk(source):
        here = Path(directory)
        if here != source and any(name.endswith(_WEIGHT_SUFFIXES) for name in names):
            subdirectories.clear()
            continue
        subdirectories[:] = sorted(
            name for name in subdirectories if name[0] != "." and (here / name).resolve() != excluded.resolve()
        )
        to = destination / here.relative_to(source)
        for name in sorted(names):
            if name[0] != "." and name not in (CONFIG_NAME, MANIFEST_NAME) and not name.endswith(_WEIGHT_SUFFIXES):
                to.mkdir(parents=True, exist_ok=True)
                _copy(source, here / name, to / name)


def _copy(source: Path, path: Path, to: Path) -> None:
    inside(source, str(path.relative_to(source)))
    try:
        open_plain(path).close()
    except OSError as error:
        raise CheckpointError(
            f"{path} would be copied beside the weights, and cannot be read: {error}; make it readable, or remove it"
        ) from error
    shutil.copyfile(path, to)


# ---- reading ----


def read_shards(directory: Path) -> tuple[dict[str, dict[str, Entry]], dict[str, Any]]:
    """What each weights file of a checkpoint holds, and the metadata of its index.

    Returns:
        Entries by file name and tensor name; the index's metadata, empty if there is no index.

    Raises:
        CheckpointError: when there are no safetensors weights, an index is broken or names a file outside the
            directory, or index and shards disagree.
    """
    settle(directory)
    if not (directory / INDEX_FILE).exists():
        if not (directory / WEIGHTS_FILE).exists():
            raise CheckpointError(_nothing_to_read(directory))
        return {WEIGHTS_FILE: _entries(directory, WEIGHTS_FILE)}, {}
    path = directory / INDEX_FILE
    index = read_object(inside(directory, INDEX_FILE), MAX_INDEX)
    by_shard = _by_shard(path, index.get("weight_map"))
    shards = {shard: _entries(directory, shard) for shard in sorted(by_shard)}
    _check_once(directory, shards)
    for shard, names in by_shard.items():
        different = sorted(names ^ set(shards[shard]))
        if different:
            where = "the index, and not in the file" if different[0] in names else "the file, and not in the index"
            raise CheckpointError(f"{directory / shard}: '{different[0]}' is in {where}; download the checkpoint again")
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path}: 'metadata' is {shown(metadata)} and not an object; download the checkpoint again"
        )
    _check_total(path, cast("dict[str, Any]", metadata).get("total_size"), shards)
    return shards, cast("dict[str, Any]", metadata)


def _by_shard(path: Path, weight_map: object) -> dict[str, set[str]]:
    """The names of the tensors in each file, as the index at `path` says."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'; download or save the checkpoint again")
    by_shard: dict[str, set[str]] = {}
    for name, shard in cast("dict[str, Any]", weight_map).items():
        if not isinstance(shard, str) or _FILE_NAME.fullmatch(shard) is None:
            raise CheckpointError(
                f"{path}: '{name}' is said to be in {shown(shard)}, which is no file name in this directory, and is not "
                "followed; download the checkpoint again"
            )
        by_shard.setdefault(shard, set()).add(name)
    return by_shard


def _check_once(directory: Path, shards: Mapping[str, Mapping[str, Entry]]) -> None:
    """Refuse a tensor that two files have: readers differ in which they take."""
    first: dict[str, str] = {}
    for shard, names in shards.items():
        for name in names:
            other = first.setdefault(name, shard)
            if other != shard:
                raise CheckpointError(
                    f"{directory}: '{name}' is in '{other}' and in '{shard}'; download the checkpoint again"
                )


def _check_total(path: Path, total: object, shards: Mapping[str, Mapping[str, Entry]]) -> None:
    """Refuse an index of other shards. Sizes are written as floating-point numbers too."""
    size = sum(entry.nbytes for names in shards.values() for entry in names.values())
    if total is not None and (isinstance(total, bool) or total != size):
        raise CheckpointError(
            f"{path}: 'total_size' is {shown(total)}, and the tensors have {size:,} bytes: index and files are of different "
            "checkpoints. Download it again"
        )


def _entries(directory: Path, shard: str) -> dict[str, Entry]:
    return read_header(inside(directory, shard)).entries


def _nothing_to_read(directory: Path) -> str:
    if not directory.is_dir():
        return f"'{directory}' is not a directory; it should hold the base model's {WEIGHTS_FILE}"
    pickled = [name for name in sorted(os.listdir(directory)) if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        return (
            f"'{directory}' has only pickled weights ({pickled[0]}), which are not read; load and save the model with "
            "transformers, which writes safetensors"
        )
    return f"'{directory}' has neither {WEIGHTS_FILE} nor {INDEX_FILE}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's directory, such as its `config.json`.

    Raises:
        CheckpointError: as `fxlora.files.read_object`, and for a link that leads out of the directory.
    """
    return read_object(inside(path.parent, path.name))
