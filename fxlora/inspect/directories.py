"""`diff` and `compare` of Hugging Face model directories, for the command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from fxlora.capture import export
from fxlora.capture.inputs import Example
from fxlora.errors import CheckpointError, ConfigError
from fxlora.host.skeleton import skeleton
from fxlora.inspect.batches import batch_for
from fxlora.inspect.compare import Comparison, compare
from fxlora.inspect.diff import GraphDiff, diff
from fxlora.transform import lora_transform

_VOCABULARY = 1000
"""Random tokens are below this, or the size of the vocabulary if that is less."""


def diff_directories(
    a: Path, b: Path | None, config: object, capture: Literal["modules", "export"] = "export"
) -> GraphDiff:
    """The difference between two models, or of one with LoRA to itself without. Reads no weights.

    Args:
        a: a model directory.
        b: another; None for `a` with the configuration's LoRA.
        config: a LoRA configuration, which both models get if there are two; None for none.
        capture: how they become graphs.

    Raises:
        ConfigError: for one model without a configuration; for two without, by modules.
    """
    tokens = torch.zeros(2, 8, dtype=torch.long, device="meta")

    def graphs(path: Path) -> Any:
        model = skeleton(path)
        batch = batch_for(model, tokens)
        if config is None:
            return export.capture(model, Example.of(batch))
        example = batch if capture == "export" else None
        return lora_transform(model, config, capture=capture, example_inputs=example)

    if config is None and (b is None or capture == "modules"):
        raise ConfigError("there is nothing to compare with: give a second model, or --targets for LoRA on this one")
    after = graphs(a if b is None else b)
    if b is not None:
        return diff(graphs(a), after)
    with after.disable_adapter():
        before = copy.deepcopy(after)
    return diff(before, after)


def compare_directories(
    a: Path,
    b: Path,
    *,
    adapter: Path | None = None,
    tokens: list[int] | None = None,
    length: int = 8,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    backward: bool = False,
) -> Comparison:
    """Run two models on the same tokens, or on one random image, and find the first module that differs.

    Args:
        a: a model directory.
        b: another, such as a merged one.
        adapter: an adapter directory, for the first.
        tokens: of one text; random ones if None.
        length: number of random tokens.
        seed: of random tokens.
        dtype: to run both in; each one's own if None.
        backward: compare gradients too.

    Raises:
        CheckpointError: when a directory cannot be read.
    """
    first, second = _loaded(a, dtype), _loaded(b, dtype)
    if adapter is not None:
        first = lora_transform(first, adapter, capture="modules")
    batch = batch_for(first, _tokens(first, tokens, length, seed))
    return compare(first, second, batch, backward=backward)


def _tokens(model: nn.Module, tokens: list[int] | None, length: int, seed: int) -> torch.Tensor:
    size = int(getattr(getattr(model, "config", None), "vocab_size", _VOCABULARY))
    if tokens is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, min(size, _VOCABULARY), (1, length), generator=generator)
    wrong = [token for token in tokens if not 0 <= token < size]
    if wrong or not tokens:
        raise ConfigError(f"tokens should be numbers from 0 to {size - 1}, with commas between, not {wrong or 'none'}")
    return torch.tensor([tokens])


def _loaded(path: Path, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    cls: Any = type(skeleton(path))
    try:
        model = cast(nn.Module, cls.from_pretrained(path, local_files_only=True, dtype=dtype or "auto"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    assert isinstance(model, transformers.PreTrainedModel)
    return model.eval()
