"""`fxlora demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from fxlora.cli.arguments import DIRECTORY, FILE


@click.command(epilog="Example: fxlora demo --out /tmp/demo")
@click.option("--model", type=DIRECTORY, help="A Hugging Face model directory, in place of SmolLM2-135M-Instruct.")
@click.option("--data", type=FILE, help="A text file, in place of Shakespeare's plays; its last tenth is held out.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("fxlora-demo"), show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, and nothing else on standard output.")
def demo(model: Path | None, data: Path | None, out: Path, steps: int, seed: int, as_json: bool) -> None:
    """Tune a real pretrained language model, merge it, and check every step."""
    from dataclasses import asdict

    from rich.console import Console

    from fxlora.demo.run import DemoOptions, run

    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 110)
    report = run(DemoOptions(model=model, data=data, out=out, steps=steps, seed=seed), console)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    if not report.passed:
        sys.exit(1)
