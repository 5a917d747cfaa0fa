"""Regular expressions that would keep `re` busy for years, in the adapter of a stranger: each way to read it answers in time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import (
    CheckpointError,
    FxloraError,
    LoraConfig,
    check_adapter,
    lora_transform,
    make_portable,
    merge_checkpoint,
)
from passes import patterns

pytestmark = pytest.mark.usefixtures("garbage_left")

LONG = "a" * 60
LAYER = f"layers.0.{LONG}"
HOSTILE = (r"[", r"(a+)+$", r"(\w+\.?)+#", r"(a|a)*$", r"(.*a){25}#", r"(?=(a+)+$)a", r"(a?){60}a{60}#")
FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "target_modules": lambda text: {"target_modules": text},
    "exclude_modules": lambda text: {"exclude_modules": text},
    "layers_pattern": lambda text: {"layers_pattern": [text], "layers_to_transform": [0]},
    "rank_pattern": lambda text: {"rank_pattern": {text: 4}},
    "alpha_pattern": lambda text: {"alpha_pattern": {text: 4}},
    "modules_to_save": lambda text: {"modules_to_save": [text]},
}


class Block(nn.Module):
    """Layers with a long name and a short one."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(LONG, nn.Linear(4, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.get_submodule(LONG)(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def write(directory: Path, fields: dict[str, Any]) -> Path:
    """An adapter with these fields, of one layer and of a copy of another's weight."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [LONG], **fields}
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model."
    tensors = {f"{prefix}{LAYER}.lora_A.weight": torch.ones(2, 4), f"{prefix}{LAYER}.lora_B.weight": torch.ones(4, 2)}
    for name in fields.get("modules_to_save", ()):  # with something of that name, and something that it could match
        tensors |= {f"{prefix}{each}.weight": torch.ones(4, 4) for each in (f"{LAYER}.other", f"z.{name}")}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def base(directory: Path) -> Path:
    directory.mkdir()
    save_file({**Net().state_dict(), f"{LAYER}.other.weight": torch.zeros(4, 4)}, directory / "model.safetensors")
    return directory


def answered(call: Callable[[], object]) -> float:
    """How long a call took to succeed, or to refuse with an error of ours."""
    start = time.perf_counter()
    with contextlib.suppress(FxloraError, NotImplementedError):
        call()
    return time.perf_counter() - start


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("field", FIELDS)
def test_every_way_to_read_an_adapter_answers(
    field: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.1)  # in place of 1; the rest is the start of a child process
    adapter, model = write(tmp_path / "adapter", FIELDS[field](pattern)), base(tmp_path / "base")
    lora: Any = lora_transform(Net(), LoraConfig(r=1, target_modules=["head"]), capture="modules")
    ways: dict[str, Callable[[], object]] = {
        "load_adapter": lambda: lora.load_adapter(adapter, "other"),
        "load_adapter, not strict": lambda: lora.load_adapter(adapter, "another", strict=False),
        "lora_transform": lambda: lora_transform(Net(), adapter),
        "merge_checkpoint": lambda: merge_checkpoint(model, adapter, tmp_path / "out"),
        "merge_checkpoint, not strict": lambda: merge_checkpoint(model, adapter, tmp_path / "more", strict=False),
        "check_adapter": lambda: check_adapter(adapter),
        "make_portable": lambda: make_portable(adapter, tmp_path / "portable"),
    }
    slow = {name: seconds for name, call in ways.items() if (seconds := answered(call)) > 2}
    assert not slow


def test_modules_to_save_are_names_and_no_expressions(tmp_path: Path) -> None:
    """As in peft and in live models: the end of a module's name, whatever its characters mean to `re`."""
    model = base(tmp_path / "base")
    save_file(
        {f"{LAYER}.weight": torch.zeros(4, 4), "a.x+y.weight": torch.zeros(4, 4), "a.xxy.weight": torch.zeros(4, 4)},
        model / "model.safetensors",
    )
    adapter = write(tmp_path / "adapter", {"modules_to_save": ["x+y"]})
    prefix, factors = "base_model.model.", {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(4, 2)}
    tensors = {f"{prefix}{LAYER}.{name}.weight": value for name, value in factors.items()}
    save_file({**tensors, f"{prefix}a.x+y.weight": torch.ones(4, 4)}, adapter / "adapter_model.safetensors")
    merge_checkpoint(model, adapter, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["a.x+y.weight"].all()
    save_file(
        {**tensors, f"{prefix}a.x+y.weight": torch.ones(4, 4), f"{prefix}a.xxy.weight": torch.ones(4, 4)},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"a\.xxy\.weight.* is a weight of the base model"):
        merge_checkpoint(model, adapter, tmp_path / "more")


def test_an_empty_name_saves_nothing(tmp_path: Path) -> None:
    """Every name ends with it, so that an adapter could replace any weight of the base."""
    adapter = write(tmp_path / "adapter", {"modules_to_save": [""]})
    with pytest.raises(FxloraError):
        merge_checkpoint(base(tmp_path / "base"), adapter, tmp_path / "out")
    with pytest.raises(FxloraError, match="modules_to_save"):
        lora_transform(Net(), adapter)
