"""What each reader would get wrong: a rule for each thing that was seen to go wrong, and none where nothing does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import readers as table
from fxlora import AdapterReport, CheckpointError, ConfigError, LoraConfig, check_adapter, lora_transform
from fxlora.checkpoint.readers import FEATURES, READERS
from fxlora.checkpoint.readers.base import LEVELS
from fxlora.cli import cli
from tests.oracle import parity
from tests.oracle.cases import CASES, llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SERVERS = ("vllm", "sglang", "llama.cpp", "onnxruntime")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BY_NAME = {case.name: case for case in CASES}


def saved(
    directory: Path, base: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **config: Any
) -> Path:
    """An adapter of a small Llama in bfloat16, and the base's config.json if asked for."""
    settings = {"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **config}
    adapted: Any = lora_transform(llama(**(model or {}))(), LoraConfig(**settings), capture="modules")
    adapted.save_pretrained(directory / "adapter")
    narrow(directory / "adapter")
    if base is not None:
        (directory / "base").mkdir()
        (directory / "base" / "config.json").write_text(json.dumps(base))
        change(directory / "adapter", base_model_name_or_path=str(directory / "base"))
    else:
        change(directory / "adapter", base_model_name_or_path="some/model")
    return directory / "adapter"


def narrow(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, directory / WEIGHTS)


def change(directory: Path, **fields: Any) -> None:
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**values, **fields}))


def add(directory: Path, key: str, *shape: int) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file({**tensors, f"base_model.model.{key}": torch.zeros(shape, dtype=torch.bfloat16)}, directory / WEIGHTS)


def levels(report: AdapterReport) -> dict[str, set[tuple[str, str]]]:
    """(feature, level) of the findings by reader, without torchtune's, which is always the same."""
    names = [name for name in report.readers if name != "torchtune"]
    found = {name: {(each.feature, each.level) for each in report.of(name)} for name in names}
    return {name: each for name, each in found.items() if each}


def same_for_all(feature: str, level: str, *but: str) -> dict[str, set[tuple[str, str]]]:
    return {name: {(feature, level)} for name in READERS if name not in ("torchtune", *but)}


PLAIN_BASE = {"vocab_size": 32, "tie_word_embeddings": False}
TIED_BASE = {"vocab_size": 32, "tie_word_embeddings": True}

