"""Ranges of bytes of files: read into memory that is there already, written in any order, copied by the system.

Unlike memory maps, these leave no pages behind that count as memory of the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from fxlora.checkpoint.durable import remedy
from fxlora.errors import CheckpointError

_MAX_OPEN = 16
_CHUNK = 1 << 20
"""Bytes that are copied at a time where the system does not copy."""
_FLUSH_SECONDS = 0.2
_CANNOT_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY)
"""Between file systems, on network mounts, in sandboxes that do not know the system call."""

_copy_file_range: Callable[[int, int, int, int, int], int] | None = getattr(os, "copy_file_range", None)


Stamp = tuple[int, int, int]
"""What tells that a file is still the same: inode, size, and time of its last change in nanoseconds."""


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file.

    Raises:
        CheckpointError: when it is not there any more.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_stamp(path: Path, stamp: Stamp) -> None:
    """Refuse a file that is another one by now.

    Raises:
        CheckpointError: naming it.
    """
    if stamp_of(path) != stamp:
        raise CheckpointError(f"{path} was changed while it was read; try again when nothing writes there")


class Files:
    """Open files of one thread. To be closed, as by a `with` statement."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, str], FileIO] = {}
        self._by_system = _copy_file_range is not None

    def read_into(self, path: Path, position: int, view: memoryview) -> None:
        """Fill memory with what a file has from a position on.

        Raises:
            CheckpointError: when the file is shorter, or cannot be read.
        """
        try:
            file, done = self._file(path, "rb"), 0
            file.seek(position)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise _ended(path, position + done)
                done += count
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def write(self, path: Path, position: int, view: memoryview) -> None:
        """Write memory to a file that exists, from a position on.

        Raises:
            CheckpointError: when that fails, as on a full disk.
        """
        try:
            file, done = self._file(path, "r+b"), 0
            file.seek(position)
            while done < len(view):
                done += file.write(view[done:])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}{remedy(error)}") from error

    def copy(self, source: Path, start: int, destination: Path, position: int, nbytes: int) -> None:
        """Copy bytes of one file to a place in another one, which exists, without reading them where the system can.

        Raises:
            CheckpointError: when the source is shorter, or the copy fails, as on a full disk.
        """
        try:
            done = self._copy_by_system(source, start, destination, position, nbytes) if self._by_system else 0
        except OSError as error:
            raise CheckpointError(f"{source} cannot be copied to {destination}: {error}{remedy(error)}") from error
        if done < nbytes:
            view = memoryview(bytearray(min(_CHUNK, nbytes - done)))
            for at in range(done, nbytes, _CHUNK):
                part = view[: min(_CHUNK, nbytes - at)]
                self.read_into(source, start + at, part)
                self.write(destination, position + at, part)

    def _copy_by_system(self, source: Path, start: int, destination: Path, position: int, nbytes: int) -> int:
        """How many bytes the system copied: all, unless it cannot, or the source ends."""
        assert _copy_file_range is not None
        files, done = (self._file(source, "rb").fileno(), self._file(destination, "r+b").fileno()), 0
        while done < nbytes:
            try:
                count = _copy_file_range(*files, nbytes - done, start + done, position + done)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
                self._by_system = False
                break
            if not count:
                break
            done += count
        return done

    def _file(self, path: Path, mode: Literal["rb", "r+b"]) -> FileIO:
        key = path, mode
        if key not in self._open:
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[key] = open(path, mode, buffering=0)  # noqa: SIM115
        return self._open[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for file in self._open.values():
                stack.callback(file.close)
            self._open.clear()


def _ended(path: Path, size: int) -> CheckpointError:
    return CheckpointError(
        f"{path} ends after {size:,} bytes, before the data that its header announces; copy or download it again"
    )


def create(path: Path, nbytes: int, start: bytes) -> None:
    """Make a file of its final size, with its first bytes: writing far into a growing file is slow.

    Its room is reserved where the file system can, so that a disk that is too small is noticed before anything is done.

    Raises:
        CheckpointError: when there is no room for it, or it cannot be made.
    """
    try:
        with open(path, "xb", buffering=0) as file:
            _reserve(file.fileno(), nbytes)
            file.truncate(nbytes)
            file.write(start)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({nbytes / 1e6:,.1f} MB): {error}{remedy(error)}") from error


def _reserve(descriptor: int, nbytes: int) -> None:
    """Give a file its room on the disk, where that is one system call: emulations write all of it."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if libc.fallocate(descriptor, 0, 0, nbytes) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def flushing(paths: Sequence[Path]) -> Generator[None]:
    """Within this context files are brought to disk bit by bit, so that little is left for the end.

    Errors are not noticed here: who needs the files to be on disk syncs them once more.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(_FLUSH_SECONDS):
            for path in paths:
                with suppress(OSError), open(path, "r+b", buffering=0) as file:
                    os.fsync(file.fileno())

    thread = threading.Thread(target=flush, name="fxlora-flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def free_space(directory: Path) -> int | None:
    """Bytes that may be written where a directory is or will be; None where the file system does not say.

    Args:
        directory: need not exist.
    """
    existing = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    usage = shutil.disk_usage(existing)
    return usage.free if usage.total else None
