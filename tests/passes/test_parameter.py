"""Bare parameters: however a graph multiplies by one, the low-rank branch equals the weight with its update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxlora import LoraConfig, lora_transform

Call = Callable[[Tensor, Tensor], Tensor]

PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Call]] = {
    "einsum, out first": ((5, 3), (4, 3), lambda x, w: torch.einsum("bi,oi->bo", x, w)),
    "einsum, in first": ((5, 3), (3, 4), lambda x, w: torch.einsum("bi,io->bo", x, w)),
    "einsum, weight first": ((5, 3), (4, 3), lambda x, w: torch.einsum("oi, bi -> ob", w, x)),
    "einsum, every expert": ((5, 3), (2, 4, 3), lambda x, w: torch.einsum("bi,eoi->beo", x, w)),
    "einsum, experts of the input": ((5, 2, 3), (2, 3, 4), lambda x, w: torch.einsum("bei,eio->beo", x, w)),
    "einsum, experts summed": ((5, 2, 3), (2, 4, 3), lambda x, w: torch.einsum("bei,eoi->bo", x, w)),
    "bmm": ((2, 5, 3), (2, 3, 4), lambda x, w: torch.bmm(x, w)),
    "bmm, transposed": ((2, 5, 3), (2, 4, 3), lambda x, w: torch.bmm(x, w.transpose(1, 2))),
    "bmm, mT": ((2, 5, 3), (2, 4, 3), lambda x, w: x.bmm(w.mT)),
    "bmm, cast": ((2, 5, 3), (2, 4, 3), lambda x, w: torch.bmm(x, w.to(x.dtype).transpose(-1, -2))),
}
READS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Call]] = {
    "product with a matrix (in, out)": ((5, 3), (3, 4), lambda x, w: x @ w),
    "one expert": ((5, 3), (2, 4, 3), lambda x, w: nn.functional.linear(x, w[1])),
    "elementwise": ((5, 3), (5, 3), lambda x, w: (x * w).cos()),
    "swapped experts": ((2, 5, 3), (3, 2, 4), lambda x, w: torch.bmm(x, w.transpose(0, 1))),
    "two uses": ((2, 5, 3), (2, 3, 4), lambda x, w: torch.bmm(x, w) + w.sum()),
}


class Net(nn.Module):
    def __init__(self, call: Call, shape: tuple[int, ...], transposed: bool) -> None:
        super().__init__()
        self.call = call
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.randn(shape))
        self.inner.is_transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.inner.w)


@pytest.mark.parametrize("capture", ["symbolic", "export", "modules"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [*PRODUCTS, *READS])
def test_branch_equals_the_adapted_weight(name: str, transposed: bool, capture: Any) -> None:
    x_shape, w_shape, call = {**PRODUCTS, **READS}[name]
    if transposed and len(w_shape) == 2:
        pytest.skip("the layout is a matter of experts")
    net, x = Net(call, w_shape, transposed).double(), torch.randn(x_shape).double()
    base = net.inner.w.detach().clone()
    config = LoraConfig(r=2, lora_alpha=3, target_parameters=["inner.w"], autocast_adapter_dtype=False)
    lora = lora_transform(net, config, capture=capture, example_inputs=x)
    assert torch.equal(lora(x), call(x, base))
    (spec,) = lora._specs()
    assert spec.form == ("output" if name in PRODUCTS and capture != "modules" else "weight")
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape).to(parameter)
    A, B = (lora.get_parameter(f"inner.lora_parameters.w.lora_{part}.default.weight") for part in "AB")
    if len(w_shape) == 3:
        experts = w_shape[0]
        a, b = A.view(experts, 2, -1), B.view(B.shape[0], 2, experts)
        delta = torch.einsum("ore,eri->eio" if transposed else "ore,eri->eoi", b, a)
    else:
        delta = B @ A
    expected = call(x, base + 1.5 * delta)
    torch.testing.assert_close(lora(x), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(lora(x).cos().sum(), [A, B])
    reference = torch.autograd.grad(expected.cos().sum(), [A, B])
    torch.testing.assert_close(grads, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)
