"""Spans of a graph: stretches within which a value does not depend on where in the stretch it is computed.

A span ends with a node that writes into a tensor or switches a mode (autocast, gradients), and goes on behind a context
that is entered and left. Passes that compute something at another place of the graph do so within one span.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn

from passes.leaves import CONTAINERS


def spans(graph: fx.Graph, module_of: Callable[[str], object] | None = None) -> dict[fx.Node, int]:
    """The number of the span that each node of a graph is in.

    Args:
        graph: graphs of Dynamo or of a region.
        module_of: finds the module that a node calls, to see whether it writes into its input. Without it, any module
            but a branch's own is taken to do so.
    """
    found: dict[fx.Node, int] = {}
    numbers: dict[tuple[int, tuple[fx.Node, ...]], int] = {}
    ends, contexts = 0, cast("tuple[fx.Node, ...]", ())
    for node in graph.nodes:
        found[node] = numbers.setdefault((ends, contexts), len(numbers))
        name = getattr(node.target, "__name__", "")
        if name.startswith("_enter_"):
            contexts = (*contexts, node)
        elif name.startswith("_exit_") and contexts and node.args == contexts[-1:]:
            contexts = contexts[:-1]
        else:
            ends += _ends_span(node, module_of)
    return found


_WRITING = (
    *(operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor),
    *(operator.ilshift, operator.irshift),
)


def _ends_span(node: fx.Node, module_of: Callable[[str], object] | None) -> bool:
    if node.op == "call_module":
        target = cast(str, node.target)
        if module_of is None:
            return not any(part in CONTAINERS for part in target.split("."))
        module = module_of(target)
        return not isinstance(module, nn.Module) or any(getattr(each, "inplace", False) for each in module.modules())
    if node.op == "call_method":
        return _is_name_of_writer(cast(str, node.target))
    return node.op == "call_function" and _is_writing_call(node)


def _is_writing_call(node: fx.Node) -> bool:
    target = cast(Any, node.target)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator) or target in _WRITING:
        return True
    name = getattr(target, "__name__", "")
    if name.startswith("_exit_") or name.endswith("set_grad_enabled") or _is_name_of_writer(name):
        return True
    place = _place_of_inplace(target)
    inplace = node.kwargs.get("inplace", node.args[place] if place is not None and place < len(node.args) else False)
    return inplace is not False or node.kwargs.get("out") is not None


def _is_name_of_writer(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") or name in ("__setitem__", "__iadd__", "__imul__")


@functools.cache
def _place_of_inplace(target: Callable[..., Any]) -> int | None:
    """The position of a function's parameter `inplace`, None if it has none or no signature."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