SETTINGS: list[tuple[str, dict[str, Any], dict[str, set[tuple[str, str]]]]] = [
    ("plain", {}, {}),
    ("rslora", {"use_rslora": True}, {name: {("rslora", "wrong")} for name in ("sglang", "llama.cpp")}),
    ("rslora of rank 1", {"use_rslora": True, "r": 1}, {}),
    ("alpha_pattern", {"alpha_pattern": {"q_proj": 3}},
     {"vllm": {("alpha_pattern", "note")}, **{n: {("alpha_pattern", "wrong")} for n in ("sglang", "llama.cpp", "onnxruntime")}}),
    ("alpha_pattern that changes nothing", {"alpha_pattern": {"q_proj": 8, "fc": 3}, "lora_alpha": 8}, {}),
    ("rank_pattern", {"rank_pattern": {"q_proj": 2}},
     {"vllm": {("rank_pattern", "note")}, "sglang": {("rank_pattern", "fails")}, "onnxruntime": {("rank_pattern", "wrong")}}),
    ("dora", {"use_dora": True}, same_for_all("dora", "fails", "peft")),
    ("lora_bias", {"lora_bias": True},
     {**same_for_all("lora_bias", "fails", "peft", "sglang"), "sglang": {("lora_bias", "ignored")}}),
    ("bias='lora_only'", {"bias": "lora_only", "model": {"attention_bias": True}},
     {**same_for_all("bias", "fails", "peft", "sglang"), "sglang": {("bias", "ignored")}}),
    ("bias='all'", {"bias": "all", "model": {"mlp_bias": True}}, same_for_all("bias", "fails", "peft")),
    ("a head", {"modules_to_save": ["lm_head"]},
     {**same_for_all("modules_to_save", "fails", "peft", "sglang"), "sglang": {("modules_to_save", "ignored")}}),
    ("norms", {"modules_to_save": ["input_layernorm"]},
     {**same_for_all("modules_to_save", "fails", "peft", "llama.cpp"), "llama.cpp": {("modules_to_save", "ignored")}}),
    ("pissa", {"init_lora_weights": "pissa"},
     {"vllm": {("base_init", "fails")}, **{n: {("base_init", "wrong")} for n in ("sglang", "llama.cpp", "onnxruntime")}}),
    ("mica leaves the base", {"init_lora_weights": "mica"}, {}),
    ("tokens", {"trainable_token_indices": [1, 2]},
     {**same_for_all("trainable_tokens", "fails", "peft", "sglang"), "sglang": {("trainable_tokens", "ignored")}}),
    ("replication", {"layer_replication": [[0, 2], [1, 2]]}, same_for_all("layer_replication", "fails", "peft")),
    ("expression", {"target_modules": r".*\.(q|v)_proj"}, {"sglang": {("regex_targets", "fails")}}),
    ("q alone", {"target_modules": ["q_proj"]}, {"sglang": {("lone_projections", "fails")}}),
    ("q and v", {"target_modules": ["q_proj", "v_proj"]}, {}),
    ("k and v", {"target_modules": ["k_proj", "v_proj"]}, {"sglang": {("lone_projections", "fails")}}),
    ("up alone", {"target_modules": ["up_proj"]}, {"sglang": {("lone_projections", "fails")}}),
    ("gate alone", {"target_modules": ["gate_proj"]}, {}),
    ("rank 17", {"r": 17}, {"vllm": {("high_rank", "note")}}),
    ("rank 513", {"r": 513}, {"vllm": {("high_rank", "fails")}}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), [each[1:] for each in SETTINGS], ids=[each[0] for each in SETTINGS])
def test_settings(config: dict[str, Any], expected: dict[str, set[tuple[str, str]]], tmp_path: Path) -> None:
    report = check_adapter(saved(tmp_path, PLAIN_BASE, **config))
    assert levels(report) == expected
    others = [finding for finding in report.findings if finding.reader != "torchtune"]
    assert check_adapter(tmp_path / "adapter", set(READERS) - {"torchtune"}).ok == all(
        f.level == "note" for f in others
    )


FILES: list[tuple[str, Any, dict[str, set[tuple[str, str]]]]] = [
    ("alora", lambda d: change(d, alora_invocation_tokens=[3]),
     {"vllm": {("alora", "fails")}, "sglang": {("alora", "wrong")}, "onnxruntime": {("alora", "wrong")}}),
    ("kasa", lambda d: change(d, kasa_config={"beta": 1}), same_for_all("variants", "fails", "peft")),
    ("newer field", lambda d: change(d, invented_config={"x": 1}), same_for_all("unknown_fields", "ignored")),
    ("newer field, off", lambda d: change(d, invented_config=None), {}),
    ("call_sites", lambda d: change(d, call_sites={"q_proj": [0]}), same_for_all("call_sites", "wrong")),
    ("no targets", lambda d: change(d, target_modules=None), {"sglang": {("no_targets", "fails")}}),
    ("no base's name", lambda d: change(d, base_model_name_or_path=None), {"llama.cpp": {("no_base_name", "note")}}),
    ("fan_in_fan_out, square", lambda d: change(d, fan_in_fan_out=True), {"llama.cpp": {("fan_in_fan_out", "wrong")}}),
    ("another adapter below", lambda d: saved(d / "other").rename(d / "second"), same_for_all("several_adapters", "note")),
    ("float32", lambda d: add_float(d), {n: {("dtype", "note")} for n in ("vllm", "sglang")}),
    ("base weights", lambda d: add(d, "model.layers.0.self_attn.q_proj.base_layer.weight", 16, 16),
     {**same_for_all("base_weights", "note", "vllm", "onnxruntime"),
      **{n: {("base_weights", "fails")} for n in ("vllm", "onnxruntime")}}),
    ("new tokens", lambda d: (d / "added_tokens.json").write_text('{"<a>": 40}'), {"sglang": {("new_tokens", "fails")}}),
    ("old tokens", lambda d: (d / "added_tokens.json").write_text('{"<a>": 31}'), {}),
]  # fmt: skip


