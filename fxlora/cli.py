"""The command line: `fxlora demo, explain, inspect, graph, diff, compare, doctor, plot, merge, extract, check, portable`.

Each command is a thin cover over one or two Python calls.

Exit codes: 0 success, 1 an error that fxlora explains, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click


class _Path(click.Path):
    """A path that exists, or does again once a replacement of it that was interrupted is completed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.path.exists(value):
            from fxlora.checkpoint.leftovers import settle

            settle(value)
        return super().convert(value, param, ctx)


DIRECTORY = _Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DTYPES = {
    **{name: name for name in ("bfloat16", "float16", "float32", "float64")},
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
}
"""Names of dtypes on the command line, and torch's."""
CHECKPOINT = _Path(exists=True, path_type=Path)


def main() -> None:
    """Run the command line; an error that fxlora explains is one line on standard error, without a traceback."""
    from fxlora.errors import FxloraError

    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (FxloraError, FileNotFoundError, ImportError, NotImplementedError) as error:
        click.echo(f"fxlora: {error}", err=True)
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fxlora")
def cli() -> None:
    """LoRA as a compiler pass for PyTorch."""


@cli.command(epilog="Example: fxlora demo --out /tmp/demo")
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


def _config_options(command: Any) -> Any:
    options = (
        click.option("--config", "config_path", type=DIRECTORY, help="A saved adapter, whose configuration is taken."),
        click.option("--targets", help="Names of the target modules, with commas between; or a regular expression."),
        click.option("-r", "--rank", type=int, default=8, show_default=True),
        click.option("--alpha", type=float, default=8, show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(epilog="Example: fxlora explain ./SmolLM2-135M --targets q_proj,v_proj -r 16")
@click.argument("model", type=DIRECTORY)
@_config_options
@click.option(
    "--tokens",
    type=(int, int),
    metavar="ROWS LENGTH",
    help="Predict the activations of a batch of this size; of so many images for a vision model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    model: Path,
    config_path: Path | None,
    targets: str | None,
    rank: int,
    alpha: float,
    tokens: tuple[int, int] | None,
    as_json: bool,
) -> None:
    """Show which layers of a Hugging Face MODEL directory get LoRA, why, and what it costs. Reads no weights."""
    import torch

    from fxlora.inspect import explain as explain_model
    from fxlora.inspect.batches import batch_for

    config = _config(config_path, targets, rank, alpha)
    skeleton = _skeleton(model)
    dtype = getattr(skeleton.config, "dtype", None)  # in which transformers loads the weights
    skeleton = skeleton if dtype is None else skeleton.to(dtype)
    batch = batch_for(skeleton, torch.zeros(tokens, dtype=torch.long, device="meta")) if tokens else None
    explanation = explain_model(skeleton, config, example_inputs=batch)
    click.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else str(explanation))
    if explanation.problem:
        sys.exit(1)


@cli.command(epilog="Example: fxlora inspect ./SmolLM2-135M --targets q_proj --capture modules")
@click.argument("model", type=DIRECTORY)
@_config_options
@click.option("--capture", type=click.Choice(["auto", "modules", "export"]), default="auto", show_default=True)
@click.option("--before", is_flag=True, help="Print the graph without LoRA.")
@click.option("--code", type=click.Path(file_okay=False, path_type=Path), help="Write the generated code here instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    model: Path,
    config_path: Path | None,
    targets: str | None,
    rank: int,
    alpha: float,
    capture: Any,
    before: bool,
    code: Path | None,
    as_json: bool,
) -> None:
    """Print the graphs of a Hugging Face MODEL directory as LoRA rewrites them; added nodes are marked with +."""
    import torch

    from fxlora import lora_transform, write_code
    from fxlora._passes import print_graph
    from fxlora.inspect.batches import batch_for

    if code is not None and before:
        raise click.UsageError(
            "--before prints graphs, and --code writes what LoRA made of them; leave one of them out"
        )
    skeleton = _skeleton(model)
    tokens = torch.zeros(2, 8, dtype=torch.long, device="meta")
    example = batch_for(skeleton, tokens) if capture == "export" else None
    lora = lora_transform(skeleton, _config(config_path, targets, rank, alpha), capture=capture, example_inputs=example)
    if code is not None:
        files = write_code(lora, code)
        click.echo(json.dumps({"capture": lora.capture, **files.to_dict()}, indent=2) if as_json else str(files))
        return
    with lora.disable_adapter() if before else nullcontext():
        regions = [
            {"modules": [instance.name for instance in region.instances], "graph": print_graph(region.graph)}
            for region in lora.regions()
        ]
    if as_json:
        click.echo(json.dumps({"capture": lora.capture, "regions": regions}, indent=2))
        return
    click.echo(f"capture '{lora.capture}', {lora._lora.reason}")
    for region in regions:
        names = region["modules"]
        who = names[0] or "the whole model"
        click.echo(f"\n{who}" + (f" and {len(names) - 1} more of this signature" if len(names) > 1 else ""))
        click.echo(region["graph"])


@cli.command(epilog="Example: fxlora graph ./SmolLM2-135M --targets q_proj -o graph.graphml")
@click.argument("model", type=DIRECTORY)
@_config_options
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help=".graphml, .json, .dot or .svg")
@click.option("--level", type=click.Choice(["flat", "modules"]), default="flat", show_default=True)
@click.option("--around", help="Draw only what is near this layer, module or node.")
@click.option("--depth", type=click.IntRange(min=0), default=2, show_default=True, help="Arrows away from --around.")
@click.option("--model-explorer", is_flag=True, help="Write a .json for Google's Model Explorer.")
@click.option("--capture", type=click.Choice(["auto", "modules", "export"]), default="auto", show_default=True)
@click.option(
    "--tokens", type=click.IntRange(min=2), help="Shapes and FLOPs for two texts of so many tokens, or two images."
)
@click.option("--json", "as_json", is_flag=True, help="Print the graph as JSON.")
def graph(
    model: Path,
    config_path: Path | None,
    targets: str | None,
    rank: int,
    alpha: float,
    out: Path | None,
    level: Any,
    around: str | None,
    depth: int,
    model_explorer: bool,
    capture: Any,
    tokens: int | None,
    as_json: bool,
) -> None:
    """Give the graph of a Hugging Face MODEL directory with LoRA, for other tools or as a picture. Reads no weights.

    Without -o it prints what the graph is made of; with --around, that part of it as DOT. `--capture export` gives one
    graph of a whole language model; else each layer with LoRA is a graph of its own.
    """
    import torch

    from fxlora import lora_transform
    from fxlora.inspect.batches import batch_for
    from fxlora.inspect.dot import to_dot, to_svg
    from fxlora.inspect.graph_files import describe_graph, node_link, write_graph
    from fxlora.inspect.model_explorer import to_model_explorer
    from fxlora.inspect.networkx_graph import to_networkx

    drawing = around is not None or (out is not None and out.suffix in (".dot", ".svg"))
    if model_explorer and (out is None or out.suffix != ".json"):
        raise click.UsageError("--model-explorer writes a file: name one that ends in .json with -o")
    if drawing and (model_explorer or as_json or level != "flat" or (out and out.suffix not in (".dot", ".svg"))):
        raise click.UsageError("a picture is of the flat graph, and goes to a .dot or .svg file, or to standard output")
    ids = torch.zeros(2, tokens or 8, dtype=torch.long, device="meta")
    skeleton = _skeleton(model)
    example = batch_for(skeleton, ids) if tokens or capture == "export" else None
    config = _config(config_path, targets, rank, alpha)
    traced = example if capture == "export" else None
    lora = lora_transform(skeleton, config, capture=capture, example_inputs=traced)
    if model_explorer and out is not None:
        to_model_explorer(lora, out, example_inputs=example)
        return
    found = to_networkx(lora, example_inputs=example, level=level)
    if drawing:
        draw = to_svg if out is not None and out.suffix == ".svg" else to_dot
        text = draw(found, around=around, depth=depth)
        click.echo(text, nl=False) if out is None else out.write_text(text, encoding="utf-8", newline="\n")
    elif out is not None:
        write_graph(found, out)
    if as_json:
        click.echo(json.dumps(node_link(found), indent=2))
    elif out is None and not drawing:
        click.echo(f"capture '{lora.capture}', {lora._lora.reason}")
        click.echo(describe_graph(found))


