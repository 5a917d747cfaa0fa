"""Helpers for writing a branch's nodes: their names, their paths, and the `meta["lora"]` by which tools know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from passes.sites import CallSite

Role = Literal["x", "A", "B", "dtype", "lora_dropout", "lora_scaling", "a", "b", "s", "y"]


@dataclass(frozen=True, slots=True)
class LoraMeta:
    """What an inserted node is: `node.meta["lora"]`.

    Attributes:
        site: the call site's name, relative to the region's instance.
        call: which call of that layer, from 0.
        adapter: the adapter's name; empty for the nodes that all branches of a site share.
        role: `A`, `B`: a factor (or its cast); `x`: the cast input; `a`, `b`: the two products; `s`: the scaled
            branch; `y`: the sum with the base's output; `dtype`: a dtype that is read.
    """

    site: str
    call: int
    adapter: str
    role: Role


def lora_meta(node: fx.Node) -> LoraMeta | None:
    """The `LoraMeta` of an inserted node, None for the base's own nodes."""
    return node.meta.get("lora")


class BranchBuilder:
    """Adds one branch's nodes, named after their site, at the graph's insertion point."""

    def __init__(self, graph: fx.Graph, site: CallSite, adapter: str) -> None:
        self._graph = graph
        self._site = site
        self._adapter = adapter

    def parameter(self, role: Literal["lora_A", "lora_B"]) -> fx.Node:
        """A `get_attr` of the factor's weight."""
        short: Role = "A" if role == "lora_A" else "B"
        return self._create("get_attr", f"{self._path(role)}.weight", (), short)

    def module(self, role: Literal["lora_dropout", "lora_scaling"], *args: fx.Node) -> fx.Node:
        """A `call_module` of one of the site's leaf modules."""
        return self._create("call_module", self._path(role), args, role)

    def call(self, role: Role, function: Callable[..., Any], *args: object) -> fx.Node:
        """A `call_function`."""
        return self._create("call_function", function, args, role)

    def dtype(self, like: fx.Node) -> fx.Node:
        """`like.dtype`."""
        return self._create("call_function", getattr, (like, "dtype"), "dtype")

    def cast(self, value: fx.Node, dtype: fx.Node, role: Role) -> fx.Node:
        """`value.to(dtype)`: nothing at run time where the dtypes agree."""
        return self._create("call_method", "to", (value, dtype), role)

    def _path(self, container: str) -> str:
        return ".".join(part for part in (self._site.owner, container, self._adapter) if part)

    def _create(self, op: str, target: Any, args: tuple[Any, ...], role: Role) -> fx.Node:
        prefix = "_".join(part for part in (self._site.name.replace(".", "_"), "lora", role.removeprefix("lora_")))
        node = self._graph.create_node(op, target, args, name=prefix.lstrip("_"))
        node.meta["lora"] = LoraMeta(self._site.name, self._site.call, self._adapter, role)
        if "nn_module_stack" in self._site.node.meta:
            node.meta["nn_module_stack"] = self._site.node.meta["nn_module_stack"]
        return node
