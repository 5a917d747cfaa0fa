"""The table of docs/crash-safety.md with fewer kills: what fxlora writes is never torn, never lost, and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 5


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork, signals and renameat2")
def test_killed_at_random_times(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = ["benchmarks.crash_safety", "--kills", KILLS, "--layers", 1, "--rank", 64, "--own", "--json", results]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), "--directory", str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 5
    for row in rows:
        assert row["kills"] == KILLS == row["old"] + row["new"], row
        assert (row["torn"], row["lost"], row["left"]) == (0, 0, 0), row
        assert {row["full"], row["limited"], row["read_only"]} <= {"old, an error", "—"}, row
