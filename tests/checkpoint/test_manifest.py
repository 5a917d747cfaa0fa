"""`SHA256SUMS`: what is written, that `sha256sum` agrees, and that a broken one is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

import fxlora
from fxlora import CheckpointError, LoraConfig, lora_transform, make_portable, merge_checkpoint
from fxlora.checkpoint import manifest
from fxlora.checkpoint.manifest import MANIFEST_NAME, digest_of, read_manifest, write_manifest
from fxlora.checkpoint.safetensors_io import save_tensors

DIGEST = "0" * 64


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): sha(path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }


def make(root: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def sha256sum(directory: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    return subprocess.run(
        ["sha256sum", "--check", "--strict", MANIFEST_NAME],
        cwd=directory,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def test_lines_are_sorted_and_as_sha256sum_writes_them(tmp_path: Path) -> None:
    make(tmp_path, {"b": b"1", "a/c": b"2", "a b": b"3", "B": b""})
    write_manifest(tmp_path)
    lines = [f"{sha(data)}  {name}\n" for name, data in (("B", b""), ("a b", b"3"), ("a/c", b"2"), ("b", b"1"))]
    assert (tmp_path / MANIFEST_NAME).read_text() == "".join(lines)
    assert read_manifest(tmp_path) == files(tmp_path)
    assert sha256sum(tmp_path).returncode == 0
    (tmp_path / "b").write_bytes(b"x")
    assert "b: FAILED" in sha256sum(tmp_path).stdout


@pytest.mark.skipif(os.name == "nt", reason="no such names on Windows")
def test_odd_names(tmp_path: Path) -> None:
    names = ["a\\b", "new\nline", "\r", "a\\n", "ä", "*star", " ", os.fsdecode(b"\xff"), "\\\\"]
    make(tmp_path, {name: name.encode(errors="surrogateescape") for name in names})
    write_manifest(tmp_path)
    assert read_manifest(tmp_path) == {name: sha(os.fsencode(name)) for name in names}
    result = sha256sum(tmp_path)
    assert result.returncode == 0, result.stderr


def test_reads_what_sha256sum_writes(tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    make(tmp_path, {"a\\b": b"1", "x\ny": b"2", "plain": b"3"})
    names = sorted(os.listdir(tmp_path))
    for option in ("--text", "--binary"):
        text = subprocess.run(["sha256sum", option, *names], cwd=tmp_path, capture_output=True, check=True).stdout
        (tmp_path / MANIFEST_NAME).write_bytes(text)
        assert read_manifest(tmp_path) == files(tmp_path)


def test_known_digests_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"a": b"1", "b": b"2"})
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return digest_of(path)

    monkeypatch.setattr(manifest, "digest_of", counted)
    write_manifest(tmp_path, {"a": DIGEST, "gone": DIGEST})
    assert read == ["b"] and read_manifest(tmp_path) == {"a": DIGEST, "b": sha(b"2")}


def test_directories_with_a_manifest_are_left_to_it(tmp_path: Path) -> None:
    make(tmp_path, {"a": b"1", "sub/b": b"2", "sub/deep/c": b"3", "other/d": b"4"})
    write_manifest(tmp_path / "sub")
    write_manifest(tmp_path)
    assert set(read_manifest(tmp_path) or ()) == {"a", "other/d"}
    assert set(read_manifest(tmp_path / "sub") or ()) == {"b", "deep/c"}


def test_large_files_are_read_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(64 << 20))
    tracemalloc.start()
    write_manifest(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


BROKEN = {
    "no digest": (b"hello\n", r"line 1: b'hello' is not '<64 hexadecimal"),
    "short digest": (b"00  a\n", "line 1"),
    "one blank": (f"{DIGEST} a\n".encode(), "line 1"),
    "no name": (f"{DIGEST}  \n".encode(), "line 1"),
    "empty line": (f"{DIGEST}  a\n\n{DIGEST}  b\n".encode(), "line 2"),
    "NUL": (f"{DIGEST}  a\0b\n".encode(), "line 1"),
    "carriage return": (f"{DIGEST}  a\r\n".encode(), "line 1"),
    "unknown escape": (f"\\{DIGEST}  a\\t\n".encode(), "line 1"),
    "escape at the end": (f"\\{DIGEST}  a\\\n".encode(), "line 1"),
    "absolute": (f"{DIGEST}  /etc/passwd\n".encode(), "'/etc/passwd' is no file in this directory"),
    "parent": (f"{DIGEST}  ../x\n".encode(), r"'\.\./x' is no file in this directory"),
    "parent within": (f"{DIGEST}  a/../../x\n".encode(), "is no file in this directory"),
    "dot": (f"{DIGEST}  ./x\n".encode(), "is no file in this directory"),
    "twice": (f"{DIGEST}  a\n{DIGEST}  a\n".encode(), "line 2: 'a' is there twice"),
    "twice, escaped": (f"{DIGEST}  a\n\\{DIGEST}  a\n".encode(), "line 2: 'a' is there twice"),
    "binary": (bytes(range(256)) * 4, "line 1"),
    "JSON": (b'{"a": 1}', "line 1"),
}


@pytest.mark.parametrize("text, message", BROKEN.values(), ids=BROKEN)
def test_broken_manifests_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST_NAME}, {message if 'line' in message else '.*' + message}"):
        read_manifest(tmp_path)


def test_no_manifest_and_an_empty_one(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST_NAME).touch()
    assert read_manifest(tmp_path) == {}


def test_last_line_may_lack_its_end(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(f"{DIGEST.replace('0', 'A')}  a")
    assert read_manifest(tmp_path) == {"a": "a" * 64}


def test_links_pipes_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside").write_text(f"{DIGEST}  a\n")
    home = tmp_path / "home"
    home.mkdir()
    (home / MANIFEST_NAME).symlink_to("../outside")
    with pytest.raises(CheckpointError, match="is outside of"):
        read_manifest(home)
    (home / MANIFEST_NAME).unlink()
    os.mkfifo(home / MANIFEST_NAME)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        read_manifest(home)
    (home / MANIFEST_NAME).unlink()
    (home / MANIFEST_NAME).write_text(f"{DIGEST}  a\n")
    monkeypatch.setattr(manifest, "MAX_MANIFEST", 60)
    with pytest.raises(CheckpointError, match="more than 60 bytes"):
        read_manifest(home)


# ---- who writes one ----


def model(**options: object) -> fxlora.LoraModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    lora = lora_transform(net, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), **options)
    assert isinstance(lora, fxlora.LoraModel)
    return lora


def assert_described(directory: Path, names: set[str]) -> None:
    assert read_manifest(directory) == files(directory) and files(directory).keys() == names
    assert sha256sum(directory).returncode == 0


ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def test_adapters(tmp_path: Path) -> None:
    lora = model()
    lora.add_adapter("a", LoraConfig(r=1, target_modules=["0"]))
    make(tmp_path, {"mine": b"stays"})
    lora.save_pretrained(tmp_path)
    assert (read_manifest(tmp_path) or {}).keys() == ADAPTER, (
        "neither files that were there, nor those of other adapters"
    )
    assert_described(tmp_path / "a", ADAPTER)
    again = (tmp_path / MANIFEST_NAME).read_bytes()
    lora.save_pretrained(tmp_path)
    assert (tmp_path / MANIFEST_NAME).read_bytes() == again
    make_portable(tmp_path, tmp_path / "portable")
    assert_described(tmp_path / "portable", {*ADAPTER, "mine"})


def test_merges_and_extraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, base = model(), tmp_path / "base"
    lora.save_pretrained(tmp_path / "adapter")
    make(
        base, {"config.json": b"{}", "code/x.py": b"1", "code/SHA256SUMS": b"of the base", "SHA256SUMS": b"of the base"}
    )
    with lora.disable_adapter():
        state = {name: tensor for name, tensor in lora.state_dict().items() if "lora" not in name}
    save_tensors(base / "model.safetensors", state)
    companions = {"config.json", "code/x.py", "model.safetensors"}
    fxlora.export_merged(lora, tmp_path / "exported", base_dir=base)
    assert_described(tmp_path / "exported", companions)
    hashed: list[str] = []

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return digest_of(path)

    monkeypatch.setattr(manifest, "digest_of", noted)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert_described(tmp_path / "merged", companions)
    assert sorted(hashed) == ["config.json", "x.py"], "the digests of shards are those of the writing"
    for name in ("merged", "exported"):
        assert not (tmp_path / name / "code" / MANIFEST_NAME).exists()
    fxlora.extract_adapter(base, tmp_path / "merged", tmp_path / "extracted", r=2, target_modules=["0", "2"])
    assert_described(tmp_path / "extracted", ADAPTER)
