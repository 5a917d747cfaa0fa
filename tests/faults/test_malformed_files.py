"""Files as an accident or an attacker makes them: each is refused by name with a remedy, quickly, and nothing is changed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import FxloraError, LoraConfig, lora_transform, merge_checkpoint
from fxlora.checkpoint.safetensors_io import read_header
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.zoo import MLP

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE, INDEX = "model.safetensors", "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("garbage_left")

KEY = "base_model.model.fc1.lora_A.weight"


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    """`adapter` and `base`, both valid."""
    torch.manual_seed(0)
    lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"])).save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(MLP().state_dict(), tmp_path / "base" / BASE)
    return tmp_path


def entries(path: Path) -> dict[str, object]:
    """All that is in a directory; what is no file by its kind alone, since a pipe would wait."""
    return {
        str(each.relative_to(path)): each.read_bytes()
        if each.is_file() and not each.is_symlink() and each.stat().st_size < 2**24
        else each.lstat().st_mode
        for each in sorted(path.rglob("*"))
    }


def assert_refused(tmp: Path, words: list[str], calls: list[Callable[[nn.Module], object]]) -> None:
    files = entries(tmp)
    for call in calls:
        model = MLP()
        before, start = snapshot(model), time.perf_counter()
        with pytest.raises((FxloraError, NotImplementedError)) as caught:
            call(model)
        assert time.perf_counter() - start < 2
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
        assert len(str(caught.value)) < 2000
        assert_unchanged(model, before)
        assert entries(tmp) == files


def adapter_refused(tmp: Path, words: list[str]) -> None:
    """By all that read an adapter: into a model as it is, into one that has another, and into files."""

    def another(_: nn.Module) -> None:
        model = lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"]), capture="modules")
        before = snapshot(model)
        try:
            model.load_adapter(tmp / "adapter", "other")
        finally:
            assert_unchanged(model, before)

    merge = lambda _: merge_checkpoint(tmp / "base", tmp / "adapter", tmp / "out")
    assert_refused(tmp, words, [lambda model: lora_transform(model, tmp / "adapter"), another, merge])


def base_refused(tmp: Path, words: list[str]) -> None:
    assert_refused(tmp, words, [lambda _: merge_checkpoint(tmp / "base", tmp / "adapter", tmp / "out")])


# ---- things that are no files, and links ----


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_link_out(path: Path) -> None:
    outside = next(each for each in path.parents if each.name in ("adapter", "base")).parent / "elsewhere"
    outside.write_bytes(b"{}")
    path.symlink_to(outside)


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (as_pipe, "a pipe or a device"),
    "directory": (Path.mkdir, "a directory"),
    "device": (as_device, "is a link to /dev/zero"),
    "link out": (as_link_out, "outside of"),
    "loop": (as_loop, ""),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("file", [f"adapter/{CONFIG}", f"adapter/{WEIGHTS}", f"base/{BASE}", f"base/{INDEX}"])
def test_no_file(file: str, kind: str, tmp: Path) -> None:
    make, words = NO_FILES[kind]
    if file.endswith(INDEX) and kind == "loop":
        pytest.skip("a link to nothing is no index")
    (tmp / file).unlink(missing_ok=True)
    make(tmp / file)
    (adapter_refused if file.startswith("adapter") else base_refused)(tmp, [words, Path(file).name])


def test_links_of_the_hub_cache_are_read(tmp: Path) -> None:
    blobs, snapshot_ = tmp / "repo" / "blobs", tmp / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot_.mkdir(parents=True)
    for number, name in enumerate((CONFIG, WEIGHTS)):
        (tmp / "adapter" / name).rename(blobs / str(number))
        (snapshot_ / name).symlink_to(Path("../../blobs") / str(number))
    assert lora_transform(MLP(), snapshot_).active_adapters == ["default"]
    assert merge_checkpoint(tmp / "base", snapshot_, tmp / "out").merged == ("fc1.weight",)


# ---- adapter_config.json ----

TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "a list": (b"[]", "must hold a JSON object"),
    "cut": (b'{"r": 8', "not valid JSON"),
    "twice": (b'{"r": 8, "r": 4}', "has 'r' twice"),
    "NaN": (b'{"lora_alpha": NaN}', "'lora_alpha': NaN is no number"),
    "NaN in it": (b'{"r": 8, "alpha_pattern": {"q": 1, "v": NaN}}', "'alpha_pattern.v': NaN is no number"),
    "infinite": (b'{"r": 1, "eva_config": [1, {"a": -Infinity}]}', "'eva_config.1.a': -Infinity is no number"),
    "too large": (b'{"lora_alpha": 1e999}', "'lora_alpha': 1e999 is too large for a number"),
    "many times NaN": (b'{"eva_config": [' + b"NaN, " * 10_000 + b"1]}", "'eva_config.0': NaN is no number"),
    "byte order mark": (b"\xef\xbb\xbf{}", "without a byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "is not UTF-8"),
    "nested": (b'{"eva_config":' * 40 + b"1" + b"}" * 40, "inside of each other"),
    "nested without end": (b'{"a":' + b"[" * 100_000, ""),
    "ten megabytes": (b'{"target_modules": ["' + b"a" * 10_000_000 + b'"]}', "has more than 1,048,576 bytes"),
    "very small parts": (b'{"target_modules": [' + b"[]," * 300_000 + b"[]]}", "very many very small parts"),
    "huge number": (b'{"r": ' + b"9" * 5_000 + b"}", ""),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_of_the_configuration(name: str, tmp: Path) -> None:
    text, words = TEXTS[name]
    (tmp / "adapter" / CONFIG).write_bytes(text)
    adapter_refused(tmp, [CONFIG, words])


FIELDS: list[tuple[str, Any]] = [
    *(("r", value) for value in (0, -1, True, "8", 2.0, None, [8], 10**9, 10**400)),
    *(("lora_alpha", value) for value in (0, True, "8", None, [8], 10**400)),
    *(("lora_dropout", value) for value in (1, -0.1, True, "0", None)),
    *(("target_modules", value) for value in (3, [3], {"a": 1}, True, "(", "(?P<a", "a" * 100_001 + "+")),
    *(("exclude_modules", value) for value in (3, [None], "[")),
    *(
        ("rank_pattern", value)
        for value in ("a", [1], {"fc1": 0}, {"fc1": True}, {"fc1": "2"}, {"(": 2}, {"fc1": 10**9})
    ),
    *(("alpha_pattern", value) for value in ("a", [1], {"fc1": 0}, {"fc1": "2"}, {"[": 2})),
    *(("modules_to_save", value) for value in ("fc2", 3, [3], {"a": 1})),
    *(("layers_to_transform", value) for value in ("1", -1, [True], 1.5)),
    *(("layers_pattern", value) for value in (3, [3])),
    *(("target_parameters", value) for value in ("w", 3, [3])),
    *(("trainable_token_indices", value) for value in ("1", 3, ["a"], [-1], {"emb": 3}, {"emb": [True]})),
    *(("layer_replication", value) for value in (3, "a", [3], [[1]], [["a", "b"]])),
    *(("bias", value) for value in ("some", True, None, ["none"])),
    *(("task_type", value) for value in ("X", 3, ["CAUSAL_LM"])),
    *(("init_lora_weights", value) for value in ("x", 3, None, [True])),
    *((name, value) for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias") for value in ("no", 1, None)),
    *((name, "yes") for name in ("use_qalora", "ensure_weight_tying")),
    *((name, 3) for name in ("revision", "base_model_name_or_path", "peft_version", "megatron_core", "auto_mapping")),
    *(
        (f"{name}_config", value)
        for name in ("eva", "corda", "lora_ga", "loftq", "kasa")
        for value in ("x", [1], {"a": 1})
    ),
    ("alora_invocation_tokens", "x"),
    ("qalora_group_size", "x"),
    ("call_sites", {"fc1": [-1]}),
    ("call_sites", [1]),
    *(("peft_type", value) for value in ("IA3", 3, ["LORA"])),
    ("a_new_field", 3),
    ("target_module", ["fc1"]),
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=[f"{name}={str(value)[:20]}" for name, value in FIELDS])
def test_field_of_the_configuration(field: str, value: Any, tmp: Path) -> None:
    path = tmp / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    adapter_refused(tmp, [CONFIG, field if len(str(value)) < 400 else ""])


# ---- adapter_model.safetensors ----


def edited(**changes: Any) -> Callable[[Path], None]:
    """A tensor of the file made something else."""

    def write(path: Path) -> None:
        tensors: dict[str, Tensor] = load_file(path)
        edit = changes["edit"]
        tensors[changes.get("key", KEY)] = edit(tensors[KEY].clone())
        save_file(tensors, path)

    return write


def as_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Bomb(path.parent.parent / "exploded")))


def as_archive(path: Path) -> None:
    torch.save({name: tensor.clone() for name, tensor in load_file(path).items()}, path.with_suffix(".pt"))
    path.with_suffix(".pt").replace(path)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


TENSORS: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        str(dtype): (edited(edit=lambda t, dtype=dtype: t.to(dtype)), "convert")
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    },
    "NaN": (edited(edit=lambda t: t.fill_(torch.nan)), "NaN"),
    "infinite": (edited(edit=lambda t: t.fill_(torch.inf)), "infinite"),
    "no dimension": (edited(edit=lambda t: t.sum()), "shape"),
    "empty": (edited(edit=lambda t: t[:0].clone()), "shape"),
    "transposed": (edited(edit=lambda t: t.t().contiguous()), "shape"),
    "base weight": (edited(key="base_model.model.fc1.weight", edit=lambda _: torch.ones(16, 8)), "base"),
    "unknown": (edited(key="base_model.model.nothing", edit=lambda t: t), "nothing"),
    "pickle": (as_pickle, "can run code"),
    "archive": (as_archive, "can run code"),
    "nothing in it": (lambda path: path.write_bytes(b""), "truncated or corrupt"),
    "header bomb": (lambda path: path.write_bytes(struct.pack("<Q", 2**40) + b"{"), "truncated or corrupt"),
    "a sparse file of a terabyte": (lambda path: os.truncate(path, 2**40), "truncated or corrupt"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_an_adapter(name: str, tmp: Path) -> None:
    write, words = TENSORS[name]
    write(tmp / "adapter" / WEIGHTS)
    adapter_refused(tmp, [words])
    assert not (tmp / "exploded").exists()


# ---- an index ----


def index(base: Path, name: str = BASE, **metadata: Any) -> None:
    weight_map = dict.fromkeys(load_file(base / BASE), BASE)
    first = next(iter(weight_map))
    (base / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": {**weight_map, first: name}}))


PATHS = ("../base.safetensors", "/etc/passwd", "..\\x", "C:\\x", "C:x", "a/b", "..", ".", "", "x\0y")


@pytest.mark.parametrize("name", PATHS)
def test_path_in_an_index(name: str, tmp: Path) -> None:
    index(tmp / "base", name)
    base_refused(tmp, [INDEX, "is no file name in this directory", "download"])


@pytest.mark.parametrize("total", [1, -1, True, "x", [1]])
def test_size_in_an_index(total: Any, tmp: Path) -> None:
    index(tmp / "base", total_size=total)
    base_refused(tmp, [INDEX, "total_size", "Download it again"])


def test_size_as_transformers_writes_it(tmp: Path) -> None:
    size = sum(tensor.nbytes for tensor in load_file(tmp / "base" / BASE).values())
    index(tmp / "base", total_size=float(size))
    merge_checkpoint(tmp / "base", tmp / "adapter", tmp / "out")


def test_missing_shard(tmp: Path) -> None:
    index(tmp / "base", "shard.safetensors")
    base_refused(tmp, ["shard.safetensors cannot be read"])


def test_tensor_in_two_shards(tmp: Path) -> None:
    save_file({"fc1.weight": torch.ones(16, 8), "x": torch.ones(1)}, tmp / "base" / "other.safetensors")
    weight_map = {**dict.fromkeys(load_file(tmp / "base" / BASE), BASE), "x": "other.safetensors"}
    (tmp / "base" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    base_refused(tmp, ["'fc1.weight' is in 'model.safetensors' and in 'other.safetensors'"])


# ---- memory ----


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


EMPTY = b':{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
LARGE: dict[str, tuple[str, bytes]] = {
    "many tensors": (WEIGHTS, with_header(b"{" + b",".join(b'"%d"' % i + EMPTY for i in range(60_000)) + b"}")),
    "short texts": (
        WEIGHTS,
        with_header(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(200_000)) + b"}}"),
    ),
    "a list of lists": (WEIGHTS, with_header(b'{"a":' + b"[[]," * 500_000)),
    "a long shape": (WEIGHTS, with_header(b'{"a":{"dtype":"U8","shape":[' + b"1," * 1_000_000 + b"1]}}")),
    "a long name": (WEIGHTS, with_header(b'{"' + b"a" * 2_000_000 + b'"' + EMPTY + b"}")),
    "escapes": (WEIGHTS, with_header(b'{"' + b"\\u0061" * 300_000 + b'"' + EMPTY + b"}")),
    "small numbers": (CONFIG, b'{"layers_to_transform": [' + b"1," * 500_000 + b"1]}"),
    "small objects": (CONFIG, b'{"target_modules": [' + b"{}," * 300_000 + b"{}]}"),
    "short names": (CONFIG, b'{"rank_pattern": {' + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}}"),
    "deep": (CONFIG, b'{"a":' * 200_000),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_in_proportion(name: str, tmp: Path) -> None:
    file, content = LARGE[name]
    path = tmp / "adapter" / file
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        read_header(path) if file == WEIGHTS else LoraConfig.read(tmp / "adapter")
    except FxloraError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        error.__traceback__ = None
    finally:
        peak, seconds = tracemalloc.get_traced_memory()[1], time.perf_counter() - start
        tracemalloc.stop()
    print(f"{name}: {peak / len(content):.1f} times the file, {seconds:.2f} s")
    assert peak < 10 * len(content) + 2**20
    assert seconds < 2 * 4  # tracemalloc slows allocations down


# ---- files beside the weights ----


@pytest.mark.parametrize("kind", ["pipe", "device", "link out", "loop"])
@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_no_companion(name: str, kind: str, tmp: Path) -> None:
    """What a merge copies from the base's directory: a link in it may name any file of this machine."""
    make, words = NO_FILES[kind]
    (tmp / "base" / name).parent.mkdir(exist_ok=True)
    make(tmp / "base" / name)
    base_refused(tmp, [words, name])


def test_companions_behind_links_within_the_directory_and_the_hub_cache(tmp: Path) -> None:
    blobs, snapshot_ = tmp / "repo" / "blobs", tmp / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot_ / "1_Pooling").mkdir(parents=True)
    shutil.move(tmp / "base" / BASE, blobs / "0")
    for number, name in enumerate((BASE, "tokenizer.json", "1_Pooling/config.json")):
        if number:
            (blobs / str(number)).write_text(name)
        (snapshot_ / name).symlink_to(blobs / str(number))
    (snapshot_ / "again.json").symlink_to("tokenizer.json")
    merge_checkpoint(snapshot_, tmp / "adapter", tmp / "out")
    for name, text in (("tokenizer.json", "tokenizer.json"), ("1_Pooling/config.json", "1_Pooling/config.json")):
        assert (tmp / "out" / name).read_text() == text and not (tmp / "out" / name).is_symlink()
    assert (tmp / "out" / "again.json").read_text() == "tokenizer.json"
