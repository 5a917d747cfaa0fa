"""Writes the weights of a `MergePlan`: threads that take pieces of work from one queue, each with memory of its own.

The order in which pieces are done changes nothing in the files. The first error stops all threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fxlora._passes import Loss, MergeError, PassError
from fxlora.checkpoint.buffers import Worker
from fxlora.checkpoint.digests import FileDigest
from fxlora.checkpoint.file_ranges import Files, check_stamp, create, flushing, free_space
from fxlora.checkpoint.merge_plan import MergePlan
from fxlora.checkpoint.merge_steps import Losses, Piece, Rounding, Task, tasks
from fxlora.errors import CheckpointError

Progress = Callable[[int, int], object]
"""`progress(bytes done, bytes in all)`."""

_MOST_THREADS = 8
_SECONDS = 0.1
"""Between calls of a progress function."""


def default_threads() -> int:
    """The processors that this process may use, but not so many that their buffers are all that memory holds."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MOST_THREADS)


@dataclass(frozen=True, slots=True)
class Written:
    """What writing has found out.

    Attributes:
        digests: the SHA-256 of each shard, in hexadecimal digits.
        losses: what rounding takes of the updates, by tensor in the order of their names; empty if not asked.
    """

    digests: dict[str, str]
    losses: dict[str, Loss]


def write_weights(
    plan: MergePlan,
    directory: Path,
    *,
    threads: int,
    progress: Progress | None = None,
    rounding: Rounding | None = None,
) -> Written:
    """Write all shards of a plan.

    Args:
        plan: what to write.
        directory: where; it has none of the shards yet.
        threads: how many to start.
        progress: called now and then in the calling thread, and once when all is done.
        rounding: how much of what rounding takes is to be measured.

    Raises:
        CheckpointError: when a file cannot be read or written, or the disk is too small. Says where.
        MergeError: when an entry would become NaN or infinite. Says where.
    """
    layouts = plan.layouts()
    _check_room(directory, sum(layout.nbytes for layout in layouts.values()))
    jobs: list[_Job] = []
    digests: dict[str, FileDigest] = {}
    losses: Losses = {}
    for shard, outputs in plan.shards().items():
        layout, path = layouts[shard], directory / shard
        create(path, layout.nbytes, layout.header)
        digests[shard] = FileDigest(path, layout.header)
        jobs += [_Job(task, digests[shard]) for task in tasks(outputs, layout, path, losses, rounding) if task.pieces]
    with flushing([directory / shard for shard in layouts]):
        _Run(jobs).start(threads, progress, plan.nbytes)
    for path, stamp in plan.stamps.items():
        check_stamp(path, stamp)
    return Written(
        {shard: digest.hexdigest() for shard, digest in digests.items()},
        {name: Loss.total(parts[first] for first in sorted(parts)) for name, parts in sorted(losses.items()) if parts},
    )


def _check_room(directory: Path, needed: int) -> None:
    free = free_space(directory)
    if free is not None and free < needed:
        raise CheckpointError(
            f"'{directory.parent}' has {free / 1e6:,.1f} MB free, and the merged weights take {needed / 1e6:,.1f} MB; free "
            "some space or write them elsewhere"
        )


class _Job:
    """A task in the queue."""

    def __init__(self, task: Task, digest: FileDigest) -> None:
        self.task, self.digest = task, digest
        self.pieces = list(reversed(task.pieces))
        self.prepared, self.preparing = False, False


class _Run:
    """The queue and the threads."""

    def __init__(self, jobs: list[_Job]) -> None:
        """Takes the list over and empties it, so that what was prepared for a job goes when the job is done."""
        self._jobs = jobs
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False
        self._running = 0
        self._done = 0

    def start(self, threads: int, progress: Progress | None, total: int) -> None:
        """Do all jobs; raises the first error."""
        # torch counts threads for each Python thread, and gives new ones the number that was set last
        kept = torch.get_num_threads()
        workers = [threading.Thread(target=self._work, name=f"fxlora-merge-{i}") for i in range(threads)]
        self._running = len(workers)
        try:
            for worker in workers:
                worker.start()
            with self._changed:
                while self._running:
                    self._changed.wait(_SECONDS if progress is not None else None)
                    if progress is not None and self._running:
                        progress(self._done, total)
        finally:
            self._stop()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            torch.set_num_threads(kept)
        if self._error is not None:
            raise self._error
        if progress is not None:
            progress(total, total)

    def _work(self) -> None:
        try:
            torch.set_num_threads(1)
            with Files() as files:
                worker = Worker(files)
                while (found := self._take()) is not None:
                    self._do(*found, worker)
                    del found  # and with it what was prepared, before a wait for the next
        except BaseException as error:  # noqa: BLE001 it is raised again in the calling thread
            with self._changed:
                self._error = self._error or error
            self._stop()
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _take(self) -> tuple[_Job, Piece | None] | None:
        """The next piece of a job, or a job that is to be prepared; None when there is nothing left to do."""
        with self._changed:
            while not self._stopped and self._jobs:
                for i, job in enumerate(self._jobs):
                    if not job.prepared and not job.preparing:
                        job.preparing = True
                        return job, None
                    if job.prepared:
                        piece = job.pieces.pop()
                        if not job.pieces:
                            del self._jobs[i]
                        return job, piece
                self._changed.wait()
        return None

    def _do(self, job: _Job, piece: Piece | None, worker: Worker) -> None:
        task = job.task
        try:
            if piece is None:
                task.prepare(worker.files)
            else:
                view = task.make(piece, worker)
                job.digest.add(piece.start, view, piece.nbytes, worker)
        except (PassError, MergeError, CheckpointError) as error:
            kind = CheckpointError if isinstance(error, CheckpointError) else MergeError
            raise kind(f"{task.source}: '{task.name}': {error}; nothing was written") from error
        with self._changed:
            if piece is None:
                job.prepared = True
            else:
                self._done += piece.nbytes
            self._changed.notify_all()
