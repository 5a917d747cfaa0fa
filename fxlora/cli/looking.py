"""The commands that look at models and adapters and write no weights: `fxlora explain, inspect, graph, doctor, diff, compare, plot`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from fxlora.cli.arguments import DIRECTORY, DTYPES, config_of, config_options, skeleton_of


@click.command(epilog="Example: fxlora explain ./SmolLM2-135M --targets q_proj,v_proj -r 16")
@click.argument("model", type=DIRECTORY)
@config_options
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

    config = config_of(config_path, targets, rank, alpha)
    skeleton = skeleton_of(model)
    dtype = getattr(skeleton.config, "dtype", None)  # in which transformers loads the weights
    skeleton = skeleton if dtype is None else skeleton.to(dtype)
    batch = batch_for(skeleton, torch.zeros(tokens, dtype=torch.long, device="meta")) if tokens else None
    explanation = explain_model(skeleton, config, example_inputs=batch)
    click.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else str(explanation))
    if explanation.problem:
        sys.exit(1)


@click.command(epilog="Example: fxlora inspect ./SmolLM2-135M --targets q_proj --capture modules")
@click.argument("model", type=DIRECTORY)
@config_options
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
    skeleton = skeleton_of(model)
    tokens = torch.zeros(2, 8, dtype=torch.long, device="meta")
    example = batch_for(skeleton, tokens) if capture == "export" else None
    lora = lora_transform(
        skeleton, config_of(config_path, targets, rank, alpha), capture=capture, example_inputs=example
    )
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


@click.command(epilog="Example: fxlora graph ./SmolLM2-135M --targets q_proj -o graph.graphml")
@click.argument("model", type=DIRECTORY)
@config_options
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
    skeleton = skeleton_of(model)
    example = batch_for(skeleton, ids) if tokens or capture == "export" else None
    config = config_of(config_path, targets, rank, alpha)
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


@click.command(epilog="Example: fxlora doctor ./SmolLM2-135M --adapter ./adapter")
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


@click.command(epilog="Example: fxlora diff ./SmolLM2-135M --targets q_proj,v_proj")
@click.argument("model", type=DIRECTORY)
@click.argument("other", type=DIRECTORY, required=False)
@config_options
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

    config = config_of(config_path, targets, rank, alpha) if config_path or targets else None
    found = diff_directories(model, other, config, capture)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


@click.command(epilog="Example: fxlora compare ./SmolLM2-135M ./merged --adapter ./adapter")
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


@click.command(epilog="Example: fxlora plot norms ./adapter --base ./SmolLM2-135M -o norms.svg")
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
