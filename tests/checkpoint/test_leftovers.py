"""What killed writers left: who lives is left alone, what is half done is completed, the rest goes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from fxlora import CheckpointError, LoraConfig, check_files, lora_transform
from fxlora.checkpoint import atomic, exchange, in_place, leftovers, locks
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.layout import read_shards
from fxlora.checkpoint.leftovers import settle
from fxlora.checkpoint.locks import Owner, acquire
from fxlora.cli import cli

BASE = ".t.fxlora-1-0123abcd"


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def make(root: Path, text: str) -> Path:
    root.mkdir(parents=True)
    (root / "x").write_text(text)
    return root


def left(place: Path, owner: Owner | None, *suffixes: str) -> None:
    """What a writer left: directories, and its lock."""
    for suffix in suffixes:
        make(place / f"{BASE}{suffix}", suffix)
    if owner is not None:
        (place / f"{BASE}.lock").write_text(json.dumps(asdict(owner)))


def write(target: Path, text: str) -> None:
    with staged(target) as staging:
        (staging / "x").write_text(text)


DEAD = replace(Owner.this(), pid=2**22 + 1)
FOREIGN = Owner(1, "elsewhere", "another kernel", "")


@contextmanager
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(locks, "_lock", lambda descriptor: False)
        yield


# ---- staging directories of the dead and the living ----


def test_the_dead_are_cleared_away(tmp_path: Path) -> None:
    make(tmp_path / "t", "old")
    left(tmp_path, DEAD, "")
    write(tmp_path / "t", "new")
    assert contents(tmp_path) == {"t/x": "new"} and os.listdir(tmp_path) == ["t"]


def test_killed_before_anything_was_made(tmp_path: Path) -> None:
    (tmp_path / f"{BASE}.lock").touch()
    (tmp_path / ".t.fxlora.lock").touch()
    write(tmp_path / "t", "new")
    assert os.listdir(tmp_path) == ["t"]


def test_other_targets_are_not_touched(tmp_path: Path) -> None:
    for name in (".tt.fxlora-1-0123abcd", ".t.fxlora-1-0123abc", ".t.fxlora-x-0123abcd", ".u.fxlora-1-0123abcd"):
        make(tmp_path / name, "mine")
        (tmp_path / f"{name}.lock").write_text(json.dumps(asdict(DEAD)))
    before = contents(tmp_path)
    write(tmp_path / "t", "new")
    assert contents(tmp_path) == {**before, "t/x": "new"}


def test_the_living_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path / "t", "old")
    with staged(tmp_path / "t") as first:
        (first / "x").write_text("first")
        write(tmp_path / "t", "second")
        assert (first / "x").read_text() == "first"
    assert contents(tmp_path) == {"t/x": "first"}, "the last to end wins"
    assert os.listdir(tmp_path) == ["t"] and not caplog.records


def test_without_locks_the_living_are_known_by_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not Owner.this().boot:
        pytest.skip("the kernel has no identity")
    with no_locks(monkeypatch):
        with staged(tmp_path / "t") as first:
            (first / "x").write_text("first")
            write(tmp_path / "t", "second")
        assert contents(tmp_path) == {"t/x": "first"}
        assert f"still in use (by process {os.getpid()} on" in caplog.text
        left(tmp_path, DEAD, "")
        write(tmp_path / "t", "third")
        assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("with_locks", [True, False])
@pytest.mark.parametrize("owner", [FOREIGN, replace(FOREIGN, boot=""), None], ids=["foreign", "unknown", "no lock"])
def test_in_doubt_nothing_is_removed(
    tmp_path: Path,
    owner: Owner | None,
    with_locks: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    left(tmp_path, owner, "")
    if with_locks:
        write(tmp_path / "t", "new")
    else:
        with no_locks(monkeypatch):
            write(tmp_path / "t", "new")
    assert (tmp_path / BASE / "x").exists() and (tmp_path / "t" / "x").read_text() == "new"
    assert caplog.records[0].levelno == logging.WARNING and f"{BASE}' is left of an interrupted write" in caplog.text


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


# ---- locks ----


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


# ---- between two renames ----


def test_a_target_that_is_missing_is_put_back_when_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left(tmp_path, DEAD, "-old")
    settle(tmp_path / "t")
    assert contents(tmp_path) == {"t/x": "-old"} and os.listdir(tmp_path) == ["t"]
    assert "is in place again" in caplog.text
    settle(tmp_path / "t")


def test_a_complete_new_one_is_put_in_place(tmp_path: Path) -> None:
    left(tmp_path, DEAD, "-old", "")
    settle(tmp_path / "t")
    assert contents(tmp_path) == {"t/x": ""} and os.listdir(tmp_path) == ["t"]


def test_what_is_in_place_stays(tmp_path: Path) -> None:
    make(tmp_path / "t", "new")
    left(tmp_path, DEAD, "-old")
    settle(tmp_path / "t")
    assert sorted(os.listdir(tmp_path)) == [BASE + "-old", f"{BASE}.lock", "t"], "reading is no reason to clean"
    write(tmp_path / "t", "newer")
    assert contents(tmp_path) == {"t/x": "newer"} and os.listdir(tmp_path) == ["t"]


def test_in_doubt_the_error_names_the_old_directory(tmp_path: Path) -> None:
    left(tmp_path, FOREIGN, "-old", "")
    with pytest.raises(
        CheckpointError, match=rf"was being replaced.*another machine.*'{tmp_path}/{BASE}-old'.*rename it"
    ):
        settle(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_recovery_that_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left(tmp_path, DEAD, "-old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match=rf"cannot be completed here.*Permission denied.*{BASE}-old'"):
        settle(tmp_path / "t")
    assert (tmp_path / f"{BASE}-old" / "x").exists()


def test_an_exchange_that_cannot_be_undone_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "t", "old")
    rename = os.rename

    def only_aside(source: Any, destination: Any) -> None:
        if not str(destination).endswith("-old"):
            raise PermissionError(13, "Permission denied")
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_swap", lambda a, b: 38)
        patch.setattr(os, "rename", only_aside)
        with pytest.raises(CheckpointError, match="is half replaced, and the next write or read completes it"):
            write(tmp_path / "t", "new")
    settle(tmp_path / "t")
    assert contents(tmp_path) == {"t/x": "new"} and os.listdir(tmp_path) == ["t"]


def adapter(directory: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    lora_transform(net, LoraConfig(r=2, target_modules=["0"])).save_pretrained(directory)
    return directory


READERS = {
    "LoraConfig": lambda path: LoraConfig.from_pretrained(path),
    "model": lambda path: lora_transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), path),
    "check_files": lambda path: check_files(path),
    "command": lambda path: (
        CliRunner().invoke(cli, ["check", str(path)], catch_exceptions=False).exit_code == 0 or 1 / 0
    ),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_recovers(tmp_path: Path, read: Any) -> None:
    adapter(tmp_path / "t").rename(tmp_path / f"{BASE}-old")
    left(tmp_path, DEAD)
    read(tmp_path / "t")
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ""])
def test_odd_names_are_left_to_the_reader(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settle(name)


def test_checkpoints_are_recovered_too(tmp_path: Path) -> None:
    left(tmp_path, DEAD, "-old")
    with pytest.raises(CheckpointError, match="has neither model.safetensors"):
        read_shards(tmp_path / "t")
    assert (tmp_path / "t").is_dir()


# ---- one by one ----


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the replacement of files stop after some of them."""
    move, moved = in_place._move, []

    def some(source: Path, destination: Path) -> None:
        if len(moved) == after:
            raise OSError(5, "Input/output error")
        moved.append(source)
        move(source, destination)

    monkeypatch.setattr(in_place, "_move", some)


