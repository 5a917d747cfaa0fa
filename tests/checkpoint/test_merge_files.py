"""How `merge_checkpoint` does its work: files of a chosen size, threads, blocks, progress, dry runs, rounding. What it
makes of adapters is in the files beside this one."""

from __future__ import annotations

import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxlora import CheckpointError, ConfigError, LoraConfig, MergeError, export_merged, lora_transform, merge_checkpoint
from fxlora._passes import Fold
from fxlora.checkpoint import merge_steps
from fxlora.checkpoint.changes import Change
from tests.checkpoint.test_merged import INDEX, WEIGHTS, folder, mlp, refused, save_adapter, save_base, weights
from tests.models.checks import randomise
from tests.zoo import MLP


def shards_of(path: Path) -> dict[str, set[str]]:
    return {file.name: set(load_file(file)) for file in sorted(path.glob("*.safetensors"))}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", dtype="float32")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", target_modules=["fc1", "fc2"])


# ---- files ----


def test_files_of_a_chosen_size(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole = merge_checkpoint(base, adapter, tmp_path / "whole")
    report = merge_checkpoint(base, adapter, tmp_path / "parts", max_shard_size=600)
    parts = shards_of(tmp_path / "parts")
    assert sorted(parts) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert report.files == {name: (tmp_path / "parts" / name).stat().st_size for name in parts}
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    assert index["metadata"] == {"total_size": whole.bytes}
    assert index["weight_map"] == {name: shard for shard, names in parts.items() for name in names}
    ours, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    # and together again
    merge_checkpoint(tmp_path / "parts", adapter, tmp_path / "again", max_shard_size="1GB")
    assert list(shards_of(tmp_path / "again")) == [WEIGHTS] and not (tmp_path / "again" / INDEX).exists()


def test_number_of_parameters_follows_what_is_written(adapter: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    state = mlp().state_dict()
    (base / INDEX).write_text(
        json.dumps({"metadata": {"total_parameters": 1}, "weight_map": dict.fromkeys(state, WEIGHTS)})
    )
    merge_checkpoint(base, adapter, tmp_path / "out", out_dtype=torch.bfloat16)
    metadata = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
    total = sum(tensor.numel() for tensor in state.values())
    assert metadata == {"total_parameters": total, "total_size": 2 * total}


def test_dry_run_writes_nothing_and_says_what_it_would_write(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "max_shard_size": 300}
    before = folder(tmp_path)
    planned = merge_checkpoint(base, adapter, out, dry_run=True, **options)
    assert folder(tmp_path) == before and not out.parent.exists()
    assert str(planned).startswith("would merge 1 adapter into 2 of 4 weights") and not planned.written
    assert "config.json: dtype = 'bfloat16'" in str(planned)
    done = merge_checkpoint(base, adapter, out, **options)
    assert done.written and str(done).startswith("merged 1 adapter")
    same = {"out_dir", "adapters", "merged", "tensors", "files", "bytes", "config"}
    assert {name: planned.to_dict()[name] for name in same} == {name: done.to_dict()[name] for name in same}
    assert all((out / name).stat().st_size == nbytes for name, nbytes in planned.files.items())


def test_dry_run_refuses_what_the_merge_would_refuse(adapter: Path, tmp_path: Path) -> None:
    state = mlp().state_dict()
    base = save_base(tmp_path / "base", {**state, "fc1.weight": state["fc1.weight"].to(torch.int8)})
    refused(
        tmp_path,
        MergeError,
        r"is quantized \(I8",
        lambda: merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True),
    )


def test_dry_run_refuses_a_file_as_its_target(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_config.json"
    refused(tmp_path, CheckpointError, "is a file", lambda: merge_checkpoint(base, adapter, file, dry_run=True))


# ---- bytes ----


def wide(dtype: torch.dtype) -> MLP:
    torch.manual_seed(3)
    model = MLP()
    for name in ("fc1", "fc2"):
        setattr(model, name, torch.nn.Linear(96, 160))
    return model.to(dtype).eval()


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_and_blocks_do_not_change_a_byte(
    dtype: torch.dtype, variant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", wide(dtype).state_dict())
    lora = lora_transform(wide(dtype), LoraConfig(r=4, target_modules=["fc1", "fc2"], **variant))
    randomise(lora)
    lora.save_pretrained(tmp_path / "adapter")
    export_merged(lora, tmp_path / "live")
    expected = (tmp_path / "live" / WEIGHTS).read_bytes()
    for block in (1, 1000, 1 << 20):
        monkeypatch.setattr(merge_steps, "BLOCK", block)
        for threads in (1, 3):
            out = tmp_path / f"{block}-{threads}"
            merge_checkpoint(base, tmp_path / "adapter", out, threads=threads)
            assert (out / WEIGHTS).read_bytes() == expected, (block, threads)


def test_what_is_prepared_for_a_weight_goes_when_it_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Fold]] = []
    alive: list[int] = []
    prepare = Change.fold

    def fold(self: Change, *arguments: Any) -> Fold:
        alive.append(sum(each() is not None for each in made))
        result = prepare(self, *arguments)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Change, "fold", fold)
    merge_checkpoint(base, adapter, tmp_path / "out", threads=1)
    assert alive == [0, 0]


