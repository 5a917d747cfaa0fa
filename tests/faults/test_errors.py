"""Each mistake a user can make gets an error that says what, where and what to do, and leaves the model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxlora import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ConfigError,
    FxloraError,
    MergeError,
    NoTargetError,
    VerifyError,
    lora_transform,
)
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.zoo import MLP, OptionalInput

CAPTURES = ["symbolic", "export", "modules"]


class Net(nn.Module):
    """Two blocks, so that names have a middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MLP() for _ in range(2)])
        self.head = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.head(layer(x))
        return x


X = torch.ones(2, 8)

BAD_CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], list[str]]] = {
    "no target": (
        {"target_modules": ["fc_1"]},
        {},
        NoTargetError,
        ["matches no module", "Did you mean 'fc1'", "fc1 (2)", "fc2 (2)", "head"],
    ),
    "one of several names misspelt": (
        {"target_modules": ["fc1", "haed"]},
        {},
        NoTargetError,
        ["no module is called 'haed'", "Did you mean 'head'"],
    ),
    "a string is a regular expression": ({"target_modules": "fc1"}, {}, NoTargetError, ["Did you mean 'fc1'"]),
    "all excluded": (
        {"target_modules": ["fc1"], "exclude_modules": ["fc1"]},
        {},
        NoTargetError,
        ["2 modules are excluded"],
    ),
    "no such layer": (
        {"target_modules": ["fc1"], "layers_to_transform": [7], "layers_pattern": "layers"},
        {},
        NoTargetError,
        ["layers_to_transform leaves none"],
    ),
    "a container": ({"target_modules": ["layers.0"]}, {}, NoTargetError, ["a MLP", "fc1, fc2"]),
    "nothing given": ({}, {}, NoTargetError, ["Please specify `target_modules`", "all-linear"]),
    "rank zero": ({"r": 0}, {}, ConfigError, ["`r`", "positive integer", "0"]),
    "rank no integer": ({"r": 1.5}, {}, ConfigError, ["`r`", "1.5"]),
    "rank in a pattern": ({"rank_pattern": {"fc1": -1}}, {}, ConfigError, ["rank_pattern['fc1']", "-1"]),
    "alpha NaN": ({"lora_alpha": float("nan")}, {}, ConfigError, ["`lora_alpha`", "nan"]),
    "alpha zero": ({"lora_alpha": 0}, {}, ConfigError, ["`lora_alpha`", "0"]),
    "dropout one": ({"lora_dropout": 1.0}, {}, ConfigError, ["`lora_dropout`", "1.0"]),
    "dropout negative": ({"lora_dropout": -0.1}, {}, ConfigError, ["`lora_dropout`", "-0.1"]),
    "broken regular expression": ({"target_modules": "*a"}, {}, ConfigError, ["`target_modules`", "'*a'"]),
    "broken pattern": ({"rank_pattern": {"(": 3}}, {}, ConfigError, ["`rank_pattern`", "'('"]),
    "targets that are no names": ({"target_modules": [3]}, {}, ConfigError, ["`target_modules`", "[3]"]),
    "unknown initialisation": ({"init_lora_weights": "gausian"}, {}, ConfigError, ["gausian"]),
    "unknown field": ({"target_module": ["fc1"]}, {}, ConfigError, ["'target_module'", "'target_modules'"]),
    "not yet": ({"use_qalora": True}, {}, NotImplementedError, ["use_qalora", "what works now"]),
    "not yet, initialisation": ({"init_lora_weights": "eva"}, {}, NotImplementedError, ["eva", "what works instead"]),
    "odd rank": ({"init_lora_weights": "orthogonal", "r": 3}, {}, ConfigError, ["even rank", "use 4"]),
    "rank too large to decompose": ({"init_lora_weights": "pissa", "r": 64}, {}, ConfigError, ["rank_pattern"]),
    "bias of a branch with magnitudes": ({"use_dora": True, "lora_bias": True}, {}, ConfigError, ["use_dora"]),
    "unknown capture": ({}, {"capture": "symbolc"}, CaptureError, ["'symbolc'", "Did you mean 'symbolic'"]),
    "dotted adapter name": ({}, {"adapter_name": "a.b"}, AdapterError, ["dot", "'a.b'"]),
    "adapter name with a slash": ({}, {"adapter_name": "a/b"}, AdapterError, ["slash", "'a/b'"]),
    "reserved adapter name": ({}, {"adapter_name": "keys"}, AdapterError, ["'keys'", "ModuleDict"]),
    "empty adapter name": ({}, {"adapter_name": ""}, AdapterError, ["not empty"]),
    "inputs of a wrong type": ({}, {"example_inputs": 3}, CaptureError, ["example_inputs", "int"]),
    "another method": ({"peft_type": "IA3"}, {}, ConfigError, ["IA3", "LORA"]),
    "bad task": ({"task_type": "CAUSAL"}, {}, ConfigError, ["task_type", "'CAUSAL_LM'"]),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_changes_nothing(name: str, capture: str) -> None:
    config, options, error, words = BAD_CALLS[name]
    if not options and "target_modules" not in config and name not in ("nothing given", "unknown field"):
        config = {"target_modules": ["fc1"], **config}
    elif options:
        config = {"target_modules": ["fc1"]}
    model = Net()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        lora_transform(model, config, **{"capture": capture, "example_inputs": X, **options})
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, (ValueError, NotImplementedError))
    assert_unchanged(model, before)


