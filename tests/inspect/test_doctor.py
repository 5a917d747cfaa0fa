"""`doctor` on models that are broken in one way each, without a batch: it names the fault and the place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxlora import (
    DoctorReport,
    doctor,
)
from tests.inspect.doctoring import Net, adamw, fill, lora, train


def _plain() -> DoctorReport:
    return doctor(Net())


def _no_adapter() -> DoctorReport:
    model = lora()
    model.delete_adapter("default")
    return doctor(model)


def _everything_trainable() -> DoctorReport:
    model = lora()
    model.requires_grad_(True)
    return doctor(model)


def _part_of_the_base_trainable() -> DoctorReport:
    model = lora()
    model.get_parameter("second.bias").requires_grad_(True)
    return doctor(model)


def _nothing_trainable() -> DoctorReport:
    model = lora().train()
    model.requires_grad_(False)
    return doctor(model)


def _one_factor_frozen() -> DoctorReport:
    model = lora()
    model.get_parameter("second.lora_B.default.weight").requires_grad_(False)
    return doctor(model)


def _optimizer_before_the_transform() -> DoctorReport:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    return doctor(lora(model), optimizer=optimizer)


def _optimizer_of_another_model() -> DoctorReport:
    return doctor(lora(), optimizer=adamw(lora()))


def _optimizer_with_frozen_parameters() -> DoctorReport:
    model = lora()
    return doctor(model, optimizer=torch.optim.AdamW(model.parameters()))


def _branch_left_out_of_training() -> DoctorReport:
    model = lora()
    held = [each for name, each in model.named_parameters() if each.requires_grad and "second" not in name]
    optimizer = torch.optim.AdamW(held, lr=1e-2)
    train(model, optimizer)
    return doctor(model, optimizer=optimizer)


def _both_factors_zero() -> DoctorReport:
    model = lora()
    nn.init.zeros_(model.get_parameter("third.lora_A.default.weight"))
    return doctor(model)


def _tied() -> DoctorReport:
    model = Net()
    model.third.weight = model.first.weight
    return doctor(lora(model, target_modules=["first"]))


def _float16() -> DoctorReport:
    return doctor(lora(Net().half(), autocast_adapter_dtype=False))


def _narrow() -> DoctorReport:
    model = lora()
    for part in ("lora_A", "lora_B"):
        model.get_submodule(f"first.{part}.default").bfloat16()
    return doctor(model)


def _one_factor_converted() -> DoctorReport:
    model = lora(Net().bfloat16(), autocast_adapter_dtype=False)
    model.get_submodule("second.lora_A.default").float()
    return doctor(model)


def _not_finite() -> DoctorReport:
    model = lora()
    with torch.no_grad():
        model.get_parameter("first.lora_A.default.weight")[0, 0] = torch.nan
    return doctor(model)


def _gradient_not_finite() -> DoctorReport:
    model = lora()
    parameter = model.get_parameter("first.lora_B.default.weight")
    parameter.grad = torch.full_like(parameter, torch.inf)
    return doctor(model)


def _no_scale() -> DoctorReport:
    model = lora()
    model.set_scale("default", 0.0)
    return doctor(model)


def _large_scale() -> DoctorReport:
    return doctor(lora(lora_alpha=1000))


def _scale_changed_by_hand() -> DoctorReport:
    model = lora()
    model.get_buffer("first.lora_scaling.default.scale").fill_(7.0)
    return doctor(model)


def _transposed() -> DoctorReport:
    model = lora()
    model.get_submodule("second.lora_B.default").weight = nn.Parameter(torch.zeros(2, 8))
    return doctor(model)


def _replaced_layer() -> DoctorReport:
    model = lora()
    model.second = nn.Linear(8, 8)
    return doctor(model)


def _orphan() -> DoctorReport:
    model = lora()
    model.get_submodule("third.lora_A")["forgotten"] = nn.Linear(8, 2, bias=False)  # pyright: ignore[reportIndexIssue]
    return doctor(model)


def _stale_merge() -> DoctorReport:
    model = fill(lora())
    model.merge_adapter()
    with torch.no_grad():
        model.get_parameter("second.weight").add_(1.0)
    return doctor(model)


def _trained_while_merged() -> DoctorReport:
    model = lora()
    model.merge_adapter()
    return doctor(model)


def _disabled() -> DoctorReport:
    model = lora()
    model.disable_adapter_layers()
    return doctor(model)


def _dropout_in_evaluation() -> DoctorReport:
    model = lora(lora_dropout=0.1).eval()
    model.get_submodule("first.lora_dropout").train()
    return doctor(model)


STATIC: list[tuple[Callable[[], DoctorReport], str, str]] = [
    (_plain, "not-transformed", ""),
    (_plain, "everything-trainable", "first.weight"),
    (_no_adapter, "no-adapter", ""),
    (_everything_trainable, "everything-trainable", "second.weight"),
    (_part_of_the_base_trainable, "base-trainable", "second.bias"),
    (_nothing_trainable, "nothing-trainable", "default"),
    (_one_factor_frozen, "frozen-adapter", "second.lora_B.default.weight"),
    (_optimizer_before_the_transform, "not-in-optimizer", "first.lora_A.default.weight"),
    (_optimizer_before_the_transform, "frozen-in-optimizer", "first.weight"),
    (_optimizer_of_another_model, "stale-in-optimizer", "tensor of shape (2, 8)"),
    (_optimizer_with_frozen_parameters, "frozen-in-optimizer", "third.bias"),
    (_branch_left_out_of_training, "dead-branch", "second"),
    (_branch_left_out_of_training, "not-in-optimizer", "second.lora_B.default.weight"),
    (_both_factors_zero, "stuck-branch", "third"),
    (_tied, "tied-weight", "first"),
    (_float16, "float16-factors", "first.lora_A.default.weight"),
    (_narrow, "narrow-factors", "first.lora_A.default.weight"),
    (_one_factor_converted, "mixed-dtypes", "second"),
    (_not_finite, "not-finite", "first.lora_A.default.weight"),
    (_gradient_not_finite, "gradient-not-finite", "first.lora_B.default.weight"),
    (_no_scale, "scale-zero", "first"),
    (_large_scale, "scale-large", "first"),
    (_scale_changed_by_hand, "broken-graph", "first"),
    (_transposed, "broken-graph", "second"),
    (_replaced_layer, "missing-parameter", "second.lora_A.default.weight"),
    (_orphan, "orphan-branch", "third.lora_A.forgotten"),
    (_stale_merge, "stale-merge", "second.weight"),
    (_trained_while_merged, "idle-adapter", "first.lora_A.default.weight"),
    (_disabled, "adapters-disabled", "default"),
    (_dropout_in_evaluation, "dropout-in-evaluation", "first.lora_dropout.default"),
]


@pytest.mark.parametrize(("fault", "code", "place"), STATIC, ids=[f"{f.__name__}-{code}" for f, code, _ in STATIC])
def test_faults_without_a_batch(fault: Callable[[], DoctorReport], code: str, place: str) -> None:
    report = fault()
    assert code in report.codes, str(report)
    assert not report.ok
    (found,) = report.of_code(code)
    assert place in found.places if place else not found.places
    assert found.what and found.why and found.remedy


def test_a_finding_is_only_where_the_fault_is() -> None:
    assert _branch_left_out_of_training().of_code("dead-branch")[0].places == ("second",)
    assert _stale_merge().of_code("stale-merge")[0].places == ("second.weight",)
    assert _part_of_the_base_trainable().codes == ("base-trainable",)
    assert _narrow().of_code("narrow-factors")[0].where == "first.lora_A.default.weight, first.lora_B.default.weight"
