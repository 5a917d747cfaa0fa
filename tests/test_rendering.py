"""Every report can be printed, is JSON, and is shown by rich and in notebooks."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora.algebra import SiteRank
from fxlora.algebra.extract import Difference
from fxlora.checkpoint.integrity import CheckedFile
from fxlora.inspect.compare import Divergence
from fxlora.inspect.diff import NodeChange
from fxlora.rendering import Rendered, Section, aligned, human_count, json_data
from fxlora.rounding import LayerRounding, RoundingReport

NASTY = "a<b>&'\"[red]c[/red]"
"""What is markup for HTML or for rich must come out as it is."""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def lora(**options: Any) -> Any:
    return fxlora.lora_transform(net(), fxlora.LoraConfig(r=2, target_modules=["0"]), **options)


def rounding() -> RoundingReport:
    layer = LayerRounding(NASTY, "bfloat16", 1.0, 0.0, 0.5, 1.0, 0.5, 4, 4)  # an update of a weight that was zero
    effect = fxlora.OutputEffect(math.inf, math.nan, 1.0, 1.0, 1.0)
    return RoundingReport((layer,), effect)


def adapter_report(path: Path) -> fxlora.AdapterReport:
    lora().save_pretrained(path / "adapter")
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    (path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True, NASTY: 1}))
    return fxlora.check_adapter(path / "adapter")


def comparison(path: Path) -> fxlora.Comparison:
    del path
    place = Divergence(NASTY, NASTY, "", "", math.inf, 0.0, values=(math.nan, 1.0, -math.inf))
    return fxlora.Comparison("nodes", 3, place, place, worst=math.inf)


def explanation(path: Path) -> fxlora.Explanation:
    del path
    model = nn.ModuleDict({NASTY: nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    return fxlora.explain(model, {"target_modules": ["other"]})


SITES = (SiteRank(NASTY, 2, 4, 1.0, 0.5),)
SAMPLES: dict[str, Callable[[Path], Any]] = {
    "AdapterReport": adapter_report,
    "CodeFiles": lambda path: fxlora.write_code(lora(), path / "generated"),
    "Comparison": comparison,
    "DoctorReport": lambda path: fxlora.DoctorReport.of(NASTY, fxlora.doctor(lora(), torch.ones(1, 8)).findings, ()),
    "Explanation": explanation,
    "ExtractReport": lambda path: fxlora.ExtractReport(path, SITES, (), (Difference(NASTY, "differs"),), 2, 0.1),
    "FilesReport": lambda path: fxlora.FilesReport(
        NASTY, ("SHA256SUMS",), (CheckedFile("x", "differs"),), (), (), ("?",)
    ),
    "GraphDiff": lambda path: fxlora.GraphDiff(
        (NodeChange("rewired", "x", "x", "linear", "input 0: x → y", NASTY),), 3
    ),
    "LayerStatus": lambda path: fxlora.get_layer_status(lora(adapter_name="a<b>"))[0],
    "MergeReport": lambda path: fxlora.MergeReport(
        path, (path,), (NASTY,), 2, {"model.safetensors": 8}, 8, {"tie_word_embeddings": False}, False, rounding(), 0.1
    ),
    "ModelStatus": lambda path: fxlora.get_model_status(lora(adapter_name="a<b>")),
    "OptimizeReport": lambda path: fxlora.OptimizeReport(True, (NASTY,), (NASTY,), (), {"a reason": (NASTY,)}),
    "PassTrace": lambda path: lora(trace_passes=True).pass_trace,
    "PortableReport": lambda path: fxlora.PortableReport(
        str(path), 1, 2, 0, 0, math.nan, NASTY, 8, 8, (NASTY,), adapter_report(path)
    ),
    "RankReport": lambda path: fxlora.RankReport(NASTY, "b", SITES),
    "RoundingReport": lambda path: rounding(),
    "Spectra": lambda path: fxlora.Spectra(NASTY, fxlora.spectra(lora()).sites, ("left out",)),
    "UpdateNorms": lambda path: fxlora.UpdateNorms(NASTY, fxlora.update_norms(lora()).sites, True, ("left out",)),
}


def public_reports() -> list[str]:
    """All public classes that give data for JSON; `LoraConfig` is what users give us."""
    names = [name for name in fxlora.__all__ if isinstance(getattr(fxlora, name), type)]
    return [name for name in names if hasattr(getattr(fxlora, name), "to_dict") and name != "LoraConfig"]


def test_no_report_is_forgotten() -> None:
    assert sorted(SAMPLES) == public_reports()
    modules = {name: sys.modules[name] for name in list(sys.modules) if name.startswith("fxlora.")}
    classes = {value for module in modules.values() for value in vars(module).values() if isinstance(value, type)}
    for cls in classes - {Rendered}:
        if issubclass(cls, Rendered):
            assert cls.__str__ is not object.__str__ and hasattr(cls, "to_dict"), cls


def shown(report: Any) -> str:
    from rich.console import Console

    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(report)
    return console.export_text()


@pytest.mark.parametrize("name", SAMPLES)
def test_every_report_has_its_four_forms(name: str, tmp_path: Path) -> None:
    report = SAMPLES[name](tmp_path)
    assert isinstance(report, getattr(fxlora, name)) and isinstance(report, Rendered)
    text = str(report)
    assert text and not text.startswith(f"{name}("), "a text for people, and not the dataclass's"
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data, "tuples and keys that are no texts would differ"
    html = report._repr_html_()
    assert html.count("<table") == html.count("</table>") and "<b>&" not in html and "a<b>" not in html
    rich = shown(report)
    if NASTY in text:
        assert NASTY in rich and "a&lt;b&gt;&amp;&#x27;&quot;[red]c[/red]" in html
    for word in text.replace(":", " ").split():
        if word.isalpha() and len(word) > 9:
            assert word in rich, f"rich leaves out {word!r}"


def test_infinite_numbers_are_texts() -> None:
    data = comparison(Path()).to_dict()
    assert (data["worst"], data["first"]["error"], data["first"]["values"]) == ("inf", "inf", ["nan", 1.0, "-inf"])
    assert float(data["worst"]) == math.inf and data["agrees"] is False
    assert rounding().to_dict()["layers"][0]["relative_change"] == "inf"


def test_plain_values() -> None:
    given = {1: (1, 2.5, None, True), "path": Path("a"), "dtype": torch.float32, "nested": {"x": [math.nan]}}
    wanted = {"1": [1, 2.5, None, True], "path": "a", "dtype": "torch.float32", "nested": {"x": ["nan"]}}
    assert json_data(given) == wanted


def test_columns_are_aligned() -> None:
    assert aligned([("a", "n"), ("bb", "10"), ("c", "")], right=(1,)) == ["a    n", "bb  10", "c"]


def test_counts_have_units() -> None:
    assert [human_count(n) for n in (7, 999, 1500, 2.5e9, 4e17)] == ["7", "999", "1.5 k", "2.5 G", "400.0 P"]
    assert [human_count(n, "FLOPs") for n in (7, 424.7e6)] == ["7 FLOPs", "424.7 MFLOPs"]


def test_a_report_without_sections_shows_its_text() -> None:
    class Plain(Rendered):
        def __str__(self) -> str:
            return "one <line>\n  another"

    assert shown(Plain()) == "one <line>\n  another\n"
    assert Plain()._repr_html_() == "<p style='white-space:pre-wrap'>one &lt;line&gt;<br>  another</p>"
    assert Section() == Section(lines=())


def test_rich_is_imported_by_those_who_use_it() -> None:
    names = "fxlora, fxlora.inspect.doctor, fxlora.inspect.compare, fxlora.algebra, fxlora.status"
    code = f"import sys, torch; before = set(sys.modules); import {names}; print('rich' in set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
