"""What killed writers left: who lives is left alone, what is half done is completed, the rest goes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from fxlora import CheckpointError, LoraConfig, check_files, lora_transform
from fxlora.checkpoint import atomic, exchange, leftovers, locks
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.layout import read_shards
from fxlora.checkpoint.leftovers import settle
from fxlora.checkpoint.locks import Owner
from fxlora.cli import cli
from tests.checkpoint.interrupted import BASE, DEAD, FOREIGN, contents, left, make, write


@contextmanager
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(locks, "_lock", lambda descriptor: False)
        yield


# ---- staging directories of the dead and the living ----


def test_a_directory_that_is_removed_later_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "t", "old")
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_swap", lambda one, other: errno.ENOSYS)
        patch.setattr(atomic, "discard", lambda staging, target, held: held.release(remove=False))  # killed there
        write(tmp_path / "t", "new")
    shutil.rmtree(tmp_path / "t")
    settle(tmp_path / "t")
    assert not (tmp_path / "t").exists()


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
