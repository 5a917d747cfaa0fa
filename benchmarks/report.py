"""What the benchmarks that measure tables share: options, settings, numbers in cells, and writing the results."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def start(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Read the options `--json` and `--markdown`, and make the process quiet, single-threaded and self-checking.

    Args:
        parser: one with further options.
    """
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    os.environ["FXLORA_VERIFY"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the base and peft say of their own
    logging.getLogger("fxlora").setLevel(logging.ERROR)
    return options


def versions() -> dict[str, str]:
    """Versions of the libraries that the figures depend on."""
    import peft
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


@dataclass(frozen=True, slots=True)
class Environment:
    """What figures of speed depend on besides the code.

    Attributes:
        machine: the GPU, or the CPU and the threads used.
        versions: of libraries.
        date: of the run.
    """

    machine: str
    versions: dict[str, str]
    date: str

    def __str__(self) -> str:
        """One line."""
        return ", ".join([self.machine, *(f"{name} {version}" for name, version in self.versions.items()), self.date])


def environment(device: str, threads: int) -> Environment:
    """Of this run.

    Args:
        device: `cuda` or `cpu`.
        threads: of a CPU.
    """
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}"
    return Environment(machine, versions(), datetime.now(UTC).date().isoformat())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def save(path: Path, benchmark: str, about: Environment, settings: Any, rows: Sequence[Any]) -> None:
    """Write a benchmark's results as JSON, for `benchmarks.plots` and `benchmarks.performance`.

    Args:
        path: of the file.
        benchmark: its name.
        about: where and when it ran.
        settings: what it ran: a dataclass that prints as one line.
        rows: plain data.
    """
    measured = {"measured": str(settings), "settings": asdict(settings)}
    data = {"benchmark": benchmark, **asdict(about), **measured, "rows": list(rows)}
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [line(header), "|" + " --- |" * len(header), *(line(row) for row in rows)]


def number(value: float | None, suffix: str = "") -> str:
    """An error as a cell: a dash where there is none."""
    return "—" if value is None else (f"{value:.0e}" if value else "0") + suffix


def yes(*values: bool | None) -> str:
    """Truth as a cell: a dash where nothing is known, `NO` in capitals to be seen."""
    known = [value for value in values if value is not None]
    return "—" if not known else "yes" if all(known) else "NO"


def shortened(text: str, length: int) -> str:
    """The beginning of a text that is too long for a table."""
    return text if len(text) <= length else text[:length] + "…"


def write(options: argparse.Namespace, text: str, rows: Iterable[Any]) -> None:
    """Write what `start` was asked for.

    Args:
        options: from `start`.
        text: the whole page.
        rows: dataclasses.
    """
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if options.json:
        data = {"versions": versions(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
