"""Helpers for writing a branch's nodes: their names, their paths, and the `meta["lora"]` by which tools know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from passes.callsite import CallSite
from passes.leaves import BASE_OUTPUT, DROPOUT, ROW_DROPOUT, SCALING, SLOTS, SWITCH, TOKEN_IDS, WEIGHT_NORM, part_path


@dataclass(frozen=True, slots=True)
class LoraMeta:
    """What an inserted node is: `node.meta["lora"]`.

    Attributes:
        site: the call site's name, relative to the region's instance.
        call: which call of that layer, from 0.
        adapter: the adapter's name; empty for the nodes that all branches of a site share.
        role: `A`, `B`, `bias`, `m`: a part (or its cast); `x`: the cast input; `a`, `b`: the two products; `s`: the
            scaled branch; `y`: the sum with the base's output; `dtype`: a dtype that is read; what kinds and variants
            add has names of theirs. Roles of nodes that call a leaf module are the container's name.
        last: whether this is the branch's result, which is added to the base's.
        kind: the call site's kind, since an embedding and a head may be one layer of two kinds.
    """

    site: str
    call: int
    adapter: str
    role: str
    last: bool = False
    kind: str = ""


def lora_meta(node: fx.Node) -> LoraMeta | None:
    """The `LoraMeta` of an inserted node, None for the base's own nodes."""
    return node.meta.get("lora")


_ROLES = {
    "A": "factor_A",
    "B": "factor_B",
    "x": "cast",
    "a": "product_A",
    "b": "product_B",
    "s": "scale",
    "y": "add",
    SCALING: "scaling",
    DROPOUT: "dropout",
}
"""Roles in words, of those that need them."""


def role_of(node: fx.Node, meta: LoraMeta) -> str:
    """The role of an inserted node in a word; all casts are `cast`."""
    if node.op == "call_method" and node.target == "to":
        return "cast"
    return _ROLES.get(meta.role, meta.role)


class BranchBuilder:
    """Adds one branch's nodes, named after their site, at the graph's insertion point.

    Args:
        graph: where to.
        site: the branch's call site.
        adapter: whose parts and leaf modules the nodes read.
        label: what the nodes' metadata have for their adapter, if they belong to a stack of several.
    """

    def __init__(self, graph: fx.Graph, site: CallSite, adapter: str, label: str | None = None) -> None:
        self._graph = graph
        self._site = site
        self._adapter = adapter
        self._label = adapter if label is None else label

    def part(self, part: str, role: str) -> fx.Node:
        """A `get_attr` of one of the adapter's parts."""
        return self._create("get_attr", self._path(part_path(part, self._adapter)), (), role)

    def base(self, path: str, role: str) -> fx.Node:
        """A `get_attr` of one of the base's tensors, by its path in the region's instance."""
        return self._create("get_attr", path, (), role)

    def dropout(self, x: fx.Node) -> fx.Node:
        """A `call_module` of the adapter's dropout."""
        return self._leaf(DROPOUT, x)

    def scaling(self) -> fx.Node:
        """A `call_module` of the adapter's scale."""
        return self._leaf(SCALING)

    def scale(self) -> fx.Node:
        """A `get_attr` of the adapter's scale, which costs less than the call."""
        return self._create("get_attr", self._path(f"{SCALING}.{self._adapter}.scale"), (), SCALING)

    def weight_norm(self) -> fx.Node:
        """A `call_module` of the squared norms of the base weight's rows."""
        return self._leaf(WEIGHT_NORM)

    def base_output(self, *args: fx.Node | None) -> fx.Node:
        """A `call_module` of the base's output without its bias, from `(y, bias, x, weight)`."""
        return self._leaf(BASE_OUTPUT, *args)

    def token_ids(self, adapter: str | None = None) -> fx.Node:
        """A `call_module` of the table of the ids whose rows an adapter replaces; the builder's own if None."""
        path = self._path(f"{TOKEN_IDS}.{self._adapter if adapter is None else adapter}")
        return self._create("call_module", path, (), TOKEN_IDS)

    def switch(self, names: tuple[str, ...]) -> fx.Node:
        """A `call_module` of the selection among these adapters."""
        return self._leaf(SWITCH, names)

    def row_dropout(self, x: fx.Node, select: fx.Node, layout: Any) -> fx.Node:
        """A `call_module` of the dropout that differs from row to row."""
        return self._leaf(ROW_DROPOUT, x, select, layout)

    def slots(self, part: str) -> fx.Node:
        """A `get_attr` of one of the stacked copies."""
        return self._create("get_attr", self._path(f"{SLOTS}.{self._adapter}.{part}"), (), part)

    def call(self, role: str, function: Callable[..., Any], *args: object) -> fx.Node:
        """A `call_function`."""
        return self._create("call_function", function, args, role)

    def method(self, role: str, name: str, *args: object) -> fx.Node:
        """A `call_method`."""
        return self._create("call_method", name, args, role)

    def dtype(self, like: fx.Node) -> fx.Node:
        """`like.dtype`."""
        return self._create("call_function", getattr, (like, "dtype"), "dtype")

    def cast(self, value: fx.Node, dtype: fx.Node, role: str) -> fx.Node:
        """`value.to(dtype)`: nothing at run time where the dtypes agree."""
        return self._create("call_method", "to", (value, dtype), role)

    def _leaf(self, container: str, *args: Any) -> fx.Node:
        return self._create("call_module", self._path(f"{container}.{self._adapter}"), args, container)

    def _path(self, path: str) -> str:
        return ".".join(part for part in (self._site.owner, path) if part)

    def _create(self, op: str, target: Any, args: tuple[Any, ...], role: str) -> fx.Node:
        prefix = "_".join(part for part in (self._site.name.replace(".", "_"), "lora", role.removeprefix("lora_")))
        node = self._graph.create_node(op, target, args, name=prefix.lstrip("_"))
        node.meta["lora"] = LoraMeta(self._site.name, self._site.call, self._label, role, kind=self._site.kind)
        if "nn_module_stack" in self._site.node.meta:
            node.meta["nn_module_stack"] = self._site.node.meta["nn_module_stack"]
        return node
