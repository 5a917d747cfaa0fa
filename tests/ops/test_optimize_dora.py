"""Models with DoRA, optimized and compiled: what their canonical graphs compute, with a gradient for the magnitudes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxlora
import fxlora.ops.call
from fxlora import optimize
from fxlora.compile import optimized as dynamo_graph
from tests.ops.test_optimize import (
    CAPTURES,
    LIFECYCLE,
    Mlp,
    assert_near,
    assert_same,
    batch,
    calls,
    calls_when_compiled,
    config,
    results,
    transformed,
)


def pair(capture: str, **options: Any) -> tuple[Any, Any]:
    """Two models with DoRA, the same, with magnitudes that are no norms."""
    model = transformed(capture, use_dora=True, **options)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("training", [False, True])
def test_computes_what_the_canonical_graphs_do(capture: str, training: bool) -> None:
    model, canonical = pair(capture)
    report = optimize(model)
    assert sorted(report.lowered) == sorted(["q", "k", "v", "mlp.gate", "mlp.up", "mlp.down"])
    assert not report.kept
    assert_same(model.train(training), canonical.train(training))
    assert len(results(model, batch())) == 2 + 18
    model.verify()
    assert fxlora.diff(model, canonical).is_empty
    optimize(model, False)
    assert all(torch.equal(a, b) for a, b in zip(results(model, batch()), results(canonical, batch()), strict=True))


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_a_whole_graph_joins_siblings_and_blocks(capture: str) -> None:
    model, _ = pair(capture)
    report = optimize(model)
    assert report.shared == ("q", "k", "v")
    assert report.blocks == (("mlp.gate", "mlp.up", "mlp.down"),)
    assert calls(model.lowered_regions()[0].graph) == [3, 3]


def test_blocks_among_modules() -> None:
    model, canonical = pair("modules")
    assert optimize(model).blocks == (("mlp.gate", "mlp.up", "mlp.down"),)
    block = type(model.mlp)
    assert block is not Mlp and issubclass(block, Mlp)
    for options, trained in (({}, False), ({"rank_pattern": {"down": 5}}, False), ({}, True)):
        model, canonical = pair("modules", **options)
        assert optimize(model).blocks
        for each in (model, canonical):
            each.mlp.requires_grad_(trained)
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
        assert len(results(model, batch())) == 2 + 18 + 3 * trained
        assert_same(model, canonical)
    handle = model.mlp.up.register_forward_pre_hook(lambda _m, x: (x[0] * 2,))
    canonical.mlp.up.register_forward_pre_hook(lambda _m, x: (x[0] * 2,))
    assert_same(model, canonical)
    handle.remove()
    with pytest.raises(AssertionError):
        assert_same(model, canonical)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
@pytest.mark.parametrize("step", ["both", "merge", "unmerge", "load", "scale", "disable", "slots"])
def test_holds_through_changes_of_adapters(capture: str, step: str, tmp_path: Path) -> None:
    model, canonical = pair(capture)
    optimize(model)
    for each in (model, canonical):
        torch.manual_seed(5)
        LIFECYCLE[step](each, tmp_path / str(each is model))
    assert_same(model, canonical)
    model.verify()
    assert_same(optimize(model, False) and model, canonical)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_several_adapters(capture: str, use_dora: bool) -> None:
    """Two of DoRA at one layer both read its own output, and stay canonical; a plain one is added to what the first gives."""
    model, canonical = pair(capture, target_modules=["q", "up"])
    optimize(model)
    for each in (model, canonical):
        torch.manual_seed(5)
        each.add_adapter("other", config(target_modules=["q", "k"], use_dora=use_dora))
        each.set_adapter(["default", "other"])
    assert_same(model, canonical)
    assert set(optimize(model).lowered) == {"k", "mlp.up"} | (set() if use_dora else {"q"})


def test_zero_magnitudes_and_rows() -> None:
    model, _ = pair("modules")
    with torch.no_grad():
        model.q.lora_magnitude_vector.default.weight[0] = 0
        for layer in (model.q, model.mlp.up):
            layer.weight[1] = 0
            layer.lora_B.default.weight[1] = 0
            layer.lora_weight_norm.default.squared[1] = 0
    canonical = copy.deepcopy(model)
    optimize(model)
    found = results(model, batch())
    assert all(each.isfinite().all() for each in found)
    assert_near(found, results(canonical, batch()))
    assert model.q.lora_magnitude_vector.default.weight.grad[0] != 0
    assert model.q.lora_magnitude_vector.default.weight.grad[1] == 0


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_follows_a_change_of_dtype(capture: str) -> None:
    model, canonical = pair(capture)
    optimize(model)
    assert_same(model.double(), canonical.double(), torch.float64)


def test_float32_factors_on_a_bfloat16_base() -> None:
    """Both are as near to float32 as bfloat16 is."""
    exact, _ = pair("modules")
    model = copy.deepcopy(exact).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    canonical = copy.deepcopy(model)
    optimize(model)
    right = results(exact, batch())

    def errors(found: list[Tensor]) -> list[float]:
        return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]

    ours, theirs = errors(results(model, batch(torch.bfloat16))), errors(results(canonical, batch(torch.bfloat16)))
    assert max(ours) < max(0.05, 1.5 * max(theirs))
    assert model.q.lora_magnitude_vector.default.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("capture", CAPTURES)
def test_within_autocast_and_without_gradients(capture: str) -> None:
    model, canonical = pair(capture)
    optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(batch()), canonical(batch())
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), canonical(batch()))
    if capture == "modules":
        torch.testing.assert_close(torch.vmap(model)(batch()), canonical(batch()))


def test_a_base_that_is_trained_too() -> None:
    model, canonical = pair("symbolic")
    optimize(model)
    for each in (model, canonical):
        each.requires_grad_(True)
    assert len(results(model, batch())) == len(results(canonical, batch())) == 2 + 18 + 9
    assert_same(model, canonical)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_hooks_see_what_they_would(capture: str) -> None:
    model, canonical = pair(capture)
    optimize(model)
    for each in (model, canonical):
        for name in ("q", "mlp.gate"):
            each.get_submodule(name).register_forward_pre_hook(lambda _m, x: (x[0] * 2,))
    assert_same(model, canonical)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 3, 4, 8)])
def test_inputs_of_other_shapes(shape: tuple[int, ...]) -> None:
    model, canonical = pair("symbolic")
    optimize(model)
    x = torch.randn(shape)
    assert_near(results(model, x), results(canonical, x))


def test_factors_of_two_dtypes() -> None:
    """Of siblings: each has a call of its own."""
    model, canonical = pair("symbolic")
    optimize(model)
    for each in (model, canonical):
        for factor in (each.k.lora_A.default, each.k.lora_B.default):
            factor.double()
    assert_same(model, canonical)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("optimizing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_in_one_graph(capture: str, optimizing: bool, dropout: float) -> None:
    """With dropout only in evaluation mode are the layers of the one form."""
    torch._dynamo.reset()
    model, canonical = pair(capture, lora_dropout=dropout)
    model, canonical = model.train(not dropout), canonical.train(not dropout)
    if optimizing:
        optimize(model)
    assert calls_when_compiled(model, canonical) == [[3, 3]]


def test_dropout_in_training_stays_canonical() -> None:
    torch._dynamo.reset()
    model, canonical = pair("modules", lora_dropout=0.4)
    optimize(model)
    assert_same(model.train(), canonical.train())
    seen: list[str] = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        changed = dynamo_graph(gm)
        seen.extend(str(node.target) for node in changed.graph.nodes if "fxlora" in str(node.target))
        return changed.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_near(results(model, batch(), compiled), results(canonical, batch()))
    assert not seen


@pytest.mark.parametrize("capture", CAPTURES)
def test_exported_programs_are_canonical(capture: str) -> None:
    model, canonical = pair(capture)
    optimize(model.eval())
    program = torch.export.export(model, (batch(),))
    assert not [node for node in program.graph.nodes if "fxlora" in str(node.target)]
    torch.testing.assert_close(program.module()(batch()), canonical.eval()(batch()))


def test_the_ratio_follows_its_factors() -> None:
    model, canonical = pair("modules")
    optimize(model)
    for each in (model, canonical):
        torch.manual_seed(6)
        each.q.lora_A.default.weight.data = torch.randn(2, 8)
        each.q.lora_scaling.default.value = 0.25
    assert_same(model, canonical)
    assert isinstance(model.q, nn.Linear)


@pytest.mark.parametrize("capture", CAPTURES)
def test_on_a_cpu_the_canonical_computation_runs(capture: str, composed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, canonical = pair(capture)
    optimize(model)
    for name in ("Doras", "DoraSwiglu", "norms_of"):
        monkeypatch.delattr(fxlora.ops.call, name)
    assert_same(model, canonical)
