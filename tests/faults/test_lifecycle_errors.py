"""Every public method with every kind of bad input, on every capture: the error says what and how, nothing is changed."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxlora
from fxlora import AdapterError, CheckpointError, ConfigError, LoraConfig, MergeError, NoTargetError, lora_transform
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.zoo import MLP

CAPTURES = ["symbolic", "export", "modules"]
X = torch.ones(2, 8)
FC1 = {"target_modules": ["fc1"], "r": 2}
UNKNOWN = "no adapter is called 'defualt'; there is default, other, saves.* Did you mean 'default'"
MERGED = "adapter 'default' is merged; call unmerge_adapter first"
DISABLED = "disabled here; .* outside of disable_adapter\\(\\), or after enable_adapter_layers"
NO_NAME = "given by a name or a list of names, not by 3"

Case = tuple[Callable[[Any], object], type[Exception], str]

ANY_STATE: dict[str, Case] = {
    "add a taken name": (lambda m: m.add_adapter("other", FC1), AdapterError, "'other' already exists; delete_adapter"),
    "add a dotted name": (lambda m: m.add_adapter("a.b", FC1), AdapterError, "a dot.*'a.b'"),
    "add no name": (lambda m: m.add_adapter(None, FC1), AdapterError, "must be a string.*None"),
    "add no configuration": (lambda m: m.add_adapter("x", 3), ConfigError, "must be a LoraConfig.*int"),
    "add a bad rank": (lambda m: m.add_adapter("x", {**FC1, "r": 0}), ConfigError, "`r` should be a positive integer"),
    "add without values": (
        lambda m: m.add_adapter("x", FC1, low_cpu_mem_usage=True),
        NotImplementedError,
        "low_cpu_mem_usage=True.*load_adapter",
    ),
    "add a clash": (
        lambda m: m.add_adapter("x", {"target_modules": ["fc1"], "modules_to_save": ["fc1"]}),
        NoTargetError,
        "1 modules are excluded .*modules_to_save.*Take them out",
    ),
    "load a taken name": (
        lambda m: m.load_adapter("/nowhere", "other"),
        AdapterError,
        "'other' already.*hotswap_adapter",
    ),
    "load from nowhere": (lambda m: m.load_adapter("/nowhere", "x"), CheckpointError, "/nowhere.*does not exist"),
    "load to no device": (
        lambda m: m.load_adapter("/nowhere", "x", torch_device="gpu9"),
        AdapterError,
        "'gpu9' is no dev",
    ),
    "load with offload": (
        lambda m: m.load_adapter("/nowhere", "x", ephemeral_gpu_offload=True),
        NotImplementedError,
        "ephemeral_gpu_offload.*leave it",
    ),
    "set unknown": (lambda m: m.set_adapter("defualt"), AdapterError, UNKNOWN),
    "set one of several unknown": (lambda m: m.set_adapter(["other", "defualt"]), AdapterError, UNKNOWN),
    "set no name": (lambda m: m.set_adapter(3), AdapterError, NO_NAME),
    "set nothing": (lambda m: m.set_adapter(None), AdapterError, "not by None"),
    "set a list of lists": (lambda m: m.set_adapter([["default"]]), AdapterError, r"not by \['default'\]"),
    "set two copies": (
        lambda m: m.set_adapter(["other", "saves"]),
        AdapterError,
        "'saves' runs a copy of 'fc2'.*'other' would have no effect; use one",
    ),
    "delete unknown": (lambda m: m.delete_adapter("defualt"), AdapterError, UNKNOWN),
    "gradients unknown": (lambda m: m.set_requires_grad("defualt"), AdapterError, UNKNOWN),
    "gradients of one of several unknown": (
        lambda m: m.set_requires_grad(["default", "defualt"], False),
        AdapterError,
        UNKNOWN,
    ),
    "gradients of no name": (lambda m: m.set_requires_grad(3), AdapterError, NO_NAME),
    "set_scale unknown": (lambda m: m.set_scale("defualt", 2.0), AdapterError, UNKNOWN),
    "set_scale infinite": (lambda m: m.set_scale("other", float("inf")), AdapterError, "finite number, not inf"),
    "set_scale no number": (lambda m: m.set_scale("other", "2"), AdapterError, "finite number, not '2'"),
    "set_scale too large": (lambda m: m.set_scale("other", 1e39), AdapterError, "4e\\+39, which float32 cannot hold"),
    "scale unknown": (lambda m: m.scale_adapter(2.0, "defualt"), AdapterError, UNKNOWN),
    "scale NaN": (lambda m: m.scale_adapter(float("nan"), "other"), AdapterError, "finite number, not nan"),
    "scale one of several too large": (
        lambda m: m.scale_adapter(1e38, ["saves", "other"]),
        AdapterError,
        "float32 cannot hold",
    ),
    "unscale unknown": (lambda m: m.unscale_adapter(2.0, "defualt"), AdapterError, UNKNOWN),
    "unscale by zero": (
        lambda m: m.unscale_adapter(0, "other"),
        AdapterError,
        r"divide by zero; unscale_adapter\(\) gives",
    ),
    "unscale by nothing much": (lambda m: m.unscale_adapter(1e-39, "other"), AdapterError, "float32 cannot hold"),
    "rescale no number": (lambda m: fxlora.rescale_adapter_scale(m, "2").__enter__(), TypeError, "a number, not '2'"),
    "rescale infinite": (lambda m: fxlora.rescale_adapter_scale(m, float("inf")).__enter__(), AdapterError, "not inf"),
    "merge unknown": (lambda m: m.merge_adapter(["other", "defualt"]), AdapterError, UNKNOWN),
    "merge no name": (lambda m: m.merge_adapter(3), AdapterError, NO_NAME),
    "merge and unload unknown": (lambda m: m.merge_and_unload(adapter_names="defualt"), AdapterError, UNKNOWN),
    "save unknown": (lambda m: m.save_pretrained("never", selected_adapters=["defualt"]), AdapterError, UNKNOWN),
    "save embeddings perhaps": (
        lambda m: m.save_pretrained("never", save_embedding_layers="yes"),
        AdapterError,
        "True, False or 'auto', not 'yes'",
    ),
    "save pickled": (
        lambda m: m.save_pretrained("never", safe_serialization=False),
        NotImplementedError,
        "safetensors",
    ),
    "save into a file": (lambda m: m.save_pretrained(__file__), CheckpointError, "is a file"),
    "save with a state dict of another": (
        lambda m: m.save_pretrained("never", state_dict={}),
        CheckpointError,
        "has no '",
    ),
    "a card in a file": (lambda m: m.create_or_update_model_card(__file__), CheckpointError, "cannot be written"),
    "combine unknown": (lambda m: m.add_weighted_adapter(["defualt"], [1.0], "x"), AdapterError, UNKNOWN),
}

WHILE_MERGED: dict[str, Case] = {
    "delete": (lambda m: m.delete_adapter("default"), AdapterError, MERGED),
    "set_scale": (lambda m: m.set_scale("default", 2.0), AdapterError, MERGED),
    "scale": (lambda m: m.scale_adapter(2.0), AdapterError, MERGED),
    "scale others too": (lambda m: m.scale_adapter(2.0, ["other", "default"]), AdapterError, MERGED),
    "unscale": (lambda m: m.unscale_adapter(), AdapterError, MERGED),
    "rescale": (lambda m: fxlora.rescale_adapter_scale(m, 2.0).__enter__(), AdapterError, MERGED),
    "set two copies": (lambda m: m.set_adapter(["other", "saves"]), AdapterError, "use one of the adapters at a time"),
    "add what changes the base": (
        lambda m: m.add_adapter("x", {**FC1, "init_lora_weights": "pissa"}),
        AdapterError,
        "'pissa' changes base weights; call unmerge_adapter first",
    ),
}

WHILE_DISABLED: dict[str, Case] = {
    "merge": (lambda m: m.merge_adapter(), AdapterError, DISABLED),
    "merge and unload": (lambda m: m.merge_and_unload(), AdapterError, DISABLED),
    "unload": (lambda m: m.unload(), AdapterError, DISABLED),
}


def make(capture: Any) -> Any:
    torch.manual_seed(0)
    model: Any = lora_transform(MLP(), LoraConfig(**FC1), capture=capture, example_inputs=X)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["fc1", "fc2"]))
    model.add_adapter("saves", LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["fc2"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()


def check(model: Any, case: Case) -> None:
    call, error, words = case
    before, state, output = snapshot(model), states(model), model(X)
    with pytest.raises(error, match=words):
        call(model)
    assert_unchanged(model, before)
    assert states(model) == state
    assert torch.equal(model(X), output)
    model.verify()


def states(model: Any) -> object:
    state = model._lora
    scales = {name: [spec.scaling for spec in plan.branches] for name, plan in state.adapters.items()}
    return state.active, state.merged, state.enabled, list(state.adapters), list(state.originals), scales


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("state", ["as it is", "merged", "disabled"])
@pytest.mark.parametrize("name", ANY_STATE)
def test_in_any_state(name: str, state: str, capture: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model = prepared(capture, state)
    check(model, ANY_STATE[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", WHILE_MERGED)
def test_while_merged(name: str, capture: Any) -> None:
    check(prepared(capture, "merged"), WHILE_MERGED[name])


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", WHILE_DISABLED)
def test_while_disabled(name: str, capture: Any) -> None:
    check(prepared(capture, "disabled"), WHILE_DISABLED[name])


def prepared(capture: Any, state: str) -> Any:
    return pickle.loads(pickled(capture, state))


@functools.cache
def pickled(capture: Any, state: str) -> bytes:
    model = make(capture)
    if state == "merged":
        model.merge_adapter()
    elif state == "disabled":
        model.disable_adapter_layers()
    return pickle.dumps(model)


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_merge_that_fails_gives_back_what_it_took_off(capture: Any) -> None:
    """An adapter that changed the base and is not merged is taken off first; when the merge fails it is there again."""
    torch.manual_seed(0)
    model: Any = lora_transform(MLP(), LoraConfig(**FC1), capture=capture, example_inputs=X)
    model.add_adapter("changes", LoraConfig(r=2, target_modules=["fc2"], init_lora_weights="pissa"))
    weight = model.get_parameter("fc1.lora_B.default.weight")
    with torch.no_grad():
        weight.fill_(float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MergeError, match="'fc1'.*nothing was changed"):
        model.merge_and_unload()
    assert list(model._lora.changed_base) == ["changes"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        weight.zero_()
    model.delete_adapter("changes")
    torch.manual_seed(0)
    plain = MLP().state_dict()
    torch.testing.assert_close({name: model.state_dict()[name] for name in plain}, plain)


def test_no_adapter_is_left() -> None:
    model: Any = lora_transform(MLP(), LoraConfig(**FC1))
    model.delete_adapter("default")
    for call in (model.get_layer_status, model.get_model_status):
        with pytest.raises(AdapterError, match="no adapter is left.*add_adapter"):
            call()
    for call in (fxlora.get_layer_status, fxlora.get_model_status):
        with pytest.raises(AdapterError, match="this MLP has no adapters; lora_transform"):
            call(MLP())
    with pytest.raises(AdapterError, match="no adapter is active; choose one with set_adapter"):
        _ = model.active_adapter
    with pytest.raises(AdapterError, match="no adapter whose scale"), fxlora.rescale_adapter_scale(MLP(), 2.0):
        pass
