"""`SHA256SUMS`: the digest of every file that was written into a directory, in the format of `sha256sum`.

`sha256sum -c SHA256SUMS` verifies it, and so does `fxlora check`. Knows nothing of what the files mean.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import cast

from fxlora.errors import CheckpointError, shown
from fxlora.files import inside, open_plain

MANIFEST_NAME = "SHA256SUMS"

MAX_MANIFEST = 2**24
"""Bytes of a manifest: a hundred thousand files."""

_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *]([^\n\r\x00]+)")
_ESCAPED = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
"""How `sha256sum` writes these characters in a name; such a line begins with a backslash."""
_PLAIN = {escaped: character for character, escaped in _ESCAPED.items()}


def write_manifest(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the manifest of all files below a directory.

    Directories in it that have a manifest of their own are left to that one.

    Args:
        directory: to describe, while nothing is in it but what was written.
        known: digests by file name, relative with slashes, that need not be computed; other files are read.

    Raises:
        OSError: when a file cannot be read, or the manifest not be written.
    """
    known = known or {}
    digests = {name: known.get(name) or digest_of(directory / name) for name in _files(directory)}
    lines = [_line(name, digests[name]) for name in sorted(digests, key=os.fsencode)]
    (directory / MANIFEST_NAME).write_bytes(b"".join(lines))


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits, read piece by piece.

    Raises:
        OSError: when it cannot be read.
        CheckpointError: when it is no plain file.
    """
    with open_plain(path) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()


def _files(directory: Path) -> Iterator[str]:
    for here, subdirectories, names in os.walk(directory):
        at = Path(here)
        subdirectories[:] = [name for name in subdirectories if not (at / name / MANIFEST_NAME).exists()]
        yield from ((at / name).relative_to(directory).as_posix() for name in names if name != MANIFEST_NAME)


def _line(name: str, digest: str) -> bytes:
    escaped = "".join(_ESCAPED.get(character, character) for character in name)
    start = "" if escaped == name else "\\"
    return f"{start}{digest}  ".encode() + os.fsencode(escaped) + b"\n"


def read_manifest(directory: Path) -> dict[str, str] | None:
    """The digests that a directory's manifest says its files have.

    Returns:
        By file name, relative with slashes; None if there is no manifest.

    Raises:
        CheckpointError: when the manifest is a link out of the directory, too large or unreadable; for a line that is not
            of the format; for a name that is absolute, leads out of the directory or is there twice. Names file, line and
            remedy.
    """
    path = directory / MANIFEST_NAME
    if not os.path.lexists(path):
        return None
    digests: dict[str, str] = {}
    for number, line in enumerate(_lines(inside(directory, MANIFEST_NAME)), start=1):
        match = _LINE.fullmatch(line)
        name = match and _name(match[3], escaped=bool(match[1]))
        if not match or not name:
            raise CheckpointError(
                f"{path}, line {number}: {shown(line)} is not '<64 hexadecimal digits>  <name>'. {_REMEDY}"
            )
        if any(part in ("", ".", "..") for part in name.split("/")) or Path(name).drive:
            raise CheckpointError(
                f"{path}, line {number}: {shown(name)} is no file in this directory, and is not followed. {_REMEDY}"
            )
        if name in digests:
            raise CheckpointError(f"{path}, line {number}: {shown(name)} is there twice. {_REMEDY}")
        digests[name] = match[2].decode().lower()
    return digests


_REMEDY = "Copy or download the directory again, or remove the manifest if you trust the files"


def _lines(path: Path) -> list[bytes]:
    try:
        with open_plain(path) as file:
            text = file.read(min(MAX_MANIFEST, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(text) > MAX_MANIFEST:
        raise CheckpointError(f"{path} has more than {MAX_MANIFEST:,} bytes, more than a manifest needs. {_REMEDY}")
    lines = text.split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def _name(text: bytes, *, escaped: bool) -> str | None:
    """A name as it is in the file system; None if it is escaped and has an unknown escape."""
    name = os.fsdecode(text)
    if not escaped:
        return name
    if re.search(r"\\(?![\\nr])", name.replace("\\\\", "")):
        return None
    return re.sub(r"\\[\\nr]", lambda match: _PLAIN[match[0]], name)
