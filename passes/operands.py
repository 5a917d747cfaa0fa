"""Reading a node's operands: arguments by position or name, and a weight below casts and transposes."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

ADD = (torch.add, operator.add, aten.add.Tensor)
SUBTRACT = (torch.sub, operator.sub, aten.sub.Tensor)
MULTIPLY = (torch.mul, operator.mul, aten.mul.Tensor)
"""An operation as tracers write it, none of them into an operand."""


def arg(node: fx.Node, index: int, *names: str, default: Any = None) -> Any:
    """An argument that may be given by position or by one of its names (ATen and torch differ in these)."""
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def owning_path(node: fx.Node) -> str:
    """Path of the module whose code made this node, from `nn_module_stack`; `""` where unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    if path.startswith("_empty_nn_module_stack"):  # torch.export's mark for a node whose origin it does not know
        return ""
    return re.sub(r"@\d+", "", path)  # torch.export marks repeated calls of one module so


def peel(value: object) -> tuple[object, bool]:
    """Strip casts and transposes from a weight operand: (what is below, whether it is transposed)."""
    flipped = False
    while isinstance(value, fx.Node) and value.op in ("call_function", "call_method"):
        if _is_transpose(value):
            flipped = not flipped
        elif value.target not in CASTS:
            break
        value = arg(value, 0, "input", "self")
    return value, flipped


# Strings are the names of methods, which only a `call_method` node has for a target.
_TRANSPOSES = ("t", torch.t, aten.t.default, aten.numpy_T.default, aten.mT.default)
_SWAPS = (
    *("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims),
    *(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default),
)
_PERMUTES = ("permute", torch.permute, aten.permute.default)
CASTS = (
    *("to", "type_as", "float", "double", "half", "bfloat16", "contiguous"),
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default),
    *(aten.type_as.default, aten.contiguous.default),
)


def _is_transpose(node: fx.Node) -> bool:
    if node.target in _TRANSPOSES:
        return True
    rest = [*node.args[1:], *(value for name, value in node.kwargs.items() if name not in ("input", "self"))]
    if node.target is getattr:
        return rest in (["T"], ["mT"])
    if node.target in _SWAPS:
        return _swaps(rest)
    if node.target in _PERMUTES:
        first = rest[0] if rest else None
        return _swaps(first if isinstance(first, (list, tuple)) else rest, in_order=True)
    return False


def _swaps(dims: Sequence[object], *, in_order: bool = False) -> bool:
    """Whether `dims` are the two dimensions of a matrix, counted from either end; second first if `in_order`."""
    found = [dim % 2 for dim in dims if isinstance(dim, int)]
    return len(found) == len(dims) and (found if in_order else sorted(found, reverse=True)) == [1, 0]