def test_an_adapter_that_changes_meanwhile_is_noticed(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Change.fold

    def fold(self: Change, *arguments: Any) -> Fold:
        save_file(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.safetensors")
        return prepare(self, *arguments)

    monkeypatch.setattr(Change, "fold", fold)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_meanwhile_is_noticed(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Change.fold

    def fold(self: Change, *arguments: Any) -> Fold:
        other = {name: tensor + 1 for name, tensor in mlp().state_dict().items()}
        save_file(other, base / WEIGHTS, metadata={"format": "pt"})
        return prepare(self, *arguments)

    monkeypatch.setattr(Change, "fold", fold)
    with pytest.raises(CheckpointError, match="model.safetensors was changed while it was read"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_in_one_thread_stops_all(adapter: Path, tmp_path: Path) -> None:
    state = mlp().state_dict()
    state["fc2.weight"] = torch.full_like(state["fc2.weight"], torch.finfo(torch.float16).max).half()
    base = save_base(tmp_path / "base", state)
    big = load_file(adapter / "adapter_model.safetensors")
    save_file({key: tensor * 1000 for key, tensor in big.items()}, adapter / "adapter_model.safetensors")
    running = threading.active_count()
    words = "'fc2.weight': the merged weight would have NaN or infinite entries; nothing was written"
    refused(tmp_path, MergeError, words, lambda: merge_checkpoint(base, adapter, tmp_path / "out", threads=3))
    assert threading.active_count() == running


# ---- progress and rounding ----


def test_progress_ends_at_the_whole(base: Path, adapter: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = merge_checkpoint(base, adapter, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[-1] == (report.bytes, report.bytes)
    assert calls == sorted(calls) and {total for _, total in calls} == {report.bytes}


def small_update(tmp_path: Path, size: float) -> tuple[Path, Path]:
    """A bfloat16 base, and an adapter whose update has this size relative to it."""
    base = save_base(tmp_path / "base", wide(torch.bfloat16).state_dict())
    lora = lora_transform(wide(torch.bfloat16), LoraConfig(r=4, target_modules=["fc1"]))
    randomise(lora)
    plain = lora.get_parameter("fc1.weight").detach().float()
    a, b = (lora.get_parameter(f"fc1.lora_{x}.default.weight") for x in "AB")
    with torch.no_grad():
        b *= size * plain.norm() / (b.float() @ a.float() * 2).norm()
    lora.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def exact_loss(before: Tensor, after: Tensor, adapter: Path) -> float:
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.fc1.lora_{x}.weight"].double() for x in "AB")
    update = LoraConfig.from_pretrained(adapter).lora_alpha / 4 * (b @ a)
    return float((after.double() - before.double() - update).norm() / update.norm())


def test_rounding_is_measured_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, adapter = small_update(tmp_path, 1e-3)
    report = merge_checkpoint(base, adapter, tmp_path / "out", rounding="all", threads=2)
    assert report.rounding is not None
    (layer,) = report.rounding.layers
    assert layer.name == "fc1.weight" and layer.dtype == "bfloat16" and layer.entries == layer.all_entries == 96 * 160
    before, after = (weights(path)["fc1.weight"] for path in (base, tmp_path / "out"))
    assert layer.lost == pytest.approx(exact_loss(before, after, adapter), rel=1e-9)
    assert layer.lost > 0.5 and "loses more than 25% of the update" in caplog.text
    caplog.clear()
    wide_report = merge_checkpoint(base, adapter, tmp_path / "wide", out_dtype=torch.float32)
    assert wide_report.rounding is not None and wide_report.rounding.lost < 1e-3 and not caplog.text


def test_weights_that_are_not_finite_do_not_spoil_the_report(adapter: Path, tmp_path: Path) -> None:
    state = mlp().state_dict()
    state["fc1.weight"][0, :2] = torch.tensor([torch.inf, torch.nan])
    base = save_base(tmp_path / "base", state)
    report = merge_checkpoint(base, adapter, tmp_path / "out", rounding="all")
    assert report.rounding is not None and all(layer.update_norm > 0 for layer in report.rounding.layers)
    json.dumps(report.to_dict(), allow_nan=False)


def test_rounding_is_not_measured_if_not_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, adapter = small_update(tmp_path, 1e-3)
    report = merge_checkpoint(base, adapter, tmp_path / "out", rounding=None)
    assert report.rounding is None and report.to_dict()["rounding"] is None and not caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": "some"}, "`rounding` should be 'sample', 'all' or None, not 'some'"),
        ({"threads": 0}, "`threads` should be 1 or more, not 0"),
        ({"max_shard_size": "5 apples"}, "`max_shard_size` should be a number of bytes or a text such as '5GB'"),
    ],
)
def test_options_that_cannot_be(options: Any, words: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    refused(tmp_path, ConfigError, words, lambda: merge_checkpoint(base, adapter, tmp_path / "out", **options))