def add_float(directory: Path) -> None:
    save_file({key: tensor.float() for key, tensor in load_file(directory / WEIGHTS).items()}, directory / WEIGHTS)


@pytest.mark.parametrize(("edit", "expected"), [each[1:] for each in FILES], ids=[each[0] for each in FILES])
def test_files(edit: Any, expected: dict[str, set[tuple[str, str]]], tmp_path: Path) -> None:
    directory = saved(tmp_path, PLAIN_BASE)
    edit(directory)
    assert levels(check_adapter(directory, base=tmp_path / "base")) == expected


EMBEDDINGS = ["embed_tokens", "lm_head", *ATTENTION]
OF_BASE = [
    (PLAIN_BASE, set()),
    ({"text_config": PLAIN_BASE}, set()),
    (TIED_BASE, {("tied_head", "fails"), ("tied_embedding", "fails")}),
    ({**PLAIN_BASE, "vocab_size": 48}, {("resized", "fails")}),
]


@pytest.mark.parametrize(("base", "expected"), OF_BASE)
def test_embeddings(base: dict[str, Any], expected: set[tuple[str, str]], tmp_path: Path) -> None:
    found = levels(check_adapter(saved(tmp_path, base, target_modules=EMBEDDINGS)))
    assert found["llama.cpp"] == expected | {("base_weights", "note")}
    sizes = {each for each in expected if each[0] == "resized"}
    assert found["vllm"] == sizes | {("base_weights", "note"), ("embeddings", "note"), ("lm_head", "note")}
    assert found["sglang"] == found["peft"] == sizes | {("base_weights", "note")}
    assert {("embeddings", "fails"), ("lm_head", "fails"), ("base_weights", "fails")} == found["onnxruntime"]


def test_embeddings_of_an_unknown_base(tmp_path: Path) -> None:
    report = check_adapter(saved(tmp_path, target_modules=EMBEDDINGS), ["llama.cpp"])
    assert levels(report)["llama.cpp"] == {("base_weights", "note"), ("embeddings", "note"), ("lm_head", "note")}
    assert report.ok and "--base DIR" in str(report)


def test_a_classifier_head(tmp_path: Path) -> None:
    directory = saved(tmp_path, PLAIN_BASE)
    change(directory, modules_to_save=["score"])
    add(directory, "score.weight", 2, 16)
    found = levels(check_adapter(directory))
    assert found["vllm"] == {("modules_to_save", "note")} and found["sglang"] == {("modules_to_save", "ignored")}


# ---- other layers: the cases of the parity table ----


OTHERS: list[tuple[str, dict[str, set[tuple[str, str]]]]] = [
    ("nn.Conv2d", {name: {("conv", "fails")} for name in SERVERS}),
    ("DoRA, nn.Conv2d, groups", {"peft": {("grouped_dora", "wrong")}, **{n: {("conv", "fails"), ("dora", "fails")} for n in SERVERS}}),
    ("nn.MultiheadAttention, self",
     {"peft": {("attention", "wrong")}, "vllm": {("attention", "ignored")}, "sglang": {("attention", "fails")},
      "llama.cpp": {("attention", "fails")}, "onnxruntime": {("attention", "fails")}}),
    ("Mixtral's experts", {name: {("experts", "fails")} for name in SERVERS}),
]  # fmt: skip
IGNORED = {"dtype", "no_base_name", "module_names", "lone_projections", "rank_pattern", "alpha_pattern"}
"""What these small models have besides: convolutions with groups have ranks of their own in files."""


