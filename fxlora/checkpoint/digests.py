"""SHA-256 of a file while its pieces are written in any order."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import torch

from fxlora.checkpoint.buffers import Worker, bytes_of

_CHUNK = 1 << 20
"""Bytes that are read back at a time."""


class FileDigest:
    """Follows the writing of a file: whoever finishes a piece hashes what is complete from the beginning on.

    One thread hashes at a time, and none waits for it. Used by all of them.
    """

    def __init__(self, path: Path, start: bytes) -> None:
        """The digest of a file that has its first bytes."""
        self._path, self._hash, self._done = path, hashlib.sha256(start), len(start)
        self._ends: dict[int, int] = {}
        self._busy = threading.Lock()

    def add(self, start: int, view: memoryview | None, nbytes: int, worker: Worker) -> None:
        """A piece was written.

        Args:
            start: its position.
            view: its bytes; None if they are to be read back.
            nbytes: its length.
            worker: of the calling thread.
        """
        if view is not None and start == self._done and self._busy.acquire(blocking=False):
            try:
                self._hash.update(view)
                self._done += nbytes
            finally:
                self._busy.release()
        else:
            self._ends[start] = start + nbytes
        self._follow(worker)

    def _follow(self, worker: Worker) -> None:
        # the condition is seen again after the release: another thread may have added a piece and found this one busy
        while self._done in self._ends and self._busy.acquire(blocking=False):
            try:
                while (end := self._ends.pop(self._done, None)) is not None:
                    self._read_back(end, worker)
            finally:
                self._busy.release()

    def _read_back(self, end: int, worker: Worker) -> None:
        start = self._done
        while start < end:
            view = bytes_of(worker.buffer("hashed", min(_CHUNK, end - start), torch.uint8))
            worker.files.read_into(self._path, start, view)
            self._hash.update(view)
            start += len(view)
        self._done = end

    def hexdigest(self) -> str:
        """The digest, once all pieces were added."""
        assert not self._ends and not self._busy.locked()
        return self._hash.hexdigest()
