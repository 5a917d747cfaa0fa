"""One training step of the demo (SmolLM2-135M, LoRA r=8 on 210 linears), beside peft's and the frozen model's.

Run: python benchmarks/train_step.py [--threads 2] [--json FILE]. The three alternate in one process on the same batch.
"frozen" is forward and backward to the embeddings only: the floor. All in float32, eager.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

from fxlora import LoraConfig, lora_transform
from fxlora.demo import smollm2

TARGETS = "all-linear"


def models() -> dict[str, Any]:
    """The three models, each with its own copy of the weights."""
    path = smollm2.cached_model_dir()
    frozen = smollm2.load_model(path).requires_grad_(False)
    frozen.enable_input_require_grads()
    ours = lora_transform(smollm2.load_model(path), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    theirs = peft.get_peft_model(smollm2.load_model(path), config)
    return {"frozen": frozen, "fxlora": ours, "peft": theirs}


def stepper(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    """One training step: forward, backward, AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    model.train()

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens = torch.randint(5, 40000, (2, 64))
    steps = {name: stepper(model, tokens) for name, model in models().items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    floor = statistics.median(times["frozen"])
    print(f"one step of 2 x 64 tokens, {options.threads} threads, median of {options.rounds}")
    print(f"{'':8} {'s':>8} {'x frozen':>9}   min-max")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:8} {median:8.3f} {median / floor:9.3f}   {min(values):.3f}-{max(values):.3f}")
    ratios = [a / b for a, b in zip(times["fxlora"], times["peft"], strict=True)]
    print(f"fxlora / peft, round by round: median {statistics.median(ratios):.3f}, {min(ratios):.3f}-{max(ratios):.3f}")
    if options.json:
        options.json.write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
