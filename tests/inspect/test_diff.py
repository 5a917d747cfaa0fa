"""`diff`: by dataflow and not by names; grouped by site; a mirror both ways; between passes, configurations, models."""

from __future__ import annotations

import copy
import functools
import json
import time
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora import ConfigError, LoraConfig, LoraModel, diff, lora_transform
from fxlora._passes import copy_graph
from fxlora.inspect.diff import GraphDiff
from tests.zoo import Attention, Residual

MIRROR = {"inserted": "removed", "removed": "inserted", "rewired": "rewired", "changed": "changed"}


def attention(targets: list[str], capture: Any = "symbolic", **settings: Any) -> LoraModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=targets, **settings)
    return lora_transform(Attention(), config, capture=capture, trace_passes=True)


@functools.cache
def exported() -> LoraModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=r"blocks\.\d\.1", lora_dropout=0.1)
    return lora_transform(Residual(), config, capture="export", example_inputs=torch.randn(5, 8))


def traced(forward: Any) -> fx.GraphModule:
    """A graph of plain tensor code."""
    return fx.symbolic_trace(forward)


def names(found: GraphDiff, what: Any) -> list[str]:
    return [change.operation for change in found.of(what)]


def assert_mirrored(a: object, b: object) -> None:
    one, other = diff(a, b), diff(b, a)
    assert one.equal == other.equal
    changes = sorted((MIRROR[c.what], c.after, c.before, c.site) for c in one.changes)
    assert changes == sorted((c.what, c.before, c.after, c.site) for c in other.changes)


def renamed(graph: fx.Graph) -> fx.Graph:
    result = copy_graph(graph)
    for index, node in enumerate(result.nodes):
        node.name = f"n{index}"
        if node.op == "placeholder":
            node.target = f"n{index}"
    return result


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_names_of_nodes_do_not_matter(capture: str) -> None:
    model = attention(["q_proj", "v_proj"], capture)
    for region in model.regions():
        other = renamed(region.graph)
        assert [node.name for node in other.nodes] != [node.name for node in region.graph.nodes]
        found = diff(region.graph, other)
        assert found.is_empty and found.equal == len(list(region.graph.nodes))
        assert str(found) == f"no difference: {found.equal} nodes are the same"


def test_an_exported_graph_under_other_names_is_the_same() -> None:
    graph = exported().regions()[0].graph
    assert diff(graph, renamed(graph)).is_empty


# ---- graphs ----


def test_an_inserted_operation() -> None:
    found = diff(traced(lambda x: (x.relu() + 1).tanh()), traced(lambda x: (x.relu() * 3 + 1).tanh()))
    assert names(found, "inserted") == ["mul"] and names(found, "rewired") == ["add"]
    assert not found.removed and not found.changed


def test_an_inserted_operation_of_a_kind_that_is_there_already() -> None:
    """A residual sum is not taken for the new one."""
    before = traced(lambda x, y, z: ((x @ y) + x).tanh())
    after = traced(lambda x, y, z: (((x @ y) + z) + x).tanh())
    found = diff(before, after)
    assert names(found, "inserted") == ["add"] and names(found, "rewired") == ["add"]
    assert found.equal == 6
    assert [change.detail for change in found.rewired] == ["input 0: matmul → add"]


def test_a_changed_operation_and_a_changed_constant() -> None:
    found = diff(traced(lambda x: x.relu() * 2 + 1), traced(lambda x: x.tanh() * 3 + 1))
    assert [change.detail for change in found.changed] == [".relu(x) → .tanh(x)", "mul(relu, 2) → mul(tanh, 3)"]
    assert len(found.changes) == 2


def test_a_rewired_node() -> None:
    found = diff(traced(lambda x, y: torch.cat((x.relu(), y.tanh()))), traced(lambda x, y: torch.cat((x.relu(), y))))
    assert [change.detail for change in found.rewired] == ["input 1: tanh → y"]
    assert names(found, "removed") == [".tanh"]


def test_swapped_inputs_are_rewired() -> None:
    found = diff(traced(lambda x, y: x.relu() - y.relu()), traced(lambda x, y: y.relu() - x.relu()))
    assert names(found, "rewired") == ["sub"] and len(found.changes) == 1


def test_equal_nodes_in_another_number() -> None:
    found = diff(traced(lambda x: x.relu() + 1), traced(lambda x: x.relu() + x.relu().sum()))
    assert names(found, "inserted") == [".relu", ".sum"] and names(found, "rewired") == ["add"]


