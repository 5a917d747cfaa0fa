"""redirect-saved: uses of a module become uses of its copy, and go back to what they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.base import Instance, Region, copy_graph
from passes.errors import PassError, VerifyError
from passes.printer import print_graph
from passes.redirect import RedirectSaved, VerifySaved, spread_template


class Net(nn.Module):
    """A head that is called and read, and an embedding that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.out = nn.Sequential(nn.Linear(3, 2))
        self.out.modules_to_save = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 2))})
        self.head.modules_to_save = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        self.tied = nn.Embedding(3, 3)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.head(x), self.head.weight)
        return self.out[0](h)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear)


def traced() -> Region:
    torch.manual_seed(0)
    net = Net()
    return Region(_Tracer().trace(net), (Instance("", net),))


def run(region: Region, x: Tensor) -> Tensor:
    return fx.GraphModule(region.module, region.graph)(x)


def test_calls_and_reads_use_the_copy() -> None:
    region = traced()
    before = print_graph(region.graph)
    result = RedirectSaved((("head", "a"), ("out", "a"))).run(region)
    assert result.modified and result.summary == "3 uses of 2 copies"
    net, x = region.module, torch.randn(4, 3)
    a, out = net.get_submodule("head.modules_to_save.a"), net.get_submodule("out.modules_to_save.a")
    assert torch.equal(run(region, x), out(F.linear(a(x), a.weight)))
    text = print_graph(region.graph)
    assert "self.head.modules_to_save.a(x)" in text and "self.out.modules_to_save.a.0(" in text
    again = RedirectSaved((("head", "a"), ("out", "a"))).run(region)
    assert not again.modified and print_graph(region.graph) == text
    RedirectSaved((("head", "b"),)).run(region)
    b = net.get_submodule("head.modules_to_save.b")
    assert torch.equal(run(region, x), net.get_submodule("out.0")(F.linear(b(x), b.weight)))
    RedirectSaved().run(region)
    assert print_graph(region.graph) == before
    assert not RedirectSaved().run(region).modified


def test_a_tied_tensor_is_the_modules_where_its_own_code_uses_it() -> None:
    net = Net()
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("tied.weight")  # one node for both, as torch.export makes it
    rows = graph.call_function(F.embedding, (x, weight))
    result = graph.call_function(F.linear, (rows, weight))
    graph.output(result)
    rows.meta["nn_module_stack"] = {"": ("", "Net"), "tied": ("tied", "Embedding")}
    result.meta["nn_module_stack"] = {"": ("", "Net"), "head": ("head", "Linear")}
    region = Region(graph, (Instance("", net),))
    before = print_graph(graph)
    RedirectSaved((("head", "a"),)).run(region)
    VerifySaved((("head", "a"),), (("head", "a"),)).run(region)
    copied = net.get_submodule("head.modules_to_save.a")
    ids = torch.tensor([0, 2])
    assert torch.equal(run(region, ids), F.linear(net.tied(ids), copied.weight))
    region.graph = copy_graph(region.graph)
    RedirectSaved().run(region)
    assert print_graph(region.graph) == before


def test_a_template_calls_the_copy_with_whatever_it_gets() -> None:
    class Head(nn.Module):
        def forward(self, *args: Tensor, factor: float = 1.0) -> Tensor:
            return args[0] * factor

    head = Head()
    head.modules_to_save = nn.ModuleDict({"a": Head()})
    region = Region(spread_template(), (Instance("head", head),))
    RedirectSaved((("", "a"),)).run(region)
    VerifySaved((("", "a"),), (("", "a"),)).run(region)
    module = fx.GraphModule(head, region.graph)
    assert torch.equal(module(torch.ones(2), factor=3.0), torch.full((2,), 3.0))


def test_a_module_that_is_not_used() -> None:
    region = traced()
    region.module.spare = nn.Linear(1, 1)
    with pytest.raises(PassError, match="the captured graph never uses 'spare'"):
        RedirectSaved((("spare", "a"),)).run(region)


def test_verify_names_the_module() -> None:
    registered = (("head", "a"), ("head", "b"))
    region = traced()
    VerifySaved((), registered).run(region)
    with pytest.raises(VerifyError, match="'head': the graph does not run the copy of adapter 'a'"):
        VerifySaved((("head", "a"),), registered).run(region)
    RedirectSaved((("head", "a"),)).run(region)
    with pytest.raises(VerifyError, match="'head': the graph runs the copy of adapter 'a', which is not active"):
        VerifySaved((), registered).run(region)
    node = next(node for node in region.graph.nodes if node.op == "get_attr")
    node.target = "head.weight"
    del node.meta["redirected"]
    with pytest.raises(VerifyError, match="'head': 'head_weight' uses the original, not the copy of 'a'"):
        VerifySaved((("head", "a"),), registered).run(region)
