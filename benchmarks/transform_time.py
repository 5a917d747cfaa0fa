"""How long the transform takes, beside peft's injection: SmolLM2-135M, and the shape of a 70B Llama on meta.

Run: python benchmarks/transform_time.py [--json FILE]. Both sides alternate in one process on fresh copies of the same
model. peft runs with its own recommendation for meta models, `low_cpu_mem_usage=True`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from fxlora import LoraConfig, lora_transform
from fxlora.demo import smollm2

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_70b() -> torch.nn.Module:
    """An 80-layer Llama of the 70B shape without weights."""
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def ours(model: torch.nn.Module) -> object:
    """Transform by fxlora."""
    return lora_transform(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS), capture="modules")


def theirs(model: Any) -> object:
    """Inject by peft."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    return peft.get_peft_model(model, config, low_cpu_mem_usage=next(model.parameters()).is_meta)


def seconds(function: Callable[[Any], object], model: torch.nn.Module) -> float:
    """Wall time of one call on a fresh copy."""
    copied = copy.deepcopy(model)
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    function(copied)
    taken = time.perf_counter() - start
    gc.enable()
    return taken


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    models = {"Llama 70B shape, meta": llama_70b(), "SmolLM2-135M": smollm2.load_model(smollm2.cached_model_dir())}
    results: dict[str, dict[str, list[float]]] = {}
    print(f"{'model':24} {'fxlora s':>10} {'peft s':>10} {'ratio':>7}   (median of {options.rounds}; min-max)")
    for name, model in models.items():
        for function in (ours, theirs):  # warm-up: imports, first generated class
            seconds(function, model)
        times: dict[str, list[float]] = {"fxlora": [], "peft": []}
        for _ in range(options.rounds):
            times["fxlora"].append(seconds(ours, model))
            times["peft"].append(seconds(theirs, model))
        results[name] = times
        a, b = (statistics.median(times[each]) for each in ("fxlora", "peft"))
        spread = "  ".join(f"{each} {min(values):.3f}-{max(values):.3f}" for each, values in times.items())
        print(f"{name:24} {a:10.3f} {b:10.3f} {a / b:7.2f}   {spread}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
