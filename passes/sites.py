"""Call sites: the one place that knows how a layer is spelled in a graph.

A linear may be a `call_module`, `torch.nn.functional.linear`, one of several ATen operators, or a matrix product with
a transposed weight. `find_sites` recognises them all and gives each its qualified name. It must not know about
adapters, configurations or selection.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.base import Region
from passes.leaves import PARAMETERS

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class CallSite:
    """One call of a layer in a region's graph: `y = linear(x, W, b)`.

    Attributes:
        name: qualified name of the layer, relative to the region's instance. A bare parameter's own name when the
            weight belongs to no layer.
        kind: the layer kind, a key of `passes.branches.KINDS`.
        node: the node that computes `y`.
        x: the node of the input, `(…, in_features)`.
        weight: path of `W` relative to the instance.
        in_features: size of the last dimension of `x`.
        out_features: size of the last dimension of `y`.
        transposed: whether `W` is stored `(in, out)`, as in GPT-2's Conv1D, and not `(out, in)`.
        spelling: how the graph writes the call, for people.
        call: 0 for the first call of this layer in the graph, 1 for the second, …
    """

    name: str
    kind: str
    node: fx.Node
    x: fx.Node
    weight: str
    in_features: int
    out_features: int
    transposed: bool
    spelling: str
    call: int = 0

    @property
    def owner(self) -> str:
        """Path of the module under which the branches' factors are registered."""
        return branch_owner(self.name, is_parameter=self.weight == self.name)


def branch_owner(site: str, *, is_parameter: bool) -> str:
    """The module that holds a site's factors: the layer itself, or a holder beside a bare parameter."""
    if not is_parameter:
        return site
    module, _, leaf = site.rpartition(".")
    return ".".join(part for part in (module, PARAMETERS, leaf) if part)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of a linear layer's weight: `(out, in)`, or `(in, out)` if `transposed`."""

    in_features: int
    out_features: int
    transposed: bool


def linear_shape(module: nn.Module) -> LinearShape | None:
    """The shape of a module that is a linear layer (`nn.Linear` or transformers' `Conv1D`), else None."""
    if isinstance(module, nn.Linear):
        return LinearShape(module.in_features, module.out_features, transposed=False)
    if any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__):
        weight = cast(Tensor, module.weight)
        return LinearShape(weight.shape[0], weight.shape[1], transposed=True)
    return None


def find_sites(region: Region) -> list[CallSite]:
    """All call sites of a region, in graph order, calls of the same layer numbered from 0."""
    names = _Names(region.module)
    calls: dict[str, int] = {}
    sites: list[CallSite] = []
    for node in region.graph.nodes:
        found = _match(node, region, names)
        if found is None:
            continue
        call = calls[found.name] = calls.get(found.name, -1) + 1
        sites.append(replace(found, call=call))
    return sites


def _match(node: fx.Node, region: Region, names: _Names) -> CallSite | None:
    if node.op == "call_module":
        return _match_module(node, region, names)
    if node.op in ("call_function", "call_method"):
        for spelling, pattern in _FUNCTIONAL:
            operands = pattern(node)
            if operands is not None:
                return _match_functional(node, operands, spelling, region, names)
    return None


def _match_module(node: fx.Node, region: Region, names: _Names) -> CallSite | None:
    module = region.resolve(cast(str, node.target))
    shape = linear_shape(module) if isinstance(module, nn.Module) else None
    x = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if shape is None or not isinstance(x, fx.Node):
        return None
    name = names.of_module(cast(nn.Module, module))
    weight = f"{name}.weight" if name else "weight"
    return CallSite(
        name,
        "linear",
        node,
        x,
        weight,
        shape.in_features,
        shape.out_features,
        shape.transposed,
        type(module).__name__,
    )


