"""`print_graph`: one line a node, with operators, arguments and known shapes."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from passes.nodes import LoraMeta
from passes.printer import print_graph
from tests.passes.helpers import TwoLayers, exported

assert_expected_inline = pytest.importorskip("expecttest").assert_expected_inline


def every_kind_of_node() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    w = graph.get_attr("h.0.fc.weight")
    a = graph.call_function(torch.addmm, (x, w, w), {"beta": 2, "alpha": 0.5})
    b = graph.call_function(operator.getitem, (a, (0, slice(None, 3), None)))
    c = graph.call_function(torch.cat, ([a, b],), {"dim": -1})
    d = graph.call_method("to", (c, torch.float16), {"non_blocking": True})
    e = graph.call_function(getattr, (d, "shape"))
    f = graph.call_module("h.0.drop", (d,), {"mode": "same"})
    g = graph.call_function(torch.ops.aten.sum.dim_IntList, (f, [0, 1]))
    graph.output({"one": (g,), "two": [e, None], "none": ()})
    return graph


def test_every_kind_of_node() -> None:
    assert_expected_inline(
        print_graph(every_kind_of_node()),
        """\
  x                = input
  h_0_fc_weight    = self.h.0.fc.weight
  addmm            = addmm(x, h_0_fc_weight, h_0_fc_weight, beta=2, alpha=0.5)
  getitem          = getitem(addmm, (0, slice(None, 3, None), None))
  cat              = cat([addmm, getitem], dim=-1)
  to               = cat.to(torch.float16, non_blocking=True)
  getattr_1        = to.shape
  h_0_drop         = self.h.0.drop(to, mode='same')
  sum_dim_int_list = sum.dim_IntList(h_0_drop, [0, 1])
  return {one: (sum_dim_int_list,), two: [getattr_1, None], none: ()}""",
    )


def test_inserted_nodes_are_marked() -> None:
    graph = every_kind_of_node()
    before = print_graph(graph).splitlines()
    for node in graph.nodes:
        if node.op in ("call_method", "output"):
            node.meta["lora"] = LoraMeta("fc", 0, "default", "y")
    after = print_graph(graph).splitlines()
    assert [new for old, new in zip(before, after, strict=True) if old != new] == [
        "+" + old[1:] for old in before if ".to(" in old or "return" in old
    ]


def test_shapes_where_they_are_known() -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(TwoLayers(), (torch.randn(5, 3),), dynamic_shapes=({0: batch},))
    text = print_graph(program.graph)
    (line,) = [line for line in text.splitlines() if "relu.default" in line]
    assert line.endswith(", 4]") and "# float32 [" in line and "[5, 4]" not in line
    text = print_graph(exported(TwoLayers(), torch.randn(5, 3)).graph)
    assert "relu.default(linear)   # float32 [5, 4]" in text


def test_empty_graph() -> None:
    assert print_graph(fx.Graph()) == ""
    graph = fx.Graph()
    graph.output(None)
    assert print_graph(graph) == "  return None"


def test_printing_changes_nothing() -> None:
    graph = every_kind_of_node()
    assert print_graph(graph) == print_graph(graph)
    assert all(not node.meta for node in graph.nodes)