@pytest.mark.parametrize("after", range(4))
def test_a_journal_is_completed(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "t", "old")
    (tmp_path / "t" / "stale").mkdir()
    (tmp_path / "t" / "stale" / "y").write_text("old")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "t")
        interrupt(patch, after)
        message = r"Input/output error; the disk fails.*is half replaced, and the next write or read completes it"
        with pytest.raises(CheckpointError, match=message), staged(".") as staging:
            for name in ("a", "b", "c", "x"):
                (staging / name).write_text("new")
    assert (tmp_path / "t" / "stale").exists()
    settle(tmp_path / "t")
    assert contents(tmp_path) == {f"t/{name}": "new" for name in "abcx"}
    assert sorted(os.listdir(tmp_path / "t")) == ["a", "b", "c", "x"]


def test_what_was_put_there_since_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "t", "old")
    (tmp_path / "t" / "stale").write_text("old")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "t")
        interrupt(patch, 0)
        with pytest.raises(CheckpointError), staged(".") as staging:
            (staging / "x").write_text("new")
    (tmp_path / "t" / "other").write_text("holds the inode")
    os.replace(tmp_path / "t" / "other", tmp_path / "t" / "stale")
    settle(tmp_path / "t")
    assert contents(tmp_path / "t") == {"x": "new", "stale": "holds the inode"}


