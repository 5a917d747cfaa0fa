"""`recompute`: which inputs are a tensor with a scale for each row and each column, whatever norm made them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.recompute import recompute
from tests.passes.examples import calls, checked, keyword, layers, with_examples

H, N, W = (torch.randn(2, 3, 4), torch.rand(4) + 0.5, torch.randn(4, 5))


def scale(h: Tensor) -> Tensor:
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def llama(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    wide = h.to(torch.float32)
    return (layers(n * (wide * scale(wide)).to(h.dtype), [W])[0],)


def gemma(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    wide = h.float()
    return (layers(((wide * scale(wide)) * (1.0 + n.float())).type_as(h), [W])[0],)


def of_torch(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(F.rms_norm(h, (4,), n, 1e-6), [W])[0],)


def of_torch_without_a_weight(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(F.rms_norm(h, [4], eps=0.1), [W])[0],)


def without_a_weight(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(torch.mul(scale(h), h), [W])[0],)


NORMS = (llama, gemma, without_a_weight, of_torch, of_torch_without_a_weight)


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_found(function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    inputs = (H.to(dtype), N.to(dtype), W.to(dtype))
    gm = with_examples(function, *inputs)
    assert recompute(gm.graph, (layers,)) == 1
    (call,) = calls(gm)
    source, rows = keyword(call, "source"), keyword(call, "row_scale")
    assert source is not None and source.name == "h"
    assert rows is not None and rows.meta.get("example_value", torch.empty(2, 3, 1)).shape == (2, 3, 1)
    columns = keyword(call, "column_scale")
    assert (columns is None) == (function in (without_a_weight, of_torch_without_a_weight))
    if dtype == torch.float32:
        checked(gm, function, *inputs)  # in place of the input, the stand-in takes what its source gives


def layer_norm(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(torch.layer_norm(h, (4,), n), [W])[0],)


def only_columns(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(h * n, [W])[0],)


def two_row_scales(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(h * scale(h) * scale(h), [W])[0],)


def gate(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(h * torch.tanh(h), [W])[0],)


def narrowed(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers((h * scale(h)).to(torch.bfloat16), [W])[0],)


def broadcast(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(h[:, :1] * scale(h), [W])[0],)


def of_whole_numbers(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(h.long().float() * scale(h), [W])[0],)


def over_two_dimensions(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(F.rms_norm(h, (3, 4), eps=1e-6), [W])[0],)


def with_an_unknown_epsilon(h: Tensor, n: Tensor, W: Tensor) -> tuple[Tensor, ...]:
    return (layers(F.rms_norm(h, (4,), n), [W])[0],)


KEPT = (
    over_two_dimensions,
    with_an_unknown_epsilon,
    layer_norm,
    only_columns,
    two_row_scales,
    gate,
    narrowed,
    broadcast,
)


@pytest.mark.parametrize("function", KEPT)
def test_kept(function: Callable[..., tuple[Tensor, ...]]) -> None:
    gm = with_examples(function, H, N, W)
    assert recompute(gm.graph, (layers,)) == 0
    assert not calls(gm)[0].kwargs


def test_casts_of_whole_numbers_are_the_source() -> None:
    gm = with_examples(of_whole_numbers, H, N, W)
    assert recompute(gm.graph, (layers,)) == 1
    source = keyword(calls(gm)[0], "source")
    assert source is not None and source.meta["example_value"].is_floating_point()


def test_float16_keeps_its_input() -> None:
    """A scale may be too large for it, or what is multiplied with it."""
    gm = with_examples(without_a_weight, H.half(), N.half(), W.half())
    assert recompute(gm.graph, (layers,)) == 0


def test_one_feature_is_neither_row_nor_column() -> None:
    gm = with_examples(without_a_weight, H[..., :1], N[:1], W[:1])
    assert recompute(gm.graph, (layers,)) == 0