def test_no_target_is_a_value_error_of_ours() -> None:
    assert issubclass(NoTargetError, ValueError) and issubclass(NoTargetError, FxloraError)


@pytest.mark.parametrize("capture", CAPTURES)
def test_transformed_already(capture: Any) -> None:
    model = lora_transform(Net(), {"target_modules": ["fc1"]}, capture=capture, example_inputs=X)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="transformed already; add_adapter"):
        lora_transform(model, {"target_modules": ["fc2"]}, capture=capture, example_inputs=X)
    assert_unchanged(model, before)


LATER_CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "name taken": (lambda m: m.add_adapter("default", {"target_modules": ["fc1"]}), AdapterError, "already exists"),
    "dot": (lambda m: m.add_adapter("x.y", {"target_modules": ["fc1"]}), AdapterError, "dot"),
    "no target": (lambda m: m.add_adapter("x", {"target_modules": ["nope"]}), NoTargetError, "matches no module"),
    "bad rank": (lambda m: m.add_adapter("x", {"target_modules": ["fc1"], "r": 0}), ConfigError, "positive integer"),
    "unknown adapter": (lambda m: m.set_adapter("defualt"), AdapterError, "Did you mean 'default'"),
    "delete unknown": (lambda m: m.delete_adapter("other"), AdapterError, "no adapter is called 'other'"),
    "merge unknown": (lambda m: m.merge_adapter(["other"]), AdapterError, "no adapter is called 'other'"),
    "scale unknown": (lambda m: m.set_scale("other", 2.0), AdapterError, "no adapter is called 'other'"),
    "scale infinite": (lambda m: m.set_scale("default", float("inf")), AdapterError, "finite number, not inf"),
    "scale NaN": (lambda m: m.set_scale("default", float("nan")), AdapterError, "finite number, not nan"),
    "load nothing": (lambda m: m.load_adapter("/nonexistent", "x"), CheckpointError, "does not exist"),
    "weights missing": (
        lambda m: m.add_weighted_adapter(["default"], [], "x"),
        AdapterError,
        "1 adapters need as many weights, not 0",
    ),
    "unknown combination": (
        lambda m: m.add_weighted_adapter(["default", "second"], [1, 1], "x", "sum"),
        AdapterError,
        "unknown combination_type 'sum'",
    ),
    "combination without density": (
        lambda m: m.add_weighted_adapter(["default", "second"], [1, 1], "x", "ties"),
        AdapterError,
        "'ties' needs `density`",
    ),
    "subtract unknown": (lambda m: m.subtract_adapter("default", "sceond", "x"), AdapterError, "Did you mean 'second'"),
    "reduce to nothing": (lambda m: m.reduce_rank("default"), ConfigError, "give a rank `r`, or `max_error`"),
    "reduce to zero": (lambda m: m.reduce_rank("default", 0), ConfigError, "positive integer value but .* 0"),
    "reduce into taken": (lambda m: m.reduce_rank("default", 1, "second"), AdapterError, "already exists"),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", LATER_CALLS)
def test_bad_call_on_a_transformed_model_changes_nothing(name: str, capture: Any) -> None:
    call, error, words = LATER_CALLS[name]
    model = lora_transform(Net(), {"target_modules": ["fc1"], "r": 2}, capture=capture, example_inputs=X)
    model.add_adapter("second", {"target_modules": ["fc2"], "r": 2})
    model.eval()
    before, expected = snapshot(model), model(X)
    with pytest.raises(error, match=words):
        call(model)
    assert_unchanged(model, before)
    assert torch.equal(model(X), expected)
    model.verify()


