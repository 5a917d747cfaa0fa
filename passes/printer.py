"""Print a region's graph so that a person can read it: one line a node, shapes where known, inserted nodes marked.

Generated code gets the same facts as comments: see `comment_sites`.
"""

from __future__ import annotations

import re
from typing import Any, cast

from torch import Tensor, fx

from passes.base import Instance, Region, target_name
from passes.nodes import lora_meta, role_of
from passes.sites import find_sites


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
    size = _size(node.meta.get("val"))
    return f"   # {size}" if size else ""


# ---- generated code ----

_ASSIGNMENT = re.compile(r"(\s+)(\w+)(?:\s*:[^=]*)?\s*=[^=]")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def comment_sites(source: str, region: Region) -> str:
    """The code that torch.fx generated from a region's graph, with a comment above each line that belongs to a site.

    A comment names the site, and the adapter and the role of an inserted node, with dtype and shape where they are known:
    `# lora: layers.0.fc1, adapter 'default', role 'factor_A', float32 [8, 64]`. No line is changed.
    """
    comments = _comments(region)
    lines: list[str] = []
    for line in source.splitlines():
        found = _ASSIGNMENT.match(_COLOUR.sub("", line))
        if found and found[2] in comments:
            lines.append(f"{found[1]}# lora: {comments.pop(found[2])}")
        lines.append(line)
    return "\n".join(lines)


def _comments(region: Region) -> dict[str, str]:
    """What is to be said of nodes, by their names, which are those of the variables."""
    found: dict[str, str] = {}
    adapted: set[tuple[str, str, int]] = set()
    for node in region.graph.nodes:
        meta = lora_meta(node)
        if meta is not None:
            adapted.add((meta.site, meta.kind, meta.call))
            whose = f"adapter '{meta.adapter}'" if meta.adapter else "all adapters"
            found[node.name] = (
                f"{_place(region, meta.site)}, {whose}, role '{role_of(node, meta)}'{_known(node, region)}"
            )
    for site in find_sites(region) if adapted else ():
        if (site.name, site.kind, site.call) in adapted and lora_meta(site.node) is None:
            found[site.node.name] = f"{_place(region, site.name)}, the {site.kind} itself{_known(site.node, region)}"
    return found


def _place(region: Region, site: str) -> str:
    qualified = tuple(Instance(each.qualify(site), each.module) for each in region.instances)
    names = list(name_patterns(qualified))
    return names[0] if len(names) == 1 else f"'{site}' of this module" if site else "this layer"


def name_patterns(instances: tuple[Instance, ...]) -> dict[str, int]:
    """Names of modules, those that differ in numbers only together and with `*` for the numbers, and how many each is."""
    found: dict[str, list[str]] = {}
    for each in instances:
        found.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", each.name), []).append(each.name)
    return {pattern if len(names) > 1 else names[0]: len(names) for pattern, names in found.items()}


def _known(node: fx.Node, region: Region) -> str:
    """Dtype and shape of a node's result, if they are the same for all instances."""
    values = {_size(node.meta.get("val"))}
    if node.op == "get_attr" and values == {""}:
        values = {_size(Region(region.graph, (each,)).resolve(str(node.target))) for each in region.instances}
    text = values.pop() if len(values) == 1 else ""
    return f", {text}" if text else ""


def _size(value: object) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(str(size) for size in value.shape)}]"
