"""Kills a writer before each of its system calls, one after the other, and looks at what is left.

Run as a program, with the name of a way of replacing and a directory; prints JSON. It forks for each kill, so that the
libraries are imported once.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxlora.checkpoint import exchange, leftovers
from fxlora.checkpoint.atomic import staged

OLD = {
    "weights": "old" * 9999,
    "config": "old",
    "sub/part": "old",
    "stale": "old",
    "mine": "stays",
    "sub/mine": "stays",
}
NEW = {"weights": "new" * 9999, "config": "new", "sub/part": "new", "more/part": "new", "extra": "new"}
AFTER = {**NEW, "mine": "stays", "sub/mine": "stays"}
LAST = {"weights": "last", "config": "last"}
CALLS = ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "fsync", "chmod", "write")
WAYS = {"swap": None, "renames": errno.ENOSYS, "overlay": errno.EXDEV, "in place": None, "new": None}
"""Ways of replacing a directory, and the error of the system call that exchanges directories there."""


def keep(name: str) -> bool:
    return name != "stale"


def contents(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".fxlora" not in str(path.relative_to(root))
    }


def make(root: Path, files: dict[str, str], step: Callable[[], object] = lambda: None) -> None:
    for name, text in files.items():
        step()
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text[: len(text) // 2])
        step()
        (root / name).write_text(text)


class Kills:
    """Counts calls, and kills the process before one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def step(self) -> None:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def install(self) -> None:
        for name in CALLS:
            self._wrap(os, name)
        self._wrap(exchange, "_swap")

    def _wrap(self, owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.step()
            return call(*arguments, **options)

        setattr(owner, name, counted)


def in_child(work: Callable[[Kills], object], kill_at: int | None) -> bool:
    """Do some work in a child; whether it ended before it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            kills = Kills(kill_at)
            kills.install()
            work(kills)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert status == 0, f"the writer failed before call {kill_at}"
    return True


def run(way: str, root: Path) -> dict[str, Any]:
    """All kills of one way of replacing a directory."""
    code = WAYS[way]
    if code is not None:
        exchange._swap = lambda a, b: code
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    point, ended, start = 0, False, time.monotonic()
    while not ended:
        target = root / str(point) / "t"
        target.parent.mkdir()
        if way != "new":
            make(target, OLD)

        def write(kills: Kills, target: Path = target) -> None:
            if way == "in place":
                os.chdir(target)
            with staged(target, keep=keep) as staging:
                make(staging, NEW, kills.step)

        ended = in_child(write, point)
        outcome = _outcome(target, way)
        outcomes[outcome] += 1
        if outcome not in ("old", "new") or (ended and outcome != "new"):
            faults.append(f"killed before call {point}: {outcome}")
        again = _recovered_under_kills(target, way, point) if leftovers.interrupted(target) else "settled"
        if again != "settled":
            faults.append(f"killed before call {point}, and again during recovery: {again}")
        with staged(target, keep=keep) as staging:
            make(staging, LAST)
        if not LAST.items() <= contents(target).items() or os.listdir(target.parent) != ["t"] or _ours(target):
            faults.append(f"killed before call {point}, then written: {os.listdir(target.parent)}, {contents(target)}")
        point += 1
    return {"points": point, "outcomes": outcomes, "faults": faults, "seconds": time.monotonic() - start}


def _outcome(target: Path, way: str) -> str:
    """What a reader finds, on a copy of everything, so that the state stays for another look."""
    if leftovers.interrupted(target):
        copy = Path(f"{target.parent}-copy") / "t"
        _copy(target.parent, copy.parent)
        leftovers.settle(copy)
        target = copy
    found = contents(target) if target.exists() else {}
    states = {"old": {} if way == "new" else OLD, "new": NEW if way == "new" else AFTER}
    return next((name for name, expected in states.items() if found == expected), f"torn: {sorted(found)}")


def _recovered_under_kills(target: Path, way: str, point: int) -> str:
    """Kill the recovery before every third of its calls too; which ones is different from point to point."""
    at, ended = point % 3, False
    while not ended:
        copy = Path(f"{target.parent}-copy-{at}") / "t"
        _copy(target.parent, copy.parent)
        ended = in_child(lambda _, copy=copy: leftovers.settle(copy), at)
        leftovers.settle(copy)
        if _outcome(copy, way) not in ("old", "new"):
            return f"call {at}: {_outcome(copy, way)}"
        at += 3
    return "settled"


def _copy(source: Path, destination: Path) -> None:
    """A copy with hard links, since inodes are compared; the lock files are copies, since they are locked."""
    destination.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            _copy(entry, destination / entry.name)
        elif entry.name.endswith(".lock") or entry.name.endswith(leftovers.JOURNAL):
            (destination / entry.name).write_bytes(entry.read_bytes())
        else:
            os.link(entry, destination / entry.name)


def _ours(target: Path) -> list[str]:
    return [name for name in os.listdir(target) if leftovers.is_ours(name)]


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]))))
