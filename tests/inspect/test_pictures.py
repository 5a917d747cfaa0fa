"""DOT, SVG and Model Explorer's JSON: what is in them, that they are well formed, and the same each time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fxlora import GraphError, LoraConfig, lora_transform, to_dot, to_model_explorer, to_networkx, to_svg
from tests.zoo import ARCHITECTURES

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
CONFIG = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    return lora_transform(LLAMA.model(), CONFIG, capture="export", example_inputs=LLAMA.batch())


@pytest.fixture(scope="module")
def graph(model: Any) -> Any:
    return to_networkx(model)


def boxes(dot: str) -> set[str]:
    return set(re.findall(r'^ +"([^"]+)" \[label', dot, re.MULTILINE))


def ends(dot: str) -> set[str]:
    return {end for pair in re.findall(r'"([^"]+)" -> "([^"]+)"', dot) for end in pair}


def test_a_whole_graph_is_collapsed(graph: Any) -> None:
    dot = to_dot(graph)
    assert Q0 in boxes(dot) and "input_ids" in boxes(dot) and len(boxes(dot)) <= 60
    assert ends(dot) <= boxes(dot)
    assert f'"{Q0}" [label="{Q0}\\n14 nodes\\nLoRA default", fillcolor="#ffd9a8"]' in dot
    assert f'"model.layers.0.input_layernorm" -> "{Q0}" [label=3];' in dot
    assert dot == to_dot(graph) and dot.count("{") == dot.count("}")


def test_a_deep_model_is_collapsed_further() -> None:
    config = LLAMA.make().config
    config.num_hidden_layers = 31
    import transformers

    deep = lora_transform(transformers.LlamaForCausalLM(config), CONFIG)
    dot = to_dot(to_networkx(deep))
    assert boxes(dot) == {f"model.layers.{number}.self_attn" for number in range(31)}
    assert "LoRA default at 2 layers" in dot


def test_a_neighbourhood(graph: Any) -> None:
    dot = to_dot(graph, around=Q0, depth=1)
    of_site = {node for node, facts in graph.nodes(data=True) if facts.get("site") == Q0}
    near = {other for node in of_site for other in (*graph.predecessors(node), *graph.successors(node))}
    assert boxes(dot) == of_site | near and "view" in near and "model_layers_0_self_attn_q_proj_weight" in near
    assert f'label="{Q0}"' in dot and ends(dot) <= boxes(dot)
    assert boxes(to_dot(graph, around="view", depth=0)) == {"view"}
    assert len(boxes(to_dot(graph, collapse=None))) == len(graph)
    near = to_dot(graph, around=Q0, depth=1, collapse="modules")
    assert boxes(near) == {Q0, "model.layers.0.input_layernorm", "model.layers.0.self_attn"}


def test_errors_of_pictures(model: Any, graph: Any) -> None:
    with pytest.raises(GraphError, match=r"Did you mean 'model.layers.0.self_attn.q_proj'"):
        to_dot(graph, around="model.layers.0.self_attn.q_prj")
    with pytest.raises(GraphError, match="made from a flat graph"):
        to_dot(to_networkx(model, level="modules"))
    with pytest.raises(GraphError, match="`collapse` should be"):
        to_svg(graph, collapse="module")  # pyright: ignore[reportArgumentType]
    with pytest.raises(GraphError, match="cannot be -1"):
        to_dot(graph, around=Q0, depth=-1)


def test_svg_has_the_same_boxes(graph: Any) -> None:
    svg = to_svg(graph, around=Q0, depth=1)
    root = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    titles = [each.text for each in root.iter(f"{name}title")]
    assert set(titles) == boxes(to_dot(graph, around=Q0, depth=1)) and len(titles) == len(set(titles))
    places = [tuple(float(r.attrib[key]) for key in ("x", "y", "width", "height")) for r in root.iter(f"{name}rect")]
    for index, (x, y, width, height) in enumerate(places):
        assert x >= 0 and x + width <= float(root.attrib["width"]) and y + height <= float(root.attrib["height"])
        for other_x, other_y, other_width, other_height in places[:index]:
            assert (
                x >= other_x + other_width
                or other_x >= x + width
                or y >= other_y + other_height
                or other_y >= y + height
            )
    assert svg == to_svg(graph, around=Q0, depth=1)


def test_model_explorer(model: Any, graph: Any, tmp_path: Path) -> None:
    first, second = (to_model_explorer(model, tmp_path / name) for name in ("a.json", "b.json"))
    assert first.read_bytes() == second.read_bytes()
    data = json.loads(first.read_text())
    assert set(data) == {"label", "graphs"} and len(data["graphs"]) == 1
    nodes = {node["id"]: node for node in data["graphs"][0]["nodes"]}
    assert list(nodes) == list(graph)
    edges = [edge for node in nodes.values() for edge in node["incomingEdges"]]
    assert len(edges) == graph.number_of_edges() and {edge["sourceNodeId"] for edge in edges} <= set(nodes)
    factor = nodes["model_layers_0_self_attn_q_proj_lora_a"]
    assert factor["namespace"] == Q0.replace(".", "/") and factor["label"] == "product_A" and factor["style"]
    attributes = {pair["key"]: pair["value"] for pair in factor["attrs"]}
    assert (attributes["adapter"], attributes["rank"]) == ("default", "2")
    assert attributes["flops"] == str(2 * 3 * 11 * 32 * 2) and attributes["bytes"] == str(4 * 3 * 11 * 2)
    assert factor["outputsMetadata"][0]["attrs"][0] == {"key": "tensor_shape", "value": "float32[s72, s70, 2]"}
    assert all(isinstance(pair["value"], str) for node in nodes.values() for pair in node["attrs"])
    groups = data["graphs"][0]["groupNodeAttributes"]
    assert groups["model/layers/0"]["sites"] == "2" and groups[""]["trainable"] == "448"
    assert {node["namespace"] for node in nodes.values()} <= set(groups)
