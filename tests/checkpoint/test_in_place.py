"""Files that are replaced one by one, under a journal, where the directory must stay."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fxlora import CheckpointError
from fxlora.checkpoint import exchange, in_place, leftovers
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.leftovers import settle
from tests.checkpoint.interrupted import BASE, DEAD, FOREIGN, contents, interrupt, left, make, write


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


def test_what_was_put_there_since_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "t", "old")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "t")
        interrupt(patch, 0)
        with pytest.raises(CheckpointError), staged(".") as staging:
            for name in ("a", "x"):
                (staging / name).write_text("of the stopped writer")
    (tmp_path / "t" / "x").write_text("newer")
    with pytest.raises(CheckpointError, match=r"t/x' was changed after the writer .* was stopped, and is not replaced"):
        settle(tmp_path / "t")
    assert contents(tmp_path / "t")["x"] == "newer"
    (tmp_path / "t" / "x").unlink()
    settle(tmp_path / "t")
    assert contents(tmp_path / "t")["x"] == "of the stopped writer"


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
