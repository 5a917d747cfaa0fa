"""What rounding takes of an update: reported before a merge, warned of by every merge."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxlora import AdapterError, ConfigError, LoraConfig, export_merged, lora_transform, rounding_report

IDS = torch.arange(24).view(2, 12)


def llama(dtype: torch.dtype, size: float, **options: Any) -> Any:
    """A model whose update has a given size beside its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model = lora_transform(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02 * size)
    return model


def norms(model: Any, path: str, dtype: torch.dtype) -> tuple[float, float]:
    """(relative change, share lost) of one weight in float64."""
    layer = model.get_submodule(path)
    B, A = (getattr(layer, name)["default"].weight.detach().double() for name in ("lora_B", "lora_A"))
    delta = 2 * B @ A
    weight = layer.weight.detach().double()
    written = (weight + delta).to(dtype).double()
    return float(delta.norm() / weight.norm()), float((written - weight - delta).norm() / delta.norm())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_figures_beside_float64(dtype: torch.dtype) -> None:
    model = llama(dtype, 0.05, lora_alpha=8)
    before = state(model)
    report = rounding_report(model)
    assert [layer.name for layer in report.layers] == [
        f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    for layer in report.layers:
        change, lost = norms(model, layer.name.removesuffix(".weight"), dtype)
        assert layer.relative_change == pytest.approx(change, rel=1e-6)
        assert layer.lost == pytest.approx(lost, rel=1e-3)
        assert layer.entries == layer.all_entries
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert report.largest_change == max(layer.relative_change for layer in report.layers)


def test_a_small_update_is_lost_in_bfloat16_and_kept_in_float32(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = llama(torch.bfloat16, 1e-3)
    report = rounding_report(model)
    assert all(layer.lost > 0.5 and layer.unchanged > 0.5 for layer in report.layers)
    assert len(report.affected) == 4 and report.affected[0].lost == max(layer.lost for layer in report.layers)
    assert "loses more than 25% of the update in 4 of 4 merged weights" in report.warning
    assert "out_dtype=torch.float32" in report.warning and "warning: " in str(report)
    wide = rounding_report(model, out_dtype=torch.float32)
    assert not wide.warning and wide.lost < 1e-3
    caplog.set_level(logging.WARNING, "fxlora")
    export_merged(model, tmp_path / "wide", out_dtype=torch.float32)
    assert not caplog.messages
    for merge in (lambda: export_merged(model, tmp_path / "narrow"), model.merge_adapter, model.unmerge_adapter):
        merge()
    assert len(caplog.messages) == 2 and all("in 4 of 4 merged weights" in message for message in caplog.messages)


def test_a_large_update_raises_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "fxlora")
    llama(torch.bfloat16, 2.0).merge_and_unload()
    assert not caplog.messages


def test_without_an_update_nothing_is_lost() -> None:
    model = llama(torch.bfloat16, 0.0)
    report = rounding_report(model, example_inputs={"input_ids": IDS})
    assert report.lost == 0 and not report.warning and all(layer.lost == 0 for layer in report.layers)
    assert report.effect is not None and report.effect.largest == report.effect.update == 0
    assert report.effect.same_argmax == 1


def test_effect_on_the_outputs() -> None:
    model = llama(torch.bfloat16, 0.05)
    before, training = state(model), model.training
    report = rounding_report(model, example_inputs={"input_ids": IDS})
    effect = report.effect
    assert effect is not None and 0 < effect.mean <= effect.largest < effect.scale and effect.mean < effect.update
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training == training and not model._lora.merged
    reference = llama(torch.bfloat16, 0.05).eval()
    exact = reference.merge_and_unload()  # bfloat16 weights, run in float32: what was called rounded
    rounded = exact.float()(input_ids=IDS).logits.detach()
    wide = llama(torch.bfloat16, 0.05).float().eval()
    unrounded = wide.merge_and_unload()(input_ids=IDS).logits.detach()
    assert effect.largest == pytest.approx(float((rounded - unrounded).abs().max()), rel=0.02)
    assert "outputs move by" in str(report)


def test_effect_while_merged_and_of_a_whole_graph() -> None:
    model = llama(torch.bfloat16, 0.05)
    expected = rounding_report(model, example_inputs={"input_ids": IDS}).effect
    model.merge_adapter()
    merged = state(model)
    found = rounding_report(model, example_inputs={"input_ids": IDS})
    assert found.effect == expected and model._lora.merged == ("default",)
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())

    net: Any = lora_transform(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), LoraConfig(target_modules=["0"], r=2))
    nn.init.normal_(net.get_submodule("0").lora_B["default"].weight)
    effect = rounding_report(net, out_dtype=torch.bfloat16, example_inputs=torch.randn(4, 8)).effect
    assert net.capture == "symbolic" and effect is not None and effect.largest > 1e-4


def test_report_as_data() -> None:
    report = rounding_report(llama(torch.bfloat16, 1e-3), example_inputs={"input_ids": IDS})
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0]["name"] == report.layers[0].name and data["layers"][0]["lost"] == report.layers[0].lost
    assert data["effect"]["largest"] == report.effect.largest if report.effect else False


def test_bad_arguments() -> None:
    model = llama(torch.bfloat16, 0.1)
    with pytest.raises(AdapterError, match="takes what lora_transform returned, not a Linear"):
        rounding_report(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="`out_dtype` should be one of"):
        rounding_report(model, out_dtype=torch.int8)
    with pytest.raises(AdapterError, match="other"):
        rounding_report(model, adapter_names=["other"])
