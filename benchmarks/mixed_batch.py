"""A batch whose rows use 8 adapters, beside a batch of the same size with one adapter, and peft's of both.

Run: python -m benchmarks.mixed_batch [--device cuda] [--json FILE]. A 12-layer Llama of random weights without a head,
LoRA on all of its linears, no gradients. Every row is first checked in float32 against a model with its adapter alone.
All sides alternate in one process on the same batch; a ratio is the median of those of the rounds. A decode step is a
batch of one token for each row, without a cache: the case in which LoRA's share is largest.

Sides: `one`: the graph of one adapter. `rows`: `adapter_names` given to a call. `rows, open`: calls inside
`adapter_rows`, as the steps of `generate`. `slots`: the same with stacked copies (`use_slots`). On CUDA the models are in
bfloat16, and so are peft's adapters, which is faster than its default of float32. On the CPU with one thread, times are
those of the process, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from fxlora import LoraConfig, lora_transform

ADAPTERS = tuple(f"a{number}" for number in range(8))
ROWS = {
    "8 rows": ADAPTERS,
    "16 rows": tuple(name for name in ADAPTERS for _ in range(2)),
    "8 rows, 1 base": (*ADAPTERS[:-1], "__base__"),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One batch: names of the adapters of its rows, and the number of tokens of each."""

    rows: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows} of {self.tokens} tokens" if self.tokens > 1 else f"{self.rows}, decode step"


@dataclass(frozen=True)
class Side:
    """What is timed: a call inside a context that is entered before."""

    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


# ---- models ----


def base(hidden: int, device: str) -> Any:
    """A Llama of 12 layers with the seed's weights, frozen, in evaluation."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 64 * 64, num_hidden_layers=12, vocab_size=1024,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaModel(config).eval().requires_grad_(False)


def ours(hidden: int, r: int, device: str) -> Any:
    """With all adapters, B random."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS)
    model = lora_transform(base(hidden, device), config, adapter_name=ADAPTERS[0], capture="modules")
    for name in ADAPTERS[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator(device).manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * 0.05)
    return model.eval()


