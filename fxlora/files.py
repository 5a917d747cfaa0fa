"""Reading what a stranger may have written: plain files inside a directory, and JSON in proportion to its size.

Knows nothing of what the files mean. `fxlora.config` and `fxlora.checkpoint` read through it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, cast

from fxlora.errors import CheckpointError, shown

MAX_CONFIG = 2**20
"""Bytes of `adapter_config.json`."""

MAX_JSON = 2**24
"""Bytes of a model's `config.json`: those of image classifiers name twenty thousand classes."""

MAX_INDEX = 10**8
"""Bytes of an index of shards: that of the largest models has some ten million."""

MAX_DEPTH = 32
"""Objects and lists inside of each other."""

_MEMBER, _ITEM, _BRACKET = 250, 65, 110
"""Bytes of memory that a member of an object, an item of a list and either of them take at most, without their text."""


def inside(directory: Path, name: str) -> Path:
    """The path of a file in a directory, whether it exists or not.

    A link may lead to another place in the directory, and from a snapshot in the hub's cache
    (`<repository>/snapshots/<revision>/`) into the repository's `blobs`, where that cache keeps all files. Any other link
    out of the directory is refused: in a directory that was downloaded or unpacked it may name any file of this machine.

    Raises:
        CheckpointError: when the file lies somewhere else.
    """
    path = directory / name
    try:
        home, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if home == target.parent or home in target.parents:
        return path
    for parent in (home, *home.parents):
        if parent.name == "snapshots" and parent.parent / "blobs" in target.parents:
            return path
    raise CheckpointError(
        f"{path} is a link to {target}, which is outside of '{directory}', and is not followed; put the file itself there, "
        "or name the directory that it is in"
    )


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading, if it is one: opening a named pipe would wait for a writer.

    Raises:
        OSError: when it cannot be opened.
        CheckpointError: when it is a directory, a named pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise CheckpointError(f"{path} is a directory, a pipe or a device, and not a file; put the file itself there")


def read_object(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file, with every number finite.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        CheckpointError: when the file is unreadable, too large, not such an object or not UTF-8, has a name twice, is
            nested too deeply, or would take much more memory than it has bytes.
    """
    text = _text(path, most)
    _check_memory(path, text)
    numbers = _Numbers()
    try:
        values = json.loads(
            text.decode(),
            object_pairs_hook=reject_duplicates,
            parse_constant=numbers.constant,
            parse_float=numbers.real,
        )
    except DuplicateNameError as error:
        raise CheckpointError(f"{path} has {shown(str(error))} twice; remove one of them") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error}); save it again in that encoding") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:
        hint = "; save it again without a byte order mark" if text.startswith(b"\xef\xbb\xbf") else ""
        raise CheckpointError(f"{path} is not valid JSON: {error}{hint or '. Write it again'}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}; write it again")
    _check_depth(path, values)
    if numbers.fault:
        where = _name_of(numbers, cast("dict[str, Any]", values))
        raise CheckpointError(f"{path} is not valid JSON: {shown(where)}: {numbers.fault}. Write it again")
    return cast("dict[str, Any]", values)


def _text(path: Path, most: int) -> bytes:
    try:
        with open_plain(path) as file:
            text = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)  # all of it is allocated first
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(text) > most:
        raise CheckpointError(
            f"{path} has more than {most:,} bytes, far more than such a file needs; write it again, and name modules by "
            "the ends of their names or a regular expression if they are what fills it"
        )
    return text


def _check_memory(path: Path, text: bytes) -> None:
    """Refuse a text of very small parts, such as `[[],[],…`: each takes many times its characters."""
    brackets = text.count(b"[") + text.count(b"{")
    memory = _MEMBER * text.count(b":") + _ITEM * text.count(b",") + _BRACKET * brackets
    if memory > 8 * len(text) + 2**20:
        raise CheckpointError(
            f"{path} has {len(text):,} bytes and would take {memory:,} in memory: it is made of very many very small parts, "
            "as no such file is. Write it again"
        )


def _check_depth(path: Path, values: object) -> None:
    level = [values]
    for _ in range(MAX_DEPTH):
        containers = [each for each in level if isinstance(each, (dict, list))]
        level = [
            item
            for each in cast("list[dict[str, Any] | list[Any]]", containers)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise _too_deep(path)


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} has more than {MAX_DEPTH} objects or lists inside of each other; write it again")


class _Numbers:
    """Reads numbers, and itself takes the place of those that are not finite, so that their names can be told."""

    def __init__(self) -> None:
        self.fault = ""
        """What is wrong with the first of them."""

    def constant(self, text: str) -> _Numbers:
        """`NaN`, `Infinity` or `-Infinity`."""
        self.fault = self.fault or f"{text} is no number of JSON"
        return self

    def real(self, text: str) -> float | _Numbers:
        """A number with a point or an exponent."""
        number = float(text)
        if math.isfinite(number):
            return number
        self.fault = self.fault or f"{text[:30]} is too large for a number"
        return self


def _name_of(wanted: object, values: dict[str, Any] | list[Any]) -> str | None:
    """The names that lead to a value, with dots between them; those of items are their numbers."""
    members = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in members:
        if value is wanted:
            return str(name)
        if isinstance(value, (dict, list)):
            rest = _name_of(wanted, cast("dict[str, Any] | list[Any]", value))
            if rest is not None:
                return f"{name}.{rest}"
    return None


class DuplicateNameError(ValueError):
    """A JSON object has a name twice; the message is the name."""


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(…, object_pairs_hook=…)`: a dict, unless a name is there twice.

    Raises:
        DuplicateNameError: for the first such name.
    """
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise DuplicateNameError(name)
        names.add(name)
    raise AssertionError("no name is there twice")