@pytest.mark.parametrize("capture", CAPTURES)
def test_merge_of_a_broken_adapter_changes_nothing(capture: Any) -> None:
    model = lora_transform(Net(), {"target_modules": ["fc1", "fc2"]}, capture=capture, example_inputs=X)
    with torch.no_grad():
        model.get_parameter("layers.1.fc2.lora_B.default.weight")[0, 0] = float("nan")
    before = snapshot(model)
    values = before["values"].pop("layers.1.fc2.lora_B.default.weight")
    assert values.isnan().any()
    with pytest.raises(MergeError, match=r"'layers\.1\.fc2': .* NaN or infinite .* nothing was changed"):
        model.merge_adapter()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before["values"].items())


def test_tied_weight_is_not_merged() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    lora = lora_transform(model, {"target_modules": ["0"]}, capture="modules")
    before = snapshot(lora)
    with pytest.raises(MergeError, match=r"'0': its weight is shared with '1\.weight'.*untie"):
        lora.merge_and_unload()
    assert_unchanged(lora, before)


def test_optional_arguments_are_not_traced() -> None:
    model = OptionalInput()
    before = snapshot(model)
    with pytest.raises(CaptureError, match="optional argument 'mask'"):
        lora_transform(model, {"target_modules": ["fc"]}, capture="symbolic")
    assert_unchanged(model, before)


def test_replaced_forward_is_refused() -> None:
    model = MLP()
    model.fc1.forward = lambda x: x  # type: ignore[method-assign]
    before = snapshot(model)
    with pytest.raises(CaptureError, match="'fc1': its forward was replaced on the instance"):
        lora_transform(model, {"target_modules": ["fc1"]}, capture="modules")
    assert_unchanged(model, before)


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_transformed_part_is_refused(capture: Any) -> None:
    model = nn.Sequential(MLP(), nn.Linear(4, 8))
    model[0] = lora_transform(model[0], {"target_modules": ["fc1"]}, capture="modules")
    before = snapshot(model)
    with pytest.raises(AdapterError, match="'0' in the model is transformed already"):
        lora_transform(model, {"target_modules": ["1"]}, capture=capture, example_inputs=X)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_old_weight_norm_is_refused() -> None:
    model = MLP()
    nn.utils.weight_norm(model.fc1)
    with pytest.raises(NoTargetError, match="'fc1' is parametrized.*remove_weight_norm"):
        lora_transform(model, {"target_modules": ["fc1"]})


def test_lora_comes_off_a_model_whose_layer_was_replaced() -> None:
    model = lora_transform(MLP(), {"target_modules": ["fc1"]}, capture="modules")
    model.fc1 = nn.Linear(8, 17)
    plain = model.unload()
    assert type(plain) is MLP and not [name for name in plain.state_dict() if "lora_" in name]


@pytest.mark.parametrize("capture", CAPTURES)
def test_parametrized_layers(capture: Any) -> None:
    """Refused as targets; elsewhere in the model they work."""
    model = MLP().eval()
    nn.utils.parametrizations.weight_norm(model.fc1)
    expected, classes = model(X), [type(module) for module in model.modules()]
    with pytest.raises(NoTargetError, match="'fc1' is parametrized.*remove_parametrizations"):
        lora_transform(model, {"target_modules": ["fc1"]}, capture=capture, example_inputs=X)
    assert [type(module) for module in model.modules()] == classes
    lora = lora_transform(model, {"target_modules": ["fc2"]}, capture=capture, example_inputs=X)
    assert torch.equal(lora(X), expected)
    assert torch.equal(lora.merge_and_unload()(X), expected)


class Unused(nn.Module):
    """A layer that is only called in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.extra = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return self.extra(x) if self.training else x


def test_site_that_is_not_called_is_named() -> None:
    model = Unused()
    before = snapshot(model)
    with pytest.raises(CaptureError, match="'extra' is a target, but the model neither calls it nor reads"):
        lora_transform(model, {"target_modules": ["fc", "extra"]}, capture="modules", example_inputs=X)
    assert_unchanged(model, before)


def test_replaced_layer_is_noticed() -> None:
    model = lora_transform(MLP(), {"target_modules": ["fc1"]}, capture="modules")
    model.verify()
    model.fc1 = nn.Linear(8, 16)
    with pytest.raises(VerifyError, match="'fc1' is a plain Linear now"):
        model.verify()


def test_saved_adapter_of_another_model(tmp_path: Path) -> None:
    lora_transform(Net(), {"target_modules": ["fc1"]}).save_pretrained(tmp_path)
    model = nn.Sequential(nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(NoTargetError):
        lora_transform(model, tmp_path)
    assert_unchanged(model, before)
