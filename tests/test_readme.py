"""The README, executed: every Python block, every command, and the printed graph."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: list[str], cwd: Path, **more: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", **more}
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_snippets_and_commands(tmp_path: Path) -> None:
    """In the README's order and in one folder, since the commands use what the snippets leave."""
    pytest.importorskip("gguf")
    outputs = []
    for number, code in enumerate(blocks("python")):
        script = tmp_path / f"snippet_{number}.py"
        script.write_text(code, encoding="utf-8")
        outputs.append(run([sys.executable, "-W", "error::UserWarning:fxlora", str(script)], tmp_path))
    (promised,) = re.findall(r"# (trainable params: .*)", README)
    assert promised in outputs[0]
    assert outputs[1].rstrip("\n") == blocks("text")[0].rstrip("\n")
    assert outputs[2].startswith("symbolic ")
    first, *shell = blocks("console")
    assert first == "$ make demo\n$ make test\n"
    for block in shell:
        run(["bash", "-euc", re.sub(r"^\$ ", "", block, flags=re.MULTILINE)], tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    merged = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "merged-from-files")]
    assert merged[0] == merged[1]


def test_make_targets_run_what_the_tests_run() -> None:
    """`make demo` and `make test` themselves: too long, or endless, to be run here."""
    assert ".venv/bin/fxlora demo" in run(["make", "-n", "demo"], ROOT)
    assert "-m pytest" in run(["make", "-n", "test"], ROOT)


def test_links_and_logging_topics(tmp_path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
    code = blocks("python")[1]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FXLORA_LOGS": "passes,select,graph,pases"},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "insert-branches on the model: +3 .to" in result.stderr
    assert "select fc2: no target matches" in result.stderr
    assert "+ fc1_lora_A" in result.stderr
    assert "unknown topic 'pases'" in result.stderr and "Did you mean 'passes'" in result.stderr


def test_pictures_are_current(tmp_path: Path) -> None:
    """The committed pictures show the graph that the code makes: same labels, in the same order."""
    pytest.importorskip("matplotlib")
    (tmp_path / "pictures.py").write_text((ROOT / "docs" / "pictures.py").read_text(encoding="utf-8"))
    run([sys.executable, "pictures.py"], tmp_path)
    for name in ("before.svg", "after.svg"):
        labels = [
            re.findall(r"<text[^>]*>([^<]*)</text>", (folder / name).read_text(encoding="utf-8"))
            for folder in (tmp_path, ROOT / "docs")
        ]
        assert labels[0] == labels[1] and labels[0]
