"""`to_networkx`: the schema on small graphs, shapes and FLOPs against torch's own, files that come back equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fxlora
from fxlora import GraphError, LoraConfig, lora_transform, to_networkx, write_graph
from fxlora.inspect.graph_files import describe_graph
from tests.zoo import ARCHITECTURES, MLP

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
CONFIG = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
X = torch.randn(5, 8)


def mlp() -> Any:
    return lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.1))


@pytest.fixture(scope="module")
def exported() -> Any:
    return lora_transform(LLAMA.model(), CONFIG, capture="export", example_inputs=LLAMA.batch())


def test_every_node_and_argument_is_there() -> None:
    model = mlp()
    graph = to_networkx(model)
    assert list(graph) == [node.name for node in model.graph.nodes]
    assert graph.number_of_edges() == sum(len(node.all_input_nodes) for node in model.graph.nodes)
    assert graph.graph == {"schema": "fxlora-graph-1", "level": "flat", "capture": "symbolic"}
    assert graph.edges["fc1", "fc1_lora_y", "0"] == {"position": "0"}
    assert graph.has_edge("fc1_lora_s", "fc1_lora_y", "1")


def test_what_a_node_says() -> None:
    nodes = to_networkx(mlp(), example_inputs=X).nodes
    assert nodes["fc1"] == dict(
        op="call_module", target="fc1", name="fc1", role="base", module="fc1", qualified_name="fc1", site="fc1", call=0,
        kind="linear", parameters="fc1.weight fc1.bias", shape="[5, 16]", dtype="float32", bytes=320, flops=2 * 5 * 8 * 16,
    )  # fmt: skip
    assert nodes["fc1_lora_a"]["flops"] == 2 * 5 * 8 * 2
    assert nodes["fc1_lora_A"] == dict(
        op="get_attr", target="fc1.lora_A.default.weight", name="fc1_lora_A", role="factor_A", module="fc1", kind="linear",
        qualified_name="fc1.lora_A.default.weight", parameters="fc1.lora_A.default.weight", site="fc1", call=0, last=0,
        adapter="default", rank=2, shape="[2, 8]", dtype="float32", bytes=64,
    )  # fmt: skip
    roles = {name: facts["role"] for name, facts in nodes(data=True) if facts.get("site") == "fc1"}
    assert roles == {
        "fc1": "base", "fc1_lora_A": "factor_A", "fc1_lora_B": "factor_B", "fc1_lora_dropout": "dropout",
        "fc1_lora_dtype": "dtype", "fc1_lora_A_1": "cast", "fc1_lora_B_1": "cast", "fc1_lora_a": "product_A",
        "fc1_lora_b": "product_B", "fc1_lora_scaling": "scaling", "fc1_lora_s": "scale", "fc1_lora_y": "add",
        "fc1_lora_dtype_1": "dtype", "fc1_lora_y_1": "cast",
    }  # fmt: skip
    assert nodes["x"]["role"] == "input" and nodes["output"]["role"] == "output"
    assert [name for name, facts in nodes(data=True) if facts.get("last")] == ["fc1_lora_s"]


def test_without_inputs_only_what_is_known_is_said() -> None:
    nodes = to_networkx(mlp()).nodes
    assert "shape" not in nodes["fc1"] and "flops" not in nodes["fc1"]
    assert nodes["fc1_lora_A"]["shape"] == "[2, 8]"


def test_flops_are_those_that_torch_counts(exported: Any) -> None:
    graph = to_networkx(exported)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        exported.eval()(**LLAMA.batch())
    counted = sum(facts.get("flops", 0) for _, facts in graph.nodes(data=True))
    assert counted == counter.get_total_flops()
    attention = graph.nodes["scaled_dot_product_attention"]
    assert attention["flops"] == 2 * 2 * 3 * 4 * 11 * 11 * 8 and attention["module"] == "model.layers.0.self_attn"
    assert "s" in attention["shape"]  # a size that may vary


def test_templates_are_one_component_for_each_layer() -> None:
    model = lora_transform(LLAMA.model(), CONFIG)
    graph = to_networkx(model, example_inputs=LLAMA.batch())
    assert graph.graph["capture"] == "modules"
    assert nx.number_weakly_connected_components(graph) == 4
    base = graph.nodes["model.layers.1.self_attn.v_proj/base_forward"]
    assert base["qualified_name"] == base["site"] == base["region"] == "model.layers.1.self_attn.v_proj"
    assert base["parameters"] == "model.layers.1.self_attn.v_proj.weight"
    assert base["shape"] == "[3, 11, 16]" and base["flops"] == 2 * 3 * 11 * 32 * 16
    assert all(not any(p.is_meta for p in m.parameters()) and not m._forward_pre_hooks for m in model.modules())


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = lora_transform(LLAMA.make(), CONFIG)
        graph = to_networkx(model, example_inputs={"input_ids": torch.zeros(3, 11, dtype=torch.long)})
    assert graph.nodes["model.layers.0.self_attn.q_proj/lora_a"]["flops"] == 2 * 3 * 11 * 32 * 2


def test_two_graphs_have_names_of_their_own() -> None:
    entry = next(entry for entry in ARCHITECTURES if entry.name == "dinov2")
    config = LoraConfig(r=2, target_modules=["fc1"])
    model = lora_transform(entry.model(), config, capture="export", example_inputs=entry.batch())
    regions = {facts["region"] for _, facts in to_networkx(model).nodes(data=True)}
    assert regions == {"training", "evaluation"}


def test_any_graph_of_torch_fx() -> None:
    traced = fx.symbolic_trace(MLP())
    graph = to_networkx(traced)
    assert list(graph) == ["x", "fc1", "relu", "drop", "fc2", "output"]
    assert list(to_networkx(traced.graph)) == list(graph)
    bare = fx.Graph()
    x = bare.placeholder("x")
    bare.output(bare.call_function(torch.cat, ([x, x],), {"dim": 1}))
    edges = to_networkx(bare).edges(keys=True)
    assert list(edges) == [("x", "cat", "0.0"), ("x", "cat", "0.1"), ("cat", "output", "0")]
    with pytest.raises(GraphError, match="a MLP has no graph; give what lora_transform returns"):
        to_networkx(MLP())
    with pytest.raises(GraphError, match="should be 'flat' or 'modules', not 'module'"):
        to_networkx(traced, level="module")  # pyright: ignore[reportArgumentType]


def test_a_node_that_needs_values_stays_unknown() -> None:
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1).sum().item() * x

    nodes = to_networkx(fx.symbolic_trace(Counts()), example_inputs=X).nodes
    assert nodes["sum_1"]["shape"] == "[]" and "shape" not in nodes["mul"]


class OwnModes(nn.Module):
    """Parts that run without gradients, and in another precision: nested graphs, once exported."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.frozen, self.low = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.frozen(x).sin()
        with torch.autocast("cpu", torch.bfloat16):
            y = self.low(x)
        return self.fc(x) * scale + y.float() * y.float().sum(-1, keepdim=True)


