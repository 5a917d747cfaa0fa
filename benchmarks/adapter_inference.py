"""Inference with an adapter: beside the weights or merged into them, ours and peft's; a prompt read, and tokens generated.

Run: python -m benchmarks.adapter_inference [VARIANT ...] [--shape llama-3-8b] [--device cuda] [--compile-mode reduce-overhead]

"frozen" is the model without an adapter: the floor, and what a merged model must cost. "Prompt" is one forward over
`--tokens` batch and length; "token" is what each of 32 tokens takes that are generated after a prompt of 16 for the same
batch, greedily, with a cache that grows in eager mode and a static one where the model is compiled. Variants take turns, as
in benchmarks.train_step.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import model_shapes
from benchmarks.plots import draw_steps
from benchmarks.report import environment, save
from benchmarks.run_settings import Settings, read_options, settings_of
from benchmarks.step_table import Row, lines, summarised
from benchmarks.turns import Timed, measured
from benchmarks.variants import Adapter, Variant, callable_of, parse_all, with_adapter

VARIANTS = ("fxlora fp32", "fxlora fp32 merged", "fxlora fp32 canonical", "peft fp32", "peft fp32 merged")
HALF = ("fxlora bf16", "peft bf16")
KINDS = ("prompt", "token")
PROMPT, GENERATED = 16, 32


class Inference(Timed):
    """Prompts read, or tokens generated, by one variant."""

    def __init__(self, variant: Variant, settings: Settings, kind: str) -> None:
        torch.set_num_threads(settings.threads)
        dtype, shape = getattr(torch, settings.dtype), model_shapes.SHAPES[settings.shape]
        model = model_shapes.build(
            settings.shape, settings.layers, settings.shrink, settings.device, dtype, head=True
        ).eval()
        batch, length = settings.tokens
        torch.manual_seed(1)
        tokens = torch.randint(
            5, model.config.vocab_size, (batch, length if kind == "prompt" else PROMPT), device=settings.device
        )
        adapter = Adapter(settings.rank, model_shapes.targets(model), shape.parameters)
        model = with_adapter(model, variant, adapter).eval()
        if kind == "prompt":
            call = callable_of(model, variant, **settings.for_compile)
            super().__init__(settings, lambda: _read(call, tokens))
        else:
            options = _generation(model, variant, settings)
            super().__init__(settings, lambda: _generate(model, tokens, options))
        self._parts = 1 if kind == "prompt" else GENERATED

    def measure(self, steps: int) -> list[float]:
        """Seconds of each prompt, or of each token on average over a generation."""
        return [seconds / self._parts for seconds in super().measure(steps)]


@torch.inference_mode()
def _read(call: Any, tokens: torch.Tensor) -> None:
    call(input_ids=tokens, use_cache=False)


@torch.inference_mode()
def _generate(model: Any, tokens: torch.Tensor, options: dict[str, Any]) -> None:
    model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)


def _generation(model: Any, variant: Variant, settings: Settings) -> dict[str, Any]:
    """Options of `generate`; where the variant is compiled, the forward that it calls is replaced."""
    options = {"do_sample": False, "min_new_tokens": GENERATED, "max_new_tokens": GENERATED, "disable_compile": True}
    if not variant.eager:
        inner = model.get_base_model() if variant.name == "peft" and not variant.merged else model
        inner.forward = callable_of(inner.forward, variant, **settings.for_compile)
        options["cache_implementation"] = "static"
    return options


def main() -> None:
    """Measure, print tables, write what was asked for."""
    asked = read_options(__doc__ or "")
    settings = settings_of(asked)
    texts = asked.variants or (VARIANTS if settings.dtype == "float32" else VARIANTS + HALF)
    about = environment(settings.device, settings.threads)
    print(f"{about}\n{settings}", flush=True)
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        rows: list[Row] = []
        for mode in asked.mode:
            if variants := parse_all(texts, [mode]):
                rows += measured(variants, Inference, settings, kind, profiles=asked.profile, jobs=asked.jobs)
        found += [
            {"kind": kind, **data, "mode": f"{kind}, {data['mode']}"} for data in summarised(rows, with_goals=False)
        ]
        if asked.json:
            save(asked.json, "adapter_inference", about, settings, found)
    print("\n".join(lines(found)))
    if asked.plot:
        draw_steps(found, f"{settings}\n{about}", asked.plot)


if __name__ == "__main__":
    main()
