"""Graphs whose nodes have example values, as Dynamo's have, with a stand-in for the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx


def layers(x: Tensor, weights: list[Tensor], residual: Tensor | None = None, **scaled: Tensor) -> list[Tensor]:
    """An operator: `x W` for each weight, plus the residual; x made anew from its source where there is one."""
    if scaled:
        columns = scaled.get("column_scale")
        x = scaled["source"] * scaled["row_scale"] * (1 if columns is None else columns)
    outputs = [x.float() @ W.float() for W in weights]
    return [(y if residual is None else y + residual).to(weights[0].dtype) for y in outputs]


class _Noting(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = value = super().run_node(n)
        return value


def with_examples(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The graph of a function, with an example of what each node gives."""
    tracer = fx.Tracer(autowrap_functions=(layers,))
    gm = fx.GraphModule(torch.nn.Module(), tracer.trace(cast(Any, function)))
    _Noting(gm).run(*inputs)
    return gm


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    """Those of the operator."""
    return [node for node in gm.graph.nodes if node.target is layers]


def keyword(call: fx.Node, name: str) -> fx.Node | None:
    """A node that a call has for a keyword."""
    return cast("fx.Node | None", call.kwargs[name])


def checked(gm: fx.GraphModule, function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The changed graph, which computes what the function does."""
    gm.graph.lint()
    gm.recompile()
    for found, right in zip(gm(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(found, right)
    return gm
