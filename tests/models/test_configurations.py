"""Real architectures under configurations beyond plain LoRA: outputs and gradients are peft's, merged is unmerged.

Exporting takes seconds: of the exported cases one of each configuration that changes a graph is run. With
`FXLORA_ALL_EXPORTS=1` in the environment all are, which takes some minutes.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch

from fxlora import LoraConfig, lora_transform
from tests.models.checks import error, run, tensors
from tests.zoo import ARCHITECTURES, Entry

TOLERANCE = 3e-5
"""Of float32 outputs and gradients, relative to the largest value."""

NAMES = [
    "llama", "qwen2", "gemma3", "mixtral", "gpt2", "opt", "bert", "deberta-v2", "albert", "t5", "bart", "vit", "clip",
    "whisper", "convnext",
]  # fmt: skip
ENTRIES = [entry for entry in ARCHITECTURES if entry.name in NAMES]

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"0.*": 3}, "alpha_pattern": {"1.*": 5}},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "trained biases": {"bias": "all"},
    "gaussian, dropout": {"init_lora_weights": "gaussian", "lora_dropout": 0.2},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}

EXPORTED = {("llama", "dora"), ("bert", "lora_bias"), ("t5", "dora"), ("gpt2", "dora"), ("vit", "trained biases")}
"""What is exported in any case."""

CASES = [
    (entry, name, capture)
    for entry in ENTRIES
    for name in CONFIGURATIONS
    for capture in ("modules", "export")
    if capture == "modules" or (entry.name, name) in EXPORTED or os.environ.get("FXLORA_ALL_EXPORTS") == "1"
]


def name_in_peft(name: str) -> str:
    """A parameter's name without what peft's wrappers add to it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight"


def randomise(model: Any, named: Any) -> None:
    """The same random values in every trained parameter that has the same name."""
    generator = torch.Generator().manual_seed(7)
    trained = {named(name): p for name, p in model.named_parameters() if p.requires_grad}
    for _, parameter in sorted(trained.items()):
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def gradients(model: Any, batch: dict[str, Any], named: Any, training: bool) -> dict[str, torch.Tensor]:
    model.train(training)
    generator = torch.Generator().manual_seed(11)
    torch.manual_seed(13)
    loss: Any = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in tensors(model(**batch)))
    loss.backward()
    return {named(n): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("entry", "configuration", "capture"), CASES, ids=[f"{e.name}-{n}-{c}" for e, n, c in CASES])
def test_as_in_peft(entry: Entry, configuration: str, capture: Any) -> None:
    import peft

    settings = {"r": 4, "lora_alpha": 8, "target_modules": entry.targets, **CONFIGURATIONS[configuration]}
    batch = entry.batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns on layouts, missing biases and patterns without a match
        base = entry.model()
        torch.manual_seed(5)
        theirs = peft.get_peft_model(base, peft.LoraConfig(**settings))
    model = entry.model()
    keys = list(model.state_dict())
    torch.manual_seed(5)
    ours = lora_transform(model, LoraConfig(**settings), capture=capture, example_inputs=batch)
    own = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    other = {name_in_peft(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == other.keys()
    exact = [name for name in own if "magnitude" not in name]
    assert all(torch.equal(own[name], other[name]) for name in exact)
    assert [key for key in ours.state_dict() if "lora_" not in key] == keys
    randomise(ours, str)
    randomise(theirs, name_in_peft)
    unmerged = run(ours, batch)
    assert error(unmerged, run(theirs, batch)) < TOLERANCE
    dropout = settings.get("lora_dropout", 0.0) > 0
    found = gradients(ours, batch, str, dropout)
    expected = gradients(theirs, batch, name_in_peft, dropout)
    assert found.keys() == expected.keys() and len(found) > 1
    assert error([found[name] for name in sorted(found)], [expected[name] for name in sorted(found)]) < TOLERANCE
    ours.eval()
    if not settings.get("lora_bias"):  # some layers have no bias that could take the branch's
        assert error(run(ours.merge_and_unload(), batch), unmerged) < TOLERANCE
