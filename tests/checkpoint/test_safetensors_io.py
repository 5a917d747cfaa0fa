"""Our files are the library's, bit by bit, and a broken one is always a `CheckpointError` that names it."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fxlora import CheckpointError
from fxlora.checkpoint import safetensors_io
from fxlora.checkpoint.safetensors_io import Entry, open_tensors, save_tensors, write_tensors

DTYPES = sorted(safetensors_io._NAMES, key=str)


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + max(1, torch.Size(shape).numel())).to(dtype)[: torch.Size(shape).numel()].reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


def test_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.{dtype}": some(dtype, 2, 3) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "Grüße.weight": some(torch.bfloat16, 5)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    save_tensors(tmp_path / "ours", dict(reversed(tensors.items())))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
    )
)
def test_round_trip(tmp_path: Path, wanted: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: some(dtype, *shape) for name, (dtype, shape) in wanted.items()}
    save_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with open_tensors(tmp_path / "ours") as file:
        assert file.metadata == {"format": "pt"} and file.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = file.load(name)
            assert file.entries[name] == Entry.of(tensor) == Entry.of(found)
            assert raw_bytes(found) == raw_bytes(tensor)


def test_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "a": base,
        "same": base,
        "t": base.T,
        "row": base[2],
        "step": base[::2, 1:],
        "wide": torch.ones(1).expand(3, 2),
    }
    tensors["conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
    save_tensors(tmp_path / "x", tensors)
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_metadata_in_the_order_of_names(tmp_path: Path) -> None:
    for name, metadata in (("a", {"z": "1", "b": "2"}), ("b", {"b": "2", "z": "1"})):
        save_tensors(tmp_path / name, {"x": torch.ones(2)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert b'{"__metadata__":{"b":"2","z":"1"}' in (tmp_path / "a").read_bytes()
    save_tensors(tmp_path / "none", {"x": torch.ones(2)}, {})
    assert b"__metadata__" not in (tmp_path / "none").read_bytes() and load_file(tmp_path / "none")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "x", {"x": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~mask


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def load(name: str) -> torch.Tensor:
        order.append(name)
        return torch.full((2,), float(len(order)))

    entries = {name: Entry("F32", (2,)) for name in "cab"}
    write_tensors(tmp_path / "x", entries, load)
    assert order == ["a", "b", "c"] and load_file(tmp_path / "x")["b"].tolist() == [2.0, 2.0]


def test_tensors_without_data(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'w' is on the meta device"):
        save_tensors(tmp_path / "x", {"w": torch.empty(2, device="meta")})
    with pytest.raises(CheckpointError, match=r"cannot hold torch.complex128"):
        save_tensors(tmp_path / "x", {"w": torch.empty(2, dtype=torch.complex128)})
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(CheckpointError, match=r"'w' is a TwoTensor, not a plain tensor; gather or dequantize"):
        save_tensors(tmp_path / "x", {"w": TwoTensor(torch.ones(2), torch.ones(2))})
    assert not list(tmp_path.iterdir())


# ---- broken files ----


def raw(header: str | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if size is None else size) + text + data


GOOD: dict[str, Any] = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated or corrupt"),
    "a few bytes": (b"abc", "truncated or corrupt"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "pointer of Git LFS"),
    "header cut": (raw(json.dumps(GOOD))[:30], "truncated or corrupt"),
    "data cut": (raw(json.dumps(GOOD), b"\0" * 7), "truncated or corrupt"),
    "data left over": (raw(json.dumps(GOOD), b"\0" * 9), "truncated or corrupt"),
    "huge header": (raw(json.dumps(GOOD), b"\0" * 8, size=2**62), "truncated or corrupt"),
    "not JSON": (raw("{'w'}"), "truncated or corrupt"),
    "not UTF-8": (raw(b"\xff\xfe{}"), "truncated or corrupt"),
    "a list": (raw("[]"), "truncated or corrupt"),
    "nested without end": (raw("[" * 100_000), "truncated or corrupt"),
    "no offsets": (raw('{"w":{"dtype":"F32","shape":[2]}}', b"\0" * 8), "truncated or corrupt"),
    "no dtype": (raw('{"w":{"shape":[2],"data_offsets":[0,8]}}', b"\0" * 8), "truncated or corrupt"),
    "unknown dtype": (raw(json.dumps(GOOD).replace("F32", "X32"), b"\0" * 8), "truncated or corrupt"),
    "shape and offsets differ": (raw(json.dumps(GOOD).replace("[2]", "[3]"), b"\0" * 8), "truncated or corrupt"),
    "negative size": (raw(json.dumps(GOOD).replace("[2]", "[-2]"), b"\0" * 8), "truncated or corrupt"),
    "shape is a text": (raw(json.dumps(GOOD).replace("[2]", '"2"'), b"\0" * 8), "truncated or corrupt"),
    "offsets overlap": (
        raw(json.dumps({**GOOD, "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}), b"\0" * 12),
        "truncated or corrupt",
    ),
    "metadata is a list": (raw(json.dumps({"__metadata__": [1], **GOOD}), b"\0" * 8), "truncated or corrupt"),
    "name twice": (raw(json.dumps(GOOD)[:-1] + "," + json.dumps(GOOD)[1:], b"\0" * 8), "has 'w' twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(name: str, tmp_path: Path) -> None:
    content, words = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught, open_tensors(path):
        pytest.fail("opened")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing cannot be read"), open_tensors(tmp_path / "nothing"):
        pytest.fail("opened")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_headers_never_raise_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x"
    save_tensors(path, {"a.weight": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 33))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        with open_tensors(path) as file:
            for name in file.entries:
                file.load(name)
    except CheckpointError as error:
        assert str(path) in str(error)
