"""`to_model_explorer`: a model's graph as a file that Google's Model Explorer opens, with data at each node.

The file is one graph collection (`{"label", "graphs"}`), which its upload of JSON files takes as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import fx, nn

from fxlora.inspect.boxes import short_target
from fxlora.inspect.networkx_graph import NetworkxGraph, by_modules, to_networkx

_HIDDEN = ("op", "name", "module", "shape", "dtype", "region", "last")
_ORANGE = {"backgroundColor": "#ffd9a8"}


def to_model_explorer(model: nn.Module | fx.Graph, path: str | Path, *, example_inputs: object = None) -> Path:
    """Write a model's graph for Model Explorer: nested by module, nodes of adapters in colour.

    Each node has what `to_networkx` knows of it (site, adapter, rank, role, FLOPs, bytes), and each module its totals.

    Args:
        model: as for `to_networkx`.
        path: the JSON file to write; the same model gives the same bytes.
        example_inputs: as for `lora_transform`; they give shapes and FLOPs.

    Returns:
        The path.

    Raises:
        GraphError: for a model that has no graph.
    """
    flat = to_networkx(model, example_inputs=example_inputs)
    label = "graph" if isinstance(model, fx.Graph) else model._get_name()
    nodes = [_node(flat, node, facts) for node, facts in flat.nodes(data=True)]
    groups = {
        "/".join(str(facts["qualified_name"]).split(".")): _totals(facts)
        for _, facts in by_modules(flat, model).nodes(data=True)
        if facts["nodes"]
    }
    data = {"label": label, "graphs": [{"id": label, "nodes": nodes, "groupNodeAttributes": groups}]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"
    path = Path(path)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def _node(flat: NetworkxGraph, node: str, facts: dict[str, str | int]) -> dict[str, Any]:
    edges = [
        {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": position}
        for source, _, position in flat.in_edges(node, keys=True)
    ]
    result: dict[str, Any] = {
        "id": node,
        "label": _label(facts),
        "namespace": str(facts["module"]).replace(".", "/"),
        "attrs": _pairs({key: value for key, value in facts.items() if key not in _HIDDEN}),
        "incomingEdges": edges,
    }
    if "shape" in facts:
        output = {"tensor_shape": f"{facts['dtype']}{facts['shape']}", "bytes": facts.get("bytes", "")}
        result["outputsMetadata"] = [{"id": "0", "attrs": _pairs(output)}]
    if "adapter" in facts or facts["role"] == "add":
        result["style"] = _ORANGE
    return result


def _label(facts: dict[str, str | int]) -> str:
    role = str(facts["role"])
    if role not in ("base", "parameter", "buffer"):
        return str(facts["target"]) if role == "input" else role
    return short_target(str(facts["target"]), str(facts["op"]))


def _pairs(facts: dict[str, str | int]) -> list[dict[str, str]]:
    """Model Explorer shows text only."""
    return [{"key": key, "value": str(value)} for key, value in facts.items() if value != ""]


def _totals(facts: dict[str, str | int]) -> dict[str, str]:
    return {key: f"{value:,}" if isinstance(value, int) else value for key, value in facts.items() if value}
