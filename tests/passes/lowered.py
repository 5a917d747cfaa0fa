"""A stand-in for the operators, written into graphs of regions and of Dynamo: what the tests of lowering share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.base import copy_graph
from passes.branches.dora import magnitude_ratio, rescale, row_norms, squared_norms, without_bias
from passes.lower import BranchedLinear, functional_base, lower


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
    scales: Sequence[Tensor], p: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Layers that share their input; without dropout."""
    each = zip(weights, biases, As, Bs, scales, strict=True)
    return [branched(x, W, bias, A, B, scale) for W, bias, A, B, scale in each]


def doras(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
    scales: Sequence[Tensor], ratios: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Layers that share their input, with DoRA."""
    products = linears(x, weights, [None] * len(weights), As, Bs, scales, 0.0, None)
    each = zip(products, ratios, biases, strict=True)
    return [(ratio * y + (0 if bias is None else bias)).to(y.dtype) for y, ratio, bias in each]


def swiglu(
    x: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[Tensor],
    p: float, seed: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """A SwiGLU block; without dropout."""
    gate, up = linears(x, weights[:2], [None, None], As[:2], Bs[:2], scales[:2], p, seed)
    return linears(F.silu(gate) * up, weights[2:], [None], As[2:], Bs[2:], scales[2:], p, seed)


def dora_swiglu(
    x: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[Tensor],
    ratios: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """A SwiGLU block with DoRA."""
    gate, up = doras(x, weights[:2], [None, None], As[:2], Bs[:2], scales[:2], ratios[:2])
    return doras(F.silu(gate) * up, weights[2:], [None], As[2:], Bs[2:], scales[2:], ratios[2:])


def branched(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, p: float = 0.0) -> Tensor:
    """The canonical form."""
    y = F.linear(x, W, bias)
    dropped = F.dropout(x, p) if p else x
    b = F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))
    return torch.add(y, torch.mul(b, scale)).to(y.dtype)


def rescaled(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor, m: Tensor, squared: Tensor
) -> Tensor:
    """The canonical form of DoRA."""
    y = F.linear(x, W, bias)
    A, B = A.to(x.dtype), B.to(x.dtype)
    s = torch.mul(F.linear(F.linear(x, A), B), scale)
    ratio = magnitude_ratio(m, row_norms(W, A, B, scale, squared))
    return torch.add(y, rescale(s, without_bias(y, bias, -1), ratio, -1)).to(y.dtype)


def draw() -> None:
    """Stands for what draws a seed."""


def write(graph: fx.Graph, found: BranchedLinear) -> fx.Node:
    """A call of `linears` for one layer; with dropout p is 0.5, and there is a seed."""

    def value(operand: fx.Node | str | None) -> Any:
        return graph.get_attr(operand) if isinstance(operand, str) else operand

    base, drops = found.base, found.dropout is not None
    lists = [[value(each)] for each in (base.weight, base.bias, found.A, found.B, found.scaling)]
    if found.ratio is not None:
        call = graph.call_function(doras, (base.x, *lists, [found.ratio]))
        return graph.call_function(operator.getitem, (call, 0))
    seed = graph.call_function(draw) if drops else None
    return graph.call_function(operator.getitem, (graph.call_function(linears, (base.x, *lists, 0.5 * drops, seed)), 0))


def without_biases(graph: fx.Graph, found: BranchedLinear) -> fx.Node:
    """Likewise for a layer that has no bias: a region's has the path of one."""
    return write(graph, replace(found, base=replace(found.base, bias=None)))


@dataclass(frozen=True)
class Captured:
    """A graph of Dynamo's and the inputs that it was made for."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]

    def run(self, graph: fx.Graph) -> list[Tensor]:
        """What another graph computes in place of this one, on copies of the inputs."""
        inputs = [each.clone() if isinstance(each, Tensor) else each for each in self.inputs]
        torch.manual_seed(0)
        return list(fx.GraphModule(self.gm, copy_graph(graph))(*inputs))

    def lowered(self) -> tuple[fx.Graph, int]:
        """A copy of the graph, lowered, and how many layers were."""
        graph = copy_graph(self.gm.graph)
        count = lower(graph, functional_base, write)
        graph.lint()
        return graph, count


def captured(function: Callable[..., Any], *inputs: Any) -> Captured:
    """The graph that Dynamo makes of a function."""
    found: list[Captured] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(Captured(gm, tuple(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    copies = [each.clone() if isinstance(each, Tensor) else each for each in inputs]
    torch.compile(function, backend=keep, fullgraph=True)(*copies)
    (only,) = found
    inputs_again = tuple(each.clone() if isinstance(each, Tensor) else each for each in only.inputs)
    return Captured(only.gm, inputs_again)


def targets(graph: fx.Graph, *wanted: object) -> list[fx.Node]:
    """The nodes that call one of these."""
    return [node for node in graph.nodes if node.target in wanted]


def parameters(
    count: int = 1, columns: int = 3, out: int = 4, r: int = 2, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[list[Any]]:
    """`[W, bias, A, B, scale]` of some layers."""
    return [
        [
            torch.randn(out, columns),
            torch.randn(out) if bias else None,
            torch.randn(r, columns).to(dtype),
            torch.randn(out, r).to(dtype),
            torch.tensor(0.5 + index),
        ]
        for index in range(count)
    ]


def dora_parameters(
    count: int = 1, columns: int = 3, out: int = 4, r: int = 2, *, bias: bool = True
) -> list[list[Any]]:
    """`[W, bias, A, B, scale, m, squared norms of W]` of some layers."""
    layers = parameters(count, columns, out, r, bias=bias)
    return [[*layer, torch.rand(out) + 0.5, squared_norms(layer[0])] for layer in layers]
