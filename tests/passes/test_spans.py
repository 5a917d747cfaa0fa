"""`spans`: what ends a stretch of a graph in which computations may be moved, and what does not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.spans import spans
from tests.passes.lowered import captured


def ends(call: Callable[[fx.Graph, fx.Node], fx.Node], module_of: Callable[[str], object] | None = None) -> bool:
    """Whether the node that `call` adds ends a span."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = call(graph, x)
    output = graph.output(node)
    found = spans(graph, module_of)
    assert found[x] == found[node] == 0
    return found[output] == 1


def function(target: Any, *args: Any, **kwargs: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, x: graph.call_function(target, (x, *args), kwargs)


def method(name: str, *args: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, x: graph.call_method(name, (x, *args))


WRITING = {
    "x += 1": function(operator.iadd, 1),
    "x[0] = 1": function(operator.setitem, 0, 1),
    "x.add_": method("add_", 1),
    "torch.relu_": function(torch.relu_),
    "aten.add_": function(torch.ops.aten.add_.Tensor, 1),
    "relu, inplace by name": function(F.relu, inplace=True),
    "relu, inplace by position": function(F.relu, True),
    "dropout, inplace by position": function(F.dropout, 0.5, True, True),
    "out=": function(torch.add, 1, out=None) and (lambda graph, x: graph.call_function(torch.add, (x, 1), {"out": x})),
    "autocast": lambda graph, x: graph.call_function(torch.amp._enter_autocast, ("cpu", None, True, None)),
    "no_grad": lambda graph, x: graph.call_function(torch._C._set_grad_enabled, (False,)),
}
PURE = {
    "x + 1": function(operator.add, 1),
    "torch.add": function(torch.add, 1, out=None),
    "aten.add": function(torch.ops.aten.add.Tensor, 1),
    "relu": function(F.relu),
    "relu, not inplace": function(F.relu, inplace=False),
    "dropout": function(F.dropout, 0.5, True, False),
    "x.view": method("view", -1),
    "x.__getitem__": method("__getitem__", 0),
    "linear": lambda graph, x: graph.call_function(F.linear, (x, x)),
    "x.dtype": function(getattr, "dtype"),
}


@pytest.mark.parametrize("name", WRITING)
def test_writing(name: str) -> None:
    assert ends(WRITING[name])


@pytest.mark.parametrize("name", PURE)
def test_pure(name: str) -> None:
    assert not ends(PURE[name])


def test_modules() -> None:
    """A module may write into its input, unless it is known not to: a branch's own, or by its attribute `inplace`."""

    def call(target: str) -> Callable[[fx.Graph, fx.Node], fx.Node]:
        return lambda graph, x: graph.call_module(target, (x,))

    known: dict[str, object] = {
        "plain": nn.Linear(2, 2),
        "writing": nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)),
    }
    assert ends(call("plain"))
    assert not ends(call("plain"), known.__getitem__)
    assert ends(call("writing"), known.__getitem__)
    assert not ends(call("fc1.lora_scaling.default"))


def test_on_a_graph_of_dynamo() -> None:
    def computed(x: Tensor) -> Tensor:
        y = x.sin()
        with torch.autocast("cpu", torch.bfloat16):
            y = y @ y
        with torch.no_grad():
            z = y.cos()
        return z.add_(1).tan()

    graph = captured(computed, torch.randn(3, 3)).gm.graph
    found = spans(graph)
    by_target = {str(node.target): found[node] for node in graph.nodes}
    assert by_target["sin"] < by_target[str(operator.matmul)] < by_target["cos"] < by_target["tan"]


def test_behind_a_context_a_span_goes_on() -> None:
    """Not inside of it, and not if something is written there, or another context is left."""

    def computed(x: Tensor, y: Tensor) -> Tensor:
        z = x.sin()
        with torch.autocast("cpu", torch.bfloat16):
            z = z @ y
            with torch.autocast("cpu", enabled=False):
                z = z.float() @ y
            z = z.relu()
        z = z.cos()
        with torch.autocast("cpu", torch.bfloat16):
            y.add_(1)
        return z.tan()

    graph = captured(computed, torch.randn(3, 3), torch.randn(3, 3)).gm.graph
    found = spans(graph)
    first, second = (found[node] for node in graph.nodes if node.target is operator.matmul)
    by_target = {str(node.target): found[node] for node in graph.nodes}
    assert by_target["sin"] == by_target["cos"] == 0
    assert by_target["relu"] == first
    assert len({0, first, second, by_target["tan"]}) == 4


def test_a_context_that_is_left_out_of_order_ends_a_span() -> None:
    graph = fx.Graph()
    outer, inner = (graph.call_function(torch.amp._enter_autocast, ("cpu", None, True, None)) for _ in range(2))
    left = [graph.call_function(torch.amp._exit_autocast, (node,)) for node in (outer, inner)]
    output = graph.output(None)
    found = spans(graph)
    assert len({found[node] for node in (outer, inner, *left, output)}) == 5
