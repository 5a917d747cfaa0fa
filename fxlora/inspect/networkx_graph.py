"""`to_networkx`: the graphs of a model as one `networkx` graph with plain attributes, for one's own tools.

What each node says is found in `node_facts`; shapes and FLOPs come from `shapes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import networkx as nx
from torch import fx, nn

from fxlora._passes import Instance, Region, is_inserted
from fxlora.capture.graph_module import MODES, CapturedModule
from fxlora.capture.inputs import Example
from fxlora.errors import GraphError
from fxlora.inspect.node_facts import Facts
from fxlora.inspect.shapes import Shapes, Signature, input_values, run_on_shapes, signature
from fxlora.model import LoraModel

Level = Literal["flat", "modules"]
NetworkxGraph = Any
"""`networkx.MultiDiGraph[str]`, which has no generic form before networkx's stubs."""

SCHEMA = "fxlora-graph-1"
"""Stands in the graph's attributes, and changes when the meaning of one does."""


def to_networkx(model: nn.Module | fx.Graph, *, example_inputs: object = None, level: Level = "flat") -> NetworkxGraph:
    """The graphs of a model as a `networkx.MultiDiGraph`. All attributes are plain `str`, `int` or `float`.

    `"flat"` has a node for each node of the graphs, and an edge for each argument, with its `position`: an index or a
    keyword, and the path inside a list (`0`, `0.1`, `dim`). A node's id is its name; where several modules run a graph
    (`modules` capture) it is `<module>/<name>`, and each of these modules is a component of its own, since what is between
    them is the model's own code. Where training and evaluation have two graphs, it is `training/<name>`. Attributes of a
    node, each left out where it is not known:

    - `op`, `target`, `name`: as in `torch.fx`. `qualified_name`: of the parameter that it reads, the module that it calls,
      or the layer whose call it is. `module`: the module whose code it belongs to. `parameters`: names of all parameters
      that it holds, with spaces between.
    - `role`: `input`, `output`, `parameter`, `buffer` or `base` for the model's own nodes; `factor_A`, `factor_B`,
      `product_A`, `product_B`, `scaling`, `scale`, `add`, `cast`, `dtype`, `dropout` and what kinds and variants add for
      those of an adapter.
    - `site`: the layer whose call it is or belongs to; `kind`: its kind; `call`: which call of that layer; `adapter` and
      `rank`: of the branch that it belongs to; `last`: 1 for the node that is added to the base's output.
    - `shape`, `dtype`, `bytes` of its result, and `flops`, 2 for a multiplication and its addition, of matrix products,
      convolutions and attention. Sizes that may vary are letters in `shape`, and count as in the example.

    `"modules"` has a node for each module, with `type`, the numbers of `nodes`, `sites` with an adapter, `parameters` and
    `trainable` entries, `bytes` of parameters and `flops`, all of these with those of the modules in it; edges are
    `contains`, and `data` with a `count` of values that pass from one module's code to another's.

    Args:
        model: a `LoraModel`, a `torch.fx.GraphModule` or a `torch.fx.Graph`; not changed; may be on the meta device.
        example_inputs: as for `lora_transform`. Nothing is computed on their values: they give shapes.
        level: `"flat"` or `"modules"`.

    Returns:
        The graph. Its attributes are `schema`, `level` and `capture`.

    Raises:
        GraphError: for a model that has no graph, and an unknown level.
    """
    if level not in ("flat", "modules"):
        raise GraphError(f"`level` should be 'flat' or 'modules', not {level!r}")
    example = Example.of(example_inputs)
    capture = model.capture if isinstance(model, LoraModel) else "none"
    graph: NetworkxGraph = nx.MultiDiGraph(schema=SCHEMA, level="flat", capture=capture)
    ranks = _ranks(model)
    pieces = list(_pieces(model))
    inputs = input_values(model, [(region, instance) for _, region, instance in pieces], example)
    known: dict[Signature, Shapes] = {}
    for (label, region, instance), values in zip(pieces, inputs, strict=True):
        key = signature(region.graph, instance.module, values)
        if key not in known:
            known[key] = run_on_shapes(region.graph, instance.module, values)
        facts = Facts(region, instance, known[key], ranks)
        _add(graph, region.graph, f"{label}/" if label else "", label, facts)
    return graph if level == "flat" else by_modules(graph, model)


def _pieces(model: nn.Module | fx.Graph) -> Iterator[tuple[str, Region, Instance]]:
    """Each graph with each module that runs it, and a label that tells them apart."""
    regions = _regions(model)
    taken: dict[str, int] = {}
    for index, region in enumerate(regions):
        for instance in region.instances:
            label = instance.name
            if isinstance(model, CapturedModule) and len(regions) > 1:
                label = MODES[index]
            number = taken[label] = taken.get(label, 0) + 1
            yield label if number == 1 else f"{label}#{number}", region, instance