@pytest.mark.parametrize(("name", "expected"), OTHERS, ids=[name for name, _ in OTHERS])
def test_other_layers(name: str, expected: dict[str, set[tuple[str, str]]], tmp_path: Path) -> None:
    parity.ours(BY_NAME[name], "modules").save_pretrained(tmp_path)
    found = levels(check_adapter(tmp_path))
    cleaned = {reader: {each for each in rules if each[0] not in IGNORED} for reader, rules in found.items()}
    assert {reader: rules for reader, rules in cleaned.items() if rules} == expected


def test_depthwise_convolutions_may_be_compact(tmp_path: Path) -> None:
    """With more than 16 groups files have a form that only this library reads."""
    model: Any = lora_transform(nn.Sequential(nn.Conv1d(32, 32, 3, groups=32)), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    assert levels(check_adapter(tmp_path))["peft"] == {("compact_conv", "note")}


def test_layers_that_store_in_times_out(tmp_path: Path) -> None:
    """The converter transposes what is not transposed: squares go through, the others are refused when they are loaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0)
    model: Any = lora_transform(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn", "attn.c_proj"]))
    model.save_pretrained(tmp_path)
    found = {
        each.level: each.places
        for each in check_adapter(tmp_path, "llama.cpp").findings
        if each.feature == "fan_in_fan_out"
    }
    assert found == {"wrong": ("transformer.h.0.attn.c_proj",), "fails": ("transformer.h.0.attn.c_attn",)}


def test_names_that_servers_do_not_know(tmp_path: Path) -> None:
    model: Any = lora_transform(nn.ModuleDict({"fc": nn.Linear(4, 4)}), LoraConfig(r=2, target_modules=["fc"]))
    model.save_pretrained(tmp_path)
    found = levels(check_adapter(tmp_path))
    assert ("module_names", "fails") in found["sglang"] and ("module_names", "fails") in found["onnxruntime"]


# ---- the report ----


def test_torchtune_reads_none(tmp_path: Path) -> None:
    report = check_adapter(saved(tmp_path), "torchtune")
    assert [(each.feature, each.level) for each in report.findings] == [("layout", "fails")] and not report.ok


def test_report(tmp_path: Path) -> None:
    directory = saved(tmp_path, PLAIN_BASE, use_rslora=True, rank_pattern={"q_proj": 32})
    report = check_adapter(directory, ["sglang", "vllm", "sglang"])
    assert report.readers == ("sglang", "vllm") and not report.ok
    assert [each.level for each in report.of("sglang")] == ["wrong", "fails"]  # worst first
    text = str(report)
    for words in (
        "SGLang (SGLang 0.5.23)",
        "wrong    rsLoRA",
        "Remedy: write it with the scales folded",
        "Source: SGLang 0.5.23",
    ):
        assert words in text
    assert max(map(len, text.splitlines()[1:])) <= 121
    values = json.loads(json.dumps(report.to_dict()))
    assert values["ok"] is False and values["findings"][0]["places"] == ["use_rslora"]
    assert values["findings"][0].keys() == {"reader", "level", "feature", "places", "effect", "remedy", "source"}
    good = str(check_adapter(saved(tmp_path / "good"), ["peft"]))
    assert good.endswith("peft (peft 0.21.2): reads it as peft does")


def test_places_are_cut(tmp_path: Path) -> None:
    report = check_adapter(saved(tmp_path, PLAIN_BASE, alpha_pattern={"q_proj": 3, "v_proj": 5}), "sglang")
    assert len(report.findings[0].places) == 4 and "self_attn.q_proj and 1 more. Source" in " ".join(
        str(report).split()
    )


def test_unknown_reader(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no reader is called 'vlm'\. Did you mean 'vllm'\? Known are: peft, vllm, sglang"
    ):
        check_adapter(saved(tmp_path), ["peft", "vlm"])


def test_broken_adapters(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a saved adapter"):
        check_adapter(tmp_path)
    directory = saved(tmp_path, PLAIN_BASE)
    with pytest.raises(CheckpointError, match=r"config.json does not exist; name the base model's directory"):
        check_adapter(directory, base=tmp_path)
    (directory / "added_tokens.json").write_text("{")
    with pytest.raises(CheckpointError, match="added_tokens.json is not valid JSON"):
        check_adapter(directory)
    change(directory, r="four")
    with pytest.raises(CheckpointError, match="`r` should be a positive integer"):
        check_adapter(directory)
    change(directory, r=4)
    tensors = load_file(directory / WEIGHTS)
    save_file(
        {key: tensor for key, tensor in tensors.items() if "0.self_attn.q_proj.lora_B" not in key}, directory / WEIGHTS
    )
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj' has no matrix lora_B"):
        check_adapter(directory)


def test_no_weights_are_read(tmp_path: Path) -> None:
    """What is said of a file does not depend on its data."""
    directory = saved(tmp_path, PLAIN_BASE, use_rslora=True)
    before = check_adapter(directory)
    tensors = load_file(directory / WEIGHTS)
    save_file({key: torch.full_like(tensor, torch.nan) for key, tensor in tensors.items()}, directory / WEIGHTS)
    assert check_adapter(directory) == before


# ---- the rules themselves ----


@pytest.mark.parametrize("name", READERS)
def test_rules_are_complete(name: str) -> None:
    reader = READERS[name]
    assert reader.name == name and reader.version
    for rule in reader.rules:
        assert rule.feature in FEATURES and rule.level in LEVELS
        assert rule.effect.endswith(".") and rule.effect[0].islower()
        assert rule.remedy and not rule.remedy.endswith(".") and rule.source
    assert all(feature.kind_of in ("", *FEATURES) for feature in FEATURES.values())


def test_every_feature_matters_to_someone() -> None:
    asked = {rule.feature for reader in READERS.values() for rule in reader.rules}
    assert asked == set(FEATURES)


def test_the_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "portable.md"
    assert page.read_text(encoding="utf-8") == table.page(), (
        "run: python -m benchmarks.readers --markdown docs/portable.md"
    )


# ---- the command line ----


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


def test_check_for(tmp_path: Path) -> None:
    directory = str(saved(tmp_path, PLAIN_BASE, use_rslora=True))
    result = run("check", directory, "--for", "peft")
    assert result.exit_code == 1 and "differs    adapter_config.json" in result.output, "the test has changed the file"
    (tmp_path / "adapter" / "SHA256SUMS").unlink()
    result = run("check", directory, "--for", "peft, vllm")
    assert result.exit_code == 0 and "vLLM (vLLM 0.33.0): reads it as peft does" in result.output
    result = run("check", directory, "--for", "peft,sglang", "--for", "llama.cpp", "--json")
    assert result.exit_code == 1 and json.loads(result.output)["readers"] == ["peft", "sglang", "llama.cpp"]
    assert json.loads(run("check", directory, "--for", "all", "--json").output)["readers"] == list(READERS)


def test_portable_command(tmp_path: Path) -> None:
    directory, out = str(saved(tmp_path, PLAIN_BASE, use_rslora=True)), str(tmp_path / "out")
    result = run("portable", directory, "-o", out)
    assert result.exit_code == 0 and "8 layers of rank 4, scale 1 for every reader" in result.output
    assert run("check", out, "--for", "peft,vllm,sglang,llama.cpp,onnxruntime").exit_code == 0
    result = run("portable", directory, "-o", out, "--dtype", "float32", "--json")
    assert json.loads(result.output)["largest_rounding"] < 1e-7
