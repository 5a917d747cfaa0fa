"""Bringing files and directories to disk, and what to do about an operating system's refusal. Knows only paths."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None


_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES)
"""Of file systems that do not know it, and of directories that may be written and not read."""


def sync_tree(root: Path, *, files: bool = True) -> None:
    """Bring the directories below `root` to disk, and their files if asked."""
    for directory, _, names in os.walk(root):
        for name in names if files else ():
            sync_file(Path(directory) / name)
        sync_directory(Path(directory))


def sync_file(path: Path) -> None:
    """Bring a file to disk."""
    with open(path, "r+b") as file:
        _sync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to disk, where that is possible: not on Windows, nor on some network mounts."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise


def _sync(descriptor: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves the data in the drive's cache
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # not on this file system
            pass
    os.fsync(descriptor)


_REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some of your quota, or write elsewhere",
    errno.EFBIG: "this file system or your limits (ulimit -f) do not allow such a large file: write elsewhere",
    errno.EACCES: "write where you may, or have its owner give you the right",
    errno.EPERM: "write where you may, or have its owner give you the right",
    errno.EROFS: "this file system is read-only: write elsewhere",
    errno.EIO: "the disk fails: check it, and write elsewhere",
}


def remedy(error: OSError) -> str:
    """What to do about an error of the operating system, to follow its text; empty if that is not known."""
    return f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
