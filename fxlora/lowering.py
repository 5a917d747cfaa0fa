"""The graphs of which the code of an optimized model is made: copies of the canonical ones, with operators for branches.

The canonical graphs stay the truth, for all that reads graphs. This knows nothing of captures; see `fxlora.optimize`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import fx, nn

from fxlora._passes import (
    SELF_CALL,
    Base,
    BranchedLinear,
    Region,
    copy_graph,
    fuse_siblings,
    fuse_swiglu,
    has_hooks,
    lower,
    region_bases,
    resolve,
)


def lowered_template(graph: fx.Graph, forward: object) -> fx.Graph:
    """A template's graph with an operator for the layer and its branch, a copy without one where the layer is no linear one.

    Args:
        graph: calls `SELF_CALL`.
        forward: what that calls: the forward of the layer's own class.
    """

    def base_of(node: fx.Node) -> Base | None:
        if node.target != SELF_CALL or forward is not nn.Linear.forward:
            return None
        return Base(node, cast(fx.Node, node.args[0]), "weight", "bias")

    copied = copy_graph(graph)
    _lower(copied, base_of, lambda _: True, lambda _: nn.Module())
    return copied


def lowered_region(region: Region) -> Region:
    """A region with operators for layers and their branches, joined where layers share an input or make a block."""
    copied = Region(copy_graph(region.graph), region.instances)
    call_silu(copied)
    bases = {base.node: base for base in region_bases(copied)}
    _lower(copied.graph, bases.get, lambda path: resolve(region.module, path) is not None, region.resolve)
    from fxlora.ops.call import branched_dora_swiglu, branched_doras, branched_linears, branched_swiglu

    for siblings, swiglu in ((branched_linears, branched_swiglu), (branched_doras, branched_dora_swiglu)):
        fuse_siblings(copied.graph, siblings, region.resolve)
        fuse_swiglu(copied.graph, siblings, swiglu, region.resolve)
    copied.graph.lint()
    return copied


def _lower(
    graph: fx.Graph,
    base_of: Callable[[fx.Node], Base | None],
    has: Callable[[str], bool],
    module_of: Callable[[str], object],
) -> None:
    """Lower all layers.

    Args:
        graph: changed in place.
        base_of: see `passes.lower`.
        has: whether there is something at the path of a bias.
        module_of: finds the module that a node calls.
    """
    from fxlora.ops.call import branched_doras, branched_linears

    scales: list[fx.Node] = []

    def write(graph: fx.Graph, found: BranchedLinear) -> fx.Node:
        def read(path: object) -> fx.Node:
            return graph.create_node("get_attr", cast(str, path))

        base, scaling, dropout = found.base, found.scaling, found.dropout
        weight = read(base.weight) if isinstance(base.weight, str) else base.weight
        bias = base.bias
        if isinstance(bias, str):
            bias = read(bias) if has(bias) else None
        called = base.node.op == "call_module" and base.node.target != SELF_CALL
        layer = read(base.node.target) if called else None
        scales.append(scaling)
        scale = read(f"{scaling.target}.scale") if scaling.op == "call_module" else scaling
        own = None if dropout is None else read(dropout.target)
        if found.ratio is not None:
            target, own = branched_doras, found.ratio
        else:
            target = branched_linears
        args = (base.x, [weight], [bias], [found.A], [found.B], [scale], [own], [layer])
        y = graph.call_function(operator.getitem, (graph.call_function(target, cast(Any, args)), 0))
        y.meta.update({name: found.result.meta[name] for name in ("lora",) if name in found.result.meta})
        return y

    lower(graph, base_of, write, module_of)
    for scaling in scales:
        if not scaling.users:
            graph.erase_node(scaling)


def call_silu(region: Region) -> None:
    """Make calls of `nn.SiLU` modules calls of the function, as which blocks have them."""
    for node in region.graph.nodes:
        if node.op != "call_module":
            continue
        module = cast(nn.Module, region.resolve(cast(str, node.target)))
        if type(module) is nn.SiLU and not module.inplace and len(node.args) == 1 and not has_hooks(module):
            node.op, node.target = "call_function", F.silu
