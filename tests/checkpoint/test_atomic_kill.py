"""A directory is old or new, never a mix."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxlora import CheckpointError
from fxlora.checkpoint import exchange
from fxlora.checkpoint.atomic import staged


def write(target: Path, text: str, *names: str) -> None:
    with staged(target, keep=lambda name: not name.startswith("old-")) as staging:
        for name in names:
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("swaps", [True, False])
def test_new_files_replace_and_others_stay(swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swaps:
        monkeypatch.setattr(exchange, "_swap", lambda one, other: errno.ENOSYS)
    target = tmp_path / "a" / "b"
    write(target, "1", "x", "sub/y", "old-1", "z")
    write(target, "2", "x", "sub/w")
    assert contents(target) == {"x": "2", "sub/y": "1", "sub/w": "2", "z": "1"}
    assert [p.name for p in target.parent.iterdir()] == ["b"]


def test_an_error_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "t"
    write(target, "1", "x")
    with pytest.raises(RuntimeError, match="boom"), staged(target) as staging:
        (staging / "x").write_text("2")
        raise RuntimeError("boom")
    assert contents(target) == {"x": "1"} and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_file_and_an_unwritable_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"), staged(tmp_path / "f"):
        pass
    with pytest.raises(CheckpointError, match="cannot be written"), staged(tmp_path / "f" / "sub"):
        pass
    assert contents(tmp_path) == {"f": "mine"}


_WRITER = """
import sys
from pathlib import Path
from fxlora.checkpoint.atomic import staged
target, number = Path(sys.argv[1]), 0
while True:
    number += 1
    with staged(target) as staging:
        for name in "abcdef":
            (staging / name).write_text(str(number) * 1000)
    print(number, flush=True)
"""


def test_killed_writers_leave_no_mix(tmp_path: Path) -> None:
    target = tmp_path / "t"
    write(target, "0" * 1000, *"abcdef")
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(set(contents(target).values())) == 1 and len(contents(target)) == 6
