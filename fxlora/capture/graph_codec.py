"""An fx graph as plain data and back, so that graph modules can be pickled without being traced again.

torch.fx pickles a `GraphModule` as source text and re-traces it on loading, which drops metadata and output classes
and bakes in the mode. Here a graph is a list of its nodes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import _get_qualified_name, map_aggregate
from torch.utils import _pytree as pytree

from fxlora.capture.caches import register_kind

KEPT_META = ("lora", "nn_module_stack", "redirected", "rows")


@dataclass(frozen=True, slots=True)
class _NodeRef:
    """Stands for a node in encoded arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class _Operator:
    """An overload of a registered operator (`aten::linear`, `default`), or a higher-order one (no overload)."""

    name: str
    overload: str | None


@dataclass(frozen=True, slots=True)
class _Function:
    """A function by its dotted path, module first."""

    path: str


@dataclass(frozen=True, slots=True)
class EncodedNode:
    """One node."""

    op: str
    name: str
    target: object
    args: object
    kwargs: object
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Structure:
    """A `pytree.TreeSpec`, whose own fields differ between versions of torch."""

    kind: type
    context: object
    children: tuple[_Structure | None, ...]
    """None for a leaf."""


@dataclass(frozen=True, slots=True)
class EncodedGraph:
    """All nodes in order, and the calling convention, if there is one: names and structure of inputs, and of outputs."""

    nodes: tuple[EncodedNode, ...]
    convention: tuple[list[str], _Structure | None, _Structure | None] | None


def encode(graph: fx.Graph) -> EncodedGraph:
    """The graph as plain data, for pickling."""
    return EncodedGraph(tuple(map(_encode_node, graph.nodes)), _encode_convention(graph))


def decode(encoded: EncodedGraph) -> fx.Graph:
    """The graph again, with the same node names and metadata."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def restore(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _NodeRef) else value

    for each in encoded.nodes:
        args, kwargs = (map_aggregate(cast(Any, part), restore) for part in (each.args, each.kwargs))
        node = graph.create_node(each.op, cast(Any, _decode_target(each.target)), args, kwargs, name=each.name)
        node.meta.update(each.meta)
        nodes[each.name] = node
    if encoded.convention is not None:
        names, inputs, outputs = encoded.convention
        graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, _decode_structure(inputs), _decode_structure(outputs))))
    return graph


def _encode_node(node: fx.Node) -> EncodedNode:
    args, kwargs = (fx.map_arg(part, lambda each: cast(Any, _NodeRef(each.name))) for part in (node.args, node.kwargs))
    meta = {name: node.meta[name] for name in KEPT_META if name in node.meta}
    if "nn_module_stack" in meta:
        meta["nn_module_stack"] = {key: (path, str(kind)) for key, (path, kind) in meta["nn_module_stack"].items()}
    return EncodedNode(node.op, node.name, _encode_target(node.target), args, kwargs, meta)


def _encode_target(target: object) -> object:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return _Operator(target._schema.name, target._overloadname)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _Operator(target.name(), None)
    path = _get_qualified_name(cast(Any, target))
    return _Function(path if "." in path else f"builtins.{path}")


def _decode_target(target: object) -> object:
    if isinstance(target, _Operator):
        if target.overload is None:
            return getattr(torch.ops.higher_order, target.name)
        namespace, name = target.name.split("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), target.overload)
    if isinstance(target, _Function):
        module, *path = target.path.split(".")
        value: object = importlib.import_module(module)
        for part in path:
            if not hasattr(value, part):
                importlib.import_module(f"{cast(Any, value).__name__}.{part}")
            value = getattr(value, part)
        return value
    return target


def _encode_convention(graph: fx.Graph) -> tuple[list[str], _Structure | None, _Structure | None] | None:
    codegen = graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return None
    info = codegen.pytree_info
    return info.orig_args, _encode_structure(info.in_spec), _encode_structure(cast(pytree.TreeSpec, info.out_spec))


def _encode_structure(spec: pytree.TreeSpec) -> _Structure | None:
    if spec.is_leaf():
        return None
    return _Structure(cast(type, spec.type), spec.context, tuple(map(_encode_structure, spec.children())))


def _decode_structure(structure: _Structure | None) -> pytree.TreeSpec:
    if structure is None:
        return pytree.tree_structure(0)
    register_kind(structure.kind)
    return pytree.TreeSpec(structure.kind, structure.context, list(map(_decode_structure, structure.children)))
