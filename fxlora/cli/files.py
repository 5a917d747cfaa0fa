"""The commands that read and write adapters and checkpoints: `fxlora merge, extract, check, portable`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fxlora.cli.arguments import CHECKPOINT, DIRECTORY, DTYPES, targets_of


@click.command(epilog="Example: fxlora merge ./SmolLM2-135M ./adapter -o ./merged")
@click.argument("base", type=DIRECTORY)
@click.argument("adapters", type=DIRECTORY, nargs=-1, required=True)
@click.option(
    "-o", "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The new checkpoint."
)
@click.option(
    "--tied",
    type=click.Choice(["refuse", "untie", "both"]),
    default="refuse",
    show_default=True,
    help="What to do where embeddings and output layer have one weight and one of them is changed.",
)
@click.option("--dequantize", is_flag=True, help="Write plain weights in place of quantized ones.")
@click.option("-w", "--weight", "weights", type=float, multiple=True, help="A factor for each adapter, in their order.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of all weights; each one's own if not given.")
@click.option("--max-shard-size", help="Weights in a file, such as 5GB; files as the base has them if not given.")
@click.option("--threads", type=click.IntRange(min=1), help="One for each processor, up to 8, if not given.")
@click.option("--no-strict", is_flag=True, help="Leave out what the adapters have for layers that BASE has not.")
@click.option("--report", is_flag=True, help="Measure what rounding takes of each update, and print the table.")
@click.option("--dry-run", is_flag=True, help="Check and print what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def merge(
    base: Path,
    adapters: tuple[Path, ...],
    out: Path,
    tied: Any,
    dequantize: bool,
    weights: tuple[float, ...],
    dtype: str | None,
    max_shard_size: str | None,
    threads: int | None,
    no_strict: bool,
    report: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fold ADAPTERS into the checkpoint BASE, from files to files, each weight rounded once.

    Weights are read, changed and written block by block, so that the base may be larger than memory.
    """
    import torch

    from fxlora import merge_checkpoint
    from fxlora.progress import byte_progress

    if report and dry_run:
        raise click.UsageError("--report measures what is written, and --dry-run writes nothing; leave one of them out")
    with byte_progress("Merging", shown=sys.stderr.isatty()) as progress:
        result = merge_checkpoint(
            base,
            list(adapters),
            out,
            weights=weights or None,
            out_dtype=getattr(torch, DTYPES[dtype]) if dtype else None,
            tied=tied,
            dequantize=dequantize,
            strict=not no_strict,
            max_shard_size=max_shard_size,
            rounding="all" if report else "sample",
            threads=threads,
            progress=progress,
            dry_run=dry_run,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    click.echo(str(result))
    if report and result.rounding is not None:
        click.echo(str(result.rounding))


@click.command(epilog="Example: fxlora extract ./SmolLM2-135M ./tuned -o ./adapter -r 16 --targets q_proj,v_proj")
@click.argument("base", type=CHECKPOINT)
@click.argument("tuned", type=CHECKPOINT)
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The new adapter.")
@click.option("-r", "--rank", type=int, help="Rank of the adapter.")
@click.option("--max-error", type=float, help="Largest relative error of a layer; chooses the rank of each, up to -r.")
@click.option("--targets", help="Names of the target modules, with commas between; or a regular expression.")
@click.option("--save", help="Names of modules that the adapter shall hold whole, with commas between.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def extract(
    base: Path,
    tuned: Path,
    out: Path,
    rank: int | None,
    max_error: float | None,
    targets: str | None,
    save: str | None,
    as_json: bool,
) -> None:
    """Make a LoRA adapter of the difference of two checkpoints, TUNED - BASE. Tensors are read one after another.

    Both are safetensors files or directories of a model. What differs outside of the targets is listed: the adapter does
    not hold it.
    """
    from fxlora import extract_adapter

    report = extract_adapter(
        base,
        tuned,
        out,
        r=rank,
        max_error=max_error,
        target_modules=targets_of(targets),
        modules_to_save=[name.strip() for name in save.split(",")] if save else None,
    )
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


@click.command(epilog="Examples: fxlora check ./merged; fxlora check ./adapter --for vllm,llama.cpp")
@click.argument("directory", type=DIRECTORY)
@click.option(
    "--for", "readers", multiple=True, help="Readers that shall load the adapter, with commas between; or 'all'."
)
@click.option("--base", type=DIRECTORY, help="The base model's directory, for its config.json.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(directory: Path, readers: tuple[str, ...], base: Path | None, as_json: bool) -> None:
    """Say whether the files in DIRECTORY are as they were written, and hold together.

    Each file is compared with SHA256SUMS. With --for, also what other programs would get wrong about the adapter.
    """
    from fxlora import check_adapter, check_files

    names = [name.strip() for each in readers for name in each.split(",") if name.strip()]
    if base is not None and not names:
        raise click.UsageError("--base is for --for: name the readers, or 'all'")
    reports: list[Any] = [check_files(directory)]
    if names:
        reports.append(check_adapter(directory, None if "all" in names else names, base=base))
    ok = all(report.ok for report in reports)
    if as_json:
        together = {name: value for report in reports for name, value in report.to_dict().items()}
        click.echo(json.dumps({**together, "ok": ok}, indent=2))
    else:
        click.echo("\n\n".join(map(str, reports)))
    if not ok:
        sys.exit(1)


@click.command(epilog="Example: fxlora portable ./adapter -o ./portable")
@click.argument("adapter", type=DIRECTORY)
@click.option("-o", "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The new adapter.")
@click.option("--dtype", help="Dtype of the B factors, such as float32; their own if not given.")
@click.option("--drop-base-weights", is_flag=True, help="Leave out weights of the base that the file has.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def portable(adapter: Path, out: Path, dtype: str | None, drop_base_weights: bool, as_json: bool) -> None:
    """Write ADAPTER with its scales folded into B, so that every reader computes the same."""
    from fxlora import make_portable

    report = make_portable(adapter, out, dtype=dtype, drop_base_weights=drop_base_weights)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
