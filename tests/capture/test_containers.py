"""Symbolic traces go into torch's transformer layers, whose linear layers would be hidden otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxlora import CaptureError, LoraConfig, lora_transform
from fxlora.capture import symbolic
from tests.models.checks import randomise, run, same

SIZES = dict(d_model=8, nhead=2, dim_feedforward=16, batch_first=True, dropout=0.1)


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(**{**SIZES, **options})
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class MaskedEncoder(Encoder):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES), 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.decoder(x, memory))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.transformer(memory, x))


def inputs(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {
        "x": torch.randn(size, 5, 8, generator=generator),
        "memory": torch.randn(size, 7, 8, generator=generator),
        "mask": torch.arange(5).expand(size, 5) > 2,
    }


def pick(model: nn.Module, size: int) -> dict[str, Tensor]:
    names = model.forward.__code__.co_varnames[1 : model.forward.__code__.co_argcount]
    return {name: inputs(size)[name] for name in names}


@pytest.mark.parametrize(
    "make", [Encoder, lambda: Encoder(norm_first=True), lambda: Encoder(activation="gelu"), Decoder],
    ids=["encoder", "norm-first", "gelu", "decoder"],
)  # fmt: skip
def test_the_layers_inside_are_call_sites(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    lora = lora_transform(
        model,
        LoraConfig(r=2, target_modules=["linear1", "linear2"]),
        capture="symbolic",
        example_inputs=pick(model, 3),
    )
    other = pick(model, 4)
    assert len(lora._specs()) == 4
    for training in (False, True):
        assert same(run(lora, other, training=training), run(model, other, training=training))
    randomise(lora)
    live = run(lora, other)
    assert not torch.allclose(live[0], run(model, other)[0], atol=0.1)
    for found, expected in zip(run(lora.merge_and_unload(), other), live, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_branch_is_not_bypassed_by_the_fast_path() -> None:
    model = Encoder().eval().requires_grad_(False)
    batch = pick(model, 3)
    lora = lora_transform(model, LoraConfig(r=2, target_modules=["linear1"]), capture="symbolic")
    randomise(lora)
    with torch.no_grad():
        assert torch.backends.mha.get_fastpath_enabled()
        without_grad, base = lora(**batch), model(**batch)
    torch.testing.assert_close(without_grad, lora(**batch))
    assert not torch.allclose(without_grad, base, atol=0.1)


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (Encoder, "out_proj"),  # nn.MultiheadAttention branches on the rank of its input
        (MaskedEncoder, "linear1"),  # how a mask is used depends on its type
        (Whole, "linear1"),  # nn.Transformer compares sizes
    ],
)
def test_layers_that_stay_hidden_are_refused(make: Any, target: str) -> None:
    model = make()
    with pytest.raises(CaptureError, match="hidden inside a module that is kept whole"):
        lora_transform(model, LoraConfig(r=2, target_modules=[target]), capture="symbolic")


@pytest.mark.parametrize("make", [MaskedEncoder, Whole])
def test_a_container_that_cannot_be_traced_is_one_call(make: Any) -> None:
    model = make().eval().requires_grad_(False)
    nodes = [node.op for node in symbolic.capture(model, None).graph.nodes]
    assert nodes == ["placeholder", "placeholder", "call_module", "call_module", "output"]
    lora = lora_transform(
        model, LoraConfig(r=2, target_modules=["head"]), capture="symbolic", example_inputs=pick(model, 3)
    )
    other = pick(model, 4)
    for training in (False, True):
        assert same(run(lora, other, training=training), run(model, other, training=training))
