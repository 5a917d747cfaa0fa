"""What is left of a directory when its writer is killed, the disk is full, or it may not be written.

Run: python -m benchmarks.crash_safety --json results.json --markdown table.md

Each writer overwrites a directory with another version of the same thing, and is killed by signal 9 at a random time,
until 200 kills have met it at work. The directory is then, by the SHA-256 of every file:

- old or new: one version, whole;
- torn: files of both, or parts of files;
- lost: a file is missing, or the directory.

The libraries are imported once, and each write is done by a fork of that process.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.crash_writers import Writer, writers
from benchmarks.report import table, write
from fxlora import FxloraError
from fxlora.checkpoint.leftovers import is_ours, settle


@dataclass(frozen=True)
class Row:
    """What became of one writer's directory.

    Attributes:
        writer: its name.
        own: whether it is fxlora's.
        megabytes: size of the directory.
        seconds: of a write that is not killed, median.
        kills: how many met it at work.
        attempts: how many there were.
        old: directories that were the old version, and `new`, `torn` and `lost` the others.
        silent: of those torn or lost, how many load without an error.
        left: entries of killed writers, beside or in the target, after the next write.
        full: the directory after a write onto a disk with room for a third of it, and what the writer said.
        limited: the same when no file may become larger than half of the largest one.
        read_only: the same on a read-only file system.
    """

    writer: str
    own: bool
    megabytes: float
    seconds: float
    kills: int
    attempts: int
    old: int
    new: int
    torn: int
    lost: int
    silent: int
    left: int
    full: str
    limited: str
    read_only: str


# ---- kills ----


class Trial:
    """One writer and its target."""

    def __init__(self, writer: Writer, target: Path) -> None:
        self.writer, self.target = writer, target
        self.expected: list[dict[str, str]] = []
        self.times: deque[float] = deque(maxlen=9)
        target.parent.mkdir(parents=True)
        for version in (0, 1, 0, 1, 0):
            target.mkdir(exist_ok=True)
            assert self._run(version, None), f"{writer.name} fails"
            if len(self.expected) < 2:
                self.expected.append(digests(target))
        assert self.expected[0] != self.expected[1]
        self.current = 0

    @property
    def seconds(self) -> float:
        """Of a write that is not killed, the median of the last ones."""
        return statistics.median(self.times)

    def kill(self, after: float) -> tuple[str, bool, bool]:
        """Overwrite the target and kill the writer.

        Returns:
            What is left, whether the writer was still at work, and whether that loads.
        """
        version = 1 - self.current
        ended = self._run(version, after)
        state = self.state(version)
        loads = self._loads()
        if state == "new":
            self.current = version
        elif state != "old":
            shutil.rmtree(self.target, ignore_errors=True)
            self.target.mkdir()
            assert self._run(self.current, None)
        return state, not ended, loads

    def state(self, version: int) -> str:
        """What the target is, when it was to become a version."""
        if self.writer.own:
            try:
                settle(self.target)
            except FxloraError:
                return "lost"
        found = digests(self.target)
        if found in (self.expected[version], self.expected[1 - version]):
            return "new" if found == self.expected[version] else "old"
        return "lost" if set(self.expected[version]) - set(found) else "torn"

    def _loads(self) -> bool:
        try:
            self.writer.load(self.target)
        except Exception:  # noqa: BLE001, whatever a library raises
            return False
        return True

    def _run(self, version: int, kill_after: float | None, limit: int | None = None) -> bool:
        """Write in another process; whether it ended by itself."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            _write_and_exit(self.writer, version, self.target, writing)
        os.read(reading, 1)
        start, process = time.perf_counter(), os.pidfd_open(pid)
        select.select([process], [], [], kill_after)
        seconds = time.perf_counter() - start
        os.kill(pid, signal.SIGKILL)  # which an ended one does not notice
        _, status = os.waitpid(pid, 0)
        for descriptor in (reading, writing, process):
            os.close(descriptor)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError(f"{self.writer.name} failed")
        if os.WIFEXITED(status):
            self.times.append(seconds)
        return os.WIFEXITED(status)


def _write_and_exit(writer: Writer, version: int, target: Path, started: int) -> None:
    status = 1
    try:
        writer.prepare(target)
        os.write(started, b".")
        writer.write(version, target)
        status = 0
    finally:
        os._exit(status)


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 by file name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(map(is_ours, path.relative_to(directory).parts))
    }


