"""The source of generated functions: how it finds the parts of branches."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxlora.capture.codegen import generate_forward, source_of


def layer() -> nn.Linear:
    linear = nn.Linear(2, 2, bias=False)
    linear.add_module("lora_A", nn.ModuleDict({"default": nn.Linear(2, 2)}))
    return linear


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("", "self._modules['lora_A']._modules['default'].weight"),
        ("q.", "self._modules['q']._modules['lora_A']._modules['default'].weight"),
        ("h.0.q.", "getattr(self.h, \"0\")._modules['q']._modules['lora_A']._modules['default'].weight"),
    ],
)
def test_modules_of_a_layers_containers_are_found_by_keys(path: str, read: str) -> None:
    root = linear = layer()
    for name in reversed(path.split(".")[:-1]):
        root, inner = nn.Module(), root
        root.add_module(name, inner)
    graph = fx.Graph()
    factor, weight = graph.get_attr(f"{path}lora_A.default.weight"), graph.get_attr(f"{path}weight")
    graph.output(graph.call_function(torch.add, (factor, weight)))
    forward = generate_forward(graph)
    lines = [line.strip() for line in source_of(forward).splitlines()]
    assert sum(line.endswith(f"= {read}") for line in lines) == 1
    assert not any("_modules" in line for line in lines if line.endswith(".weight") and "lora_A" not in line)
    expected = linear.weight + linear.lora_A["default"].weight  # pyright: ignore[reportIndexIssue]
    assert torch.equal(forward(root), expected)
