"""Tied weights in files: refused, untied or changed for both ends, as a live model would be, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import CheckpointError, ConfigError, LoraConfig, MergeError, export_merged, lora_transform, merge_checkpoint
from fxlora.checkpoint.renames import other_names
from fxlora.checkpoint.safetensors_io import Entry
from fxlora.checkpoint.ties import find_families
from fxlora.cli import cli
from tests.host import tied as models

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
IDS = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {"vocab_size": 48, "num_hidden_layers": 1}


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, tie_word_embeddings=True, **SIZES
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=48))


def neox() -> Any:
    config = transformers.GPTNeoXConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, tie_word_embeddings=True, **SIZES
    )
    return transformers.GPTNeoXForCausalLM(config)


MODELS = {"llama": (llama, "embed_tokens"), "gpt2": (gpt2, "wte"), "neox": (neox, "embed_in")}


def head_of(model: Any) -> str:
    """Which transformers renames from version to version."""
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def plain(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().eval().to(dtype)


def adapted(name: str, *ends: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    base = plain(name, dtype)
    targets = [MODELS[name][1] if end == "embedding" else head_of(base) for end in ends]
    model = lora_transform(base, LoraConfig(**{"r": 2, "target_modules": targets, **options}))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key or "trainable_tokens" in key:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def files(model: Any, name: str, path: Path) -> tuple[Path, Path]:
    """(base, adapter)."""
    plain(name, model.dtype).save_pretrained(path / "base")
    model.save_pretrained(path / "adapter")
    return path / "base", path / "adapter"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(name: str, path: Path) -> Any:
    return type(plain(name)).from_pretrained(path).eval()


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / WEIGHTS)


@pytest.mark.parametrize("ends", [["head"], ["embedding"], ["head", "embedding"]], ids="-".join)
@pytest.mark.parametrize("name", MODELS)
def test_refused_or_untied_as_the_live_model(name: str, ends: list[str], tmp_path: Path) -> None:
    model = adapted(name, *ends)
    base, adapter = files(model, name, tmp_path)
    how = "changes them differently" if len(ends) == 2 else "changes '.*' only"
    with pytest.raises(MergeError, match=rf"{MODELS[name][1]}\.weight'.* are tied.*{how}.*tied='untie'.*tied='both'"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    report = merge_checkpoint(base, adapter, tmp_path / "out", tied="untie")
    assert len(report.merged) == len(ends)
    export_merged(model, tmp_path / "live", tied="untie")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()
    result = loaded(name, tmp_path / "out")
    assert result.config.tie_word_embeddings is False
    assert result.get_output_embeddings().weight is not result.get_input_embeddings().weight
    torch.testing.assert_close(logits(result), logits(model))


@pytest.mark.parametrize("ends", [["head"], ["embedding"]], ids="-".join)
@pytest.mark.parametrize("name", MODELS)
def test_both_ends_change_together(name: str, ends: list[str], tmp_path: Path) -> None:
    model = adapted(name, *ends, dtype=torch.bfloat16)
    base, adapter = files(model, name, tmp_path)
    merge_checkpoint(base, adapter, tmp_path / "out", tied="both")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    export_merged(model, tmp_path / "live", tied="both")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()
    result = loaded(name, tmp_path / "out")
    assert result.get_output_embeddings().weight is result.get_input_embeddings().weight
    assert not torch.equal(
        result.get_input_embeddings().weight, plain(name, torch.bfloat16).get_input_embeddings().weight
    )


def test_both_cannot_be_two_updates(tmp_path: Path) -> None:
    base, adapter = files(adapted("llama", "head", "embedding"), "llama", tmp_path)
    with pytest.raises(MergeError, match="have one weight and an update each.*tied='untie'"):
        merge_checkpoint(base, adapter, tmp_path / "out", tied="both")
    with pytest.raises(ConfigError, match="`tied` should be one of 'refuse', 'untie', 'both', not 'unite'"):
        merge_checkpoint(base, adapter, tmp_path / "out", tied="unite")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", ["refuse", "both"])
def test_equal_updates_need_no_word(tied: Any, tmp_path: Path) -> None:
    model = adapted("llama", "embedding", ensure_weight_tying=True)
    base, adapter = files(model, "llama", tmp_path)
    assert {"base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"} <= set(
        load_file(adapter / ADAPTER)
    )
    merge_checkpoint(base, adapter, tmp_path / "out", tied=tied)
    export_merged(model, tmp_path / "live")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()
    torch.testing.assert_close(logits(loaded("llama", tmp_path / "out")), logits(model))


@pytest.mark.parametrize("tokens", [[1, 30, 2], {"embed_tokens": [1, 30, 2]}], ids=["list", "dict"])
def test_trained_rows_are_those_of_both_ends(tokens: Any, tmp_path: Path) -> None:
    model = adapted("llama", target_modules=["q_proj"], trainable_token_indices=tokens)
    base, adapter = files(model, "llama", tmp_path)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert report.merged == ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
    export_merged(model, tmp_path / "live")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()
    rows = load_file(adapter / ADAPTER)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    found, before = weights(tmp_path / "out")["model.embed_tokens.weight"], weights(base)["model.embed_tokens.weight"]
    assert torch.equal(found[[1, 30, 2]], rows)
    changed = (found != before).any(1).nonzero().flatten().tolist()
    assert changed == [1, 2, 30]
    torch.testing.assert_close(logits(loaded("llama", tmp_path / "out")), logits(model))


def test_rows_of_one_end_only(tmp_path: Path) -> None:
    model = adapted("llama", target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 4]})
    base, adapter = files(model, "llama", tmp_path)
    with pytest.raises(MergeError, match="changes 'lm_head.weight' only"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    merge_checkpoint(base, adapter, tmp_path / "out", tied="untie")
    torch.testing.assert_close(logits(loaded("llama", tmp_path / "out")), logits(model))


def test_rows_and_another_adapters_update(tmp_path: Path) -> None:
    """The rows take the weight's place first; the other adapter adds to them as to all others."""
    model = adapted("llama", target_modules=["q_proj"], trainable_token_indices=[5, 6], dtype=torch.bfloat16)
    base, adapter = files(model, "llama", tmp_path)
    other = adapted("llama", "embedding", ensure_weight_tying=True, dtype=torch.bfloat16)
    other.save_pretrained(tmp_path / "other")
    merge_checkpoint(base, [adapter, tmp_path / "other"], tmp_path / "out", out_dtype=torch.float32)
    factors = load_file(tmp_path / "other" / ADAPTER)
    A, B = (factors[f"base_model.model.model.embed_tokens.lora_embedding_{x}"].double() for x in "AB")
    rows = load_file(adapter / ADAPTER)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    expected = weights(base)["model.embed_tokens.weight"].double()
    expected[[5, 6]] = rows.double()
    expected += other._lora.adapters["default"].branches[0].scaling * (B @ A).T
    assert torch.equal(weights(tmp_path / "out")["model.embed_tokens.weight"], expected.float())


