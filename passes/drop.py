"""`drop-branches`: remove every inserted node, so that the graph is again what it was before `insert-branches`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from passes.base import PassResult, Region
from passes.nodes import lora_meta


@dataclass(frozen=True)
class DropBranches:
    """Give each site's output back to its users and erase the branches."""

    name: ClassVar[str] = "drop-branches"

    def run(self, region: Region) -> PassResult:
        """Remove all nodes that carry `meta["lora"]`."""
        inserted = [node for node in region.graph.nodes if lora_meta(node) is not None]
        for node in inserted:
            meta = lora_meta(node)
            if meta is not None and meta.role == "y" and node.op == "call_method":
                node.replace_all_uses_with(_base_output(node))
        for node in reversed(inserted):
            region.graph.erase_node(node)
        return PassResult(bool(inserted), f"{len(inserted)} nodes")


def _base_output(node: fx.Node) -> fx.Node:
    """The output of the base operation below a site's final cast: `y` in `(y + s₁ + s₂).to(y.dtype)`."""
    while lora_meta(node) is not None:
        node = cast(fx.Node, node.args[0])
    return node
