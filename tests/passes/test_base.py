"""Regions, graph copies, and what the pipeline adds to passes: all or nothing, verification, stages, error texts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from passes.base import (
    SELF_CALL,
    Instance,
    Pass,
    PassResult,
    Pipeline,
    Region,
    Stage,
    copy_graph,
    describe,
    resolve,
    target_name,
)
from passes.errors import FxloraError, MergeError, PassError, VerifyError
from passes.printer import print_graph
from tests.passes.helpers import TwoLayers, exported, region_of


@dataclass(frozen=True)
class AppendNegation:
    """Negate what the graph returns."""

    name: ClassVar[str] = "append-negation"

    def run(self, region: Region) -> PassResult:
        output = region.graph.output_node()
        with region.graph.inserting_before(output):
            output.args = (region.graph.call_function(torch.neg, (output.args[0],)),)
        return PassResult(True, "1 sign")


@dataclass(frozen=True)
class Nothing:
    name: ClassVar[str] = "nothing"

    def run(self, region: Region) -> PassResult:
        return PassResult(False)


@dataclass(frozen=True)
class FailAt:
    """Change the graph and then fail, but only in one region."""

    name: ClassVar[str] = "fail-at"
    region: str
    error: Exception

    def run(self, region: Region) -> PassResult:
        AppendNegation().run(region)
        if region.instances[0].name == self.region:
            raise self.error
        return PassResult(True)


class Recorder:
    """A verifier that notes how many negations it saw, and fails at a given number."""

    name: ClassVar[str] = "recorder"

    def __init__(self, fail_at: int = -1) -> None:
        self.seen: list[int] = []
        self.fail_at = fail_at

    def run(self, region: Region) -> PassResult:
        self.seen.append(sum(node.target is torch.neg for node in region.graph.nodes))
        if self.seen[-1] == self.fail_at:
            raise VerifyError("'fc1': that is one too many")
        return PassResult(False)


def named_region(name: str) -> Region:
    model = TwoLayers()
    return Region(fx.Tracer().trace(model), (Instance(name, model),))


@pytest.mark.parametrize("error", [PassError("'fc1': no"), MergeError("'fc1': no"), VerifyError("'fc1': no")])
def test_failure_in_the_second_region_changes_no_region(error: FxloraError) -> None:
    regions = [named_region("first"), named_region("second"), named_region("third")]
    before = [(region.graph, print_graph(region.graph)) for region in regions]
    with pytest.raises(type(error)) as caught:
        Pipeline((AppendNegation(), FailAt("second", error))).run(regions)
    assert str(caught.value) == "after pass 'fail-at' at 'second': 'fc1': no"
    assert caught.value.__cause__ is error
    for region, (graph, text) in zip(regions, before, strict=True):
        assert region.graph is graph
        assert print_graph(graph) == text


def test_foreign_error_comes_through_unchanged_and_changes_no_region() -> None:
    regions = [named_region("first"), named_region("second")]
    before = [print_graph(region.graph) for region in regions]
    error = ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError) as caught:
        Pipeline((FailAt("second", error),)).run(regions)
    assert caught.value is error
    assert [print_graph(region.graph) for region in regions] == before


def test_success_changes_every_region_and_keeps_the_given_graphs() -> None:
    regions = [named_region("first"), named_region("second")]
    graphs = [region.graph for region in regions]
    before = [print_graph(graph) for graph in graphs]
    Pipeline((AppendNegation(),)).run(regions)
    assert [print_graph(graph) for graph in graphs] == before
    x = torch.randn(5, 3)
    for region in regions:
        assert torch.equal(fx.GraphModule(region.module, region.graph)(x), -region.module(x))


def test_stages() -> None:
    stages = Pipeline((AppendNegation(), Nothing())).run([named_region("block"), named_region("")])
    assert [(stage.pass_name, stage.region, stage.modified) for stage in stages] == [
        ("append-negation", "'block'", True),
        ("nothing", "'block'", False),
        ("append-negation", "the model", True),
        ("nothing", "the model", False),
    ]
    assert [stage.nodes for stage in stages] == [{"neg": 1}, {}, {"neg": 1}, {}]
    assert all(stage.seconds > 0 for stage in stages)


def test_stage_counts_removed_nodes_too() -> None:
    @dataclass(frozen=True)
    class ReluToTanh:
        name: ClassVar[str] = "relu-to-tanh"

        def run(self, region: Region) -> PassResult:
            for node in region.graph.nodes:
                if node.target is torch.relu:
                    node.target = torch.tanh
            return PassResult(True)

    (stage,) = Pipeline((ReluToTanh(),)).run([named_region("")])
    assert stage.nodes == {"relu": -1, "tanh": 1}


def test_stage_is_one_readable_line() -> None:
    assert str(Stage("insert-branches", "'h.0'", 0.0015, True, {"add": 2, "relu": -1}, "2 branches")) == (
        "insert-branches on 'h.0': +2 add, -1 relu; 1.5 ms 2 branches"
    )
    assert str(Stage("verify", "the model", 0.25, False)) == "verify on the model: no nodes changed; 250.0 ms"


def test_stages_are_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "passes"):
        Pipeline((AppendNegation(),)).run([named_region("block")])
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, "passes"):
        Pipeline((AppendNegation(),)).run([named_region("block")])
    (record,) = caplog.records
    assert "append-negation on 'block': +1 neg" in record.getMessage()


@pytest.mark.parametrize(("setting", "seen"), [("1", [1, 1, 2, 1, 1, 2]), ("0", [2, 2]), (None, [2, 2])])
def test_verifier_runs_after_each_pass_or_at_the_end(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, seen: list[int]
) -> None:
    if setting is None:
        monkeypatch.delenv("FXLORA_VERIFY")
    else:
        monkeypatch.setenv("FXLORA_VERIFY", setting)
    recorder = Recorder()
    passes: tuple[Pass, ...] = (AppendNegation(), Nothing(), AppendNegation())
    Pipeline(passes, recorder).run([named_region("first"), named_region("second")])
    assert recorder.seen == seen


def test_rejected_graph_is_not_put_in_place() -> None:
    region = named_region("block")
    before = region.graph
    with pytest.raises(VerifyError, match="^after pass 'append-negation' at 'block': 'fc1': that is one too many$"):
        Pipeline((Nothing(), AppendNegation()), Recorder(fail_at=1)).run([region])
    assert region.graph is before


def test_no_passes_and_no_regions() -> None:
    region = named_region("")
    before = print_graph(region.graph)
    assert Pipeline(()).run([region]) == []
    assert print_graph(region.graph) == before
    assert Pipeline((AppendNegation(),)).run([]) == []


# ---- copies of graphs ----


def test_copy_has_the_same_names_even_odd_ones() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x_1")
    given = graph.placeholder("input", default_value=None)
    y = graph.create_node("call_function", torch.add, (x, 1), name="add_7")
    z = graph.create_node("call_function", torch.add, (y,), {"other": given}, name="add_7_1")
    w = graph.create_node("call_method", "max", (z,), name="max")
    graph.output((w, [y, {"key": z}]))
    copied = copy_graph(graph)
    assert [node.name for node in copied.nodes] == [node.name for node in graph.nodes]
    assert str(copied) == str(graph)
    assert copied.python_code("self").src == graph.python_code("self").src


def test_copy_is_independent_and_keeps_metadata() -> None:
    region = exported(TwoLayers(), torch.randn(2, 3))
    text, meta = print_graph(region.graph), [dict(node.meta) for node in region.graph.nodes]
    copied = copy_graph(region.graph)
    assert [node.meta.keys() for node in copied.nodes] == [each.keys() for each in meta]
    assert all(
        a.meta["val"] is b.meta["val"] for a, b in zip(copied.nodes, region.graph.nodes, strict=True) if "val" in a.meta
    )
    for node in list(copied.nodes):
        node.meta["mark"] = 1
    AppendNegation().run(Region(copied, region.instances))
    assert print_graph(region.graph) == text
    assert [node.meta for node in region.graph.nodes] == meta


class Structured(nn.Module):
    """Takes and returns containers."""

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: dict[str, Tensor]) -> dict[str, Any]:
        return {"sum": pair[0] + pair[1], "scaled": [pair[0] * scale["by"], None]}


def test_copy_keeps_the_calling_convention() -> None:
    a, b, c = torch.randn(3, 2)
    region = exported(Structured(), (a, b), scale={"by": c})
    module = fx.GraphModule(region.module, copy_graph(region.graph))
    found = module((a, b), scale={"by": c})
    assert list(found) == ["sum", "scaled"]
    assert torch.equal(found["sum"], a + b)
    assert torch.equal(found["scaled"][0], a * c) and found["scaled"][1] is None


# ---- names and paths ----


def test_qualify() -> None:
    module = nn.Linear(1, 1)
    assert Instance("", module).qualify("fc.weight") == "fc.weight"
    assert Instance("h.0", module).qualify("fc.weight") == "h.0.fc.weight"
    assert Instance("h.0", module).qualify("") == "h.0"


def test_resolve() -> None:
    model = nn.Sequential(TwoLayers())
    assert resolve(model, "0.fc1.weight") is model[0].fc1.weight  # type: ignore[union-attr]
    assert resolve(model, "") is model
    assert resolve(model, SELF_CALL) is model
    assert region_of(model).resolve("0.fc2") is model[0].fc2  # type: ignore[union-attr]
    with pytest.raises(AttributeError, match="fc3"):
        resolve(model, "0.fc3")


def test_describe() -> None:
    module = nn.Linear(1, 1)
    one, many = (Instance("h.0", module),), tuple(Instance(f"h.{i}", module) for i in range(3))
    assert describe(Region(fx.Graph(), (Instance("", module),))) == "the model"
    assert describe(Region(fx.Graph(), one)) == "'h.0'"
    assert describe(Region(fx.Graph(), many)) == "'h.0' and 2 like it"


def test_target_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = [
        x,
        graph.call_function(torch.relu, (x,)),
        graph.call_function(torch.ops.aten.linear.default, (x, x)),
        graph.call_method("view", (x, -1)),
        graph.call_module("fc", (x,)),
    ]
    assert [target_name(node) for node in nodes] == ["placeholder", "relu", "linear.default", ".view", "call_module"]
