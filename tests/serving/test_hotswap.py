"""`hotswap_adapter`: another adapter in a loaded one's place, with and without slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxlora
from fxlora import AdapterError, CheckpointError, LoraConfig, LoraModel, lora_transform
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import tensors
from tests.serving.models import alone, largest_error, moved, tiny_llama

TOKENS = {"input_ids": torch.arange(10).view(2, 5)}


def saved(directory: Path, seed: int, **settings: Any) -> tuple[Path, list[torch.Tensor]]:
    """An adapter's files, and what its model gives."""
    model = lora_transform(tiny_llama(), LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **settings}))
    moved(model, seed)
    model.save_pretrained(directory)
    model.eval()
    with torch.no_grad():
        return directory, tensors(model(**TOKENS))


def served() -> LoraModel:
    model = lora_transform(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=8, target_modules=["q_proj"]))
    moved(model)
    return model.eval()


SWAPS = {
    "same": {"r": 4},
    "other scale": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "smaller rank": {"r": 2},
    "larger rank": {"r": 8},
    "fewer targets": {"r": 4, "target_modules": ["v_proj"]},
    "no adapter left at a layer": {"r": 4, "target_modules": ["q_proj"]},
    "other targets": {"r": 4, "target_modules": ["o_proj", "q_proj"]},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 9}},
}


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("settings", SWAPS.values(), ids=SWAPS)
def test_another_adapter(tmp_path: Path, settings: dict[str, Any], slots: bool) -> None:
    directory, expected = saved(tmp_path, 3, **settings)
    model = served()
    with torch.no_grad():
        other = alone(model, "b", TOKENS)
        model.set_adapter("a")
        if slots:
            model.use_slots(r=16, target_modules=["o_proj"])
        stacks = {name: buffer for name, buffer in model.named_buffers() if "lora_slots" in name}
        fxlora.hotswap_adapter(model, directory, "a")
        assert all(buffer is stacks[name] for name, buffer in model.named_buffers() if "lora_slots" in name)
        assert largest_error(tensors(model(**TOKENS)), expected) < 1e-5
        assert model.active_adapters == ["a"] and list(model.peft_config) == ["a", "b"]
        assert model.peft_config["a"].r == LoraConfig.from_pretrained(directory).r
        model.verify()
        assert largest_error(alone(model, "b", TOKENS), other) < 1e-5
        model.hotswap_adapter(directory, "b")  # the inactive one
        assert largest_error(alone(model, "b", TOKENS), expected) < 1e-5
    flags = {name: p.requires_grad for name, p in model.named_parameters() if "lora_" in name}
    assert all(flag == (".b." in name) for name, flag in flags.items())


def test_what_was_swapped_in_is_what_is_saved(tmp_path: Path) -> None:
    directory, _ = saved(tmp_path / "new", 3, r=2, target_modules=["o_proj"])
    model = served()
    model.use_slots(r=8, target_modules=["o_proj"])
    model.hotswap_adapter(directory, "a")
    model.save_pretrained(tmp_path / "out", selected_adapters=["a"])
    assert_same_file(tmp_path / "out" / "a", directory)


def assert_same_file(a: Path, b: Path) -> None:
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (a, b))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)


def test_the_same_shape_is_copied_in_place(tmp_path: Path) -> None:
    directory, _ = saved(tmp_path, 3, r=4)
    model = served()
    before = {name: parameter for name, parameter in model.named_parameters()}
    model.hotswap_adapter(directory, "a")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_variants_and_layers_without_stacks(tmp_path: Path) -> None:
    """A grouped convolution is read from the adapter's own parameters also in slots: only the same shape fits."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 6, 3))

    def adapter(name: str, r: int, **settings: Any) -> Path:
        model = lora_transform(net(), LoraConfig(r=r, target_modules=["0", "1"], **settings))
        moved(model, r)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    model = lora_transform(net(), LoraConfig(r=2, target_modules=["0", "1"]), adapter_name="a").eval()
    model.use_slots(r=4)
    x = torch.randn(2, 4, 5)
    same = adapter("same", 2)
    model.hotswap_adapter(same, "a")
    with torch.no_grad():
        assert largest_error([model(x)], [lora_transform(net(), same).eval()(x)]) < 1e-5
    before = snapshot(model)
    for other, message in (
        (adapter("larger", 4), "'0' has no stack"),
        (adapter("dora", 2, use_dora=True), "'0' has no stack"),
    ):
        with pytest.raises(AdapterError, match=message):
            model.hotswap_adapter(other, "a")
        assert_unchanged(model, before.copy())


def test_refusals_change_nothing(tmp_path: Path) -> None:
    model = served()
    model.use_slots(r=8)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"r": 16}, "rank at '.*q_proj' is 16, and the slots have 8"),
        ({"r": 4, "target_modules": ["o_proj"]}, "no slot at '.*o_proj'.*use_slots"),
        ({"r": 4, "use_dora": True}, "use_dora"),
        ({"r": 4, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 4, "bias": "all"}, "bias"),
    ]
    for number, (settings, message) in enumerate(cases):
        directory, _ = saved(tmp_path / str(number), 3, **settings)
        before = snapshot(model)
        with pytest.raises(AdapterError, match=message):
            model.hotswap_adapter(directory, "a")
        assert_unchanged(model, before)
    directory, _ = saved(tmp_path / "good", 3, r=4)
    broken = load_file(directory / "adapter_model.safetensors")
    broken.pop(next(iter(broken)))
    save_file(broken, directory / "adapter_model.safetensors")
    before = snapshot(model)
    for path, name, error in (
        (directory, "a", CheckpointError),
        (tmp_path / "nowhere", "a", CheckpointError),
        (directory, "c", AdapterError),
    ):
        with pytest.raises(error):
            model.hotswap_adapter(path, name)
    model.merge_adapter(["a"])
    with pytest.raises(AdapterError, match="merged"):
        model.hotswap_adapter(directory, "a")
    model.unmerge_adapter()
    assert_unchanged(model, before)


def test_pefts_files(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=6, target_modules=["q_proj", "k_proj"]))
    moved(theirs)
    theirs.save_pretrained(tmp_path)
    model = served()
    model.use_slots(r=8, target_modules=["k_proj"])
    model.hotswap_adapter(tmp_path, "a")
    with torch.no_grad():
        assert largest_error(tensors(model(**TOKENS)), tensors(theirs.eval()(**TOKENS))) < 1e-5