def _match_functional(
    node: fx.Node, operands: tuple[Any, Any, bool], spelling: str, region: Region, names: _Names
) -> CallSite | None:
    x, weight, transposed = operands
    weight, flipped = peel(weight)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    tensor = region.resolve(cast(str, weight.target))
    if not isinstance(tensor, nn.Parameter) or tensor.dim() != 2:
        return None
    transposed ^= flipped
    in_features, out_features = tensor.shape if transposed else reversed(tensor.shape)
    name, path = names.of_parameter(tensor, owning_path(node), cast(str, weight.target))
    return CallSite(name, "linear", node, x, path, in_features, out_features, transposed, spelling)


def owning_path(node: fx.Node) -> str:
    """Path of the module whose code made this node, from `nn_module_stack`; `""` where unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    if path.startswith("_empty_nn_module_stack"):  # torch.export's mark for a node whose origin it does not know
        return ""
    return re.sub(r"@\d+", "", path)  # torch.export marks repeated calls of one module so


class _Names:
    """Canonical qualified names: the first under which `named_modules` and `named_parameters` show an object."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules = {id(module): name for name, module in root.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in root.named_parameters()}

    def of_module(self, module: nn.Module) -> str:
        return self._modules[id(module)]

    def of_parameter(self, parameter: nn.Parameter, caller: str, target: str) -> tuple[str, str]:
        """(site name, path of the weight) for a parameter that `caller`'s code uses.

        A weight that two layers share is named after the layer that makes the call, as far as the graph tells.
        """
        path = self._parameters.get(id(parameter), target)
        for candidate in (f"{caller}.weight", path):
            owner, _, leaf = candidate.rpartition(".")
            if owner and leaf == "weight" and self._parameter(candidate) is parameter:
                module = self._root.get_submodule(owner)
                owner = self._modules.get(id(module), owner)
                return owner, f"{owner}.weight"
        return path, path

    def _parameter(self, path: str) -> object:
        try:
            return self._root.get_parameter(path)
        except AttributeError:
            return None


def peel(value: object) -> tuple[object, bool]:
    """Strip casts and transposes from a weight operand: (what is below, whether it is transposed)."""
    flipped = False
    while isinstance(value, fx.Node) and value.op in ("call_function", "call_method"):
        if _is_transpose(value):
            flipped = not flipped
        elif value.target not in _CASTS:
            break
        value = _arg(value, 0, "input", "self")
    return value, flipped


# Strings are the names of methods, which only a `call_method` node has for a target.
_TRANSPOSES = ("t", torch.t, aten.t.default, aten.numpy_T.default, aten.mT.default)
_SWAPS = (
    *("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims),
    *(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default),
)
_PERMUTES = ("permute", torch.permute, aten.permute.default)
_CASTS = (
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


Pattern = Callable[[fx.Node], "tuple[Any, Any, bool] | None"]
"""From a node to `(x, weight operand, whether the operator multiplies by it untransposed)`, or None."""


def _arg(node: fx.Node, index: int, *names: str) -> Any:
    """An argument that may be given by position or by one of its names (ATen and torch differ in these)."""
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _linear(node: fx.Node) -> tuple[Any, Any, bool] | None:
    if node.target in (F.linear, aten.linear.default):
        return _arg(node, 0, "input"), _arg(node, 1, "weight"), False
    return None


def _addmm(node: fx.Node) -> tuple[Any, Any, bool] | None:
    if node.target not in (torch.addmm, aten.addmm.default):
        return None
    if any(node.kwargs.get(name, 1) != 1 for name in ("beta", "alpha")):
        return None
    return _arg(node, 1, "mat1"), _arg(node, 2, "mat2"), True


def _matmul(node: fx.Node) -> tuple[Any, Any, bool] | None:
    functions = (torch.matmul, torch.mm, operator.matmul, aten.mm.default, aten.matmul.default)
    if node.target in functions or (node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__")):
        return _arg(node, 0, "input", "self"), _arg(node, 1, "mat2", "other"), True
    return None


_FUNCTIONAL: tuple[tuple[str, Pattern], ...] = (("linear", _linear), ("addmm", _addmm), ("matmul", _matmul))