@cli.command(epilog="Example: fxlora doctor ./SmolLM2-135M --adapter ./adapter")
@click.argument("model", type=DIRECTORY)
@click.option("--adapter", type=DIRECTORY, help="A saved adapter; a fresh one with default targets if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(model: Path, adapter: Path | None, as_json: bool) -> None:
    """Say what is wrong with an adapter on a Hugging Face MODEL directory, where, why, and what to do about it.

    The adapter's values are looked at, the model's are not read, and nothing is run: fxlora.doctor(model, batch) does.
    """
    from fxlora.inspect.doctor.directories import examine_directories

    report = examine_directories(model, adapter)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if not report.ok:
        sys.exit(1)


@cli.command(epilog="Example: fxlora diff ./SmolLM2-135M --targets q_proj,v_proj")
@click.argument("model", type=DIRECTORY)
@click.argument("other", type=DIRECTORY, required=False)
@_config_options
@click.option("--capture", type=click.Choice(["export", "modules"]), default="export", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(
    model: Path,
    other: Path | None,
    config_path: Path | None,
    targets: str | None,
    rank: int,
    alpha: float,
    capture: Any,
    as_json: bool,
) -> None:
    """Show what differs between the graphs of two Hugging Face model directories, or what LoRA does to one's.

    With a configuration and one MODEL: without LoRA and with it; with two: both with it. Reads no weights.
    """
    from fxlora.inspect.directories import diff_directories

    config = _config(config_path, targets, rank, alpha) if config_path or targets else None
    found = diff_directories(model, other, config, capture)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


@cli.command(epilog="Example: fxlora compare ./SmolLM2-135M ./merged --adapter ./adapter")
@click.argument("model", type=DIRECTORY)
@click.argument("other", type=DIRECTORY)
@click.option("--adapter", type=DIRECTORY, help="An adapter for MODEL, as for a comparison with the merged model.")
@click.option("--tokens", help="Token numbers with commas between; random ones if not given.")
@click.option("--length", type=click.IntRange(min=1), default=8, show_default=True, help="Number of random tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random tokens.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="To run both in; each one's own if not given.")
@click.option("--backward", is_flag=True, help="Compare gradients too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    model: Path,
    other: Path,
    adapter: Path | None,
    tokens: str | None,
    length: int,
    seed: int,
    dtype: str | None,
    backward: bool,
    as_json: bool,
) -> None:
    """Run two Hugging Face model directories on the same tokens, and name the first module that differs.

    Differences that rounding explains are none. Exit code 1 if there is one.
    """
    import torch

    from fxlora.inspect.directories import compare_directories

    try:
        numbers = [int(token) for token in tokens.split(",")] if tokens else None
    except ValueError as error:
        raise click.UsageError(f"--tokens takes numbers with commas between: {error}") from error
    found = compare_directories(
        model,
        other,
        adapter=adapter,
        tokens=numbers,
        length=length,
        seed=seed,
        dtype=getattr(torch, DTYPES[dtype]) if dtype else None,
        backward=backward,
    )
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
    if not found.agrees:
        sys.exit(1)


@cli.command(epilog="Example: fxlora plot norms ./adapter --base ./SmolLM2-135M -o norms.svg")
@click.argument("what", type=click.Choice(["spectrum", "norms"]))
@click.argument("adapter", type=DIRECTORY)
@click.option("--base", type=DIRECTORY, help="The base model's directory, for norms relative to its weights.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="A picture: .svg or .png")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plot(what: str, adapter: Path, base: Path | None, out: Path | None, as_json: bool) -> None:
    """Say which layers a saved ADAPTER changes most (norms), or how much of its rank each of them uses (spectrum).

    The figures are printed, and with -o drawn: modules by blocks.
    """
    from fxlora.inspect import plots
    from fxlora.inspect.spectra import spectra, update_norms

    if what == "spectrum" and base is not None:
        raise click.UsageError("--base is for norms: singular values need no weights of the base")
    if what == "norms":
        norms = update_norms(adapter, base=base)
        found, draw = norms, lambda: plots.plot_update_norms(norms, save=out)
    else:
        values = spectra(adapter)
        found, draw = values, lambda: plots.plot_rank_spectrum(values, save=out)
    if out is not None:
        draw()
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


@cli.command(epilog="Example: fxlora merge ./SmolLM2-135M ./adapter -o ./merged")
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


@cli.command(epilog="Example: fxlora extract ./SmolLM2-135M ./tuned -o ./adapter -r 16 --targets q_proj,v_proj")
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
        target_modules=_targets(targets),
        modules_to_save=[name.strip() for name in save.split(",")] if save else None,
    )
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


@cli.command(epilog="Examples: fxlora check ./merged; fxlora check ./adapter --for vllm,llama.cpp")
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


@cli.command(epilog="Example: fxlora portable ./adapter -o ./portable")
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


def _config(config_path: Path | None, targets: str | None, rank: int, alpha: float) -> Any:
    from fxlora import LoraConfig

    if config_path is not None:
        return LoraConfig.from_pretrained(config_path)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=_targets(targets))


def _targets(text: str | None) -> list[str] | str | None:
    """Names with commas between as a list; a regular expression, or `all-linear`, as it is."""
    if text is None or text == "all-linear" or set(text) & set("*[](|\\+?^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def _skeleton(path: Path) -> Any:
    """The model of a Hugging Face directory on the meta device."""
    from fxlora.host.skeleton import skeleton

    return skeleton(path)


if __name__ == "__main__":
    main()
