"""`set_scale`, `scale_adapter`, `unscale_adapter` and `rescale_adapter_scale`: the numbers of peft's layers, and no state left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn

import fxlora
from fxlora import LoraConfig, lora_transform
from tests.zoo import MLP

CAPTURES = ["symbolic", "export", "modules"]
X = torch.linspace(-1, 1, 16).view(2, 8)
ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"r": 3, "lora_alpha": 5, "alpha_pattern": {"fc2": 7}},
    "second": {"r": 2, "lora_alpha": 3, "use_rslora": True},
    "third": {"r": 4},
}


def both(capture: Any) -> tuple[Any, Any]:
    configs = {name: {"target_modules": ["fc1", "fc2"], **config} for name, config in ADAPTERS.items()}
    ours: Any = lora_transform(MLP(), LoraConfig(**configs["default"]), capture=capture, example_inputs=X)
    theirs = peft.get_peft_model(MLP(), peft.LoraConfig(**configs["default"]))
    for name in ("second", "third"):
        ours.add_adapter(name, LoraConfig(**configs[name]))
        theirs.add_adapter(name, peft.LoraConfig(**configs[name]))
    for model in (ours, theirs.base_model):
        model.set_adapter(["second", "default"])
    return ours.eval(), theirs


def layers(theirs: Any) -> dict[str, Any]:
    return {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if isinstance(m, LoraLayer)}


def compare(ours: Any, theirs: Any) -> None:
    expected = {(name, adapter): scale for name, m in layers(theirs).items() for adapter, scale in m.scaling.items()}
    found = {(spec.site, spec.adapter): spec.scaling for spec in ours._specs()}
    assert found == pytest.approx(expected, rel=1e-15)
    ours.verify()


def each_layer(theirs: Any, call: Callable[[Any], object]) -> None:
    for layer in layers(theirs).values():
        call(layer)


@pytest.mark.parametrize("capture", CAPTURES)
def test_as_pefts_layers(capture: Any) -> None:
    ours, theirs = both(capture)
    compare(ours, theirs)
    ours.set_scale("third", 0.3)
    each_layer(theirs, lambda layer: layer.set_scale("third", 0.3))
    compare(ours, theirs)
    ours.scale_adapter(1.7)
    each_layer(theirs, lambda layer: layer.scale_layer(1.7))
    compare(ours, theirs)
    ours.unscale_adapter(0.9)
    each_layer(theirs, lambda layer: layer.unscale_layer(0.9))
    compare(ours, theirs)
    with fxlora.rescale_adapter_scale(ours, 3), rescale_adapter_scale(theirs, 3):
        compare(ours, theirs)
    compare(ours, theirs)
    ours.unscale_adapter()
    each_layer(theirs, lambda layer: layer.unscale_layer())
    compare(ours, theirs)
    ours.scale_adapter(2.0, "third")  # peft's layers only know the active ones
    third = [spec.scaling for spec in ours._specs() if spec.adapter == "third"]
    assert third == pytest.approx([1.2, 1.2], rel=1e-15)


@pytest.mark.parametrize("capture", CAPTURES)
def test_scales_are_back_whatever_happens_within(capture: Any) -> None:
    ours, theirs = both(capture)
    expected = ours(X)
    with pytest.raises(RuntimeError, match="boom"), fxlora.rescale_adapter_scale(ours, 0.5):
        ours.delete_adapter("third")
        ours.add_adapter("third", LoraConfig(r=1, target_modules=["fc1"]))  # another one of this name
        ours.merge_adapter()
        raise RuntimeError("boom")
    assert ours._lora.merged == ("second", "default")
    torch.testing.assert_close(ours(X), expected)
    ours.unmerge_adapter()
    assert torch.equal(ours(X), expected)
    assert [spec.scaling for spec in ours._specs() if spec.adapter == "third"] == [8.0]
    ours.verify()
    del theirs


def test_unloading_within() -> None:
    ours, _ = both("modules")
    with fxlora.rescale_adapter_scale(ours, 0.5):
        plain = ours.unload()
    assert type(plain) is MLP


def test_float64_models_have_float64_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8)).double()
    lora: Any = lora_transform(model, LoraConfig(r=3, lora_alpha=1, target_modules=["0"]), capture="modules").eval()
    with torch.no_grad():
        lora.get_parameter("0.lora_B.default.weight").normal_()
    x = X.double()
    live = lora(x)
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), live, rtol=1e-13, atol=1e-13)
    lora.unmerge_adapter()
    lora.float()
    assert lora.get_buffer("0.lora_scaling.default.scale").dtype == torch.float32
    lora.double()
    assert lora.get_buffer("0.lora_scaling.default.scale").item() == 1 / 3
    lora.verify()
