"""A directory is the old one or the new one; whatever else it holds stays."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fxlora import CheckpointError
from fxlora.checkpoint import atomic, exchange
from fxlora.checkpoint.atomic import staged


def contents(root: Path) -> dict[str, bytes]:
    """All files below a directory; directories end with a slash."""
    found: dict[str, bytes] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name + "/" * path.is_dir()] = b"" if path.is_dir() else path.read_bytes()
    return found


def everything(_: str) -> bool:
    return True


def write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).write_text(text)


def refused(*_: object, **__: object) -> Any:
    raise OSError(errno.EPERM, "not here")


@contextmanager
def umask(mask: int) -> Generator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


EXCHANGES = ["system call", "renames"]


@pytest.fixture(params=EXCHANGES)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "renames":
        monkeypatch.setattr(exchange, "_swap", lambda a, b: errno.ENOSYS)
    return request.param


def test_new_directory_with_parents(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "b") as staging:
        write(staging, x="1")
        assert staging.parent == tmp_path / "a" and staging.name.startswith(f".b.fxlora-{os.getpid()}-")
        assert not (tmp_path / "a" / "b").exists()
    assert contents(tmp_path) == {"a/": b"", "a/b/": b"", "a/b/x": b"1"}


def test_replace_whole(tmp_path: Path, way: str) -> None:
    write(tmp_path / "t", x="old", y="old")
    with staged(tmp_path / "t") as staging:
        write(staging, x="new")
    assert contents(tmp_path) == {"t/": b"", "t/x": b"new"}


def test_the_system_call_swaps(tmp_path: Path) -> None:
    write(tmp_path / "a", x="a")
    write(tmp_path / "b", x="b")
    assert exchange._swap(tmp_path / "a", tmp_path / "b") == 0
    assert contents(tmp_path) == {"a/": b"", "a/x": b"b", "b/": b"", "b/x": b"a"}


@pytest.mark.parametrize("has_call", [True, False])
def test_the_system_call_of_macos(has_call: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Library:
        def __getattr__(self, name: str) -> Any:
            if name != "renamex_np" or not has_call:
                raise AttributeError(name)
            return lambda *arguments: calls.append(arguments)

    monkeypatch.setattr(exchange.sys, "platform", "darwin")
    monkeypatch.setattr(exchange.ctypes, "CDLL", lambda *_, **__: Library())
    assert exchange._swap(Path("a"), Path("b")) == (0 if has_call else errno.ENOSYS)
    assert calls == ([(b"a", b"b", 2)] if has_call else [])


def test_other_errors_of_the_exchange_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_swap", lambda a, b: errno.EBUSY)
    write(tmp_path / "t", x="old")
    with pytest.raises(CheckpointError, match="cannot be written.*busy"), staged(tmp_path / "t") as staging:
        write(staging, x="new")
    assert contents(tmp_path) == {"t/": b"", "t/x": b"old"}


def test_second_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_swap", lambda a, b: errno.ENOSYS)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        return refused() if not self.name.endswith("-old") and target.name == "t" else rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    write(tmp_path / "t", x="old")
    with pytest.raises(CheckpointError, match="cannot be written"), staged(tmp_path / "t") as staging:
        write(staging, x="new")
    assert contents(tmp_path) == {"t/": b"", "t/x": b"old"}


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_other_files_stay(tmp_path: Path, way: str, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refused)
    write(tmp_path / "t", adapter="old", optimizer="large")
    write(tmp_path / "t" / "runs" / "1", events="log")
    (tmp_path / "t" / "empty").mkdir()
    (tmp_path / "t" / "latest").symlink_to("runs")
    inode = (tmp_path / "t" / "optimizer").stat().st_ino
    with staged(tmp_path / "t", keep=everything) as staging:
        write(staging, adapter="new")
        write(staging / "runs" / "1", more="log")
    found = contents(tmp_path / "t")
    assert found == {
        "adapter": b"new", "optimizer": b"large", "empty/": b"", "latest/": b"",
        "runs/": b"", "runs/1/": b"", "runs/1/events": b"log", "runs/1/more": b"log",
    }  # fmt: skip
    assert os.readlink(tmp_path / "t" / "latest") == "runs"
    assert ((tmp_path / "t" / "optimizer").stat().st_ino == inode) == links
    assert sorted(os.listdir(tmp_path)) == ["t"]


def test_keep_chooses(tmp_path: Path, way: str) -> None:
    write(tmp_path / "t", weights="old", notes="mine")
    with staged(tmp_path / "t", keep=lambda name: name != "weights") as staging:
        write(staging, index="new")
    assert contents(tmp_path / "t") == {"index": b"new", "notes": b"mine"}


def test_open_files_stay_open(tmp_path: Path) -> None:
    write(tmp_path / "t", adapter="old", log="1")
    with open(tmp_path / "t" / "log", "a") as log:
        with staged(tmp_path / "t", keep=everything) as staging:
            write(staging, adapter="new")
        log.write("2")
    assert (tmp_path / "t" / "log").read_text() == "12"


def test_file_of_another_process_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(a: Path, b: Path) -> Path:
        write(b, rng_state_1="of rank 1")
        return exchange.exchange(a, b)

    monkeypatch.setattr(atomic, "exchange", late)
    write(tmp_path / "t", adapter="old")
    with staged(tmp_path / "t", keep=everything) as staging:
        write(staging, adapter="new")
    assert contents(tmp_path / "t") == {"adapter": b"new", "rng_state_1": b"of rank 1"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CheckpointError])
@pytest.mark.parametrize("exists", [True, False])
def test_error_leaves_everything(tmp_path: Path, error: type[BaseException], exists: bool) -> None:
    if exists:
        write(tmp_path / "deep" / "t", x="old")
    before = contents(tmp_path)
    with pytest.raises(error, match="stop"), staged(tmp_path / "deep" / "t", keep=everything) as staging:
        write(staging, x="new")
        raise error("stop")
    assert contents(tmp_path) == before


def test_full_disk(tmp_path: Path) -> None:
    write(tmp_path / "t", x="old")
    before = contents(tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"t' cannot be written.*No space left"),
        staged(tmp_path / "t") as staging,
    ):
        write(staging, x="half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert contents(tmp_path) == before


def test_target_is_a_file(tmp_path: Path) -> None:
    write(tmp_path, t="mine")
    with pytest.raises(CheckpointError, match=r"t' is a file.*choose another path"), staged(tmp_path / "t"):
        pytest.fail("not reached")
    assert contents(tmp_path) == {"t": b"mine"}


def test_parent_is_a_file(tmp_path: Path) -> None:
    write(tmp_path, f="mine")
    with pytest.raises(CheckpointError, match="cannot be written"), staged(tmp_path / "f" / "t"):
        pytest.fail("not reached")
    assert contents(tmp_path) == {"f": b"mine"}


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", x="old")
    (tmp_path / "t").symlink_to("real")
    with staged(tmp_path / "t") as staging:
        write(staging, x="new")
    assert (tmp_path / "t").is_symlink() and (tmp_path / "real" / "x").read_text() == "new"


def test_modes(tmp_path: Path) -> None:
    with umask(0o027):
        with staged(tmp_path / "t") as staging:
            write(staging, x="1")
        assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o750
    (tmp_path / "t").chmod(0o775)
    with staged(tmp_path / "t", keep=everything) as staging:
        write(staging, y="2")
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o775


@pytest.mark.parametrize("keep", [everything, None, lambda name: name == "notes"])
def test_the_working_directory_stays_itself(tmp_path: Path, keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "t", x="old", notes="mine", weights="stale")
    write(tmp_path / "t" / "sub", y="old")
    write(tmp_path / "t" / "gone", z="stale")
    monkeypatch.chdir(tmp_path / "t")
    inode = Path().stat().st_ino
    with staged(".", keep=keep) as staging:
        write(staging, x="new")
        write(staging / "sub", y="new")
    assert Path().stat().st_ino == inode == (tmp_path / "t").stat().st_ino
    found = contents(Path())
    stay = keep or (lambda _: False)
    expected = {"x": b"new", "sub/": b"", "sub/y": b"new"}
    expected |= {"notes": b"mine"} if stay("notes") else {}
    expected |= {"weights": b"stale", "gone/": b"", "gone/z": b"stale"} if stay("gone") else {}
    assert found == expected
    assert os.listdir(tmp_path) == ["t"]


def test_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    shutil.rmtree(tmp_path / "cwd")
    write(tmp_path / "t", x="old")
    with staged(tmp_path / "t") as staging:
        write(staging, x="new")
    assert contents(tmp_path / "t") == {"x": b"new"}


def test_mount_point_is_neither_moved_nor_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "t" / "drive", data="precious")
    inode = (tmp_path / "t").stat().st_ino
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "drive")
    with staged(tmp_path / "t", keep=everything) as staging:
        write(staging, x="new")
    assert contents(tmp_path / "t") == {"drive/": b"", "drive/data": b"precious", "x": b"new"}
    assert (tmp_path / "t").stat().st_ino == inode
