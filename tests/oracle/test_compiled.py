"""Every kind and variant under torch.compile: one graph without breaks, and the numbers of eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.checks import error
from tests.oracle import parity
from tests.oracle.cases import CASES, Case

NAMES = (
    *(
        "nn.Linear",
        "transformers Conv1D",
        "nn.Embedding",
        "BART scaled embedding",
        "nn.Conv1d",
        "nn.Conv2d",
        "nn.Conv3d",
    ),
    *("nn.Conv2d, padding_mode", "nn.Conv2d, groups", "nn.ConvTranspose2d, groups", "nn.Bilinear", "nn.GRUCell"),
    *("nn.MultiheadAttention, self", "nn.MultiheadAttention, kdim and vdim", "nn.TransformerEncoderLayer"),
    *("parameter, einsum", "experts, two parameters", "functional weight", "module under two names"),
    *("DoRA, nn.Linear", "DoRA, nn.Embedding", "DoRA with dropout, nn.Conv2d", "lora_bias, nn.Linear"),
)
PLACES = [(case, "modules") for case in CASES if case.name in NAMES]
PLACES += [
    (case, "symbolic") for case in CASES if case.name in ("nn.Conv2d", "DoRA, nn.Linear", "experts, two parameters")
]


@pytest.mark.parametrize(("case", "capture"), PLACES, ids=[f"{case.name}-{capture}" for case, capture in PLACES])
def test_compiled(case: Case, capture: Any) -> None:
    assert len(PLACES) == len(NAMES) + 3
    torch._dynamo.reset()
    model: Any = parity.ours(case, capture)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    eager = parity.backward(model, case.batch())
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = parity.backward(compiled, case.batch())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert expected and error(found, eager) < 1e-6 and error(gradients, expected) < 5e-6
