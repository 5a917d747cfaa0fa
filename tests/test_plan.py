"""What `plan` says about entries of a configuration that match nothing, and about hostile expressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fxlora import LoraConfig, NoTargetError, PatternError, lora_transform, plan
from fxlora.config import CONFIG_NAME
from fxlora.errors import ConfigError
from passes import patterns
from tests.zoo import MLP


class Stack(nn.Module):
    """Three blocks in a list that has a parent."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(MLP() for _ in range(3))


def warnings_of(caplog: pytest.LogCaptureFixture, **config: Any) -> list[str]:
    caplog.clear()
    plan(Stack(), LoraConfig(r=2, **{"target_modules": ["fc1"], **config}))
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_entries_that_match_nothing_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(caplog, exclude_modules=["fc3"]) == [
        "exclude_modules: no module is matched by 'fc3'. Did you mean 'fc2' or 'fc1'?"
    ]
    assert warnings_of(caplog, exclude_modules=r".*\.out") == [r"exclude_modules: no module is matched by '.*\\.out'."]
    assert warnings_of(caplog, layers_to_transform=[1, 5]) == [
        "layers_to_transform: no target lies in layer 5. Did you mean 0 or 1 or 2?"
    ]
    assert warnings_of(caplog, rank_pattern={"fc2": 4}, alpha_pattern={"fc1": 4, "^fc1": 4}) == [
        "rank_pattern: no target is matched by 'fc2'. Did you mean 'fc1'?",
        "alpha_pattern: no target is matched by '^fc1'. Did you mean 'fc1'?",
    ]


def test_entries_that_match_are_not(caplog: pytest.LogCaptureFixture) -> None:
    config = {
        "exclude_modules": ["layers.2.fc1", "fc2"], "layers_to_transform": [0, 1], "rank_pattern": {"layers.0.fc1": 4},
        "alpha_pattern": {"fc1": 2},
    }  # fmt: skip
    assert warnings_of(caplog, **config) == []
    assert warnings_of(caplog, target_modules=["fc1", "nope"], strict_targets=False) == []


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(NoTargetError, match="no module is called 'nope'"):
        plan(Stack(), LoraConfig(r=2, target_modules=["fc1", "nope"]))


def test_an_expression_as_default_target() -> None:
    class Gemma(nn.Module):
        config = type("Config", (), {"model_type": "gemma4"})()

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            for tower in ("vision_tower", "language_model"):
                block = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "k_proj": nn.Linear(2, 2)})
                self.model.add_module(tower, nn.ModuleDict({"attn": block}))

    found = plan(Gemma(), LoraConfig(r=2))
    assert [branch.site for branch in found.branches] == ["model.language_model.attn.q_proj"]
    assert found.config.target_modules == r".*language_model\..*\.(q_proj|v_proj)"


HOSTILE = {
    "target_modules": {"target_modules": r"(\w+\.?)+#"},
    "exclude_modules": {"target_modules": ["fc1"], "exclude_modules": r"(\w+\.?)+#"},
    "rank_pattern or alpha_pattern": {"target_modules": ["fc1"], "rank_pattern": {r"(\w+\.?)+#": 4}},
}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_hostile_adapter_is_refused(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's names are long enough for the expression to take years."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 2, **HOSTILE[field]}))
    model = nn.Module()
    model.add_module("a" * 60, nn.ModuleDict({"fc1": nn.Linear(2, 2)}))
    with pytest.raises(PatternError, match=rf"^{field}: .* takes too long"):
        lora_transform(model, LoraConfig.from_pretrained(tmp_path), capture="modules")
    assert not hasattr(model.get_submodule("a" * 60).fc1, "lora_A")


@pytest.mark.parametrize("pattern", ["(" * 3000 + ")" * 3000, "a{99999999999}", "(a*)*(?<=a+)"])
def test_an_expression_that_breaks_the_compiler_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="a key of `alpha_pattern` is no regular expression"):
        LoraConfig(target_modules=["fc1"], alpha_pattern={pattern: 2}).validate()
