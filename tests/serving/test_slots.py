"""Slots: several adapters in one graph, between which one switches by a copy."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxlora import AdapterError, LoraConfig, NoTargetError, lora_transform
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import tensors
from tests.oracle.cases import Case
from tests.serving.models import alone, largest_error, llama_with_three, moved, transformed
from tests.serving.test_mixed_batches import REFUSED, SERVED

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights"),
]

IN_SLOTS = [(case, capture) for case, capture in SERVED if "modules_to_save" not in case.name]


@pytest.mark.parametrize(("case", "capture"), IN_SLOTS, ids=[f"{case.name}-{capture}" for case, capture in IN_SLOTS])
def test_slots_give_what_the_adapters_give(case: Case, capture: str) -> None:
    model, batch = transformed(case, capture), case.batch()
    half = "float16" in case.name
    with torch.no_grad():
        expected = {name: alone(model, name, batch) for name in ("a", "b", "__base__")}
        token_rows = "trainable_token" in case.name
        if not token_rows:
            model.set_adapter(["b", "a"])
            expected["both"] = tensors(model(**batch))
        model.use_slots()
        model.verify()
        if not token_rows:
            assert largest_error(tensors(model(**batch)), expected.pop("both")) < (1e-2 if half else 1e-5)
        for name, values in expected.items():
            assert largest_error(alone(model, name, batch), values) < (1e-2 if half else 1e-5), name
        rows = next(value for value in batch.values() if isinstance(value, Tensor)).shape[0]
        names = ["b", *["a"] * (rows - 1)]
        if capture not in REFUSED.get(case.name, ()):
            mixed = tensors(model(**batch, adapter_names=names))
            assert largest_error(
                mixed, [torch.cat([b[:1], a[1:]]) for a, b in zip(expected["a"], expected["b"], strict=True)]
            ) < (1e-2 if half else 1e-5)
        model.leave_slots()
    model.verify()
    assert not any("lora_slots" in name or "lora_switch" in name for name, _ in model.named_modules())


def test_the_slots_are_in_no_file_and_no_state_dict() -> None:
    model = llama_with_three()
    before = list(model.state_dict())
    model.use_slots()
    assert list(model.state_dict()) == before


def test_scales_and_merges_in_slots() -> None:
    model, tokens = llama_with_three(), {"input_ids": torch.randint(0, 61, (2, 5))}
    plain = copy.deepcopy(model)
    model.use_slots()
    with torch.no_grad():
        for each in (model, plain):
            each.set_adapter("c")
            each.set_scale("c", 0.3)
        assert largest_error(tensors(model(**tokens)), tensors(plain(**tokens))) < 1e-5
        for each in (model, plain):
            each.set_adapter(["b", "c"])
            each.merge_adapter(["b"])
        assert largest_error(tensors(model(**tokens)), tensors(plain(**tokens))) < 1e-5
        for each in (model, plain):
            each.unmerge_adapter()
        assert largest_error(tensors(model(**tokens)), tensors(plain(**tokens))) < 1e-5


def test_adapters_come_and_go_in_slots() -> None:
    model, tokens = llama_with_three(), {"input_ids": torch.randint(0, 61, (2, 5))}
    model.use_slots()
    model.add_adapter("d", LoraConfig(r=16, target_modules=["o_proj"]))
    moved(model, 9)
    model.refresh_slots()
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    model.verify()
    plain = copy.deepcopy(model)
    plain.leave_slots()
    with torch.no_grad():
        for name in ("b", "c", "d"):
            assert largest_error(alone(model, name, tokens), alone(plain, name, tokens)) < 1e-5
    for name in ("b", "c", "d"):
        model.delete_adapter(name)
    assert not any("lora_" in name for name, _ in model.named_modules())


def test_weights_that_are_loaded_reach_the_slots() -> None:
    model, tokens = llama_with_three(), {"input_ids": torch.randint(0, 61, (2, 5))}
    other = llama_with_three()
    moved(other, 11)
    model.use_slots()
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        for name in ("a", "b", "c"):
            assert largest_error(alone(model, name, tokens), alone(other, name, tokens)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_new_dtype_in_slots(dtype: torch.dtype) -> None:
    model, tokens = llama_with_three(), {"input_ids": torch.randint(0, 61, (2, 5))}
    model.set_scale("b", 1 / 3)
    model.use_slots()
    model.to(dtype)
    plain = copy.deepcopy(model)
    plain.leave_slots()
    with torch.no_grad():
        for name in ("a", "b", "c"):
            assert largest_error(alone(model, name, tokens), alone(plain, name, tokens)) < (
                1e-12 if dtype == torch.float64 else 2e-2
            )
    scales = [buffer for name, buffer in model.named_buffers() if name.endswith("scale") and "slots" in name]
    assert scales and all(s.dtype == torch.promote_types(dtype, torch.float32) for s in scales)
    model.verify()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("capture", ["symbolic", "export", "modules"])
def test_copies_have_slots_of_their_own(copied: Any, capture: Any) -> None:
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(3, 6)
    model = lora_transform(
        net, LoraConfig(r=2, target_modules=["0", "2"]), adapter_name="a", capture=capture, example_inputs=x
    )
    model.add_adapter("b", LoraConfig(r=3, target_modules=["2"]))
    moved(model)
    model.eval()
    model.use_slots()
    plain = model(x)
    other = copied(model)
    other.set_adapter("b")
    assert torch.equal(model(x), plain)
    assert largest_error([other(x)], [plain]) > 1e-3
    assert torch.equal(other(x, adapter_names=["a"] * 3), model(x, adapter_names=["a"] * 3))
    other.verify()
    other.leave_slots()
    assert torch.equal(model(x), plain)


def test_a_slot_for_layers_that_no_adapter_has_yet() -> None:
    model = llama_with_three()
    model.use_slots(r=8, target_modules=["up_proj"])
    stacks = [name for name, _ in model.named_modules() if "up_proj.lora_slots." in name]
    assert len(stacks) == 4  # in each of two layers one of "a" and "b", and one of "c", which has DoRA
    model.verify()


@pytest.mark.parametrize("capture", ["symbolic", "export", "modules"])
def test_refusals(capture: Any) -> None:
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(3, 6)
    config = LoraConfig(r=4, target_modules=["0"], modules_to_save=["2"])
    model = lora_transform(net, config, adapter_name="a", capture=capture, example_inputs=x)

    def refused(call: Any, message: str, error: type[Exception] = AdapterError) -> None:
        before = snapshot(model)
        with pytest.raises(error, match=message):
            call()
        assert_unchanged(model, before)

    refused(model.use_slots, "call eval")
    model.eval()
    refused(model.use_slots, "copy of the whole module '2'")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["0"]))
    model.set_adapter("b")
    model.delete_adapter("a")
    refused(lambda: model.use_slots(r=2), "rank 2 cannot hold an adapter of rank 4")
    refused(lambda: model.use_slots(target_modules=["nothing"]), "nothing", NoTargetError)
    model.merge_adapter()
    refused(model.use_slots, "merged")
    model.unmerge_adapter()
    model.use_slots()
    refused(model.train, "leave_slots")
    refused(lambda: model.add_adapter("c", LoraConfig(target_modules=["0"], modules_to_save=["2"])), "whole module '2'")
    model.verify()
    model.leave_slots()
    model.train()
    assert torch.allclose(model(x), model(x))
