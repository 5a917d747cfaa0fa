"""What torch asks of operators: schemas, fake tensors, autograd, AOT tracing, autocast, vmap, errors, determinism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxlora._passes import rescale, without_bias
from fxlora.ops import lora_dora_siblings, lora_dora_swiglu, lora_linear_siblings, lora_swiglu

Arguments = tuple[Any, ...]


def siblings(
    p: float = 0.0, count: int = 2, biases: str = "yes", dtype: torch.dtype = torch.float32, trained: str = "xAB"
) -> Arguments:
    """Arguments of `lora_linear_siblings`; factors are float32."""
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad="x" in trained)
    W = [torch.randn(6 + i, 8, dtype=dtype, requires_grad="W" in trained) for i in range(count)]
    has_bias = {"yes": range(count), "no": (), "mixed": (1,)}[biases]
    b = [torch.randn(6 + i, dtype=dtype, requires_grad="b" in trained) if i in has_bias else None for i in range(count)]
    A = [torch.randn(3 + i, 8, requires_grad="A" in trained) for i in range(count)]
    B = [torch.randn(6 + i, 3 + i, requires_grad="B" in trained) for i in range(count)]
    scales = [torch.tensor(1.5 + i) for i in range(count)]
    return x, W, b, A, B, scales, p, torch.tensor([7]) if p else None


def dora(count: int = 2, biases: str = "yes", dtype: torch.dtype = torch.float32, trained: str = "xABm") -> Arguments:
    """Arguments of `lora_dora_siblings`; factors and ratios are float32."""
    *layers, _, _ = siblings(0.0, count, biases, dtype, trained)
    ratios = [torch.rand(6 + i, requires_grad="m" in trained) for i in range(count)]
    return *layers, ratios


def block(
    p: float = 0.0, ranks: tuple[int, int, int] = (3, 3, 3), dtype: torch.dtype = torch.float32, trained: str = "xAB"
) -> Arguments:
    """Arguments of `lora_swiglu`."""
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad="x" in trained)
    W = [torch.randn(shape, dtype=dtype, requires_grad="W" in trained) for shape in ((6, 8), (6, 8), (7, 6))]
    A = [torch.randn(r, w.shape[1], requires_grad="A" in trained) for r, w in zip(ranks, W, strict=True)]
    B = [torch.randn(w.shape[0], r, requires_grad="B" in trained) for r, w in zip(ranks, W, strict=True)]
    return x, W, A, B, [torch.tensor(1.5)] * 3, p, torch.tensor([7]) if p else None


def dora_block(
    ranks: tuple[int, int, int] = (3, 3, 3), dtype: torch.dtype = torch.float32, trained: str = "xABm"
) -> Arguments:
    """Arguments of `lora_dora_swiglu`."""
    *layers, _, _ = block(0.0, ranks, dtype, trained)
    return *layers, [torch.rand(size, requires_grad="m" in trained) for size in (6, 6, 7)]


def with_extras(arguments: Arguments) -> Arguments:
    """With a source of x and its scales, and a residual."""
    source, rows, columns = torch.randn(2, 5, 8), torch.rand(2, 5, 1) + 0.5, torch.rand(8) + 0.5
    outputs = arguments[1][-1].shape[0]
    x = (source * rows * columns).requires_grad_()
    return x, *arguments[1:], source, rows, columns, torch.randn(2, 5, outputs, requires_grad=True)


CALLS: dict[str, tuple[Any, Callable[[], Arguments]]] = {
    "siblings": (lora_linear_siblings, siblings),
    "siblings, dropout": (lora_linear_siblings, lambda: siblings(0.3)),
    "one layer": (lora_linear_siblings, lambda: siblings(count=1)),
    "no biases": (lora_linear_siblings, lambda: siblings(count=3, biases="no")),
    "mixed biases": (lora_linear_siblings, lambda: siblings(biases="mixed")),
    "16-bit": (lora_linear_siblings, lambda: siblings(dtype=torch.bfloat16)),
    "all trained": (lora_linear_siblings, lambda: siblings(0.3, trained="xABWb")),
    "factors trained": (lora_linear_siblings, lambda: siblings(0.3, trained="AB")),
    "nothing trained": (lora_linear_siblings, lambda: siblings(trained="")),
    "one layer, extras": (lora_linear_siblings, lambda: with_extras(siblings(count=1))),
    "dora": (lora_dora_siblings, dora),
    "dora, one layer": (lora_dora_siblings, lambda: dora(1)),
    "dora, no biases": (lora_dora_siblings, lambda: dora(3, "no")),
    "dora, mixed biases": (lora_dora_siblings, lambda: dora(2, "mixed")),
    "dora, 16-bit": (lora_dora_siblings, lambda: dora(dtype=torch.bfloat16)),
    "dora, all trained": (lora_dora_siblings, lambda: dora(trained="xABWbm")),
    "dora, ratios trained": (lora_dora_siblings, lambda: dora(trained="m")),
    "dora, nothing trained": (lora_dora_siblings, lambda: dora(trained="")),
    "swiglu": (lora_swiglu, block),
    "swiglu, extras": (lora_swiglu, lambda: with_extras(block(0.3))),
    "swiglu, dropout": (lora_swiglu, lambda: block(0.3)),
    "swiglu, ranks": (lora_swiglu, lambda: block(0.3, ranks=(2, 3, 4))),
    "swiglu, 16-bit": (lora_swiglu, lambda: block(dtype=torch.bfloat16)),
    "swiglu, all trained": (lora_swiglu, lambda: block(0.3, trained="xABW")),
    "swiglu, factors trained": (lora_swiglu, lambda: block(trained="AB")),
    "dora, extras": (lora_dora_siblings, lambda: with_extras(dora(1))),
    "dora swiglu": (lora_dora_swiglu, dora_block),
    "dora swiglu, extras": (lora_dora_swiglu, lambda: with_extras(dora_block())),
    "dora swiglu, ranks": (lora_dora_swiglu, lambda: dora_block((2, 3, 4))),
    "dora swiglu, 16-bit": (lora_dora_swiglu, lambda: dora_block(dtype=torch.bfloat16)),
    "dora swiglu, all trained": (lora_dora_swiglu, lambda: dora_block(trained="xABWm")),
    "dora swiglu, ratios trained": (lora_dora_swiglu, lambda: dora_block(trained="m")),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    operator, arguments = CALLS[name]
    utils = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
        "test_aot_dispatch_dynamic",
    )
    found = torch.library.opcheck(operator, arguments(), test_utils=utils)
    assert found == dict.fromkeys(utils, "SUCCESS")


def detached(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(detached(each) for each in value)
    return value.detach() if isinstance(value, Tensor) else value


BACKWARD = {
    "siblings": "lora_linear_siblings_backward",
    "siblings, dropout": "lora_linear_siblings_backward",
    "dora": "lora_dora_siblings_backward",
    "swiglu": "lora_swiglu_backward",
    "swiglu, dropout": "lora_swiglu_backward",
    "dora swiglu": "lora_dora_swiglu_backward",
}


@pytest.mark.parametrize("name", BACKWARD)
def test_opcheck_of_the_backward_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Arguments] = []
    operator = getattr(torch.ops.fxlora, BACKWARD[name])

    def recording(*args: Any) -> list[Tensor]:
        calls.append(detached(args))
        return operator(*args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.fxlora, BACKWARD[name], recording)
        forward, made = CALLS[name]
        forward(*made())[0].square().sum().backward()
    (arguments,) = calls
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    found = torch.library.opcheck(operator.default, arguments, test_utils=utils)
    assert found == dict.fromkeys(utils, "SUCCESS")


@pytest.mark.parametrize("name", ["siblings", "dora", "swiglu", "dora swiglu"])
def test_second_derivatives_are_refused(name: str) -> None:
    operator, arguments = CALLS[name]
    x, *rest = arguments()
    (gradient,) = torch.autograd.grad(operator(x, *rest)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivatives: use the model as it was"):
        gradient.sum().backward()


def canonical(name: str, arguments: Arguments) -> list[Tensor]:
    """What the canonical graph computes; without dropout."""
    if name == "siblings":
        x, W, b, A, B, s, *_ = arguments
        return [_linear(x, *each) for each in zip(W, b, A, B, s, strict=True)]
    if name == "dora":
        x, W, b, A, B, s, ratios = arguments
        return [_dora(x, *each) for each in zip(W, b, A, B, s, ratios, strict=True)]
    if name == "dora swiglu":
        x, *lists = arguments
        gate, up = (_dora(x, each[0], None, *each[1:]) for each in zip(*(own[:2] for own in lists), strict=True))
        W, *rest = (own[2] for own in lists)
        return [_dora(F.silu(gate) * up, W, None, *rest)]
    x, W, A, B, s, *_ = arguments
    gate, up = (_linear(x, W[i], None, A[i], B[i], s[i]) for i in (0, 1))
    return [_linear(F.silu(gate) * up, W[2], None, A[2], B[2], s[2])]


def _linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    y = F.linear(x, W, b)
    return torch.add(y, torch.mul(F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)), scale)).to(y.dtype)


def _dora(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, ratio: Tensor) -> Tensor:
    y = F.linear(x, W, b)
    s = torch.mul(F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)), scale)
    return torch.add(y, rescale(s, without_bias(y, b, -1), ratio, -1)).to(y.dtype)


def leaves(arguments: Arguments) -> list[Tensor]:
    flat = [each for value in arguments for each in (value if isinstance(value, list) else [value])]
    return [each for each in flat if isinstance(each, Tensor) and each.requires_grad]


def run(function: Callable[..., list[Tensor]], arguments: Arguments, dtype: torch.dtype) -> list[Tensor]:
    with torch.autocast("cpu", dtype):
        outputs = function(*arguments)
    assert {y.dtype for y in outputs} == {dtype}
    gradients = torch.autograd.grad(sum(y.float().square().mean() for y in outputs), leaves(arguments))
    return [*outputs, *gradients]


@pytest.mark.parametrize("name", ["siblings", "dora", "swiglu", "dora swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(name: str, dtype: torch.dtype, compiled: bool) -> None:
    """Of float32 models: as `linear`, the operator computes in autocast's dtype, and all gradients are float32."""
    operator = CALLS[name][0]
    trained, made, count = {
        "siblings": ("xABWb", siblings, 2),
        "dora": ("xABWbm", dora, 2),
        "swiglu": ("xABW", block, 1),
        "dora swiglu": ("xABWm", dora_block, 1),
    }[name]
    arguments = made(trained=trained)

    def ours(*args: Any) -> list[Tensor]:
        return operator(*args)[:count]

    torch._dynamo.reset()
    function = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    found = run(function, arguments, dtype)
    right = run(lambda *args: canonical(name, args), arguments, dtype)
    assert len(found) == len(right) > len(trained)
    for one, two in zip(found, right, strict=True):
        assert one.dtype == two.dtype
        assert (one - two).float().norm() < 0.02 * two.float().norm()


