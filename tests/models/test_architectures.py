"""Real architectures (tiny, random) in every capture: bitwise the base at B = 0, and peft's numbers after that."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

from fxlora import CaptureError, LoraConfig, lora_transform
from tests.models.checks import measure, run, same
from tests.zoo import ARCHITECTURES, PLAIN, Entry

TOLERANCE = 2e-5
"""Of float32 outputs and gradients, relative to the largest value."""


@pytest.mark.parametrize("capture", ["modules", "export"])
@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
def test_architecture(entry: Entry, capture: str) -> None:
    outcome = measure(entry, capture)
    if outcome.refused.startswith("torch.export refuses it") and Version(version("transformers")) < Version("5.20"):
        pytest.skip(f"this version of the model cannot be exported: {outcome.refused}")
    assert not outcome.refused
    assert outcome.eval_equal and outcome.train_equal and outcome.keys_equal and outcome.init_equal
    assert outcome.output_error is not None and outcome.output_error < TOLERANCE
    assert outcome.gradient_error is not None and outcome.gradient_error < TOLERANCE
    assert outcome.merged_error < TOLERANCE


@pytest.mark.parametrize("entry", [*ARCHITECTURES, *(entry for entry, _ in PLAIN)], ids=lambda entry: entry.name)
def test_symbolic_refuses_or_is_right(entry: Entry) -> None:
    """A trace that succeeds must hold for another size than the example's."""
    base, batch = entry.model().requires_grad_(False), entry.batch()
    try:
        lora = lora_transform(
            entry.model(), LoraConfig(r=4, target_modules=entry.targets), capture="symbolic", example_inputs=batch
        )
    except CaptureError as refusal:
        assert str(refusal).startswith("it cannot be traced (")
        return
    tokens = {name for name, value in batch.items() if not value.is_floating_point()}
    other = {name: value[:2, :-2] if name in tokens else value[:2] for name, value in batch.items()}
    for training in (False, True):
        assert same(run(lora, other, training=training), run(base, other, training=training))


CASES = [(entry, refusals, capture) for entry, refusals in PLAIN for capture in ("symbolic", "export", "modules")]


@pytest.mark.parametrize(("entry", "refusals", "capture"), CASES, ids=[f"{e.name}-{c}" for e, _, c in CASES])
def test_plain(entry: Entry, refusals: dict[str, str], capture: str) -> None:
    peft_can = entry.name not in ("functional-weight", "shared-module", "torch-encoder")
    outcome = measure(entry, capture, peft=peft_can)
    if capture in refusals:
        assert refusals[capture] in outcome.refused
        return
    assert not outcome.refused
    assert outcome.eval_equal and outcome.train_equal and outcome.keys_equal
    assert outcome.merged_error < TOLERANCE
    if peft_can:
        assert outcome.init_equal
        assert outcome.output_error is not None and outcome.output_error < TOLERANCE
        assert outcome.gradient_error is not None and outcome.gradient_error < TOLERANCE