def theirs(model: Any, hidden: int, r: int, device: str) -> Any:
    """peft's, with the same factors."""
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS)
    wrapped: Any = peft.get_peft_model(base(hidden, device), config, adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        wrapped.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                wrapped.get_parameter(f"base_model.model.{name}").copy_(parameter)
    return wrapped.eval()


# ---- checking ----


def check(models: dict[str, Any], names: Sequence[str], tokens: Tensor) -> dict[str, float]:
    """The largest difference of any side's row to that row run alone with its adapter, relative to the largest value.

    Raises:
        RuntimeError: when it is more than rounding in float32.
    """
    plain = models["fxlora"]
    alone: list[Tensor] = []
    for name, row in zip(names, tokens, strict=True):
        if name == "__base__":
            with plain.disable_adapter():
                alone.append(plain(row[None]).last_hidden_state)
        else:
            plain.set_adapter(name)
            alone.append(plain(row[None]).last_hidden_state)
    expected = torch.cat(alone)
    plain.set_adapter(ADAPTERS[0])
    errors: dict[str, float] = {}
    for side, model in models.items():
        found = model(tokens, adapter_names=list(names)).last_hidden_state
        errors[side] = ((found - expected).abs().max() / expected.abs().max()).item()
        one = plain(tokens).last_hidden_state
        if not errors[side] < 1e-4 or torch.allclose(found, one, rtol=1e-2):
            raise RuntimeError(f"{side}: a row differs by {errors[side]:.1e} from its adapter alone")
    return errors


# ---- timing ----


def sides(models: dict[str, Any], names: list[str], tokens: Tensor) -> dict[str, Side]:
    """Everything that is compared on one batch, in the order in which it alternates."""

    def one(model: Any) -> Side:
        return Side(lambda: model(tokens))

    def rows(model: Any) -> Side:
        return Side(lambda: model(tokens, adapter_names=names))

    def opened(model: Any) -> Side:
        return Side(lambda: model(tokens), lambda: model.adapter_rows(names))

    plain, slots = models["fxlora"], models["fxlora, slots"]
    found = {
        "fxlora one": one(plain), "fxlora rows": rows(plain), "fxlora rows, open": opened(plain),
        "fxlora slots one": one(slots), "fxlora slots rows": rows(slots), "fxlora slots rows, open": opened(slots),
    }  # fmt: skip
    if "peft" in models:
        found |= {"peft one": one(models["peft"]), "peft rows": rows(models["peft"])}
    return found


def seconds(side: Side, repeats: int, device: str) -> float:
    """Of one call, the mean of some."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    with side.context():
        if side.context is not nullcontext:
            for _ in range(2):  # the first steps make stacks for the others
                side.call()
        _wait(device)
        start = clock()
        for _ in range(repeats):
            side.call()
        _wait(device)
        return (clock() - start) / repeats


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(timed: dict[str, Side], rounds: int, device: str, *, compiled: bool = False) -> dict[str, list[float]]:
    """Times of each side, round by round, all sides in each round; short calls several times."""
    repeats = {}
    for name, side in timed.items():
        first = seconds(side, 1, device)  # warm up, and compile
        repeats[name] = 1 if first > 1 and not compiled else max(1, min(50, round(0.1 / seconds(side, 1, device))))
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        for name, side in timed.items():
            times[name].append(seconds(side, repeats[name], device))
        gc.enable()
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    """Print medians, and ratios to the same library's batch of one adapter and to peft's mixed batch."""
    print(f"\n{title}")
    print(f"{'':24} {'ms':>9} {'min-max':>17}   {'x one adapter':>21}   {'x peft rows':>21}")

    def ratio(name: str, reference: str) -> str:
        if reference not in times or name == reference:
            return f"{'':21}"
        each = [a / b for a, b in zip(times[name], times[reference], strict=True)]
        return f"{statistics.median(each):6.3f} ({min(each):5.2f}-{max(each):5.2f})"

    for name, values in times.items():
        spread = f"{min(values) * 1e3:.2f}-{max(values) * 1e3:.2f}"
        median, own = statistics.median(values) * 1e3, "peft one" if name.startswith("peft") else "fxlora one"
        other = ratio(name, "peft rows") if "one" not in name else ""
        print(f"{name:24} {median:9.2f} {spread:>17}   {ratio(name, own):>21}   {other:>21}", flush=True)


# ---- runs ----


def run(hidden: int, r: int, cases: Sequence[Case], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check and time some batches on one set of models, eager and then compiled."""
    device = options.device
    tokens = {case: _tokens(case, device) for case in cases}
    models = _models(hidden, r, device, with_peft=True)
    with torch.no_grad():
        worst: dict[str, float] = {}
        for case in cases:
            short = tokens[case][:, :16]
            for side, error in check(models, ROWS[case.rows], short).items():
                worst[side] = max(error, worst.get(side, 0.0))
        said = ", ".join(f"{side} {error:.0e}" for side, error in worst.items())
        print(f"\nhidden {hidden}, r={r}: largest error of a row in float32: {said}")
        models = {name: _converted(model, device) for name, model in models.items()}
        for case in cases:
            times = measure(sides(models, list(ROWS[case.rows]), tokens[case]), options.rounds, device)
            report(f"hidden {hidden}, r={r}, {case}, eager", times)
            yield {"hidden": hidden, "r": r, "case": str(case), "compiled": "", "errors": worst, "seconds": times}
        del models
        if options.compile == "none" or r != options.ranks[0]:
            return
        compiled = {name: _converted(m, device) for name, m in _models(hidden, r, device, with_peft=False).items()}
        for model in compiled.values():
            _compile(model, options.compile)
        for case in cases:
            if device == "cpu" and options.rows is None and case.tokens > 1:
                continue
            torch._dynamo.reset()
            times = measure(sides(compiled, list(ROWS[case.rows]), tokens[case]), options.rounds, device, compiled=True)
            report(f"hidden {hidden}, r={r}, {case}, compiled ({options.compile})", times)
            yield {"hidden": hidden, "r": r, "case": str(case), "compiled": options.compile, "seconds": times}


def _models(hidden: int, r: int, device: str, *, with_peft: bool) -> dict[str, Any]:
    models = {"fxlora": ours(hidden, r, device), "fxlora, slots": ours(hidden, r, device)}
    models["fxlora, slots"].use_slots()
    if with_peft:
        models["peft"] = theirs(models["fxlora"], hidden, r, device)
    return models


def _converted(model: Any, device: str) -> Any:
    return model.to(torch.bfloat16) if device == "cuda" else model


def _compile(model: Any, what: str) -> None:
    for part in model.layers if what == "blocks" else [model]:
        part.compile(fullgraph=what == "blocks")


def _tokens(case: Case, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(case.tokens)
    return torch.randint(1024, (len(ROWS[case.rows]), case.tokens), generator=generator).to(device)


def _wanted(case: Case, r: int, options: argparse.Namespace) -> bool:
    """On the CPU long sequences take minutes: by default one batch of them is run, with one rank, not compiled."""
    one = case.rows == next(iter(ROWS)) and r == options.ranks[0]
    return options.device == "cuda" or options.rows is not None or case.tokens == 1 or one


def main() -> None:
    """Measure, print tables, write JSON."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--hidden", type=int, nargs="+", help="default: 768; on CUDA also 2048")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all")
    parser.add_argument("--rounds", type=int, help="default: 3; on CUDA 9")
    parser.add_argument("--compile", choices=("blocks", "whole", "none"), default="blocks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rounds = options.rounds or (9 if options.device == "cuda" else 3)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # what peft says of frozen adapters
    cases = [Case(rows, tokens) for tokens in options.tokens for rows in options.rows or ROWS]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(f"{where}, torch {torch.__version__}, peft {peft.__version__}; medians of {options.rounds} rounds")
    results: list[dict[str, Any]] = []
    for hidden in options.hidden or ([768, 2048] if options.device == "cuda" else [768]):
        for r in options.ranks:
            results += run(hidden, r, [case for case in cases if _wanted(case, r, options)], options)
    if options.json:
        found = {"device": where, "torch": torch.__version__, "peft": peft.__version__, "results": results}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
