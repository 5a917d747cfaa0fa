"""`LoraConfig`: peft's JSON, forms of input, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxlora import CaptureError, ConfigError, LoraConfig, lora_transform, plan
from tests.zoo import MLP


def test_fields_and_defaults_are_pefts(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(target_modules=["q"])
    theirs.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = json.loads(LoraConfig(target_modules=["q"]).to_json())
    for each in (ours, on_disk):
        del each["peft_version"]
    assert ours == on_disk


@given(
    st.builds(
        LoraConfig,
        r=st.integers(1, 64),
        lora_alpha=st.integers(1, 64) | st.floats(0.1, 10),
        target_modules=st.lists(st.text("abc._", min_size=1), min_size=1) | st.text("abc.*", min_size=1),
        rank_pattern=st.dictionaries(st.text("abc.*", min_size=1), st.integers(1, 9)),
        use_rslora=st.booleans(),
        lora_dropout=st.floats(0, 0.9),
    )
)
def test_json_round_trip(config: LoraConfig) -> None:
    restored = LoraConfig.from_any(json.loads(config.to_json()))
    assert restored.to_json() == config.to_json()
    assert restored.to_json() == restored.to_json()


def test_patterns_keep_their_order() -> None:
    """The first pattern that matches wins, so that sorting them would change ranks."""
    config = LoraConfig(target_modules=["fc1", "fc2"], rank_pattern={"fc1": 3, "fc.": 5})
    restored = LoraConfig.from_any(json.loads(config.to_json()))
    assert list(restored.rank_pattern) == ["fc1", "fc."]
    ranks = {spec.site: spec.r for spec in plan(MLP(), restored).branches}
    assert ranks == {"fc1": 3, "fc2": 5}


def test_sets_and_tuples_become_lists() -> None:
    assert LoraConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]  # pyright: ignore[reportArgumentType]
    assert LoraConfig(target_modules=("b", "a")).target_modules == ["b", "a"]  # pyright: ignore[reportArgumentType]
    assert '"a"' in LoraConfig.from_any(peft.LoraConfig(target_modules=["a"])).to_json()


def test_fields_of_other_peft_versions() -> None:
    config = LoraConfig.from_any({"peft_type": "LORA", "r": 4, "use_something_new": None, "and_another": {}})
    assert config.r == 4
    with pytest.raises(ConfigError, match="unknown field 'use_something_new'"):
        LoraConfig.from_any({"use_something_new": True})


@pytest.mark.parametrize("value", [3, None, object()])
def test_no_configuration(value: object) -> None:
    with pytest.raises(ConfigError, match="config must be a LoraConfig"):
        lora_transform(MLP(), value)


def test_compiled_models_come_later() -> None:
    with pytest.raises(CaptureError, match="transform it first"):
        lora_transform(torch.compile(MLP()), {"target_modules": ["fc1"]})


def test_auto_takes_export_for_layers_that_only_a_graph_shows() -> None:
    class OwnLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return x @ self.weight.T * scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = OwnLinear()

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.own(x, scale)

    x = torch.randn(4, 8)
    model = lora_transform(Net(), {"target_modules": ["own"]}, example_inputs=x)
    assert model.capture == "export" and [spec.site for spec in model._specs()] == ["own"]
    assert "own.lora_A.default.weight" in model.state_dict()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [None, "float32", torch.bfloat16])
def test_dtype_of_the_factors(base: torch.dtype, adapter: Any) -> None:
    config = LoraConfig(r=2, target_modules=["fc1"], adapter_dtype=adapter)
    lora = lora_transform(MLP().to(base), config)
    expected = torch.float32 if adapter in (None, "float32") else torch.bfloat16
    assert {p.dtype for n, p in lora.named_parameters() if "lora_" in n} == {expected}
    assert lora(torch.ones(2, 8, dtype=base)).dtype == base
    assert "adapter_dtype" not in config.to_dict()


def test_unknown_dtype_of_the_factors() -> None:
    with pytest.raises(ConfigError, match="`adapter_dtype` should be one of .*'float32'.*not 'int8'"):
        LoraConfig(target_modules=["fc1"], adapter_dtype="int8").validate()
