"""Lock files: they say who writes, and the system releases them when their process ends, however it ends.

Where the file system has no locks, or the process was on another machine, an owner is taken to live unless it is known
to be gone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fxlora.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

log = logging.getLogger("fxlora")

LOCK = ".lock"
"""Ends the names of lock files."""

_COMMIT_SECONDS = 600.0
"""How long to wait for another process that puts files in place: it may have to copy large ones."""
_PAUSE = 0.02
_MOST = 4096
"""Bytes that are read of a lock file."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, as it is known to others.

    Attributes:
        pid: its number.
        host: name of its machine or container.
        boot: identity of the running kernel, which containers share; empty where it is not known.
        namespace: that `pid` is counted in; empty where it is not known.
    """

    pid: int
    host: str
    boot: str
    namespace: str

    @classmethod
    def this(cls) -> Self:
        """The calling process."""
        boot = namespace = ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(os.getpid(), socket.gethostname(), boot, namespace)

    def is_gone(self, *, unlocked: bool) -> bool:
        """Whether the process has certainly ended.

        Args:
            unlocked: whether its lock was found released; False if the file system has no locks.
        """
        here = self.this()
        if unlocked:  # locks of one kernel are seen by all of its processes; those of other machines may not be
            return (self.boot == here.boot and self.boot != "") or self.host == here.host
        known = "" not in (self.boot, self.namespace) and (self.boot, self.namespace) == (here.boot, here.namespace)
        return known and not _runs(self.pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class Held:
    """A lock file that is open and, where the file system has locks, locked."""

    def __init__(self, path: Path, descriptor: int, locked: bool) -> None:
        self.path, self.locked = path, locked
        self._descriptor = descriptor

    def write(self, owner: Owner) -> None:
        """Say who holds it."""
        os.write(self._descriptor, json.dumps(asdict(owner)).encode())

    def owner(self) -> Owner | None:
        """Who held it last; None if it does not say."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return _owner(os.read(self._descriptor, _MOST))

    def release(self, *, remove: bool = True) -> None:
        """Give it back."""
        if os.name == "nt":  # which does not remove open files
            os.close(self._descriptor)
        with suppress(OSError):
            if remove:  # while it is locked: who waits for it sees that it is another file then
                self.path.unlink(missing_ok=True)
        if os.name != "nt":
            os.close(self._descriptor)


def _owner(text: bytes) -> Owner | None:
    try:
        values = json.loads(text)
        return Owner(int(values["pid"]), str(values["host"]), str(values["boot"]), str(values["namespace"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def acquire(path: Path, seconds: float = 0.0) -> Held:
    """Lock a file, which is made if need be.

    Args:
        path: the file.
        seconds: how long to wait for another holder.

    Raises:
        BlockingIOError: when another holder keeps it.
        OSError: when it cannot be made or opened.
    """
    deadline = time.monotonic() + seconds
    while True:
        descriptor = _open(path)
        try:
            locked = _lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE)
            continue
        if not locked or _is_at(path, descriptor):
            return Held(path, descriptor, locked)
        os.close(descriptor)  # its last holder has removed it meanwhile


def _open(path: Path) -> int:
    flags = getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | flags)  # of another user


def _lock(descriptor: int) -> bool:
    """Lock an open file; False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def abandoned(path: Path) -> Held | None:
    """Take over the lock of an owner that is certainly gone; None if it lives, or if that is not known.

    Args:
        path: the lock file.
    """
    if not path.exists():
        if path.with_suffix("").exists():  # an owner removes its lock last
            log.warning("'%s' is left of an interrupted write; remove it if nothing writes there", path.with_suffix(""))
        return None
    try:
        held = acquire(path)
    except BlockingIOError:
        return None
    owner = held.owner()
    # an owner makes nothing before it has written its name under its lock
    gone = held.locked if owner is None else owner.is_gone(unlocked=held.locked)
    if gone:
        return held
    held.release(remove=False)
    log.warning(
        "'%s' is left of an interrupted write, or still in use (%s); remove it if nothing writes there",
        path.with_suffix(""),
        "by an unknown process" if owner is None else f"by process {owner.pid} on {owner.host}",
    )
    return None


@contextmanager
def commit_lock(target: Path) -> Generator[None]:
    """Hold the right to put files in place at `target`, which one process has at a time.

    Where no lock file can be made, or the file system has no locks, nothing is held.

    Raises:
        CheckpointError: when another process has kept it for ten minutes.
    """
    held = _commit_lock(target)
    try:
        yield
    finally:
        if held is not None:
            held.release()


def _commit_lock(target: Path) -> Held | None:
    for place in (target.parent, target):
        path = place / f".{target.name}.fxlora{LOCK}"
        try:
            return acquire(path, _COMMIT_SECONDS)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process has been putting files in place at '{target}' for {_COMMIT_SECONDS / 60:.0f} minutes "
                f"(it holds '{path}'); end it if it hangs, and try again"
            ) from error
        except OSError:  # not here
            continue
    return None
