"""The command line: help with examples, exit codes, JSON, errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fxlora import LoraConfig, cli, lora_transform, merge_checkpoint
from fxlora.cli import cli as commands
from tests.zoo import ARCHITECTURES

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    LLAMA.model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


COMMANDS = ["demo", "explain", "inspect", "graph", "diff", "compare", "doctor", "plot", "merge", "extract", "portable"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: fxlora {command}" in result.output and "--json" in result.output


def test_explain(model_dir: Path) -> None:
    result = invoke("explain", model_dir, "--targets", "q_proj,v_proj", "-r", 4)
    assert result.exit_code == 0
    assert "model.layers.*.self_attn.q_proj  2       linear" in result.output
    assert "4 of 16 layers get LoRA" in result.output and "; k_proj would match" in result.output
    figures = json.loads(invoke("explain", model_dir, "--targets", "q_proj,v_proj", "-r", 4, "--json").output)
    assert figures["trainable_parameters"] == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert figures["base_parameters"] == sum(p.numel() for p in LLAMA.model().parameters())
    assert next(row["name"] for row in figures["sites"] if row["matched"]) == "model.layers.0.self_attn.q_proj"


def test_explain_takes_the_dtype_of_the_files(tmp_path: Path) -> None:
    LLAMA.model().bfloat16().save_pretrained(tmp_path)
    figures = json.loads(invoke("explain", tmp_path, "--targets", "q_proj", "--json").output)
    assert figures["merge"]["read_bytes"] == 2 * 2 * 32 * 32
    assert sum(figures["merge"][each] for each in ("read_bytes", "copied_bytes")) == 2 * figures["base_parameters"]


def test_explain_of_a_configuration_that_fails(model_dir: Path) -> None:
    result = invoke("explain", model_dir, "--targets", "q_prj")
    assert result.exit_code == 1
    assert "would be refused" in result.output and "Did you mean 'q_proj'" in result.output


@pytest.mark.parametrize("capture", ["auto", "export"])
def test_inspect(model_dir: Path, capture: str) -> None:
    result = invoke("inspect", model_dir, "--targets", "q_proj", "--capture", capture)
    assert result.exit_code == 0, result.output
    wanted = (
        ("export", "+ model_layers_0_self_attn_q_proj_lora_A ") if capture == "export" else ("modules", "+ lora_A ")
    )
    assert f"capture '{wanted[0]}'" in result.output and wanted[1] in result.output
    plain = invoke("inspect", model_dir, "--targets", "q_proj", "--capture", capture, "--before", "--json")
    regions = json.loads(plain.output)["regions"]
    assert regions and all("lora" not in region["graph"] for region in regions)


def test_errors_are_one_line(model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    for arguments, words in (
        (["inspect", str(model_dir), "--targets", "nope"], "fxlora: target_modules=['nope'] matches no module"),
        (["inspect", str(model_dir), "--targets", "q_proj", "-r", "0"], "fxlora: `r` should be a positive integer"),
        (["merge", str(model_dir), str(tmp_path), "-o", str(tmp_path / "out")], "adapter_config.json"),
        (["explain", str(tmp_path)], "no Hugging Face model directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["fxlora", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "Traceback" not in error
    monkeypatch.setattr(sys, "argv", ["fxlora", "explain"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2


def test_merge_options(model_dir: Path, tmp_path: Path) -> None:
    from fxlora import LoraConfig, lora_transform

    model = lora_transform(LLAMA.model(), LoraConfig(target_modules=["q_proj"]))
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    out, adapters = tmp_path / "out", (tmp_path / "a", tmp_path / "b")
    options = ("-w", 0.25, "-w", 0.75, "--dtype", "bf16", "--max-shard-size", "20KB", "--threads", 1)
    dry = invoke("merge", model_dir, *adapters, "-o", out, *options, "--dry-run")
    assert dry.exit_code == 0 and "would merge 2 adapters" in dry.output and "config.json: dtype" in dry.output
    assert not out.exists()
    result = invoke("merge", model_dir, *adapters, "-o", out, *options, "--report")
    assert result.exit_code == 0 and "merged 2 adapters" in result.output
    assert (
        "model.layers.0.self_attn.q_proj.weight  bfloat16" in result.output and "of the update is lost" in result.output
    )
    assert len(list(out.glob("model-*.safetensors"))) > 1
    both = invoke("merge", model_dir, *adapters, "-o", out, "--dry-run", "--report")
    assert both.exit_code == 2 and "leave one of them out" in both.output
    one = invoke("merge", model_dir, *adapters, "-o", tmp_path / "one", "-w", 1)
    assert one.exit_code == 1 and "`weights` should be 2 finite numbers" in str(one.exception)


def test_graph(model_dir: Path, tmp_path: Path) -> None:
    plain = invoke("graph", model_dir, "--targets", "q_proj")
    assert plain.exit_code == 0 and "30 nodes, 36 edges; 2 calls of layers, 2 layers with LoRA" in plain.output
    data = json.loads(invoke("graph", model_dir, "--targets", "q_proj", "--tokens", 4, "--json").output)
    products = [node for node in data["nodes"] if node["role"] == "product_A"]
    assert [node["shape"] for node in products] == ["[2, 4, 8]"] * 2
    options = ("--targets", "q_proj", "--capture", "export")
    near = invoke("graph", model_dir, *options, "--around", "model.layers.0.self_attn.q_proj", "--depth", 1)
    assert near.exit_code == 0 and near.output.startswith("digraph fxlora {") and "lora_A" in near.output
    for name, words in (
        ("a.graphml", "<graphml"),
        ("a.json", '"schema":"fxlora-graph-1"'),
        ("a.dot", "digraph"),
        ("a.svg", "<svg"),
    ):
        assert invoke("graph", model_dir, "--targets", "q_proj", "-o", tmp_path / name).exit_code == 0
        assert words in (tmp_path / name).read_text()
    explorer = tmp_path / "explorer.json"
    assert invoke("graph", model_dir, "--targets", "q_proj", "--model-explorer", "-o", explorer).exit_code == 0
    assert json.loads(explorer.read_text())["label"] == "LlamaForCausalLM"
    assert "parameters" in invoke("graph", model_dir, "--targets", "q_proj", "--level", "modules").output
    assert invoke("graph", model_dir, "--targets", "q_proj", "--model-explorer").exit_code == 2
    assert invoke("graph", model_dir, "--targets", "q_proj", "--around", "lm_head", "--json").exit_code == 2
    wrong = invoke("graph", model_dir, "--targets", "q_proj", "-o", tmp_path / "a.txt")
    assert wrong.exit_code == 1 and "should end in .graphml or .json" in str(wrong.exception)


def test_merge(model_dir: Path, tmp_path: Path) -> None:
    from fxlora import LoraConfig, lora_transform

    lora = lora_transform(LLAMA.model(), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "adapter")
    result = invoke("merge", model_dir, tmp_path / "adapter", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.output)["merged"]) == 2
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_diff_of_lora_to_the_base(model_dir: Path, capture: str) -> None:
    result = invoke("diff", model_dir, "--targets", "q_proj", "--capture", capture)
    assert result.exit_code == 0, result.output
    assert "2 sites: +" in result.output and "model.layers.*.self_attn.q_proj" in result.output


def test_diff_of_two_models(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    figures = json.loads(invoke("diff", model_dir, other, "--json").output)
    assert figures["changed"] == len(figures["changes"]) == 2
    assert all(change["operation"] == "gelu.default" for change in figures["changes"])
    assert invoke("diff", model_dir).exception is not None


def test_compare_of_base_and_adapter_with_the_merged_model(model_dir: Path, tmp_path: Path) -> None:
    model = lora_transform(LLAMA.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(model_dir, tmp_path / "adapter", tmp_path / "merged")
    arguments = ["compare", model_dir, tmp_path / "merged"]
    result = invoke(*arguments, "--adapter", tmp_path / "adapter", "--backward")
    assert result.exit_code == 0 and "no difference beyond rounding" in result.output
    without = invoke(*arguments, "--tokens", "5,6,7")
    assert without.exit_code == 1 and "'model.layers.0.self_attn.q_proj'" in without.output
    figures = json.loads(invoke(*arguments, "--json").stdout)
    assert figures["first"]["site"] == "model.layers.0.self_attn.q_proj"
    assert invoke(*arguments, "--tokens", "5,x").exit_code == 2
    assert "from 0 to 63" in str(invoke(*arguments, "--tokens", "64").exception)
