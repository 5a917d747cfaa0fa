"""A training step with LoRA beside the frozen model's and peers': time and memory, compiled and eager.

Run: python -m benchmarks.train_step [VARIANT ...] [--shape llama-3-8b] [--device cuda] [--mode compiled] [--json FILE]

A step is forward and backward, without the optimizer. "frozen" is forward and backward to the input only: the floor. Every
variant has a process of its own; they take turns, some steps each, so that all see the machine in the same states. A ratio
is the median over the rounds of what a variant and its floor took in the same round. Memory is the peak above what is held
before a step. Without VARIANT: the whole table, with those peers of `benchmarks.peers` that are installed. On a CPU: a
few minutes, in small sizes.
"""

from __future__ import annotations

import torch

from benchmarks import model_shapes
from benchmarks.plots import draw_steps
from benchmarks.report import environment, save
from benchmarks.run_settings import Settings, read_options, settings_of
from benchmarks.step_table import Row, lines, summarised
from benchmarks.turns import Timed, measured
from benchmarks.variants import Adapter, Variant, callable_of, parse_all, trained, with_adapter

FLOAT32_BASE = (
    "fxlora fp32", "fxlora fp32 dropout", "fxlora fp32 dora", "fxlora fp32 canonical",
    "peft fp32", "peft fp32 dropout", "peft fp32 dora",
)  # fmt: skip
HALF_BASE = (
    "fxlora fp32", "fxlora bf16", "fxlora fp32 dropout", "fxlora bf16 dropout", "fxlora fp32 dora", "fxlora bf16 dora",
    "fxlora fp32 canonical", "fxlora bf16 canonical",
    "peft fp32", "peft bf16", "peft fp32 dropout", "peft bf16 dropout", "peft fp32 dora", "peft bf16 dora",
)  # fmt: skip
PEERS_ON_GPU = ("liger bf16", "axolotl fp32", "axolotl-liger fp32", "unsloth fp32", "torchtune bf16")
NORMED = ("fxlora fp32 normed",)  # as those of Liger's: with its norms and rotary embedding


def default_variants(settings: Settings) -> tuple[str, ...]:
    """The whole table; on a GPU with the peers, which are made for it."""
    base = FLOAT32_BASE if settings.dtype == "float32" else HALF_BASE
    return base + NORMED + PEERS_ON_GPU if settings.device == "cuda" else base


class Stepper(Timed):
    """Forward and backward of one variant."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        dtype, shape = getattr(torch, settings.dtype), model_shapes.SHAPES[settings.shape]
        model = model_shapes.build(settings.shape, settings.layers, settings.shrink, settings.device, dtype)
        inputs = model_shapes.inputs(model, settings.tokens, settings.device, dtype)
        adapter = Adapter(settings.rank, model_shapes.targets(model), shape.parameters)
        model = with_adapter(model, variant, adapter).train()
        call, parameters = callable_of(model, variant, **settings.for_compile), [*trained(model), *inputs.values()]
        gradient: torch.Tensor | None = None

        def step() -> None:
            nonlocal gradient
            output = call(**inputs).last_hidden_state
            gradient = torch.randn_like(output) if gradient is None else gradient
            output.backward(gradient)
            for parameter in parameters:
                parameter.grad = None

        super().__init__(settings, step, [*model.parameters(), *model.buffers(), *inputs.values()])


def main() -> None:
    """Measure, print a table, write what was asked for."""
    asked = read_options(__doc__)
    settings = settings_of(asked)
    texts = asked.variants or default_variants(settings)
    about = environment(settings.device, settings.threads)
    print(f"{about}\n{settings}", flush=True)
    rows: list[Row] = []

    def keep(newer: list[Row]) -> None:
        if asked.json:
            save(asked.json, "train_step", about, settings, summarised(rows + newer, settings.is_reference))

    for mode in asked.mode:
        if variants := parse_all(texts, [mode]):
            rows += measured(variants, Stepper, settings, profiles=asked.profile, jobs=asked.jobs, after_round=keep)
    summaries = summarised(rows, settings.is_reference)
    print("\n".join(lines(summaries)))
    if asked.plot:
        draw_steps(summaries, f"{settings}\n{about}", asked.plot)


if __name__ == "__main__":
    main()
