"""`lower`: each linear layer with a branch in canonical form becomes one call of an operator.

    y = linear(x, W, b);  s = mul(linear(linear(dropout(x), A), B), scale);  y' = add(y, s)     →     y' = operator(…)

or, with DoRA, `y' = add(y, (ratio - 1) · (y - b) + ratio · s)`, of which the ratio stays in the graph.

The form is found by its dataflow, so that graphs of any origin can be lowered: those of a region, and those that Dynamo
makes of a model. The operator is the caller's: this package has none. What has another form stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from passes.base import SELF_CALL, PassResult, Region, has_hooks, original_forward, resolve
from passes.leaves import DROPOUT, SCALING
from passes.operands import ADD, MULTIPLY, arg
from passes.rescaled import Rescaled, rescaled
from passes.sites import find_sites
from passes.spans import spans

aten = torch.ops.aten

_LINEAR = (F.linear, aten.linear.default)
_ADD = (*ADD, operator.iadd)


@dataclass(frozen=True, slots=True)
class Base:
    """A linear layer's own operation: its node, its input, and how to write nodes of its weight and bias."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node | str
    bias: fx.Node | str | None


@dataclass(frozen=True, slots=True)
class BranchedLinear:
    """A linear layer and its branch in a graph.

    Attributes:
        base: the layer.
        A: the factor as it is registered, below any cast.
        B: likewise.
        scaling: the scale.
        dropout: the node that drops the branch's input, if there is one.
        ratio: DoRA's factor of layer and branch, `(out,)`; None for plain LoRA.
        total: the sum of the layer and its branch.
        result: the node that is replaced: the sum, or its cast to the layer's own dtype.
        inner: all nodes between the operands and the sum.
    """

    base: Base
    A: fx.Node
    B: fx.Node
    scaling: fx.Node
    dropout: fx.Node | None
    ratio: fx.Node | None
    total: fx.Node
    result: fx.Node
    inner: tuple[fx.Node, ...]


Write = Callable[[fx.Graph, BranchedLinear], fx.Node]
"""Adds the node of the operator for a layer, at the graph's insertion point, and returns it."""


@dataclass(frozen=True)
class LowerBranches:
    """Replace linear layers with branches in a region by an operator.

    Attributes:
        write: adds the operator's node.
    """

    name: ClassVar[str] = "lower"
    write: Write

    def run(self, region: Region) -> PassResult:
        """Lower what has the form."""
        bases = {base.node: base for base in region_bases(region)}
        count = lower(region.graph, bases.get, self.write, region.resolve)
        return PassResult(bool(count), f"{count} layers are one operator each")


def lower(
    graph: fx.Graph,
    base_of: Callable[[fx.Node], Base | None],
    write: Write,
    module_of: Callable[[str], object] | None = None,
) -> int:
    """Lower all layers of a graph, and return how many there were.

    Args:
        graph: changed in place.
        base_of: the linear layer that a node is, None for any other node.
        write: adds the operator's node.
        module_of: see `passes.spans.spans`.
    """
    span_of = spans(graph, module_of)
    matches = [match for match in (branched_linear(node, base_of) for node in graph.nodes) if match is not None]
    found = [match for match in matches if span_of[match.base.node] == span_of[match.total]]
    lowered: dict[fx.Node, fx.Node] = {}
    for each in found:
        x = lowered.get(each.base.x, each.base.x)
        with graph.inserting_before(each.total):
            node = write(graph, replace(each, base=replace(each.base, x=x)))
        if "example_value" in each.result.meta:
            node.meta["example_value"] = each.result.meta["example_value"]
        each.result.replace_all_uses_with(node)
        base = each.base.node
        _erase_unused(graph, (each.result, *each.inner, base))
        if base.users:  # readers of its dtype or shape
            base.replace_all_uses_with(node)
            graph.erase_node(base)
        lowered[each.result] = node
    return len(found)