@pytest.mark.parametrize(
    "text",
    ["{}", '{"remove": 1}', '{"remove": [["../t", 1, 2]]}', '{"remove": [["", 1, 2]]}', '{"remove": [[1, 2]]}', "{"],
)
def test_broken_journals_remove_nothing(tmp_path: Path, text: str) -> None:
    make(tmp_path / "t", "old")
    left(tmp_path / "t", DEAD, "")
    (tmp_path / "t" / f".t.fxlora-1-0123abcd{in_place.JOURNAL}").write_text(text)
    with pytest.raises(CheckpointError, match=r"no journal of fxlora|not valid JSON"):
        settle(tmp_path / "t")
    assert (tmp_path / "t" / "x").read_text() == "old"


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("way", ["swap", "in place"])
def test_a_new_write_ends_what_another_machine_began(
    tmp_path: Path, inside: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "t", "old")
    place = tmp_path / "t" if inside else tmp_path
    left(place, FOREIGN, "")
    (place / f"{BASE}{in_place.JOURNAL}").write_text('{"remove": []}')
    with pytest.raises(CheckpointError, match="another machine.*Write it again, or read it once where its writer ran"):
        settle(tmp_path / "t")
    if way == "in place":
        monkeypatch.chdir(tmp_path / "t")
    write(tmp_path / "t", "new")
    settle(tmp_path / "t")
    assert (tmp_path / "t" / "x").read_text() == "new" and not leftovers.interrupted(tmp_path / "t")


def test_files_take_the_place_of_directories_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "t" / "a", "old")
    (tmp_path / "t" / "b").write_text("old")
    monkeypatch.chdir(tmp_path / "t")
    with staged(".") as staging:
        (staging / "a").write_text("new")
        (staging / "b").mkdir()
        (staging / "b" / "x").write_text("new")
    assert contents(tmp_path) == {"t/a": "new", "t/b/x": "new"}


def test_another_file_system_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "t", "old")
    replaced = os.replace

    def across(source: Any, destination: Any) -> None:
        if ".fxlora-new" not in str(source):
            raise OSError(18, "Invalid cross-device link")
        replaced(source, destination)

    monkeypatch.chdir(tmp_path / "t")
    monkeypatch.setattr(os, "replace", across)
    write(Path(), "new")
    assert contents(tmp_path) == {"t/x": "new"} and os.listdir(tmp_path / "t") == ["x"]


