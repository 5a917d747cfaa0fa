"""`fuse-swiglu`: gate, up and down of a SwiGLU block, all lowered, become one operator that recomputes down's input.

    (g, u, …) = op(x, [Wg, Wu]);  h = silu(g) · u;  (y, …) = op(h, [Wd])     →     (y, …) = swiglu(x, [Wg, Wu, Wd])

It follows `fuse-siblings`. The operator is `swiglu(x, weights, As, Bs, scales, p, seed)`, or has the further lists of that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import fx

from passes.base import PassResult, Region
from passes.fuse_siblings import has_bias
from passes.operands import MULTIPLY
from passes.spans import spans

_SILU = (F.silu, torch.ops.aten.silu.default)


@dataclass(frozen=True)
class FuseSwiglu:
    """Make one operator of each SwiGLU block.

    Attributes:
        siblings: the operator of lowered layers, as for `fuse-siblings`.
        swiglu: the operator of a whole block.
    """

    name: ClassVar[str] = "fuse-swiglu"
    siblings: Any
    swiglu: Any

    def run(self, region: Region) -> PassResult:
        """Fuse what has the form."""
        count = fuse_swiglu(region.graph, self.siblings, self.swiglu, region.resolve)
        return PassResult(bool(count), f"{count} SwiGLU blocks are one operator each")


@dataclass(frozen=True, slots=True)
class _Block:
    joined: fx.Node
    gate: fx.Node
    up: fx.Node
    silu: fx.Node
    product: fx.Node
    down: fx.Node


def fuse_swiglu(
    graph: fx.Graph, siblings: object, swiglu: object, module_of: Callable[[str], object] | None = None
) -> int:
    """Fuse all SwiGLU blocks, and return how many there were.

    Args:
        graph: changed in place.
        siblings: the operator of lowered layers.
        swiglu: the operator of a whole block.
        module_of: see `passes.spans.spans`.
    """
    span_of = spans(graph, module_of)
    found = [block for block in (_block(node, siblings) for node in graph.nodes) if block is not None]
    blocks = [block for block in found if span_of[block.joined] == span_of[block.down]]
    for block in blocks:
        _fuse(graph, block, swiglu)
    return len(blocks)


def _block(down: fx.Node, siblings: object) -> _Block | None:
    """The block that a call of the operator ends, None if it is no such block."""
    if down.target is not siblings or len(cast("list[Any]", down.args[1])) != 1 or has_bias(down):
        return None
    product = cast(fx.Node, down.args[0])
    if product.target not in MULTIPLY or len(product.args) != 2 or not _reads_only(down, product):
        return None
    for silu, up in (product.args, product.args[::-1]):
        if not isinstance(silu, fx.Node) or not isinstance(up, fx.Node):
            return None
        gate = silu.args[0] if silu.target in _SILU and len(silu.users) == 1 else None
        if isinstance(gate, fx.Node) and _are_the_two(gate, up, siblings):
            joined = cast(fx.Node, gate.args[0])
            alike = (isinstance(down.args[6], Sequence) or joined.args[6] == down.args[6]) and not has_bias(joined)
            return _Block(joined, gate, up, silu, product, down) if alike else None
    return None


def _reads_only(down: fx.Node, product: fx.Node) -> bool:
    """Whether nothing reads down's input but down and readers of its dtype, to which DoRA's norm casts its factors."""
    return all(user is down or _is_dtype(user) for user in product.users)


def _is_dtype(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] == "dtype"


def _are_the_two(gate: fx.Node, up: fx.Node, siblings: object) -> bool:
    """Whether these are the two outputs of one call of the operator, and nothing else reads them."""
    if gate is up or any(each.target is not operator.getitem or len(each.users) != 1 for each in (gate, up)):
        return False
    joined = cast(fx.Node, gate.args[0])
    return joined is up.args[0] and joined.target is siblings and len(cast("list[Any]", joined.args[1])) == 2


def _fuse(graph: fx.Graph, block: _Block, swiglu: object) -> None:
    first, second = cast(int, block.gate.args[1]), cast(int, block.up.args[1])
    joined, down = block.joined.args, block.down.args
    arguments = [
        [own[first], own[second], *cast("Sequence[Any]", of_down)] if isinstance(own, Sequence) else own
        for own, of_down in cast("list[Any]", list(zip(joined, down, strict=True)))
    ]
    del arguments[2]  # the biases
    with graph.inserting_before(block.down):
        fused = graph.call_function(cast(Any, swiglu), tuple(arguments))
    fused.meta.update(block.down.meta)
    block.down.replace_all_uses_with(fused)
    unused = down[-1]
    for user in list(block.product.users):
        if _is_dtype(user):
            user.args = (joined[0], "dtype")  # which all of the block has
    for node in (block.down, block.product, block.silu, block.gate, block.up, block.joined):
        graph.erase_node(node)
    if isinstance(unused, fx.Node) and not unused.users:
        graph.erase_node(unused)
