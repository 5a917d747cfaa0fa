"""One linear layer with LoRA, and four layers of SmolLM2's shape, on the CPU: fxlora beside peft, eager and compiled.

Run: python -m benchmarks.cpu_shapes [--eager | --compiled | --models] [--dropout 0 0.1] [--every 1] [--threads 1] [--json FILE]

A figure is the median of rounds of forward and backward, in time of the processor where there is one thread, which other work
on the machine does not change; the variants alternate, each round in another order, and share the frozen weights. Factors are
float32, both libraries' default, and on a bfloat16 base also bfloat16. Ratios are ours over peft's, with factors of either
dtype, and of the faster of each. Eager fxlora is `fxlora.optimize`, compiled it is the backend `fxlora`. What wraps a whole
model, a call of either library's own, is left out.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import fxlora
from benchmarks.report import environment
from benchmarks.variants import DTYPES, trained
from fxlora.compile import backend

SIZES = ((576, 576), (576, 1536), (1536, 576), (2048, 2048))
TOKENS = (1, 16, 128, 512, 2048)
RANKS = (4, 16, 64, 256)
FACTORS = ("fp32", "bf16")
BASES = tuple(DTYPES[factors] for factors in FACTORS)

_COMPILED_EVERY = 7

Step = Callable[[], None]


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer of x."""
        return self.linear(x)


