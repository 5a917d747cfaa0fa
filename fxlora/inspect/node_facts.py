"""What a node of a graph is, as plain attributes: its role, its names, its site, and the size of its result."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import _get_qualified_name

from fxlora._passes import SELF_CALL, Instance, LoraMeta, Region, find_sites, lora_meta, owning_path, role_of
from fxlora.inspect.shapes import Shapes, hint


class Facts:
    """Attributes of the nodes of one graph, as one of its modules runs it.

    Args:
        region: the graph.
        instance: the module.
        shapes: what each node returns there, as far as known.
        ranks: of each adapter at each site, by (site, adapter).
    """

    def __init__(self, region: Region, instance: Instance, shapes: Shapes, ranks: dict[tuple[str, str], int]) -> None:
        self._instance = instance
        self._shapes = shapes
        self._ranks = ranks
        sites = find_sites(Region(region.graph, (instance,)))
        self._sites = {site.node: site for site in sites if lora_meta(site.node) is None}

    def of(self, node: fx.Node) -> dict[str, str | int]:
        """The node's attributes; see `to_networkx`."""
        facts: dict[str, str | int] = {"op": node.op, "target": target_text(node), "name": node.name}
        meta = lora_meta(node)
        facts["role"] = _base_role(node, self._value(node)) if meta is None else role_of(node, meta)
        facts["module"] = self._module(node, meta)
        facts.update(self._names(node, meta))
        facts.update(self._result(node))
        return facts

    def _module(self, node: fx.Node, meta: LoraMeta | None) -> str:
        """The module in whose box a node is drawn."""
        if meta is not None:
            return self._instance.qualify(meta.site)
        if node in self._sites:
            return self._instance.qualify(self._sites[node].name)
        if node.op == "call_module" and node.target != SELF_CALL:
            return self._instance.qualify(str(node.target))
        if node.op == "get_attr":
            return self._instance.qualify(str(node.target).rpartition(".")[0])
        return self._instance.qualify(owning_path(node))

    def _names(self, node: fx.Node, meta: LoraMeta | None) -> dict[str, str | int]:
        names: dict[str, str | int] = {}
        value = self._value(node)
        if node.op in ("get_attr", "call_module"):
            names["qualified_name"] = self._instance.qualify("" if node.target == SELF_CALL else str(node.target))
        if isinstance(value, nn.Parameter):
            names["parameters"] = str(names["qualified_name"])
        if isinstance(value, nn.Module) and not isinstance(value, fx.GraphModule):
            own = value.named_parameters(prefix=str(names["qualified_name"]), recurse=node not in self._sites)
            held = " ".join(name.removeprefix(".") for name, _ in own)
            names.update({"parameters": held} if held else {})
        if node in self._sites:
            site = self._sites[node]
            name = self._instance.qualify(site.name)
            names.update(qualified_name=name, site=name, kind=site.kind, call=site.call)
        if meta is not None:
            site = self._instance.qualify(meta.site)
            names.update(site=site, kind=meta.kind, call=meta.call, last=int(meta.last))
            if meta.adapter:
                names["adapter"] = meta.adapter
                rank = self._ranks.get((site, meta.adapter), 0)
                names.update({"rank": rank} if rank else {})
        return names

    def _result(self, node: fx.Node) -> dict[str, str | int]:
        known, flops = self._shapes.get(node, (None, 0))
        value = node.meta.get("val")
        shown = value if isinstance(value, Tensor) else known
        if shown is None:
            shown = self._value(node)
        if not isinstance(shown, Tensor):
            return {"flops": flops} if flops else {}
        result: dict[str, str | int] = {
            "shape": f"[{', '.join(map(str, shown.shape))}]",
            "dtype": str(shown.dtype).removeprefix("torch."),
        }
        sizes = [hint(size) for size in (shown if known is None else known).shape]
        if None not in sizes:
            result["bytes"] = math.prod(cast("list[int]", sizes)) * shown.element_size()
        return {**result, "flops": flops} if flops else result

    def _value(self, node: fx.Node) -> object:
        """The tensor or module that a node names."""
        if node.op not in ("get_attr", "call_module"):
            return None
        try:
            return Region(node.graph, (self._instance,)).resolve(str(node.target))
        except AttributeError:  # a bare graph, without its module
            return None


def _base_role(node: fx.Node, value: object) -> str:
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op != "get_attr":
        return "base"
    return "parameter" if isinstance(value, nn.Parameter) else "buffer"


def target_text(node: fx.Node) -> str:
    """A node's target as text: `aten.linear.default`, `torch.nn.functional.relu`, `to`, `layers.0.fc1`."""
    target: Any = node.target
    if isinstance(target, (str, torch._ops.OperatorBase)):
        return str(target)
    return _get_qualified_name(target)
