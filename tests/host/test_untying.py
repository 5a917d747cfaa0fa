"""`tied=`: a merge into a weight that other layers have too, in live models and in what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fxlora import AdapterError, ConfigError, LoraConfig, MergeError, export_merged, lora_transform

IDS = torch.arange(12).view(2, 6)


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def adapted(*targets: str, **options: Any) -> Any:
    model = lora_transform(llama(), LoraConfig(target_modules=list(targets), r=2, **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_refused_unless_said(target: str, tmp_path: Path) -> None:
    model = adapted(target)
    before = state(model)
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: export_merged(model, tmp_path / "out")):
        with pytest.raises(MergeError, match="is shared with .* tied='untie' .* tied='both'"):
            merge()
        assert same(model, before)
    assert not (tmp_path / "out").exists()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_untied_model_computes_what_the_branches_did(targets: list[str], tmp_path: Path) -> None:
    model = adapted(*targets)
    live, original = logits(model), model.lm_head.weight.detach().clone()
    export_merged(model, tmp_path / "out", tied="untie")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight  # only read
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), live)
    assert loaded.config.tie_word_embeddings is False

    merged = model.merge_and_unload(tied="untie")
    assert type(merged) is LlamaForCausalLM and merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), live)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    ends = {"lm_head": merged.lm_head.weight, "embed_tokens": merged.model.embed_tokens.weight}
    assert [name for name, weight in ends.items() if not torch.equal(weight, original)] == targets
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in loaded.state_dict().items())
    merged.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), live)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_both_ends_change_together(target: str, tmp_path: Path) -> None:
    model = adapted(target)
    before = state(model)
    export_merged(model, tmp_path / "out", tied="both")
    assert same(model, before)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.tie_word_embeddings and loaded.lm_head.weight is loaded.model.embed_tokens.weight

    model.merge_adapter(tied="both")
    expected = logits(model)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    with model.disable_adapter():
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert torch.equal(logits(model), expected)  # merged again, as it was
    export_merged(model, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    model.unmerge_adapter()
    assert same(model, before)
    with pytest.raises(MergeError):
        model.merge_adapter()  # what was said is said of one merge
    merged = model.merge_and_unload(tied="both")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and torch.equal(logits(merged), expected)


def test_both_cannot_be_two_updates(tmp_path: Path) -> None:
    model = adapted("lm_head", "embed_tokens")
    before = state(model)
    for merge in (
        lambda: model.merge_and_unload(tied="both"),
        lambda: model.merge_adapter(tied="both"),
        lambda: export_merged(model, tmp_path / "out", tied="both"),
    ):
        with pytest.raises(MergeError, match="'model.embed_tokens' and 'lm_head' have one weight and an update each"):
            merge()
        assert same(model, before)


def test_equal_updates_need_no_word() -> None:
    model = adapted("embed_tokens", ensure_weight_tying=True)
    live = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), live)


def test_what_cannot_be_unmerged_is_refused() -> None:
    model = adapted("lm_head")
    with pytest.raises(ConfigError, match=r"^tied='untie' cannot be undone by unmerge_adapter"):
        model.merge_adapter(tied=cast(Any, "untie"))
    with pytest.raises(ConfigError, match="^`tied` should be one of 'refuse', 'untie', 'both', not 'unite'"):
        model.merge_and_unload(tied=cast(Any, "unite"))


def test_after_an_error_the_ends_are_tied_again() -> None:
    model = adapted("lm_head", "embed_tokens")
    with torch.no_grad():
        model.lm_head.lora_B["default"].weight.fill_(1e30)
        model.lm_head.lora_A["default"].weight.fill_(1e30)
    before = state(model)
    with pytest.raises(MergeError, match="NaN or infinite"):
        model.merge_and_unload(tied="untie")
    assert same(model, before) and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


class Shared(nn.Module):
    """Two layers with one weight, which the graph reads once more by itself."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.a, self.b, self.reads = nn.Linear(4, 4), nn.Linear(4, 4), reads
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).tanh())
        return y + self.a.weight.sum() if self.reads else y


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_layers_of_any_model(capture: Any) -> None:
    x = torch.randn(3, 4)
    model: Any = lora_transform(Shared(False), LoraConfig(target_modules=["a"], r=2), capture=capture, example_inputs=x)
    nn.init.normal_(model.a.lora_B["default"].weight)
    live = model(x)
    merged = model.merge_and_unload(tied="untie")
    torch.testing.assert_close(merged(x), live)
    assert merged.a.weight is not merged.b.weight


def test_a_weight_that_the_graph_reads_by_itself() -> None:
    model: Any = lora_transform(Shared(True), LoraConfig(target_modules=["b"], r=2), capture="symbolic")
    with pytest.raises(
        (MergeError, AdapterError), match="is also read by '.*' of the graph, which cannot be given another"
    ):
        model.merge_and_unload(tied="untie")
    assert model.a.weight is model.b.weight