def layers_of_smollm2() -> nn.Module:
    """Four of SmolLM2-135M's thirty layers."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=64, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaModel(config)


def variants(
    make: Callable[[], nn.Module], dtype: torch.dtype, rank: int, p: float, compiled: bool
) -> Iterator[tuple[str, Any]]:
    """The ways to train one model, by name: each a callable model."""
    settings: dict[str, Any] = dict(r=rank, lora_alpha=2 * rank, lora_dropout=p, init_lora_weights=False)
    settings["target_modules"] = r".*\.(\w+_proj)|linear"

    frozen = make().to(dtype).requires_grad_(False)

    def fresh() -> nn.Module:
        return copy.deepcopy(frozen, {id(parameter): parameter for parameter in frozen.parameters()})

    for factors in FACTORS[: 1 if dtype == torch.float32 else 2]:
        model = fxlora.lora_transform(fresh(), fxlora.LoraConfig(**settings)).train()
        inner = peft.get_peft_model(fresh(), peft.LoraConfig(**settings)).base_model.model.train()
        for parameter in (*trained(model), *trained(inner)):
            parameter.data = parameter.data.to(DTYPES[factors])
        if not compiled:
            fxlora.optimize(model)
        yield f"fxlora {factors}", torch.compile(model, backend=backend, dynamic=False) if compiled else model
        yield f"peft {factors}", torch.compile(inner, dynamic=False) if compiled else inner


def stepper(model: Any, x: torch.Tensor, keyword: str | None) -> Step:
    """Forward and backward, to the input as a layer within a model does."""
    gradient: list[torch.Tensor] = []
    parameters = trained(model)
    call = model.forward

    def step() -> None:
        y = call(x) if keyword is None else call(**{keyword: x}).last_hidden_state
        if not gradient:
            gradient.append(torch.randn_like(y))
        torch.autograd.grad(y, (x, *parameters), gradient[0])

    return step


def alternating(steps: dict[str, Step], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Microseconds of each step, round by round; a round takes each step as often as fills a few milliseconds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    counts: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        start = clock()
        step()
        counts[name] = max(1, int(0.003 / (clock() - start)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    order, names = random.Random(0), list(steps)
    while time.perf_counter() < end or len(times[names[0]]) < least:
        order.shuffle(names)
        for name in names:
            step = steps[name]
            start = clock()
            for _ in range(counts[name]):
                step()
            times[name].append(1e6 * (clock() - start) / counts[name])
    return times


def measured(
    make: Callable[[], nn.Module], shape: tuple[int, ...], keyword: str | None, dtype: torch.dtype, rank: int, p: float,
    compiled: bool, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """All variants on one shape."""
    torch._dynamo.reset()
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    steps = {name: stepper(model, x, keyword) for name, model in variants(make, dtype, rank, p, compiled)}
    times = alternating(steps, seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    setting = {
        "way": "compiled" if compiled else "eager",
        "dtype": str(dtype).removeprefix("torch."),
        "r": rank,
        "dropout": p,
    }
    return {
        **setting, "us": {name: round(value, 1) for name, value in medians.items()}, "ratios": ratios(times),
    }  # fmt: skip


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of ours over peft's: by the dtype of the factors, and `best` of the faster of each library.

    Args:
        times: of `fxlora fp32`, `peft fp32` and so on, round by round.
    """
    pairs = {factors: (f"fxlora {factors}", f"peft {factors}") for factors in FACTORS if f"peft {factors}" in times}
    ours, theirs = (
        min(names, key=lambda name: statistics.median(times[name])) for names in zip(*pairs.values(), strict=True)
    )
    pairs["best"] = (ours, theirs)
    return {
        name: round(statistics.median(a / b for a, b in zip(times[one], times[two], strict=True)), 3)
        for name, (one, two) in pairs.items()
    }


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that is asked for, measured one after the other."""
    every = not (options.eager or options.compiled or options.models)
    layers = itertools.product(SIZES, TOKENS, RANKS, BASES, options.dropout)
    for index, ((columns, outputs), tokens, rank, dtype, p) in enumerate(layers):
        if index % options.every:
            continue
        for compiled in (False, True):
            # a compilation takes far longer than what is measured: one case of so many, which meets all sizes, tokens and ranks
            if not (every or (options.compiled if compiled else options.eager)) or (
                compiled and index % _COMPILED_EVERY
            ):
                continue
            row = measured(
                lambda columns=columns, outputs=outputs: Layer(columns, outputs), (tokens, columns), None, dtype, rank,
                p, compiled, options.seconds,
            )  # fmt: skip
            yield {"what": f"{columns} -> {outputs}", "tokens": tokens, **row}
    if options.models or every:
        models = itertools.product((16, 128, 512), (8,), BASES, options.dropout, (False, True))
        for tokens, rank, dtype, p, compiled in models:
            if compiled and tokens != 128:
                continue
            row = measured(
                layers_of_smollm2, (1, tokens, 576), "inputs_embeds", dtype, rank, p, compiled, 4 * options.seconds
            )
            yield {"what": "4 layers of SmolLM2", "tokens": tokens, **row}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--eager", action="store_true", help="layers in eager mode alone")
    parser.add_argument("--compiled", action="store_true", help="compiled layers alone")
    parser.add_argument("--models", action="store_true", help="models alone")
    parser.add_argument("--dropout", type=float, nargs="*", default=(0.0, 0.1))
    parser.add_argument("--every", type=int, default=1, help="one case of so many")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a case, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    about = environment("cpu", options.threads)
    print(f"{about}; microseconds")
    rows: list[dict[str, Any]] = []
    for row in cases(options):
        rows.append(row)
        figures = "  ".join(f"{name} {value:.0f}" for name, value in row["us"].items())
        setting = f"{row['way']:8} {row['dtype']:8} {row['what']:20} tokens {row['tokens']:5} r {row['r']:3} p {row['dropout']:g}"
        print(f"{row['ratios']['best']:6.3f}  {setting}  {figures}", flush=True)
        if options.json:  # after each row: a run of an hour may be cut off
            page = {**asdict(about), "rows": rows}
            options.json.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    best = [row["ratios"]["best"] for row in rows]
    print(
        f"{len(rows)} cases, median of ours over peft's {statistics.median(best):.3f}, slower on "
        f"{sum(ratio > 1.0 for ratio in best)}, by more than 3% on {sum(ratio > 1.03 for ratio in best)}"
    )


if __name__ == "__main__":
    main()
