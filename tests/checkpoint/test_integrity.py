"""`check_files` and `fxlora check`: every change of a file is noticed, and what cannot be read is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import fxlora
from fxlora import CheckpointError, LoraConfig, check_files, export_merged, lora_transform
from fxlora.checkpoint.manifest import MANIFEST_NAME
from fxlora.cli import cli

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def model() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return lora_transform(net, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """Two shards and an index."""
    return export_merged(model(), tmp_path / "merged", max_shard_size=300)


def states(directory: Path) -> dict[str, str]:
    return {file.name: file.state for file in check_files(directory).files}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["check", *map(str, arguments)], catch_exceptions=False)


def test_adapter(adapter: Path) -> None:
    (adapter / "optimizer.pt").write_bytes(b"later")
    report = check_files(adapter)
    assert report.ok and report.manifests == (MANIFEST_NAME,) and report.not_in_manifest == ("optimizer.pt",)
    assert states(adapter) == {CONFIG: "ok", WEIGHTS: "ok"}
    assert str(report) == (
        f"{adapter}\n  2 of 2 files are as SHA256SUMS says\n  adapter of 2 layers, 4 tensors\n"
        "  not in the manifest: optimizer.pt"
    )


def test_model(merged: Path) -> None:
    report = check_files(merged)
    assert report.ok and len(report.files) == 3 and report.contents == ("model of 4 tensors in 2 files",)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_every_byte_counts(adapter: Path, name: str) -> None:
    data = bytearray((adapter / name).read_bytes())
    for at in range(0, len(data), 41):
        data[at] ^= 1
        (adapter / name).write_bytes(data)
        assert states(adapter)[name] == "differs" and not check_files(adapter).ok
        data[at] ^= 1


def test_torn_between_two_saves(adapter: Path, tmp_path: Path) -> None:
    """What a killed writer of another program leaves: one file of each."""
    other = model()
    with torch.no_grad():
        other.get_parameter("0.lora_A.default.weight").add_(1)
    other.save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / WEIGHTS, adapter / WEIGHTS)
    assert states(adapter) == {CONFIG: "ok", WEIGHTS: "differs"} and not check_files(adapter).problems


def test_missing_truncated_and_linked(merged: Path, tmp_path: Path) -> None:
    first, second = sorted(path.name for path in merged.glob("*.safetensors"))
    (merged / first).unlink()
    report = check_files(merged)
    assert states(merged)[first] == "missing" and any(first in problem for problem in report.problems)
    (merged / second).write_bytes((merged / second).read_bytes()[:-1])
    assert states(merged)[second] == "differs"
    (tmp_path / "elsewhere").write_bytes(b"x")
    (merged / first).symlink_to("../elsewhere")
    file = next(file for file in check_files(merged).files if file.name == first)
    assert file.state == "unreadable" and "is outside of" in file.reason


def test_structure_without_a_manifest(merged: Path, adapter: Path) -> None:
    (merged / MANIFEST_NAME).unlink()
    report = check_files(merged)
    assert report.ok and not report.manifests and not report.not_in_manifest
    assert "no SHA256SUMS: nothing tells whether the files are those that were written" in str(report)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    index["weight_map"].popitem()
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not in the index" in check_files(merged).problems[0]
    (adapter / MANIFEST_NAME).unlink()
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.0.lora_A.weight"][1, 1] = float("nan")
    save_file(tensors, adapter / WEIGHTS)
    assert "has NaN entries" in check_files(adapter).problems[0]
    (adapter / WEIGHTS).unlink()
    assert "does not exist" in check_files(adapter).problems[0]


def test_a_stray_shard_and_a_broken_configuration(merged: Path) -> None:
    (merged / "consolidated.safetensors").write_bytes(b"half")
    assert "consolidated.safetensors is truncated" in check_files(merged).problems[0]
    (merged / "consolidated.safetensors").unlink()
    (merged / "config.json").write_text("{")
    assert "config.json is not valid JSON" in check_files(merged).problems[0]


def test_adapters_below_a_directory(tmp_path: Path) -> None:
    lora = model()
    lora.add_adapter("other", LoraConfig(r=1, target_modules=["0"]))
    lora.save_pretrained(tmp_path / "both")
    report = check_files(tmp_path / "both")
    assert report.ok and report.manifests == (MANIFEST_NAME, f"other/{MANIFEST_NAME}")
    assert report.contents == ("adapter of 2 layers, 4 tensors", "other/: adapter of 1 layer, 2 tensors")
    (tmp_path / "both" / "other" / CONFIG).write_text("{}")
    assert states(tmp_path / "both")[f"other/{CONFIG}"] == "differs"


def test_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds neither a SHA256SUMS nor a model or adapter"):
        check_files(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        check_files(tmp_path / "nowhere")


def test_names_of_fxlora() -> None:
    assert fxlora.check_files is check_files and fxlora.FilesReport.__module__ == "fxlora.checkpoint.integrity"


def test_command(adapter: Path) -> None:
    result = run(adapter)
    assert result.exit_code == 0 and result.output == f"{check_files(adapter)}\n"
    result = run(adapter, "--for", "peft", "--json")
    assert result.exit_code == 0
    figures = json.loads(result.output)
    assert figures["ok"] and figures["readers"] == ["peft"] and len(figures["files"]) == 2
    (adapter / WEIGHTS).write_bytes(b"")
    result = run(adapter, "--json")
    assert result.exit_code == 1
    figures = json.loads(result.output)
    assert not figures["ok"] and figures["files"][1] == {"name": WEIGHTS, "state": "differs", "reason": ""}
    result = run(adapter)
    assert (
        result.exit_code == 1
        and f"differs    {WEIGHTS}" in result.output
        and "write the directory again" in result.output
    )


def test_readers_decide_with_for(adapter: Path) -> None:
    result = run(adapter, "--for", "torchtune", "--json")
    assert result.exit_code == 1 and not json.loads(result.output)["ok"]
    assert run(adapter, "--base", adapter).exit_code == 2
