"""A training step of Llama-3-8B's layers with LoRA on all linears, beside the frozen model and peft. Needs a GPU.

Run: python -m benchmarks.llama_step [VARIANT ...] [--rounds 2] [--layers 4] [--tokens 4 2048] [--json FILE]

"frozen" is forward and backward to the input only: the floor. A step is forward and backward without the optimizer; the
figures are medians of 20 steps and the peak of memory above what is held before a step. Variants alternate, round by round.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

from fxlora import LoraConfig, lora_transform

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

VARIANTS = (
    "frozen", "fxlora fp32", "fxlora bf16", "fxlora fp32 dropout", "peft fp32", "peft bf16", "peft fp32 dropout",
    "frozen eager", "fxlora fp32 eager", "peft fp32 eager", "peft bf16 eager",
)  # fmt: skip


def base_model(options: argparse.Namespace) -> Any:
    """Random weights in bfloat16, frozen."""
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.hidden * 7 // 2, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128, num_key_value_heads=options.hidden // 512, vocab_size=1024,
        max_position_embeddings=32768, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaModel(config).to(torch.bfloat16).requires_grad_(False)


def prepared(variant: str, options: argparse.Namespace) -> tuple[Callable[..., Any], list[torch.nn.Parameter]]:
    """The function to call, and the parameters that are trained."""
    name, *rest = variant.split()
    model = base_model(options)
    dtype = next((DTYPES[word] for word in rest if word in DTYPES), torch.bfloat16)
    settings: dict[str, Any] = dict(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, lora_dropout=0.1 if "dropout" in rest else 0.0,
        use_dora="dora" in rest, init_lora_weights=False,
    )  # fmt: skip
    backend = "inductor"
    if name == "fxlora":
        model = lora_transform(model, LoraConfig(**settings))
        backend = "inductor" if "canonical" in rest else "fxlora"
        if "eager" in rest and "canonical" not in rest:
            import fxlora

            fxlora.optimize(model)
    elif name == "peft":
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        model = get_peft_model(model, PeftConfig(**settings))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    model.train()
    if "eager" in rest:
        return model, parameters
    if backend == "fxlora":
        from fxlora.compile import backend
    return torch.compile(model, backend=backend), parameters


def measured(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step, and GiB at its peak."""
    torch._dynamo.reset()
    call, parameters = prepared(variant, options)
    batch, length = options.tokens
    x = torch.randn(batch, length, options.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)

    def step() -> None:
        call(inputs_embeds=x).last_hidden_state.backward(gradient)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30
    if options.profile:
        _profile(step, Path(options.profile) / f"{variant.replace(' ', '_')}.txt")
    return {"ms": statistics.median(times), "low": min(times), "high": max(times), "gib": peak}


def _profile(step: Callable[[], None], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    path.write_text(run.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 2048))
    parser.add_argument("--profile", help="folder for a table of kernels of each variant")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.layers} layers, {options.tokens} tokens, r {options.rank}"
    )
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for variant in options.variants:
            gc.collect()
            torch.cuda.empty_cache()
            try:
                row = measured(variant, options)
            except torch.OutOfMemoryError:
                print(variant, "does not fit")
                continue
            results.setdefault(variant, []).append(row)
            floor = results.get("frozen eager" if "eager" in variant else "frozen", [row])[-1]["ms"]
            print(
                f"{variant:24} {row['ms']:8.2f} ms  x{row['ms'] / floor:.3f}  {row['gib']:6.2f} GiB  {row['low']:.2f}-{row['high']:.2f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
