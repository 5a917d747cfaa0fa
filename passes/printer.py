"""Print a region's graph so that a person can read it: one line a node, shapes where known, inserted nodes marked."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx

from passes.base import target_name
from passes.nodes import lora_meta


def print_graph(graph: fx.Graph) -> str:
    """The graph as text.

    Inserted nodes are marked with `+`, so that `print_graph` before and after a pass reads like a diff.
    """
    width = max((len(node.name) for node in graph.nodes if node.op != "output"), default=0)
    return "\n".join(_line(node, width) for node in graph.nodes)


def print_node(node: fx.Node) -> str:
    """One node as text."""
    return _line(node, 0).removeprefix("  ").removeprefix("+ ")


def _line(node: fx.Node, width: int) -> str:
    marker = " " if lora_meta(node) is None else "+"
    if node.op == "output":
        return f"{marker} return {_format(node.args[0])}"
    return f"{marker} {node.name:<{width}} = {_right(node)}{_shape(node)}"


def _right(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"self.{node.target}"
    arguments = [*map(_format, node.args), *(f"{name}={_format(value)}" for name, value in node.kwargs.items())]
    if node.op == "call_module":
        return f"self.{node.target}({', '.join(arguments)})"
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    if node.target is getattr:
        return f"{arguments[0]}.{node.args[1]}"
    return f"{target_name(node)}({', '.join(arguments)})"


def _format(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_format, cast("list[Any]", value)))
        comma = "," if isinstance(value, tuple) and len(cast("list[Any]", value)) == 1 else ""
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{comma})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_format(v)}" for k, v in cast("dict[Any, Any]", value).items()) + "}"
    return str(value) if not isinstance(value, str) else repr(value)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f"   # {str(value.dtype).removeprefix('torch.')} [{', '.join(str(size) for size in value.shape)}]"