def test_autocast_in_the_backward_pass() -> None:
    """A user may call backward within autocast: gradients are what they are without."""
    arguments = siblings()
    y = lora_linear_siblings(*arguments)[0].square().sum()
    right = torch.autograd.grad(y, leaves(arguments)[:1], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(y, leaves(arguments)[:1])[0], right[0])


def test_autocast_leaves_float64_and_counts_alone() -> None:
    x, W, b, A, B, s, *_ = siblings(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear_siblings(x, W, b, A, B, s, 0.3, torch.tensor([7]))[0].dtype == torch.float64


@pytest.mark.parametrize("name", ["siblings", "siblings, dropout", "dora", "swiglu", "swiglu, dropout", "dora swiglu"])
def test_vmap(name: str) -> None:
    operator, made = CALLS[name]
    _, W, *rest = detached(made())
    samples, weights = torch.randn(5, 4, 8), torch.randn(4, *W[0].shape)

    def over_x(x: Tensor) -> Tensor:
        return operator(x, W, *rest)[0]

    def over_both(x: Tensor, first: Tensor) -> Tensor:
        return operator(x, [first, *W[1:]], *rest)[0]

    found = torch.vmap(over_x, in_dims=1, out_dims=1)(samples)
    torch.testing.assert_close(found, torch.stack([over_x(samples[:, i]) for i in range(4)], 1), rtol=1e-4, atol=1e-4)
    found = torch.vmap(over_both, in_dims=(1, 0))(samples, weights)
    expected = torch.stack([over_both(samples[:, i], weights[i]) for i in range(4)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["siblings", "dora", "swiglu", "dora swiglu"])
def test_batched_gradients(name: str) -> None:
    arguments = CALLS[name][1]()
    y = CALLS[name][0](*arguments)[0]
    incoming = torch.randn(3, *y.shape)

    def gradients(dy: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(y, leaves(arguments), dy, retain_graph=True, allow_unused=True)
        return [each for each in found if each is not None]

    batched = torch.vmap(gradients)(incoming)
    for index, each in enumerate(incoming):
        for one, two in zip(batched, gradients(each), strict=True):
            torch.testing.assert_close(one[index], two)


@pytest.mark.parametrize("name", ["siblings, dropout", "dora", "swiglu, dropout", "dora swiglu"])
def test_runs_are_bit_equal(name: str, poisoned_memory: None) -> None:
    """Under torch's deterministic algorithms, which also fill fresh memory with NaN."""
    operator, arguments = CALLS[name]
    made = arguments()

    def outputs() -> list[Tensor]:
        y = operator(*made)[0]
        return [y, *torch.autograd.grad(y.square().sum(), leaves(made)[:1])]

    first = outputs()
    assert all(each.isfinite().all() for each in first)
    assert all(torch.equal(one, two) for _ in range(3) for one, two in zip(first, outputs(), strict=True))


def test_meta_tensors() -> None:
    arguments = [
        [each.to("meta") if each is not None else None for each in value] if isinstance(value, list) else value
        for value in siblings()
    ]
    x, *rest = arguments
    shapes = [y.shape for y in lora_linear_siblings(x.to("meta"), *rest)]
    assert shapes == [y.shape for y in lora_linear_siblings(*siblings())]


@pytest.mark.parametrize("name", ["one layer, extras", "swiglu, extras"])
def test_what_does_not_fit_is_refused(name: str) -> None:
    operator, arguments = CALLS[name][0], list(CALLS[name][1]())
    for place, wrong, message in (
        (-4, torch.randn(2, 5, 9), r"source of an input \(2, 5, 8\).*got \(2, 5, 9\)"),
        (-4, torch.randn(2, 5, 8).double(), r"source of an input.*got \(2, 5, 8\) of torch.float64"),
        (-3, None, "a scale for each row"),
        (-1, torch.randn(1, 5, 6), r"added to an output.*got \(1, 5, 6\)"),
    ):
        changed = list(arguments)
        changed[place] = wrong
        with pytest.raises(ValueError, match=message):
            operator(*changed)


def test_a_residual_of_several_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="a residual is added to the output of a single layer, not of 2"):
        lora_linear_siblings(*siblings(), residual=torch.randn(2, 5, 7))
