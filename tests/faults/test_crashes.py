"""Writers that are killed, run out of space or may not write: the target is the old or the new one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxlora import CheckpointError, LoraConfig, export_merged, lora_transform, merge_checkpoint
from fxlora.checkpoint import safetensors_io
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.file_ranges import Files
from tests.faults import crash_points

resource = pytest.importorskip("resource", reason="needs limits of a process")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and fork")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one, since thousands of calls of fsync take their time on a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.mark.parametrize("way", crash_points.WAYS)
def test_killed_before_every_system_call(way: str, memory: Path) -> None:
    if way == "swap" and sys.platform != "linux":
        pytest.skip("needs renameat2")
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.crash_points", way, str(memory)],
        check=True, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert not found["faults"]
    assert found["points"] > 25 and found["outcomes"].keys() == {"old", "new"}


# ---- errors ----


def model() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    return lora_transform(net, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, and a target for each writer with files of an earlier write."""
    lora = model()
    lora.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    with lora.disable_adapter():
        state = {name: tensor for name, tensor in lora.state_dict().items() if "lora" not in name}
    safetensors_io.save_tensors(tmp_path / "base" / "model.safetensors", state)
    for name in WRITERS:
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "mine").write_text("stays")
    return tmp_path


WRITERS = {
    "save_pretrained": lambda place, out: model().save_pretrained(out),
    "export_merged": lambda place, out: export_merged(model(), out),
    "merge_checkpoint": lambda place, out: merge_checkpoint(place / "base", place / "adapter", out),
}


def refused(place: Path, name: str, message: str) -> None:
    before = contents(place / "out")
    with pytest.raises(CheckpointError, match=message):
        WRITERS[name](place, place / "out" / name)
    assert contents(place / "out") == before
    assert sorted(os.listdir(place / "out")) == sorted(WRITERS), "nothing is left beside"


@pytest.mark.parametrize("name", WRITERS)
def test_file_size_limit(place: Path, name: str) -> None:
    """A full disk, without a disk: the system refuses to let files grow. Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        refused(place, name, "cannot be written.*File too large.*(ulimit|space).*")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    WRITERS[name](place, place / "out" / name)


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            if call == "rename":
                patch.setattr("fxlora.checkpoint.exchange._swap", lambda a, b: errno.ENOSYS)
            refused(place, name, "cannot be written.*No space left.*; free some space.*It is as it was")


def test_small_file_system(place: Path, tmp_path: Path) -> None:
    small, full = tmp_path / "small", b"1" * 60_000
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False, capture_output=True
    ).returncode:
        pytest.skip("may not mount")
    try:
        with staged(small / "t") as staging:
            (staging / "x").write_bytes(full)
        for writer in WRITERS.values():
            with pytest.raises(CheckpointError, match=r"No space left|MB free"):
                writer(place, small / "t")
            assert contents(small) == {"t/x": full} and os.listdir(small) == ["t"]
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        for writer in WRITERS.values():
            with pytest.raises(CheckpointError, match=r"Read-only file system.*write elsewhere"):
                writer(place, small / "t")
        assert contents(small) == {"t/x": full}
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_read_error_of_the_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Files.read_into

    def fail(self: Files, path: Path, position: int, view: memoryview) -> None:
        if path.parent.name != "base":
            return read(self, path, position, view)
        raise CheckpointError(f"{path} cannot be read: {os.strerror(errno.EIO)}")

    monkeypatch.setattr(Files, "read_into", fail)
    refused(place, "merge_checkpoint", r"base/model.safetensors cannot be read: Input/output error")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", WRITERS)
def test_directories_that_may_not_be_written(place: Path, name: str) -> None:
    for each in (place / "out", place / "out" / name):
        each.chmod(0o555)
    try:
        refused(place, name, r"Permission denied.*write where you may")
    finally:
        for each in (place / "out", place / "out" / name):
            each.chmod(0o755)


def test_no_permission_says_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Any, mode: int = 0o777, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "mkdir", denied)
    refused(place, "save_pretrained", r"Permission denied.*write where you may.*It is as it was")