def test_a_mount_point(tmp_path: Path) -> None:
    """As a container's volume."""
    target = make(tmp_path / "t", "hidden below the mount")
    if subprocess.run(["mount", "-t", "tmpfs", "t", str(target)], check=False, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        (target / "stale").write_text("old")
        for text in ("new", "newer"):
            write(target, text)
            assert contents(target) == {"x": text} and os.listdir(tmp_path) == ["t"]
    finally:
        subprocess.run(["umount", str(target)], check=True)
    assert contents(tmp_path) == {"t/x": "hidden below the mount"}


@pytest.mark.parametrize("stopped", [False, True])
def test_a_directory_of_a_lower_layer_of_an_overlay(
    tmp_path: Path, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "t", "old")
    (tmp_path / "t" / "stale").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_swap", lambda a, b: errno.EXDEV)
        if stopped:
            interrupt(patch, 1)
        error = pytest.raises(CheckpointError) if stopped else nullcontext()
        with error, staged(tmp_path / "t", keep=lambda name: name != "stale") as staging:
            (staging / "y").write_text("new")
            (staging / "z").write_text("new")
    settle(tmp_path / "t")
    assert contents(tmp_path) == {"t/x": "old", "t/y": "new", "t/z": "new"} and os.listdir(tmp_path) == ["t"]


def test_an_overlay(tmp_path: Path) -> None:
    make(tmp_path / "lower" / "t", "old")
    (tmp_path / "upper").mkdir()
    script = "mount -t tmpfs t upper && cd upper && mkdir u w m && mount -t overlay o -o lowerdir=../lower,upperdir=u,workdir=w m"
    if subprocess.run(["sh", "-c", script], check=False, capture_output=True, cwd=tmp_path).returncode:
        subprocess.run(["umount", str(tmp_path / "upper")], check=False, capture_output=True)
        pytest.skip("may not mount")
    merged = tmp_path / "upper" / "m"
    try:
        for text in ("new", "newer"):
            write(merged / "t", text)
            assert contents(merged) == {"t/x": text} and os.listdir(merged) == ["t"]
    finally:
        subprocess.run(["umount", str(merged), str(tmp_path / "upper")], check=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_parent_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose volume is the target: files are replaced inside of it."""
    make(tmp_path / "t", "old")
    before, inode = os.access, (tmp_path / "t").stat().st_ino
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and before(path, mode))
    seen: list[list[str]] = []
    with staged(tmp_path / "t") as staging:
        (staging / "x").write_text("new")
        seen.append(os.listdir(tmp_path))
    assert seen == [["t"]] and contents(tmp_path) == {"t/x": "new"} and (tmp_path / "t").stat().st_ino == inode


def test_staging_in_the_target_does_not_come_along(tmp_path: Path) -> None:
    """A writer was killed in its working directory; now the directory is replaced from elsewhere, and from another host."""
    make(tmp_path / "t", "old")
    left(tmp_path / "t", FOREIGN, "")
    with staged(tmp_path / "t", keep=lambda _: True) as staging:
        (staging / "y").write_text("new")
    assert contents(tmp_path) == {"t/x": "old", "t/y": "new"}


# ---- modes ----


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_new_files_belong_to_the_group_of_a_shared_directory(tmp_path: Path) -> None:
    target = make(tmp_path / "t", "old")
    if os.geteuid() == 0:
        os.chown(target, 0, 1)
    target.chmod(0o2775)
    write(target, "new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o2775
    assert (target / "x").stat().st_gid == target.stat().st_gid == (1 if os.geteuid() == 0 else os.getegid())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_modes_of_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        adapter(tmp_path / "a")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()}
    assert modes == {0o640} and stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750
    (tmp_path / "a").chmod(0o555)  # and nobody may write there but root: replaced whole, and still so
    adapter(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o555
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "a").chmod(0o755)
    shutil.rmtree(tmp_path / "a")


def test_names_of_ours() -> None:
    ours = (BASE, f"{BASE}-old", f"{BASE}-journal", f"{BASE}.lock", ".t.fxlora.lock")
    assert all(map(leftovers.is_ours, ours))
    assert not any(map(leftovers.is_ours, ("x", ".t.fxlora", "t.fxlora-1-0123abcd", f"{BASE}-new", ".lock")))
    assert atomic.is_ours is leftovers.is_ours
