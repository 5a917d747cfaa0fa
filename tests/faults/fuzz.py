"""Seeded mutations of small valid files, and what an independent reader says of them. `python -m tests.faults.fuzz 200000`."""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from fxlora import FxloraError, LoraConfig, lora_transform, merge_checkpoint
from fxlora.checkpoint.safetensors_io import open_tensors, read_header
from tests.zoo import MLP

ALLOWED = (FxloraError, NotImplementedError)
DTYPES = ("F32", "F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X9", "f32", "")
NUMBERS = (0, 1, 2, -1, 8, 63, 64, 2**31, 2**53, 2**63, 2**64, 10**30, 1.0, 1.5, True, None, "8", [], [8])
VALUES = (*NUMBERS, -0.0, 1e308, float("nan"), float("inf"), False, "", "fc1", "(a+)+$", "[", "fc.*", "all-linear",
          ["fc1"], ["fc2"], ["fc1", "fc1"], [None], {}, {"fc1": 4}, {"fc1": 0}, {"a": {"b": []}}, "none", "all", "LORA", [[0, 1]])  # fmt: skip
LIMIT_S, MEMORY_FACTOR, MEMORY_FLOOR = 2.0, 10, 2**16


@dataclass
class Result:
    """What a run found."""

    cases: Counter[str] = field(default_factory=Counter[str])
    accepted: Counter[str] = field(default_factory=Counter[str])
    slowest: tuple[float, str, int] = (0.0, "", -1)
    peak: tuple[float, str, int] = (0.0, "", -1)
    faults: list[str] = field(default_factory=list[str])


def run(cases: int, seed: int = 0, memory_every: int = 50) -> Result:
    """Run cases in turn: three of a header, one of a configuration, every twentieth of a whole load and merge."""
    result = Result()
    with tempfile.TemporaryDirectory() as directory:
        files = _Files(Path(directory))
        for number in range(cases):
            rng = random.Random(f"{seed}.{number}")
            kind = (
                "load"
                if number % 40 == 0
                else "merge"
                if number % 40 == 20
                else "config"
                if number % 4 == 3
                else "header"
            )
            call = getattr(files, kind)
            measured = number % memory_every < 4  # each kind in turn
            if measured:
                tracemalloc.start()
            try:
                accepted, size, fault = call(rng)
            except Exception as error:  # noqa: BLE001  the point of the exercise
                accepted, size, fault = False, 1, f"raised {type(error).__name__}: {str(error)[:200]}"
            seconds = files.seconds
            if measured:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                if kind in ("header", "config"):
                    result.peak = max(result.peak, (peak / max(size, 512), kind, number))  # errors have a size too
                    if peak > MEMORY_FACTOR * size + MEMORY_FLOOR:
                        fault = fault or f"took {peak:,} bytes of memory for {size:,}"
            result.slowest = max(result.slowest, (seconds, kind, number))
            if seconds > LIMIT_S:
                fault = fault or f"took {seconds:.2f} s"
            result.cases[kind] += 1
            result.accepted[kind] += accepted
            if fault:
                result.faults.append(f"{kind} {number} of seed {seed}: {fault}")
    return result