def test_graphs_with_nothing_in_common() -> None:
    found = diff(traced(lambda x: x.relu().tanh()), traced(lambda x, y: torch.cat((x, y)).sum()))
    assert len(found.inserted) == 3 and len(found.removed) == 2
    assert_mirrored(traced(lambda x: x.relu().tanh()), traced(lambda x, y: torch.cat((x, y)).sum()))


def test_a_renamed_parameter_is_matched_by_its_use() -> None:
    class Old(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ getattr(self, self.name)).relu().tanh()

    found = diff(fx.symbolic_trace(Old("weight")), fx.symbolic_trace(Old("kernel")))
    assert [change.detail for change in found.changed] == ["self.weight → self.kernel"] and len(found.changes) == 1


def test_two_versions_of_a_models_code() -> None:
    class Later(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + torch.nn.functional.dropout(block(x) * 0.5, 0.1, self.training)
            return self.head(x)

    found = diff(fx.symbolic_trace(Residual()), fx.symbolic_trace(Later()))
    assert names(found, "inserted") == ["mul"] * 3 and names(found, "rewired") == ["dropout"] * 3
    assert len(found.changes) == 6


# ---- passes ----


def test_what_insert_does_by_site() -> None:
    trace = attention(["q_proj", "v_proj"]).pass_trace
    stage = next(index for index, each in enumerate(trace) if each.pass_name == "insert-branches")
    found = trace.diff(stage)
    assert [group.pattern for group in found.groups() if "inserted" in group.counts] == ["q_proj", "v_proj"]
    assert {change.site for change in found.inserted} == {"q_proj", "v_proj"}
    assert {change.role for change in found.inserted} >= {"A", "B", "a", "b", "s", "y"}
    assert names(found, "rewired") == [".unflatten"] * 2 and not found.removed and not found.changed
    assert len(found.inserted) == sum(trace[stage].nodes.values())


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_sites_that_differ_alike_are_one_line(capture: str) -> None:
    model = exported()
    if capture == "modules":
        model = lora_transform(
            Residual(), LoraConfig(r=2, target_modules=r"blocks\.\d\.1", lora_dropout=0.1), capture="modules"
        )
    with model.disable_adapter():
        before = copy.deepcopy(model)
    found = diff(before, model)
    (group,) = [group for group in found.groups() if "inserted" in group.counts]
    assert (group.pattern, len(group.sites)) == ("blocks.*.1", 3)
    assert f"3 sites: +{len(found.inserted) // 3} inserted" in str(found) and "each  blocks.*.1" in str(found)
    assert len(found.rewired) == 3 and not found.removed and not found.changed
    assert_mirrored(before, model)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_merging_and_dropping_take_the_branches_away(capture: str) -> None:
    model = attention(["q_proj", "v_proj"], capture)
    merged = copy.deepcopy(model).merge_and_unload()
    found = diff(model, merged)
    assert len(found.rewired) == 2 and not found.inserted and not found.changed
    assert {change.site for change in found.removed} == {"q_proj", "v_proj"}
    assert_mirrored(model, merged)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_two_configurations_of_one_model(capture: str) -> None:
    one = attention(["q_proj", "v_proj"], capture)
    fewer = diff(one, attention(["q_proj"], capture))
    assert {change.site for change in fewer.removed} == {"v_proj"} and not fewer.inserted
    other = diff(one, attention(["q_proj", "v_proj"], capture, lora_alpha=32))
    assert len(other.changes) == 2 and all("Scaling(4) → Scaling(16)" in change.detail for change in other.changed)
    dropped = diff(one, attention(["q_proj", "v_proj"], capture, lora_dropout=0.5))
    assert len(dropped.inserted) == 2 and {change.role for change in dropped.inserted} == {"lora_dropout"}
    assert diff(one, attention(["q_proj", "v_proj"], capture)).is_empty


def test_the_rank_shows_in_shapes() -> None:
    found = diff(attention(["q_proj"]), attention(["q_proj"], rank_pattern={"q_proj": 4}))
    details = [change.detail for change in found.changed]
    assert "q_proj.lora_A.default.weight: (2, 8) float32 → (4, 8) float32" in details


def test_another_name_of_an_adapter_changes_only_what_is_read() -> None:
    one = lora_transform(Attention(), LoraConfig(target_modules=["q_proj"]), capture="symbolic", adapter_name="a")
    two = lora_transform(Attention(), LoraConfig(target_modules=["q_proj"]), capture="symbolic", adapter_name="b")
    found = diff(one, two)
    assert {change.role for change in found.changed} == {"A", "B", "lora_scaling"} and len(found.changes) == 3


# ---- the report ----


def test_the_report_as_json_and_html() -> None:
    found = diff(attention(["q_proj"]), attention(["q_proj", "v_proj"]))
    figures = json.loads(json.dumps(found.to_dict()))
    assert figures["inserted"] == len(found.inserted) and not figures["is_empty"]
    assert figures["groups"][0]["sites"] == ["v_proj"]
    html = found._repr_html_()
    assert html.startswith("<table>") and ">v_proj</td>" in html and found.summary() in html


def test_what_has_no_counterpart_is_refused() -> None:
    with pytest.raises(ConfigError, match="transform both with the same capture"):
        diff(attention(["q_proj"]), attention(["q_proj"], "modules"))
    with pytest.raises(ConfigError, match="not int"):
        diff(attention(["q_proj"]), 3)


# ---- the trace ----


def test_passes_are_traced_only_if_asked() -> None:
    model = lora_transform(Attention(), LoraConfig(target_modules=["q_proj"]), capture="symbolic")
    with pytest.raises(fxlora.AdapterError, match="trace_passes=True"):
        _ = model.pass_trace
    assert all(stage.before is None and stage.after is None for stage in model._lora.stages)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_a_trace_goes_on_with_the_model(capture: str) -> None:
    model = attention(["q_proj", "v_proj"], capture)
    first = model.pass_trace
    assert {stage.pass_name for stage in first} >= {"insert-branches"} and all(stage.seconds > 0 for stage in first)
    table = str(first).splitlines()
    assert table[0].split() == ["pass", "graph", "ms", "nodes", "change"] and len(table) == len(first) + 1
    assert any("+2 linear" in line or "+4 linear" in line for line in table)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    assert len(model.pass_trace) > len(first)
    assert json.loads(json.dumps(first.to_dict()))["stages"][0]["pass"] == first[0].pass_name
    with pytest.raises(IndexError, match="counted from 0"):
        first.diff(len(first))


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_a_merge_is_in_the_trace(capture: str) -> None:
    model = attention(["q_proj", "v_proj"], capture)
    x = torch.randn(2, 5, 8)
    count = len(model.pass_trace)
    model.merge_adapter()
    merged = model.pass_trace
    new = [stage.pass_name for stage in merged.stages[count:] if stage.modified]
    assert new[:2] == ["merge-branches", "drop-branches"] and "insert-branches" not in new
    row = next(line for line in str(merged).splitlines() if "merge-branches" in line)
    assert row.split()[1:3] == ["merge-branches", "weights"] and row.split()[-3:] == ["–", "2", "weights"]
    removed = merged.diff(count, -1)
    assert not removed.inserted and {change.site for change in removed.removed} == {"q_proj", "v_proj"}
    assert fxlora.bisect_passes(model, x) is None
    model.unmerge_adapter()
    assert "insert-branches" in {stage.pass_name for stage in model.pass_trace.stages[len(merged) :] if stage.modified}
    count = len(model.pass_trace)
    with torch.no_grad():
        model.get_parameter("v_proj.lora_B.default.weight").fill_(torch.inf)
    with pytest.raises(fxlora.MergeError):
        model.merge_adapter()
    assert len(model.pass_trace) == count


def test_stages_together() -> None:
    model = attention(["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    count = len(model.pass_trace)
    model.set_adapter("other")
    whole = model.pass_trace.diff(count, -1)
    assert {change.role for change in whole.changed} == {"A", "B", "lora_scaling"}


def test_a_copied_or_pickled_model_leaves_its_trace_behind() -> None:
    model = attention(["q_proj"])
    assert len(copy.deepcopy(model).pass_trace) == 0


# ---- time ----


def test_time_of_a_large_graph() -> None:
    """Forty layers of three hundred nodes, of which seven get a node in between."""

    def graph(inserted: bool) -> fx.Graph:
        made = fx.Graph()
        x = made.placeholder("x")
        for layer in range(40):
            for part in range(7):
                weight = made.get_attr(f"layers.{layer}.{part}")
                x = y = made.call_function(torch.matmul, (x, weight))
                if inserted:
                    y = made.call_function(torch.mul, (y, 2))
                for _ in range(20):
                    y = made.call_function(torch.add, (made.call_method("relu", (y,)), x))
                x = y
        made.output(x)
        return made

    before, after = graph(False), graph(True)
    start = time.process_time()
    found = diff(before, after)
    assert time.process_time() - start < 5
    assert len(list(after.nodes)) > 12_000
    assert len(found.inserted) == len(found.rewired) == 280 and not found.removed and not found.changed