def test_rows_that_cannot_be(tmp_path: Path) -> None:
    model = adapted("llama", target_modules=["q_proj"], trainable_token_indices=[5, 6])
    base, adapter = files(model, "llama", tmp_path)
    config = adapter / "adapter_config.json"
    text = json.loads(config.read_text())

    def say(**values: Any) -> None:
        config.write_text(json.dumps({**text, **values}))

    def refused(error: type[Exception], words: str, adapters: Any = adapter, **options: Any) -> None:
        with pytest.raises(error, match=words):
            merge_checkpoint(base, adapters, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    say(trainable_token_indices=[5, 48])
    refused(CheckpointError, r"different rows of 'model.embed_tokens.weight', which has shape \(48, 16\)")
    say(trainable_token_indices=[5, 6, 7])
    refused(CheckpointError, r"trainable_tokens_delta' has shape \(2, 16\)")
    say(trainable_token_indices={"lm_head": [5, 6]})
    refused(CheckpointError, "does not say which of 'model.embed_tokens'")
    say()
    refused(ConfigError, "`weights` has 2.0 .* which replaces rows of 'model.embed_tokens.weight'", weights=[2.0])
    other = adapted("llama", target_modules=["q_proj"], trainable_token_indices=[6])
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "trainable_tokens" in n).fill_(1.0)
    other.save_pretrained(tmp_path / "other")
    refused(MergeError, "row 6 of 'model.embed_tokens.weight' is trained by .* and by", [adapter, tmp_path / "other"])
    save_file({k: v for k, v in load_file(adapter / ADAPTER).items() if "tokens" not in k}, adapter / ADAPTER)
    refused(CheckpointError, "trainable_token_indices trains rows of an embedding, and the file has none")


