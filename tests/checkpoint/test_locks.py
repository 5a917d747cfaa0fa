"""Who holds a lock, who is gone, and writers that take turns."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fxlora import CheckpointError
from fxlora.checkpoint import atomic, exchange, locks
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.locks import Owner, acquire
from tests.checkpoint.interrupted import BASE, DEAD, FOREIGN, contents, make, write


def test_who_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    me = replace(Owner.this(), boot="kernel", namespace="mine")
    monkeypatch.setattr(Owner, "this", staticmethod(lambda: me))
    other = replace(me, pid=DEAD.pid)
    assert other.is_gone(unlocked=True) and other.is_gone(unlocked=False)
    assert not me.is_gone(unlocked=False), "it runs"
    assert replace(other, host="container").is_gone(unlocked=True), "containers share the kernel"
    assert replace(other, boot="before").is_gone(unlocked=True), "the machine was started again"
    for unknown in (replace(other, boot="before"), replace(other, namespace="theirs"), FOREIGN):
        assert not unknown.is_gone(unlocked=False)
    assert not FOREIGN.is_gone(unlocked=True), "locks of other machines are not always seen"
    assert not replace(FOREIGN, boot="").is_gone(unlocked=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": null}', "[" * 3000, "\xff"])
def test_lock_files_without_an_owner(tmp_path: Path, text: str) -> None:
    """Locked by nobody and without a name: killed before it made anything."""
    (tmp_path / f"{BASE}.lock").write_text(text)
    write(tmp_path / "t", "new")
    assert os.listdir(tmp_path) == ["t"]


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first = acquire(tmp_path / "l")
    with pytest.raises(BlockingIOError):
        acquire(tmp_path / "l", 0.05)
    waiting: list[locks.Held] = []
    thread = threading.Thread(target=lambda: waiting.append(acquire(tmp_path / "l", 10)))
    thread.start()
    first.release()
    thread.join()
    assert (tmp_path / "l").exists(), "the file was removed and made again by who waited"
    with pytest.raises(BlockingIOError):
        acquire(tmp_path / "l")
    waiting[0].release()
    assert not os.listdir(tmp_path)


def test_a_lock_file_that_is_removed_between_opening_and_locking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, opened = locks._lock, list[int]()

    def late(descriptor: int) -> bool:
        if not opened:
            (tmp_path / "l").unlink()
        opened.append(descriptor)
        return lock(descriptor)

    monkeypatch.setattr(locks, "_lock", late)
    held = acquire(tmp_path / "l")
    assert len(opened) == 2 and (tmp_path / "l").exists()
    with pytest.raises(BlockingIOError):
        acquire(tmp_path / "l")
    held.release()


def test_a_writer_waits_while_another_puts_files_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both keep what they do not write; the second must see what the first has put there."""
    make(tmp_path / "t", "old")
    order: list[str] = []

    def write(name: str) -> None:
        with staged(tmp_path / "t", keep=lambda _: True) as staging:
            (staging / name).write_text("new")
        order.append(name)

    second = threading.Thread(target=write, args=("second",))

    def slow(new: Path, target: Path) -> Path:
        if not second.is_alive() and not order:
            second.start()
            second.join(0.3)
            order.append("first is being put in place")
        return exchange.exchange(new, target)

    monkeypatch.setattr(atomic, "exchange", slow)
    write("first")
    second.join()
    assert order[0] == "first is being put in place"
    assert contents(tmp_path) == {"t/x": "old", "t/first": "new", "t/second": "new"}


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "l").symlink_to("mine")
    with pytest.raises(OSError, match="symbolic links"):
        acquire(tmp_path / "l")


def test_a_commit_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_COMMIT_SECONDS", 0.05)
    make(tmp_path / "t", "old")
    with locks.commit_lock(tmp_path / "t"), pytest.raises(CheckpointError, match="another process.*end it if it hangs"):
        write(tmp_path / "t", "new")
    assert contents(tmp_path) == {"t/x": "old"} and os.listdir(tmp_path) == ["t"]


_WRITERS = """
import sys
from pathlib import Path
from fxlora.checkpoint.atomic import staged
target, me = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    with staged(target, keep=lambda name: True) as staging:
        for name in "abcd":
            (staging / name).write_text(f"{me} {number}")
        (staging / me).write_text(str(number))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
def test_two_processes_never_mix(tmp_path: Path) -> None:
    """Each writes a file of its own too, which the other one keeps in its newest form."""
    target = tmp_path / "t"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITERS, str(target), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in ("one", "two")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    mixed, looks = [], 0
    while any(writer.poll() is None for writer in writers):
        directory = os.open(target, os.O_RDONLY) if target.exists() else None
        if directory is not None:  # one directory, whatever takes its place meanwhile
            try:
                texts = [Path(f"/proc/self/fd/{directory}/{name}").read_text() for name in "abcd"]
                looks += 1
                mixed += [texts] if len(set(texts)) > 1 else []
            except FileNotFoundError:
                pass  # on its way out
            os.close(directory)
    for writer in writers:
        assert writer.returncode == 0
        for pipe in (writer.stdin, writer.stdout):
            assert pipe is not None
            pipe.close()
    assert not mixed and looks > 20
    found = contents(target)
    assert len({found[name] for name in "abcd"}) == 1 and found["one"] == found["two"] == "39"
    assert os.listdir(tmp_path) == ["t"]