def test_nested_graphs_are_looked_into_with_and_without_metadata() -> None:
    model = lora_transform(OwnModes(), LoraConfig(r=2, target_modules=["fc"]), capture="export", example_inputs=X)
    wrapped = [node for node in model.graph.nodes if str(node.target).startswith("wrap_with_")]
    assert len(wrapped) == 2
    noted = to_networkx(model).nodes
    for node in model.graph.nodes:
        if node.op != "placeholder":
            node.meta.pop("val", None)
    nodes = to_networkx(model).nodes
    for name, facts in noted.items():
        assert ("shape" in facts) == ("shape" in nodes[name]), name
        assert [facts.get(key) for key in ("dtype", "bytes", "flops")] == [
            nodes[name].get(key) for key in ("dtype", "bytes", "flops")
        ], name
    assert all(nodes[node.name]["flops"] == 2 * 5 * 8 * 8 for node in wrapped)
    low = [nodes[user.name]["dtype"] for user in wrapped[1].users]
    assert low[0] == "bfloat16" and "shape" in nodes["add"]


def values(x: torch.Tensor) -> Any:
    return x.tolist()


def test_metadata_tell_the_shape_of_what_cannot_be_run() -> None:
    graph = fx.Graph()
    unknown = graph.call_function(values, (graph.placeholder("x"),))
    graph.output(graph.call_function(torch.add, (unknown, 1)))
    model = fx.GraphModule(nn.Module(), graph)
    unknown = next(node for node in model.graph.nodes if node.target is values)
    assert "shape" not in to_networkx(model, example_inputs=X).nodes["add"]
    for key in ("val", "example_value"):
        unknown.meta = {key: torch.empty(6, 7, device="meta")}
        assert to_networkx(model, example_inputs=X).nodes["add"]["shape"] == "[6, 7]"


def test_modules_have_the_totals_of_what_is_in_them(exported: Any) -> None:
    flat, graph = to_networkx(exported), to_networkx(exported, level="modules")
    whole, block = graph.nodes["(model)"], graph.nodes["model.layers.1"]
    assert whole["nodes"] == len(flat) and whole["sites"] == 4 and block["sites"] == 2
    trainable, parameters = exported.get_nb_trainable_parameters()
    assert (whole["trainable"], whole["parameters"]) == (trainable, parameters)
    assert whole["flops"] == sum(facts.get("flops", 0) for _, facts in flat.nodes(data=True))
    assert block["type"] == "LlamaDecoderLayer" and whole["bytes"] == 4 * parameters
    assert not any("lora_" in node for node in graph)
    tree = nx.DiGraph((a, b) for a, b, kind in graph.edges(data="kind") if kind == "contains")
    assert nx.is_arborescence(tree) and set(tree) == set(graph)
    q_proj = "model.layers.0.self_attn.q_proj"
    assert graph.edges["model.layers.0.input_layernorm", q_proj, "data"]["count"] == 3


@pytest.mark.parametrize("level", ["flat", "modules"])
def test_files_come_back_equal_and_are_the_same_bytes(exported: Any, tmp_path: Path, level: Any) -> None:
    graph = to_networkx(exported, level=level)
    for suffix in ("graphml", "json"):
        first, second = write_graph(graph, tmp_path / f"a.{suffix}"), tmp_path / f"b.{suffix}"
        write_graph(to_networkx(exported, level=level), second)
        assert first.read_bytes() == second.read_bytes()
    read = nx.read_graphml(tmp_path / "a.graphml", force_multigraph=True)
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert sorted((a, b, str(key)) for a, b, key in read.edges(keys=True)) == sorted(graph.edges(keys=True))
    data = json.loads((tmp_path / "a.json").read_text())
    assert nx.utils.graphs_equal(nx.node_link_graph(data, edges="edges"), graph)
    with pytest.raises(GraphError, match=r"'a.gml' should end in .graphml or .json"):
        write_graph(graph, tmp_path / "a.gml")


def test_a_graph_in_a_few_lines(exported: Any) -> None:
    text = describe_graph(to_networkx(exported))
    assert "16 calls of layers, 4 layers with LoRA" in text and "factor_A       4" in text
    assert "model.layers.0 " in describe_graph(to_networkx(exported, level="modules"))


def test_networkx_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, fxlora; assert 'networkx' not in sys.modules; fxlora.to_networkx; assert 'networkx' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(fxlora._MODULE_OF) < set(fxlora.__all__)