def measure(writer: Writer, place: Path, kills: int, seed: int = 0) -> Row:
    """Kill a writer at random times, and let it meet a full disk and a read-only one."""
    target = place / "out" / "t"
    trial = Trial(writer, target)
    times, counts, attempts, silent = random.Random(seed), Counter[str](), 0, 0
    while counts.total() < kills:
        state, at_work, loads = trial.kill(times.uniform(0, trial.seconds))
        attempts += 1
        if state in ("old", "new") and not loads:
            raise RuntimeError(f"{writer.name}: a whole directory does not load")
        if not at_work:
            continue
        counts[state] += 1
        silent += state in ("torn", "lost") and loads
    assert trial._run(1 - trial.current, None)
    left = len(os.listdir(target.parent)) - 1 + sum(map(is_ours, os.listdir(target)))
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    trial.current = 1 - trial.current
    limited = _attempt(trial, max(sizes) // 2)
    full, read_only = _on_small_disk(trial, place, sum(sizes))
    shutil.rmtree(target.parent)
    return Row(
        writer.name, writer.own, sum(sizes) / 1e6, trial.seconds, kills, attempts, counts["old"], counts["new"], counts["torn"],
        counts["lost"], silent, left, full, limited, read_only,
    )  # fmt: skip


# ---- full and read-only file systems ----


def _on_small_disk(trial: Trial, place: Path, size: int) -> tuple[str, str]:
    """The outcomes on a file system with room for one version and a third, and on the same one when it is read-only."""
    mounted = place / "small"
    with _mounted(mounted, size + size // 3) as can:
        if not can:
            return "—", "—"
        trial.target, trial.current = mounted / "t", 0
        trial.target.mkdir()
        assert trial._run(0, None)
        full = _attempt(trial)
        shutil.rmtree(trial.target)
        trial.target.mkdir()
        assert trial._run(0, None)
        subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        return full, _attempt(trial)


def _attempt(trial: Trial, limit: int | None = None) -> str:
    """What is left of a write that may fail, and what the writer said.

    Args:
        trial: the writer and its target.
        limit: bytes that a file may have.
    """
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)  # where the writer's traceback goes
        trial._run(1 - trial.current, None, limit)
        said = "no error"
    except RuntimeError:
        said = "an error"
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        os.close(nowhere)
    return f"{trial.state(1 - trial.current)}, {said}"


@contextmanager
def _mounted(directory: Path, size: int) -> Iterator[bool]:
    """A small file system in memory; False where that may not be mounted."""
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    can = sys.platform == "linux" and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield can
    finally:
        if can:
            subprocess.run(["umount", str(directory)], check=True)


# ---- the table ----

HEADER = ("writer", "MB", "s", "kills", "old", "new", "torn", "lost", "of these load without an error")
HEADER_ERRORS = ("left after the next write", "disk too small", "files too large", "read-only")


def page(rows: list[Row]) -> str:
    """The table."""
    cells = (
        (
            row.writer, f"{row.megabytes:.0f}", f"{row.seconds:.2f}", str(row.kills), str(row.old),
            str(row.new), str(row.torn), str(row.lost), str(row.silent) if row.torn + row.lost else "—", str(row.left),
            row.full, row.limited, row.read_only,
        )
        for row in rows
    )  # fmt: skip
    return "\n".join(table((*HEADER, *HEADER_ERRORS), cells)) + "\n"


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2, help="of the models")
    parser.add_argument("--rank", type=int, default=256, help="of the adapters that are saved")
    parser.add_argument("--own", action="store_true", help="fxlora's writers alone")
    parser.add_argument("--directory", type=Path, help="where to write; a temporary one if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("fxlora").setLevel(logging.ERROR)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for writer in writers(Path(directory), options.layers, options.rank):
            if writer.own or not options.own:
                start = time.perf_counter()
                rows.append(measure(writer, Path(directory), options.kills))
                print(f"{writer.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(page(rows), end="")
    write(options, page(rows), rows)
    if any(row.torn + row.lost for row in rows if row.own):
        sys.exit(1)


if __name__ == "__main__":
    main()
