"""Switches in slots compile nothing; exported programs switch by copies; models in these forms can be copied.

The counts are those of `benchmarks/recompiles.py`, which has peft's beside them.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.recompiles import ADAPTERS, Compiled, count, exported, files, lengths, mixing, ours

TOKENS = torch.arange(4 * 6).view(4, 6) % 61
NAMES = ["z", "x", "__base__", "y"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def output(model: Any, names: list[str] | None = None) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, adapter_names=names).last_hidden_state


def test_switches_in_slots_compile_nothing(tmp_path: Path) -> None:
    paths, model = files(tmp_path), ours(slots=True)
    assert len(paths) == len(ADAPTERS) == 3
    compiled = Compiled.of(model)

    def without(number: int) -> Tensor | None:
        del number
        with model.disable_adapter():
            return compiled.run()

    steps: dict[str, Callable[[int], object]] = {
        "set_adapter": lambda number: model.set_adapter(ADAPTERS[(number + 1) % 3]),
        "disable_adapter": without,
        "set_scale": lambda number: model.set_scale("x", 2.0 + number),
        "hotswap_adapter": lambda number: model.hotswap_adapter(paths[(number + 1) % 3], "x"),
    }
    for name, step in steps.items():
        found = count("slots", name, compiled, step)
        assert (found.failed, found.first, sum(found.later)) == ("", 1, 0), found
        model.set_adapter("x")


def test_set_scale_without_slots_compiles_nothing() -> None:
    model = ours()
    found = count("plain", "set_scale", Compiled.of(model), lambda number: model.set_scale("x", 2.0 + number))
    assert (found.first, sum(found.later)) == (1, 0)


def test_other_adapters_for_rows_compile_nothing() -> None:
    counts = list(mixing(with_peft=False))
    assert [found.library for found in counts] == ["fxlora, slots", "fxlora"]
    for found in counts:  # entering a mixed batch is another graph, once
        assert (found.failed, found.later) == ("", (1, *[0] * 9)), found


def test_lengths_of_sequences_compile_as_often_as_in_the_base() -> None:
    base, *others = list(lengths(with_peft=False))
    assert [found.later for found in others] == [base.later] * 2 and sum(base.later) == 1


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 reading an exported program
def test_exported_programs_switch_by_copies(tmp_path: Path) -> None:
    errors = dict(exported(tmp_path))
    assert list(errors) == ["exported", "saved and loaded"]
    assert max(errors.values()) < 1e-6


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_models_in_slots(how: str) -> None:
    model = ours(slots=True)
    model.set_adapter("y")
    mixed, one = output(model, NAMES), output(model)
    copied = COPIES[how](model)
    assert torch.equal(output(copied), one) and torch.equal(output(copied, NAMES), mixed)
    copied.set_adapter("z")
    copied.set_scale("y", 3.0)
    assert not torch.equal(output(copied), one) and not torch.equal(output(copied, NAMES), mixed)
    assert torch.equal(output(model), one) and torch.equal(output(model, NAMES), mixed)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_models_in_a_mixed_batch(how: str, gradients: bool) -> None:
    model = ours()
    model.set_adapter("y")
    mixed, one = output(model, NAMES), output(model)
    with torch.set_grad_enabled(gradients), model.adapter_rows(NAMES):
        inside = model(TOKENS).last_hidden_state.detach()
        copied = COPIES[how](model)
        with torch.no_grad():
            for name, parameter in copied.named_parameters():
                if "lora_B.z" in name:
                    parameter.mul_(3)
        assert torch.equal(model(TOKENS).last_hidden_state.detach(), inside)
    assert torch.allclose(inside, mixed, atol=1e-6)
    assert torch.equal(output(copied), one)  # a copy is in no context
    changed = output(copied, NAMES)
    assert torch.equal(changed[1:], mixed[1:]) and not torch.allclose(changed[0], mixed[0])


def test_factors_changed_inside_a_mixed_batch_act_at_once() -> None:
    model = ours()
    with torch.no_grad(), model.adapter_rows(NAMES):
        before = model(TOKENS).last_hidden_state
        assert torch.equal(model(TOKENS).last_hidden_state, before)
        for name, parameter in model.named_parameters():
            if "lora_B.z" in name:
                parameter.zero_()
        changed = model(TOKENS).last_hidden_state
        assert torch.equal(changed[1:], before[1:]) and not torch.allclose(changed[0], before[0])
    with model.disable_adapter():
        assert torch.allclose(changed[0], output(model)[0], atol=1e-6)