def _regions(model: nn.Module | fx.Graph) -> list[Region]:
    if isinstance(model, (LoraModel, CapturedModule)):
        return model.regions()
    if isinstance(model, fx.GraphModule):
        return [Region(model.graph, (Instance("", model),))]
    if isinstance(model, fx.Graph):
        owner = model.owning_module
        return [Region(model, (Instance("", nn.Module() if owner is None else owner),))]
    raise GraphError(
        f"a {type(model).__name__} has no graph; give what lora_transform returns, or a torch.fx.GraphModule as made by "
        "torch.fx.symbolic_trace(model) or torch.export.export(model, args).module()"
    )


def _ranks(model: nn.Module | fx.Graph) -> dict[tuple[str, str], int]:
    if not isinstance(model, LoraModel):
        return {}
    plans = model._lora.adapters.values()
    return {(spec.site, spec.adapter): spec.r for plan in plans for spec in plan.branches}


def _add(graph: NetworkxGraph, source: fx.Graph, prefix: str, label: str, facts: Facts) -> None:
    for node in source.nodes:
        attributes = facts.of(node)
        if label:
            attributes["region"] = label
        graph.add_node(prefix + node.name, **attributes)
    for node in source.nodes:
        for position, value in _arguments(node):
            graph.add_edge(prefix + value.name, prefix + node.name, key=position, position=position)


def _arguments(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """(position, value) of every argument that is a node."""
    named = [*((str(index), value) for index, value in enumerate(node.args)), *node.kwargs.items()]
    while named:
        position, value = named.pop(0)
        if isinstance(value, fx.Node):
            yield position, value
        elif isinstance(value, (list, tuple)):
            named[:0] = [(f"{position}.{index}", each) for index, each in enumerate(cast("list[Any]", value))]
        elif isinstance(value, dict):
            named[:0] = [(f"{position}.{key}", each) for key, each in cast("dict[Any, Any]", value).items()]
        elif isinstance(value, slice):
            ends = (value.start, value.stop, value.step)
            named[:0] = [(f"{position}.{index}", each) for index, each in enumerate(ends)]


def ancestors_of(name: str) -> list[str]:
    """The module itself and all around it, from the inside out; `""` is the model."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def by_modules(flat: NetworkxGraph, model: nn.Module | fx.Graph) -> NetworkxGraph:
    """The modules of a flat graph; see `to_networkx`."""
    root = model.owning_module if isinstance(model, fx.Graph) else model
    modules = {} if root is None else {name: each for name, each in root.named_modules() if not is_inserted(name)}
    names = dict.fromkeys([*modules, *(each for owner in _owners(flat) for each in reversed(ancestors_of(owner)))])
    graph: NetworkxGraph = nx.MultiDiGraph()
    graph.graph.update(flat.graph, level="modules")
    for name in names:
        module = modules.get(name)
        kind = "" if module is None else module._get_name()
        counts = dict(nodes=0, sites=0, parameters=0, trainable=0, bytes=0, flops=0)
        graph.add_node(name or "(model)", qualified_name=name, type=kind, **counts)
    _count_parameters(graph, root)
    adapted: dict[str, set[str]] = {}
    for _, attributes in flat.nodes(data=True):
        for name in ancestors_of(attributes["module"]):
            node = graph.nodes[name or "(model)"]
            node["nodes"] += 1
            node["flops"] += attributes.get("flops", 0)
            if attributes.get("adapter"):
                adapted.setdefault(name, set()).add(attributes["site"])
    for name, sites in adapted.items():
        graph.nodes[name or "(model)"]["sites"] = len(sites)
    for name in names:
        if name:
            graph.add_edge(name.rpartition(".")[0] or "(model)", name, key="contains", kind="contains")
    for source, target in flat.edges():
        ends = [flat.nodes[each]["module"] or "(model)" for each in (source, target)]
        if ends[0] != ends[1]:
            before = graph.get_edge_data(*ends, key="data", default={}).get("count", 0)
            graph.add_edge(*ends, key="data", kind="data", count=before + 1)
    return graph


def _owners(flat: NetworkxGraph) -> list[str]:
    return list(dict.fromkeys(attributes["module"] for _, attributes in flat.nodes(data=True)))


def _count_parameters(graph: NetworkxGraph, root: nn.Module | None) -> None:
    for path, parameter in [] if root is None else root.named_parameters():
        for name in ancestors_of(path.rpartition(".")[0]):
            if is_inserted(name):
                continue
            node = graph.nodes[name or "(model)"]
            node["parameters"] += parameter.numel()
            node["bytes"] += parameter.numel() * parameter.element_size()
            node["trainable"] += parameter.numel() if parameter.requires_grad else 0
