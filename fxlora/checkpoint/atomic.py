"""Putting a directory in place at one stroke: at any time, also after a crash, it is the old or the new one.

Everything is written to a staging directory beside the target, brought to disk, and exchanged with the target by one
system call. Knows nothing of adapters or checkpoints.

Two cases have no such stroke. Where the system cannot exchange directories (not Linux, or an old file system), two
renames follow each other; a crash between them leaves the old directory under the staging name. Where the target must
stay the directory that it is (it holds the working directory, or a mount point), its files are replaced one by one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxlora.errors import CheckpointError

Keep = Callable[[str], bool]
"""Whether an entry of the old directory, given its name, stays."""


@contextmanager
def staged(target: str | Path, keep: Keep | None = None) -> Generator[Path]:
    """A new, empty directory to write into, which takes the place of `target` when the context ends without an error.

    Args:
        target: the directory to make or replace; parents are created. A symbolic link is followed.
        keep: which entries of an existing target stay, besides those that were written. None replaces it whole. Kept
            files are hard links, so large ones cost nothing; they are copied where the file system has no hard links.

    Yields:
        The staging directory, `.<name>.fxlora-<pid>-<random>` beside the target.

    Raises:
        CheckpointError: when the target is a file or cannot be written. On this and any other error the staging
            directory is removed and the target is as it was.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"'{target}' is a file, and a directory is to be written there; choose another path")
    staging = path.parent / f".{path.name}.fxlora-{os.getpid()}-{secrets.token_hex(4)}"
    made: list[Path] = []
    try:
        made = _make_parents(path.parent)
        staging.mkdir()
        yield staging
        _sync(staging, files=True)
        _put_in_place(staging, path, keep)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in reversed(made):
            with suppress(OSError):  # not empty: the target is in place, or someone else uses it
                parent.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"'{target}' cannot be written: {error}") from error
        raise


def _make_parents(directory: Path) -> list[Path]:
    """Create a directory and its parents; returns those that were missing, outermost first."""
    missing: list[Path] = []
    while not directory.exists():
        missing.insert(0, directory)
        directory = directory.parent
    for each in missing:
        each.mkdir(exist_ok=True)
    return missing


def _put_in_place(staging: Path, target: Path, keep: Keep | None) -> None:
    if not target.exists():
        staging.rename(target)
        _sync_directory(target.parent)
        return
    if _must_stay(target):
        _replace_files(staging, target, keep)
        return
    _take_over_attributes(target, staging)
    if keep is not None:
        _link_missing(target, staging, keep)
        _sync(staging, files=False)
    _exchange(staging, target)
    _sync_directory(target.parent)
    with suppress(OSError):  # the new directory is in place: what fails now is only the removal of the old one
        if keep is not None:
            # Another process of the same run may have added files (its random state, say) since they were listed.
            _link_missing(staging, target, keep)
        shutil.rmtree(staging)


def _take_over_attributes(source: Path, destination: Path) -> None:
    status = source.stat()
    with suppress(OSError, AttributeError):  # only root may give files away, and Windows has no owners
        os.chown(destination, status.st_uid, status.st_gid)
    destination.chmod(status.st_mode & 0o7777)


def _link_missing(source: Path, destination: Path, keep: Keep) -> None:
    """Hard-link every kept entry of `source` that `destination` does not have, recursively."""
    for entry in source.iterdir():
        if not keep(entry.name):
            continue
        to = destination / entry.name
        if entry.is_dir() and not entry.is_symlink():
            if not to.exists():
                to.mkdir()
                _take_over_attributes(entry, to)
            _link_missing(entry, to, lambda _: True)
        elif not os.path.lexists(to):
            _link(entry, to)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except FileNotFoundError:
        pass  # removed by its owner since it was listed
    except (OSError, NotImplementedError):
        shutil.copy2(source, destination, follow_symlinks=False)


def _must_stay(target: Path) -> bool:
    """Whether replacing the directory would pull it away from under a process, or remove what is mounted in it."""
    with suppress(FileNotFoundError):  # the working directory itself may be gone
        if Path.cwd().is_relative_to(target):
            return True
    return any(os.path.ismount(directory) for directory, _, _ in os.walk(target))


def _replace_files(staging: Path, target: Path, keep: Keep | None) -> None:
    written = {entry.name for entry in staging.iterdir()}
    for directory, _, names in os.walk(staging):
        to = target / Path(directory).relative_to(staging)
        to.mkdir(exist_ok=True)
        for name in sorted(names):
            os.replace(Path(directory) / name, to / name)
        _sync_directory(to)
    for entry in target.iterdir():
        if entry.name not in written and not (keep and keep(entry.name)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    shutil.rmtree(staging)


# ---- bringing to disk ----


def _sync(root: Path, *, files: bool) -> None:
    """Bring the directories below `root` to disk, and their files if asked."""
    for directory, _, names in os.walk(root):
        for name in names if files else ():
            with open(Path(directory) / name, "r+b") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(directory))


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open directories
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- exchanging ----

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYSCALL_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""EPERM is what sandboxes answer to system calls that they do not know."""


def _exchange(a: Path, b: Path) -> None:
    """Swap two directories, by one system call where there is one."""
    if sys.platform == "linux":
        code = _renameat2(a, b)
        if code == 0:
            return
        if code not in _CANNOT_EXCHANGE:
            raise OSError(code, os.strerror(code), os.fspath(b))
    _exchange_by_renames(a, b)


def _renameat2(a: Path, b: Path) -> int:
    """The error number of `renameat2(a, b, RENAME_EXCHANGE)`, 0 for success."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if hasattr(libc, "renameat2"):
        result = libc.renameat2(*paths)
    elif platform.machine() in _SYSCALL_RENAMEAT2:  # an old libc, or musl
        result = libc.syscall(_SYSCALL_RENAMEAT2[platform.machine()], *paths)
    else:
        return errno.ENOSYS
    return ctypes.get_errno() if result else 0


def _exchange_by_renames(a: Path, b: Path) -> None:
    aside = a.with_name(f"{a.name}-old")
    b.rename(aside)
    try:
        a.rename(b)
    except BaseException:
        aside.rename(b)
        raise
    aside.rename(a)
