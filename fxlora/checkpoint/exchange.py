"""Exchanging two directories: by one system call, or by two renames that `fxlora.checkpoint.leftovers` can complete."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ASIDE = "-old"
"""Ends the name under which the old directory waits while there is none in its place."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2
_SYSCALL_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM)
"""EPERM is what sandboxes answer to system calls that they do not know."""


def exchange(new: Path, target: Path) -> Path:
    """Put a directory in the place of another one, by one system call where there is one.

    Args:
        new: complete and on disk, on the file system of `target`.
        target: the directory to replace.

    Returns:
        Where the old directory is now.

    Raises:
        OSError: when it fails; both are where they were.
    """
    code = _swap(new, target)
    if code == 0:
        return new
    if code not in _CANNOT_EXCHANGE:
        raise OSError(code, os.strerror(code), os.fspath(target))
    return _by_renames(new, target)


def _swap(a: Path, b: Path) -> int:
    """The error number of swapping two directories, 0 for success."""
    if sys.platform not in ("linux", "darwin"):
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        return _called(libc, "renamex_np", (os.fsencode(a), os.fsencode(b), _RENAME_SWAP))
    paths = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if hasattr(libc, "renameat2"):
        return _called(libc, "renameat2", paths)
    if platform.machine() in _SYSCALL_RENAMEAT2:  # an old libc, or musl
        return _called(libc, "syscall", (_SYSCALL_RENAMEAT2[platform.machine()], *paths))
    return errno.ENOSYS


def _called(libc: Any, name: str, arguments: Sequence[int | bytes]) -> int:
    if not hasattr(libc, name):
        return errno.ENOSYS
    return ctypes.get_errno() if getattr(libc, name)(*arguments) else 0


def _by_renames(new: Path, target: Path) -> Path:
    """Between the two renames there is no target; the old directory beside it shows that the new one is complete."""
    aside = new.with_name(f"{new.name}{ASIDE}")
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(new)  # its name says that there is no target
    return new