def trained_whole(*names: str, **options: Any) -> Any:
    """With copies of these modules (modules_to_save), the first twice as large as the original."""
    model = adapted("llama", **{"target_modules": ["q_proj"], "modules_to_save": list(names), **options})
    for factor, name in enumerate(names, start=2):
        with torch.no_grad():
            path = next(each for each, _ in model.named_modules() if each.endswith(f"{name}.modules_to_save.default"))
            model.get_submodule(path).weight.mul_(factor)
    return model


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="-".join)
def test_an_end_that_is_trained_whole_is_untied(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its copy was a weight of its own in training, so that nothing else can be meant; as the live model is exported."""
    model = trained_whole(*names)
    base, adapter = files(model, "llama", tmp_path)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert [each.getMessage() for each in caplog.records if "tie_word_embeddings is now False" in each.getMessage()]
    merge_checkpoint(base, adapter, tmp_path / "said", tied="untie")
    export_merged(model, tmp_path / "live")
    for other in ("said", "live"):
        assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / other / WEIGHTS).read_bytes()
    result = loaded("llama", tmp_path / "out")
    assert result.config.tie_word_embeddings is False
    assert result.get_output_embeddings().weight is not result.get_input_embeddings().weight
    torch.testing.assert_close(logits(result), logits(model))


def test_a_head_that_is_trained_whole_in_peft(tmp_path: Path) -> None:
    theirs = models.theirs(plain("llama"), modules_to_save=["lm_head"])
    with torch.no_grad():
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    plain("llama").save_pretrained(tmp_path / "base")
    with models.quiet():
        theirs.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(loaded("llama", tmp_path / "out")), logits(theirs))


def test_one_weight_for_both_ends_if_that_is_asked_for(tmp_path: Path) -> None:
    base, adapter = files(trained_whole("lm_head"), "llama", tmp_path)
    merge_checkpoint(base, adapter, tmp_path / "both", tied="both")
    doubled = 2 * weights(base)["model.embed_tokens.weight"]
    assert torch.equal(weights(tmp_path / "both")["model.embed_tokens.weight"], doubled)


def test_one_end_trained_whole_and_an_update_at_the_other(tmp_path: Path) -> None:
    """What the head had before it was copied is not known to stay: that is still asked."""
    model = trained_whole("lm_head", target_modules=["embed_tokens"])
    base, adapter = files(model, "llama", tmp_path)
    with pytest.raises(MergeError, match="changes them differently"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    with pytest.raises(MergeError, match="lm_head"):
        export_merged(model, tmp_path / "live")
    merge_checkpoint(base, adapter, tmp_path / "out", tied="untie")
    torch.testing.assert_close(logits(loaded("llama", tmp_path / "out")), logits(model))


def test_both_names_in_the_files(tmp_path: Path) -> None:
    """With the same bytes they are one weight, unless the configuration says that they are not."""
    model = adapted("llama", "head")
    base, adapter = files(model, "llama", tmp_path)
    tensors = weights(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="'lm_head.weight' and 'model.embed_tokens.weight' are tied"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    merge_checkpoint(base, adapter, tmp_path / "both", tied="both")
    found = weights(tmp_path / "both")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])
    merge_checkpoint(base, adapter, tmp_path / "two", tied="untie")
    torch.testing.assert_close(logits(loaded("llama", tmp_path / "two")), logits(model))

    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    merge_checkpoint(base, adapter, tmp_path / "never tied")
    assert torch.equal(weights(tmp_path / "never tied")["lm_head.weight"], weights(tmp_path / "two")["lm_head.weight"])

    (base / "config.json").write_text(json.dumps(config))
    tensors["lm_head.weight"][0, 0] += 1
    model.save_pretrained(adapter, save_embedding_layers=False)
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="differ in the files, and config.json says that they are one"):
        merge_checkpoint(base, adapter, tmp_path / "out", tied="untie")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_head_ties_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
        pad_token_id=0, **SIZES,
    )  # fmt: skip
    base = transformers.Qwen2ForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    model: Any = lora_transform(base, LoraConfig(r=2, target_modules=["embed_tokens"]))
    nn.init.normal_(model.model.embed_tokens.lora_embedding_A["default"].weight)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    export_merged(model, tmp_path / "live")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()


def test_a_tie_that_nothing_names(tmp_path: Path) -> None:
    """What the configuration ties must be the embeddings under one of their names."""
    tensors = {"body.weight": torch.ones(3, 3), "table.weight": torch.ones(7, 3)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / WEIGHTS)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"tie_word_embeddings": True, "vocab_size": 7}))
    model = lora_transform(nn.ModuleDict({"table": nn.Linear(3, 7)}), LoraConfig(r=1, target_modules=["table"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(MergeError, match=r"'table.weight' is tied to the embeddings"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tied="both")
    assert not (tmp_path / "out").exists()


def test_sequence_to_sequence(tmp_path: Path) -> None:
    """Four names of one weight: the one that is changed gets its own, the others keep theirs."""

    def t5() -> Any:
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config).eval()

    def of(model: Any) -> Tensor:
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS).logits

    model = lora_transform(t5(), LoraConfig(r=2, target_modules=["lm_head"])).eval()
    nn.init.normal_(model.lm_head.lora_B["default"].weight)
    t5().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match="'lm_head.weight' and 'shared.weight' are tied"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tied="untie")
    result = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert result.lm_head.weight is not result.shared.weight
    torch.testing.assert_close(of(result), of(model))


def test_the_ends_are_those_of_transformers() -> None:
    """For each class whose ties it declares: the files hold the source, and the others are found by its name."""
    names = [
        "BartForConditionalGeneration",
        "BertForMaskedLM",
        "BloomForCausalLM",
        "FalconForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "GemmaForCausalLM",
        "LlamaForCausalLM",
        "OPTForCausalLM",
        "PhiForCausalLM",
        "Qwen2ForCausalLM",
        "RobertaForMaskedLM",
        "WhisperForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "AlbertForMaskedLM",
        "MBartForConditionalGeneration",
        "T5ForConditionalGeneration",
    ]
    checked = 0
    for name in names:
        cls = getattr(transformers, name)
        declared = {k: v for k, v in (cls._tied_weights_keys or {}).items() if k.endswith("weight")}
        for source in set(declared.values()):
            config = {"tie_word_embeddings": True, "model_type": cls.config_class.model_type}
            families = find_families({source: Entry("F32", (8, 4))}, config)
            expected = [{target, *other_names(target)} for target, start in declared.items() if start == source]
            assert [each.embedding for each in families] == [source], name
            assert all(not names.isdisjoint(families[0].others) for names in expected), name
            checked += 1
    assert checked >= 15


def test_rows_that_peft_trained(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 30, 2])
    theirs = peft.get_peft_model(plain("llama"), config).eval()
    torch.manual_seed(1)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key or "trainable_tokens" in key:
            nn.init.normal_(parameter, std=0.3)
    plain("llama").save_pretrained(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(loaded("llama", tmp_path / "out")), logits(theirs))


def test_the_command_line(tmp_path: Path) -> None:
    base, adapter = files(adapted("llama", "head"), "llama", tmp_path)
    run = CliRunner().invoke(cli, ["merge", str(base), str(adapter), "-o", str(tmp_path / "no")])
    assert isinstance(run.exception, MergeError)
    for how in ("untie", "both"):
        arguments = ["merge", str(base), str(adapter), "-o", str(tmp_path / how), "--tied", how, "--dequantize"]
        assert CliRunner().invoke(cli, arguments).exit_code == 0
        merge_checkpoint(base, adapter, tmp_path / "expected", tied=how)
        assert (tmp_path / how / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()