class _Files:
    """A valid base and adapter, and a copy of each file that is mutated."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.base, self.good, self.adapter, self.out = (root / name for name in ("base", "good", "adapter", "out"))
        lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"])).save_pretrained(self.good)
        for directory in (self.base, self.adapter):
            directory.mkdir()
        save_file(MLP().state_dict(), self.base / "model.safetensors")
        self.weights = (self.good / "adapter_model.safetensors").read_bytes()
        self.settings = json.loads((self.good / "adapter_config.json").read_text())
        self.text = (self.good / "adapter_config.json").read_bytes()
        self.model: Any = lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc2"]), capture="modules")
        self.seconds = 0.0

    def timed(self, call: Callable[[], Any]) -> tuple[bool, Any]:
        """Whether a call accepts its input, and what it gives. Errors that are not ours pass."""
        start = time.perf_counter()
        try:
            return True, call()
        except ALLOWED:
            return False, None
        finally:
            self.seconds = time.perf_counter() - start

    def header(self, rng: random.Random) -> tuple[bool, int, str]:
        """All tensors of a mutated file: those that the library reads, of a header without a name twice."""
        content = mutated_tensors(self.weights, rng)
        path = self.adapter / "adapter_model.safetensors"
        path.write_bytes(content)

        def read() -> dict[str, tuple[Any, bytes]]:
            offsets = read_header(path).offsets  # alone: the library, which opens the file, checks it a second time
            alone.update({name: content[part.start : part.stop] for name, part in offsets.items()})
            with open_tensors(path) as file:
                names = [name for name, entry in file.entries.items() if entry.torch_dtype is not None]
                return {name: (file.entries[name], _bytes(file.load(name))) for name in names}

        alone: dict[str, bytes] = {}
        accepted, found = self.timed(read)
        if not accepted and not alone:
            return False, len(content), ""
        expected = library(content)
        if expected is None:
            return True, len(content), "accepted what the library refuses, or a header with a name twice"
        if not accepted or any(data != expected[name][1] for name, data in alone.items() if name in expected):
            return True, len(content), "the header alone says otherwise than the library"
        wrong = [name for name, (entry, data) in found.items() if (entry.shape, data) != expected.get(name)]
        return True, len(content), f"reads {wrong} otherwise than the library" if wrong else ""

    def config(self, rng: random.Random) -> tuple[bool, int, str]:
        """A mutated configuration: json's own values, and a LoraConfig for peft."""
        text = mutated_text(self.text, self.settings, rng)
        (self.adapter / "adapter_config.json").write_bytes(text)
        accepted, found = self.timed(lambda: LoraConfig.read(self.adapter))
        return accepted, max(len(text), 1), judge(text, found) if accepted else ""

    def load(self, rng: random.Random) -> tuple[bool, int, str]:
        """Into a model: accepted, it has the file's factors, and refused, it is as before."""
        size = self._pair(rng)
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        accepted, _ = self.timed(lambda: self.model.load_adapter(self.adapter, "other"))
        fault = self._factors() if accepted else ""
        if accepted:
            self.model.delete_adapter("other")
        after = self.model.state_dict()
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        return accepted, size, fault or ("" if same else "the model changed")

    def merge(self, rng: random.Random) -> tuple[bool, int, str]:
        """Into files: accepted, all of it is finite, and the library reads the adapter too."""
        size = self._pair(rng)
        accepted, _ = self.timed(lambda: merge_checkpoint(self.base, self.adapter, self.out))
        if not accepted:
            return False, size, ""
        tensors = load((self.out / "model.safetensors").read_bytes())
        fault = "" if all(tensor.isfinite().all() for tensor in tensors.values()) else "wrote what is not finite"
        return True, size, fault or self._judge_pair()

    def _pair(self, rng: random.Random) -> int:
        tensors = mutated_tensors(self.weights, rng) if rng.random() < 0.5 else self.weights
        text = mutated_text(self.text, self.settings, rng) if tensors is self.weights else self.text
        (self.adapter / "adapter_model.safetensors").write_bytes(tensors)
        (self.adapter / "adapter_config.json").write_bytes(text)
        return len(tensors) + len(text)

    def _judge_pair(self) -> str:
        text = (self.adapter / "adapter_config.json").read_bytes()
        fault = judge(text, LoraConfig.read(self.adapter))
        expected = library((self.adapter / "adapter_model.safetensors").read_bytes())
        return fault or ("accepted a file that the library refuses" if expected is None else "")

    def _factors(self) -> str:
        fault = self._judge_pair()
        if fault:
            return fault
        saved = load((self.adapter / "adapter_model.safetensors").read_bytes())
        for name, tensor in self.model.state_dict().items():
            if ".other" in name:
                key = name.replace(".other", "")
                other = saved.get(f"base_model.model.{key}", saved.get(key))
                if other is None or not torch.equal(other.to(tensor.dtype), tensor) or not tensor.isfinite().all():
                    return f"{name} is not what the file has, or not finite"
        return ""


def library(content: bytes) -> dict[str, tuple[tuple[int, ...], bytes]] | None:
    """Shapes and bytes as the safetensors library reads them; None if it refuses, or a name is there twice."""
    try:
        found = load(content)
        length = struct.unpack("<Q", content[:8])[0]
        json.loads(content[8 : 8 + length], object_pairs_hook=_once)
    except (SafetensorError, ValueError, struct.error, KeyError):
        return None
    return {name: (tuple(tensor.shape), _bytes(tensor)) for name, tensor in found.items()}


def judge(text: bytes, found: LoraConfig) -> str:
    """Whether json and peft agree with what was read of a configuration."""
    try:
        values: dict[str, Any] = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
        values["peft_type"] = "LORA" if values.get("peft_type") is None else values["peft_type"]
        known = {name: value for name, value in values.items() if name in peft.LoraConfig.__dataclass_fields__}
        peft.LoraConfig(**{name: value for name, value in known.items() if name not in ("peft_type", "auto_mapping")})
    except (ValueError, TypeError) as error:
        return f"accepted a configuration that json or peft refuse: {error}"
    r, alpha, kind = values.get("r", 8), values.get("lora_alpha", 8), values.get("peft_type") or "LORA"
    if type(r) is not int or r <= 0 or type(alpha) not in (int, float) or alpha == 0 or kind != "LORA":
        return f"accepted r {r!r}, lora_alpha {alpha!r}, peft_type {kind!r}"
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if type(values.get(name, False)) is not bool:
            return f"accepted {name} {values[name]!r}"
    different = [name for name, value in known.items() if (getattr(found, name) or None) != (value or None)]
    return f"reads {different} otherwise than json" if different else ""


