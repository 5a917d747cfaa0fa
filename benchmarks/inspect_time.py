"""How long it takes to look inside the shape of a 70B Llama with 80 layers on meta: explain, graphs, and their files.

Run: python benchmarks/inspect_time.py [--rounds 3] [--export] [--json FILE]. `--export` adds the graph of the whole model,
whose capture alone takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transform_time import TARGETS, llama_70b

import fxlora

CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS}
EXAMPLE = {"input_ids": torch.zeros(2, 128, dtype=torch.long, device="meta")}


def seconds(function: Callable[[], object], rounds: int) -> tuple[list[float], object]:
    """Wall times of some calls, and the last result."""
    times: list[float] = []
    result: object = None
    for _ in range(rounds):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return times, result


def steps(model: torch.nn.Module, folder: Path, example: object) -> dict[str, Callable[[], object]]:
    """What is timed on a transformed model, by name."""
    flat = fxlora.to_networkx(model, example_inputs=example)
    names = {key: folder / f"graph.{key}" for key in ("graphml", "json")}
    return {
        "to_networkx": lambda: fxlora.to_networkx(model),
        "to_networkx, with shapes": lambda: fxlora.to_networkx(model, example_inputs=example),
        "to_networkx, modules": lambda: fxlora.to_networkx(model, level="modules"),
        "write .graphml": lambda: fxlora.write_graph(flat, names["graphml"]),
        "write .json": lambda: fxlora.write_graph(flat, names["json"]),
        "to_dot, collapsed": lambda: fxlora.to_dot(flat),
        "Model Explorer, with shapes": lambda: fxlora.to_model_explorer(
            model, folder / "explorer.json", example_inputs=example
        ),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--export", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, list[float]] = {}
    print(f"{'Llama 70B shape on meta':42} {'median s':>9} {'min':>7} {'max':>7}   (of {options.rounds})")

    def measure(name: str, function: Callable[[], object], rounds: int = options.rounds) -> object:
        times, result = seconds(function, rounds)
        results[name] = times
        print(f"{name:42} {statistics.median(times):9.3f} {min(times):7.3f} {max(times):7.3f}", flush=True)
        return result

    with tempfile.TemporaryDirectory() as folder:
        model = llama_70b()
        measure("explain, and its text", lambda: str(fxlora.explain(model, CONFIG)))
        measure("explain, with activations", lambda: fxlora.explain(model, CONFIG, example_inputs=EXAMPLE), 1)
        for capture in ("modules", "export") if options.export else ("modules",):

            def transform(how: str = capture) -> object:
                example = EXAMPLE if how == "export" else None
                return fxlora.lora_transform(llama_70b(), CONFIG, capture=how, example_inputs=example)

            lora = measure(f"{capture}: lora_transform", transform, 1)
            assert isinstance(lora, torch.nn.Module)
            graph = fxlora.to_networkx(lora)
            print(f"{capture}: {graph.number_of_nodes():,} nodes, {graph.number_of_edges():,} edges")
            for name, function in steps(lora, Path(folder), EXAMPLE).items():
                measure(f"{capture}: {name}", function)
    if options.json:
        text = json.dumps({"torch": torch.__version__, "cpus": os.cpu_count(), "seconds": results}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