def functional_base(node: fx.Node) -> Base | None:
    """The linear layer that a call of `linear` on three values is."""
    if node.op != "call_function" or node.target not in _LINEAR:
        return None
    x, weight, bias = (arg(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return Base(node, x, weight, bias if isinstance(bias, fx.Node) else None)


def region_bases(region: Region) -> Iterator[Base]:
    """The linear layers of a region that an operator can stand for: with torch's own forward, and without hooks."""
    for site in find_sites(region):
        layer = site.layer
        if layer.kind != "linear" or layer.transposed or site.x is None:
            continue
        if site.node.op == "call_module":
            modules = [
                cast(nn.Module, resolve(instance.module, cast(str, site.node.target))) for instance in region.instances
            ]
            if all(original_forward(each) is nn.Linear.forward and not _is_hooked(each, site.node) for each in modules):
                prefix = site.weight.rpartition("weight")[0]
                yield Base(site.node, site.x, site.weight, f"{prefix}bias")
        else:
            base = functional_base(site.node)
            if base is not None:
                yield base


def _is_hooked(module: nn.Module, node: fx.Node) -> bool:
    """Whether something runs around a call of the module; around a template it runs in any case."""
    return node.target != SELF_CALL and has_hooks(module)


def branched_linear(node: fx.Node, base_of: Callable[[fx.Node], Base | None]) -> BranchedLinear | None:
    """The layer whose sum with its branch a node is, None for any other node."""
    if node.op != "call_function" or node.target not in _ADD or len(node.args) != 2 or node.kwargs:
        return None
    for y, s in (node.args, node.args[::-1]):
        if isinstance(y, fx.Node) and isinstance(s, fx.Node):
            base = base_of(y)
            if base is not None and (found := _with_branch(node, base, s)) is not None:
                return found
    return None


def _with_branch(node: fx.Node, base: Base, added: fx.Node) -> BranchedLinear | None:
    dora = rescaled(added, base.node, base.bias)
    s = added if dora is None else dora.s
    if s.target not in MULTIPLY or len(s.args) != 2 or s.kwargs or not _read_by(base.node, node, dora):
        return None
    b, scaling = cast("tuple[Any, Any]", s.args)
    if not _is_scale(scaling) or not _is_linear(b):
        return None
    a, B, bias = arg(b, 0, "input"), arg(b, 1, "weight"), arg(b, 2, "bias")
    if bias is not None or not _is_linear(a) or arg(a, 2, "bias") is not None:
        return None
    x, A = arg(a, 0, "input"), arg(a, 1, "weight")
    dropout = x if isinstance(x, fx.Node) and x is not base.x and _is_dropout(x) else None
    source = x if dropout is None else arg(dropout, 0, "input")
    drops = [] if dropout is None else [dropout]
    made = () if dora is None else dora.inner
    if source is not base.x or not _used_once(*made, s, b, a, *drops):
        return None
    if dora is not None and dropout is not None and arg(dropout, 2, "training", default=True) is not False:
        return None  # W is multiplied with the dropped input, too: another form
    plain_A, casts_A = _below_cast(A)
    plain_B, casts_B = _below_cast(B)
    result = _cast_to(base.node, node)
    inner = (*([] if result is node else [node]), *made, s, b, a, *casts_B, *casts_A, *drops)
    ratio = None if dora is None else dora.ratio
    return BranchedLinear(base, plain_A, plain_B, scaling, dropout, ratio, node, result, inner)


def _cast_to(base: fx.Node, total: fx.Node) -> fx.Node:
    """The cast of a sum to the dtype of the layer's own output, which an operator's output has; else the sum."""
    user = next(iter(total.users)) if len(total.users) == 1 else None
    if user is None or user.op != "call_method" or user.target != "to" or len(user.args) != 2 or user.kwargs:
        return total
    dtype = user.args[1]
    if isinstance(dtype, fx.Node):
        return user if dtype.target is getattr and dtype.args == (base, "dtype") else total
    value = base.meta.get("example_value")
    return user if value is not None and value.dtype == dtype else total


def _is_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _LINEAR


def _is_dropout(node: fx.Node) -> bool:
    if node.op == "call_module":
        return DROPOUT in cast(str, node.target).split(".")
    return node.target is F.dropout and arg(node, 3, "inplace", default=False) is False


def _is_scale(value: object) -> bool:
    """Whether a value is one number for all tokens and features."""
    if not isinstance(value, fx.Node):
        return False
    if value.op in ("call_module", "get_attr") and SCALING in cast(str, value.target).split("."):
        return True
    example = value.meta.get("example_value")
    return isinstance(example, torch.Tensor) and example.dim() == 0


def _used_once(*nodes: fx.Node) -> bool:
    """Whether the nodes have one user each, apart from readers of their dtype."""
    return all(sum(user.target is not getattr for user in node.users) == 1 for node in nodes)


def _read_by(base: fx.Node, total: fx.Node, dora: Rescaled | None) -> bool:
    """Whether nothing reads a layer's output but the sum, a branch of DoRA's and, later, readers of dtype, device or shape."""
    branch = None if dora is None else dora.reader
    return all(user is total or user is branch or (user.target is getattr and total < user) for user in base.users)


def _below_cast(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """A factor below its cast to the activation's dtype, and the nodes of the cast."""
    if node.op == "call_method" and node.target == "to" and len(node.args) == 2 and not node.kwargs:
        below, dtype = cast("tuple[fx.Node, object]", node.args)
        if isinstance(dtype, torch.dtype):
            return below, (node,)
        if isinstance(dtype, fx.Node) and dtype.target is getattr and dtype.args[1] == "dtype":
            return below, (node, dtype)
    return node, ()


def _erase_unused(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        for user in list(node.users):
            if user.target is getattr and not user.users:
                graph.erase_node(user)
        if not node.users and node in graph._find_nodes_lookup_table:
            graph.erase_node(node)
