"""Layers with branches in torch's own operations, as on a CPU: numbers against float64, and what optimized models do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fxlora import optimize
from fxlora.compile import backend
from fxlora.ops.composed import is_few, of_few_rows, of_many_rows
from tests.ops.compiling import BLOCK, Recorder, adapted, close, with_gradients
from tests.ops.references import TOLERANCE, relative_error
from tests.ops.test_optimize import CAPTURES, assert_near, assert_same, batch, results, transformed

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16


def tensors(
    rows: tuple[int, ...], dtype: torch.dtype, factors: torch.dtype, rank: int, bias: bool
) -> list[Tensor | None]:
    torch.manual_seed(0)
    x = torch.randn(*rows, 26).to(dtype).requires_grad_()
    W, b = (torch.randn(9, 26) / 5).to(dtype).requires_grad_(), torch.randn(9).to(dtype).requires_grad_()
    A, B = (torch.randn(rank, 26) / 5).to(factors).requires_grad_(), torch.randn(9, rank).to(factors).requires_grad_()
    return [x, W, b if bias else None, A, B]


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 0), (3, 300), (2, 3, 4)])
@pytest.mark.parametrize(("dtype", "factors"), [(F32, F32), (B16, F32), (F16, F32), (B16, B16), (F32, B16)])
@pytest.mark.parametrize("rank", [3, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_numbers(
    rows: tuple[int, ...], dtype: torch.dtype, factors: torch.dtype, rank: int, bias: bool, few: bool,
    poisoned_memory: None,
) -> None:  # fmt: skip
    given = tensors(rows, dtype, factors, rank, bias)
    x, W, b, A, B = given
    assert x is not None and W is not None and A is not None and B is not None
    scale = torch.tensor(1.5)
    assert is_few(x) == (rows != (3, 300))
    y = of_few_rows(x, W, b, A, B, scale, None, None) if few else of_many_rows(x, W, b, A, B, scale, 0.0)
    dy = torch.randn(y.shape).to(dtype)
    trained = [each for each in given if each is not None]
    found = torch.autograd.grad(y, trained, dy)
    doubles = [each.detach().double().requires_grad_() for each in trained]
    x, W, *rest = doubles
    A, B = rest[-2:]
    right = x @ W.t() + (rest[0] if bias else 0) + 1.5 * (x @ A.t() @ B.t())
    expected = torch.autograd.grad(right, doubles, dy.double())
    assert y.dtype == dtype and y.shape == right.shape
    assert [each.dtype for each in found] == [each.dtype for each in trained]
    errors = [
        relative_error(one, two) for one, two in zip((y.detach(), *found), (right.detach(), *expected), strict=True)
    ]
    assert max(errors) <= max(TOLERANCE[dtype], TOLERANCE[factors])


def test_few_rows_are_computed_in_the_factors_dtype() -> None:
    """Where nothing but the branch counts, a float32 branch of 16-bit rows is more exact than a 16-bit one."""
    x, _, _, A, B = tensors((4,), B16, F32, 8, False)
    assert x is not None and A is not None and B is not None
    W = torch.zeros(9, 26, dtype=B16)
    y = of_few_rows(x, W, None, A, B, torch.tensor(2.0), None, None)
    torch.testing.assert_close(y, (2 * x.float() @ A.t() @ B.t()).to(B16), rtol=0, atol=0)


def test_narrow_factors_are_widened() -> None:
    x, W, _, A, B = tensors((4,), F32, B16, 8, False)
    assert x is not None and W is not None and A is not None and B is not None
    y, right = (
        of_few_rows(x, W, None, *factors, torch.tensor(2.0), None, None) for factors in ((A, B), (A.float(), B.float()))
    )
    assert torch.equal(y, right)


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("dtype", [F32, B16])
def test_dropout(rows: int, dtype: torch.dtype) -> None:
    """Forward and backward have one mask, of the share asked for, which torch's generator decides."""
    eye = torch.eye(26, dtype=dtype)
    x = torch.ones(rows, 26, dtype=dtype, requires_grad=True)

    def branch() -> Tensor:
        return of_many_rows(x, torch.zeros_like(eye), None, eye, eye, torch.tensor(1.0), 0.25)

    torch.manual_seed(4)
    y = branch()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, dx)
    kept = y != 0
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 4 / 3), rtol=1e-2, atol=0)
    assert not torch.equal(branch(), y)
    torch.manual_seed(4)
    assert torch.equal(branch(), y)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("training", [False, True])
def test_optimized_models_compute_what_the_canonical_graphs_do(capture: str, training: bool, composed: None) -> None:
    model, canonical = transformed(capture).train(training), transformed(capture).train(training)
    optimize(model)
    assert_same(model, canonical)
    many = batch().repeat(1, 20, 1)
    assert is_few(batch()) and not is_few(many)
    assert_near(results(model, many), results(canonical, many))
    assert len(results(model, batch())) == 2 + 12
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_near(results(model, batch(), call), results(canonical, batch()))


def test_models_with_dropout_under_checkpointing(composed: None) -> None:
    model = transformed("modules", lora_dropout=0.4).train()
    optimize(model)
    x = torch.randn(2, 200, 8)
    assert not is_few(x)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)  # pyright: ignore[reportReturnType]

    assert_near(results(model, x, checkpointed), results(model, x))
    assert not torch.equal(model(x), model(x))


def test_second_derivatives(composed: None) -> None:
    """Nothing but torch's own operations: they have them."""
    model, canonical = transformed("modules").double(), transformed("modules").double()
    optimize(model)
    x = batch(torch.float64).requires_grad_()

    def second(each: torch.nn.Module) -> Tensor:
        (gradient,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    torch.testing.assert_close(second(model), second(canonical))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [F32, B16])
@pytest.mark.parametrize(("options", "dynamic"), [({}, False), ({}, True), ({"lora_dropout": 0.3}, False)], ids=str)
def test_the_backend(
    options: dict[str, Any], train: bool, dtype: torch.dtype, dynamic: bool, composed: None, recorder: Recorder
) -> None:
    model = adapted(BLOCK, train=train, **options)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.to(dtype)
    x = torch.randn(3, 5, 8, dtype=dtype)
    found = with_gradients(model, torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic), x)
    assert close(found, with_gradients(model, model, x), 1e-5 if dtype == F32 else 0.03)
    assert (recorder.calls("lora_linear_siblings"), recorder.calls("lora_swiglu")) == ([], [])
    (graph,) = recorder.graphs
    products = [node for node in graph.graph.nodes if node.target is torch.nn.functional.linear]
    assert len(products) == 3 * 7
    scaled = [node for node in graph.graph.nodes if node.target is torch.mul and node.args[0] in products]
    assert len(scaled) == 7 and all(set(each.users) < set(products) for each in scaled)
    assert _float32_branches(graph) == (7 if dtype == B16 and not dynamic else 0)


def _float32_branches(graph: torch.fx.GraphModule) -> int:
    """Whose inputs are cast."""
    return sum(node.target == "to" and node.args[1] == F32 for node in graph.graph.nodes)


@pytest.mark.parametrize("rows", [5, 300])
def test_hooks_and_autocast(rows: int, composed: None) -> None:
    model, canonical = transformed("modules", lora_dropout=0.3).eval(), transformed("modules", lora_dropout=0.3).eval()
    optimize(model)
    for each in (model, canonical):
        each.k.register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(rows, 8)
    assert_near(results(model, x), results(canonical, x))
    with torch.autocast("cpu", B16):
        assert_near(results(model, x), results(canonical, x), 0.02)