def _refuse(text: str) -> None:
    raise ValueError(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- mutations ----


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, removed, repeated or cut off."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 16)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 64)]
            case 3:
                del data[at:]
            case 4:
                data[at:at] = rng.choice(
                    [b"{", b"}", b"[", b'"', b"\\", b"\0", b"\xff", b",", b" ", b"\\ud800", b"9" * 30]
                )
            case _:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (1 << rng.randrange(8))])
    return bytes(data)


def mutated_tensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, length or size, and some that stay valid."""
    if rng.random() < 0.35:
        return mutated_bytes(content, rng)
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.3:
        header = mutated_bytes(header, rng)
    else:
        pairs = list(json.loads(header).items())
        for _ in range(rng.randint(1, 2)):
            pairs = _mutated_pairs(pairs, rng)
        header = _object(pairs, rng)
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + bytes(rng.randint(1, 16))
    number = (
        len(header)
        if rng.random() < 0.9
        else rng.choice([0, 1, max(len(header) - 1, 0), len(header) + 1, 2**32, 2**63, 2**64 - 1])
    )
    return struct.pack("<Q", number) + header + data


def _mutated_pairs(pairs: list[tuple[str, Any]], rng: random.Random) -> list[tuple[str, Any]]:
    pairs = [*pairs]
    at = rng.randrange(len(pairs))
    name, value = pairs[at]
    value = dict(value) if isinstance(value, dict) else value
    match rng.randrange(9):
        case 0:
            pairs.insert(rng.randrange(len(pairs) + 1), pairs[at])
        case 1 if len(pairs) > 1:
            del pairs[at]
        case 2:
            pairs[at] = (
                rng.choice([f"{name}x", "", "__metadata__", name.replace("base_model.model.", ""), "é", "a\0b"]),
                value,
            )
        case 3 if isinstance(value, dict):
            pairs[at] = (name, {**value, "dtype": rng.choice(DTYPES)})
        case 4 if isinstance(value, dict) and isinstance(value.get("shape"), list) and value["shape"]:
            shape = [*value["shape"]]
            shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
            pairs[at] = (
                name,
                {**value, "shape": rng.choice([shape, shape[:1], [], value["shape"][::-1], [1, *value["shape"]]])},
            )
        case 5 if isinstance(value, dict) and isinstance(value.get("data_offsets"), list):
            offsets = [*value["data_offsets"]]
            offsets[rng.randrange(len(offsets))] = rng.choice(
                [*NUMBERS, *(offset + rng.randint(-8, 8) for offset in offsets if isinstance(offset, int))]
            )
            pairs[at] = (name, {**value, "data_offsets": offsets})
        case 6 if isinstance(value, dict):
            pairs[at] = (name, {**value, rng.choice(["extra", "shape", "dtype"]): rng.choice(NUMBERS)})
        case 7:
            pairs[at] = (name, rng.choice(VALUES))
        case _:
            rng.shuffle(pairs)
    return pairs


def _object(pairs: list[tuple[str, Any]], rng: random.Random) -> bytes:
    """JSON of pairs, of which some may have one name."""
    text = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)
    return f"{{{text}}}".encode() + b" " * rng.choice([0, 0, 0, 8])


def mutated_text(text: bytes, settings: dict[str, Any], rng: random.Random) -> bytes:
    """A configuration with other bytes, values, names or repeated fields."""
    if rng.random() < 0.3:
        return mutated_bytes(text, rng)
    pairs = list(settings.items())
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(pairs))
        match rng.randrange(5):
            case 0:
                pairs.append(pairs[at])
            case 1:
                pairs[at] = (pairs[at][0] + "x", rng.choice(VALUES))
            case _:
                pairs[at] = (pairs[at][0], rng.choice(VALUES))
    return _object(pairs, rng)


if __name__ == "__main__":
    begin = time.perf_counter()
    outcome = run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{dict(outcome.cases)} in {time.perf_counter() - begin:.1f} s, accepted {dict(outcome.accepted)}")
    print(f"slowest {outcome.slowest}, peak over file size {outcome.peak}, faults {len(outcome.faults)}")
    print("\n".join(outcome.faults[:20]))
