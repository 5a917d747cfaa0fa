"""What LoRA costs before the first step: the transform, beside peft's; capture by number of nodes; the import.

Run: python benchmarks/transform_time.py [--rounds 7] [--nodes 1000 3000 10000 30000 100000] [--json FILE]. About ten
minutes on an idle machine and 7 GB, most of it for the last size of graph. Three tables:

- The transform of SmolLM2-135M and of the shape of a 70B Llama on meta, all seven linear layers of each block. The sides
  alternate in one process on fresh copies. peft is shown as it is by default, and as it recommends for models on meta
  (`low_cpu_mem_usage=True`).
- `symbolic` capture of a deep plain model with a branch at each linear layer, and `torch.fx`'s own tracing of it. Two
  tracings in each of two modes, with checks, are part of a capture. The exponent is the slope from one size to the next
  on a logarithmic scale: 1 is linear.
- Imports on top of `import torch`, in fresh processes in turn, with compiled bytecode as installed packages have it.

Seconds of the clock and, which other work on the machine changes less, of this process's processor time: medians.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from report import versions
from torch import Tensor, nn

from fxlora import LoraConfig, lora_transform
from fxlora.demo import smollm2

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IMPORTS = ("import fxlora", "from fxlora import LoraConfig, lora_transform", "import peft")
GOALS = {"Llama 70B shape, meta": "≤ 1.0 s", "import fxlora": "≤ 0.1 s"}

Times = dict[str, list[float]]
"""Seconds of each round: by the `clock`, and of the `processor`."""


def llama_70b() -> nn.Module:
    """An 80-layer Llama of the 70B shape without weights."""
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


class Deep(nn.Module):
    """Linear layers and activations in turn: as many operations as asked for."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(operations // 2))

    def forward(self, x: Tensor) -> Tensor:
        """One after another."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def by_fxlora(model: nn.Module) -> object:
    """Transform by fxlora."""
    return lora_transform(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS), capture="modules")


def by_peft(model: Any) -> object:
    """Inject by peft, as it is by default."""
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))


def by_peft_on_meta(model: Any) -> object:
    """Inject by peft without drawing the factors."""
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
    return peft.get_peft_model(model, config, low_cpu_mem_usage=True)


def symbolic(model: nn.Module) -> object:
    """Capture and transform by fxlora."""
    return lora_transform(model, LoraConfig(r=2, target_modules=r"layers\.\d+"), capture="symbolic")


def measure(function: Callable[[Any], object], model: nn.Module, times: Times) -> None:
    """Add the times of one call; the collector of Python runs only before it."""
    gc.collect()
    gc.disable()
    clock, processor = time.perf_counter(), time.process_time()
    function(model)
    times.setdefault("clock", []).append(time.perf_counter() - clock)
    times.setdefault("processor", []).append(time.process_time() - processor)
    gc.enable()


def row(name: str, side: str, times: Times, note: str = "") -> None:
    """Print the medians."""
    clock, processor = (statistics.median(times[each]) for each in ("clock", "processor"))
    spread = f"{min(times['processor']):.3f}-{max(times['processor']):.3f}"
    print(f"{name:24} {side:48} {clock:9.3f} {processor:9.3f}  {spread:15} {note}", flush=True)


def transforms(rounds: int) -> dict[str, dict[str, Times]]:
    """The first table."""
    models = {"Llama 70B shape, meta": llama_70b(), "SmolLM2-135M": smollm2.load_model(smollm2.cached_model_dir())}
    results: dict[str, dict[str, Times]] = {}
    for name, model in models.items():
        sides = {"fxlora": by_fxlora, "peft": by_peft}
        if next(model.parameters()).is_meta:
            sides["peft, low_cpu_mem_usage=True"] = by_peft_on_meta
        for function in sides.values():  # what is made once: imports, the first generated class
            function(copy.deepcopy(model))
        results[name] = {side: {} for side in sides}
        for _ in range(rounds):
            for side, function in sides.items():
                measure(function, copy.deepcopy(model), results[name][side])
        for side, times in results[name].items():
            row(name, side, times, GOALS.get(name, "") if side == "fxlora" else "")
    return results


def captures(sizes: list[int]) -> dict[int, dict[str, Times]]:
    """The second table."""
    results: dict[int, dict[str, Times]] = {}
    before: dict[str, tuple[int, float]] = {}
    symbolic(Deep(100))
    for size in sizes:
        results[size] = {}
        for side, function in (("fxlora, symbolic", symbolic), ("torch.fx.symbolic_trace", torch.fx.symbolic_trace)):
            times = results[size][side] = {}
            for _ in range(3 if size <= 3000 else 1):
                measure(function, Deep(size), times)
            seconds = statistics.median(times["processor"])
            earlier, then = before.get(side, (size, seconds))
            before[side] = size, seconds
            exponent = math.log(seconds / then) / math.log(size / earlier) if size > earlier else None
            note = f"{1e6 * seconds / size:.0f} µs a node"
            row(f"{size:,} nodes", side, times, note + (f", exponent {exponent:.2f}" if exponent else ""))
    return results


def imports(rounds: int) -> dict[str, Times]:
    """The third table."""
    results: dict[str, Times] = {statement: {} for statement in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPYCACHEPREFIX": folder,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for turn in range(rounds + 1):
            for statement, times in results.items():
                now = "time.perf_counter(), time.process_time()"
                code = f"import time, torch\na = {now}\n{statement}\nb = {now}\nprint(b[0] - a[0], b[1] - a[1])"
                command = [sys.executable, "-c", code]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                if turn:  # the first one compiles
                    for each, value in zip(("clock", "processor"), done.stdout.split(), strict=True):
                        times.setdefault(each, []).append(float(value))
    for statement, times in results.items():
        row("over torch", statement, times, GOALS.get(statement, ""))
    return results


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nodes", type=int, nargs="*", default=[1000, 3000, 10000, 30000, 100000])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'':24} {'':48} {'clock s':>9} {'cpu s':>9}  {'cpu, min-max':15} goal or note")
    results = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": versions(),
        "imports": imports(options.rounds),
        "transforms": transforms(options.rounds),
        "captures": captures(options.nodes),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
