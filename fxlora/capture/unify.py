"""One graph for train and eval: align the graphs of both modes and feed what differs from a `TrainingFlag`.

A flag must be a leaf submodule whose forward returns its own `training`: an attribute read would be baked in, without
an error, as soon as a graph module is pickled.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from fxlora._passes import copy_graph, owning_path
from fxlora.errors import CaptureError

T = TypeVar("T")
aten = torch.ops.aten

FLAG = "training_flag"
"""Name of the flag in the module whose code depends on the mode."""

_VALUE_PRESERVING = {
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.alias.default,
    aten.detach.default,
}
"""Operators that may appear in one mode only, since they copy or relabel what they are given."""


class TrainingFlag(nn.Module):
    """Returns whether its owner is in training mode."""

    def forward(self) -> bool:
        """`self.training`."""
        return self.training


def choose(training: bool, in_train: T, in_eval: T) -> T:
    """The first value in training, the second in evaluation."""
    return in_train if training else in_eval


fx.wrap("choose")


class Mismatch(CaptureError):
    """The graphs of the two modes cannot be made one."""


def combine(train: fx.Graph, evaluation: fx.Graph, tree: nn.Module) -> tuple[list[fx.Graph], str]:
    """One graph for both modes, where that can be.

    Args:
        train: graph captured in training mode.
        evaluation: graph captured in evaluation mode.
        tree: the module tree that the graphs run on; receives a `TrainingFlag` wherever the mode matters.

    Returns:
        The one graph and `""`; or the two, as they are, and the reason.
    """
    flags: list[str] = []

    def add_flag(owner: str) -> str:
        module, name = tree.get_submodule(owner), FLAG
        while hasattr(module, name):
            name += "_"
        module.add_module(name, TrainingFlag().train(module.training))
        flags.append(".".join(part for part in (owner, name) if part))
        return flags[-1]

    draft = copy_graph(train)
    try:
        unify(draft, evaluation, add_flag)
    except Mismatch as mismatch:
        for path in flags:
            owner, _, name = path.rpartition(".")
            delattr(tree.get_submodule(owner), name)
        return [train, evaluation], str(mismatch)
    return [draft], ""


def differing_owners(train: fx.Graph, evaluation: fx.Graph) -> tuple[str, ...]:
    """Paths of the modules whose own code is not the same in the graphs of the two modes.

    Layers that a graph calls as a whole are not among them: they follow their own mode.
    """
    in_training, in_evaluation = _code_by_owner(train), _code_by_owner(evaluation)
    owners = {**in_training, **in_evaluation}
    return tuple(owner for owner in owners if owner and in_training.get(owner) != in_evaluation.get(owner))


def _code_by_owner(graph: fx.Graph) -> dict[str, list[str]]:
    """The operations of each module in order, with inputs told by their place in the code of their own module."""
    code: dict[str, list[str]] = {}
    places: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            places[node] = str(node.target)
            continue
        owner = _calling_path(node)
        args = fx.map_arg((node.args, node.kwargs), lambda each: cast(Any, places[each]))
        code.setdefault(owner, []).append(f"{node.op} {node.target} {args}")
        places[node] = f"{owner}[{len(code[owner])}]"
    return code


def _calling_path(node: fx.Node) -> str:
    """Path of the module whose code made this node; for a call of a layer, that of the caller."""
    stack = node.meta.get("nn_module_stack")
    if node.op != "call_module" or not stack:
        return owning_path(node)
    entries = list(stack.values())
    return str(entries[-2][0]) if len(entries) > 1 else ""


def unify(train: fx.Graph, evaluation: fx.Graph, add_flag: Callable[[str], str]) -> int:
    """Rewrite `train` into a graph that is right in both modes.

    Args:
        train: graph captured in training mode; changed in place.
        evaluation: graph captured in evaluation mode.
        add_flag: registers a `TrainingFlag` in the module of the given path and returns the flag's own path.

    Returns:
        How many nodes depend on the mode.

    Raises:
        Mismatch: says where the two modes differ in structure.
    """
    pairs, to_train = _align(train, evaluation)
    differing = [(a, b) for a, b in pairs if (a.args, a.kwargs) != _mapped(b, to_train)]
    flags: dict[str, fx.Node] = {}

    def flag(node: fx.Node) -> fx.Node:
        owner = owning_path(node)
        if owner not in flags:
            first = next(each for each in train.nodes if each.op != "placeholder")
            with train.inserting_before(first):
                flags[owner] = train.call_module(add_flag(owner))
        return flags[owner]

    for a, b in differing:
        _mix_arguments(train, a, *_mapped(b, to_train), flag)
    paired = set(to_train.values())
    counters = [node for node in train.nodes if node not in paired and _counts_batches(node)]
    for node in counters:
        if node.op != "get_attr":
            _mix_arguments(train, node, (node.args[0], 0), {}, flag)
    return len(differing) + len(counters)


def _mapped(node: fx.Node, to_train: dict[fx.Node, fx.Node]) -> tuple[Any, Any]:
    mapped = fx.map_arg((node.args, node.kwargs), lambda each: to_train[each])
    return cast("tuple[Any, Any]", mapped)


def _align(train: fx.Graph, evaluation: fx.Graph) -> tuple[list[tuple[fx.Node, fx.Node]], dict[fx.Node, fx.Node]]:
    """Pairs of corresponding nodes, and the map from evaluation's nodes to training's."""
    left, right = list(train.nodes), list(evaluation.nodes)
    pairs: list[tuple[fx.Node, fx.Node]] = []
    to_train: dict[fx.Node, fx.Node] = {}
    i = j = 0
    while i < len(left) or j < len(right):
        a = left[i] if i < len(left) else None
        b = right[j] if j < len(right) else None
        if a is not None and b is not None and (a.op, a.target) == (b.op, b.target):
            pairs.append((a, b))
            to_train[b] = a
            i, j = i + 1, j + 1
        elif a is not None and _preserves_value(a):
            for key, value in list(to_train.items()):
                if value is a.args[0]:
                    to_train[key] = a
            i += 1
        elif a is not None and _counts_batches(a):
            i += 1
        elif b is not None and _preserves_value(b):
            to_train[b] = to_train[cast(fx.Node, b.args[0])]
            j += 1
        else:
            raise Mismatch(_difference(a, b, left, right))
    return pairs, to_train


def _preserves_value(node: fx.Node) -> bool:
    if node.target not in _VALUE_PRESERVING:
        return False
    source = cast(fx.Node, node.args[0])
    before, after = source.meta.get("val"), node.meta.get("val")
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.dtype == after.dtype and before.device == after.device
    return node.target in (aten.contiguous.default, aten.clone.default)


def _counts_batches(node: fx.Node) -> bool:
    """Whether a node belongs to `counter += 1` on a buffer, as batch norm counts its batches in training only."""
    if node.op == "get_attr":
        return bool(node.users) and all(_counts_batches(user) for user in node.users)
    counts = node.target is aten.add_.Tensor and not node.users and len(node.args) == 2
    return counts and isinstance(node.args[1], int) and cast(fx.Node, node.args[0]).op == "get_attr"


def _difference(a: fx.Node | None, b: fx.Node | None, train: list[fx.Node], evaluation: list[fx.Node]) -> str:
    where = owning_path(a or cast(fx.Node, b)) or "the model"
    in_train, in_eval = (Counter(str(node.target) for node in nodes) for nodes in (train, evaluation))
    extra = [f"{mode} computes {', '.join(list(only)[:4])}" for mode, only in _only(in_train, in_eval) if only]
    return f"in '{where}' the graphs of the two modes part: {' and '.join(extra) or 'the order differs'}"


def _only(train: Counter[str], evaluation: Counter[str]) -> list[tuple[str, Counter[str]]]:
    return [("only training", train - evaluation), ("only evaluation", evaluation - train)]


def _mix_arguments(
    graph: fx.Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], flag: Callable[[fx.Node], fx.Node]
) -> None:
    """Give `node` arguments that follow the mode, where its own (training) differ from `args` and `kwargs`."""

    def mix(in_train: Any, in_eval: Any) -> Any:
        if in_train is in_eval:
            return in_train
        if isinstance(in_train, fx.Node) or isinstance(in_eval, fx.Node):
            raise Mismatch(f"'{node.name}' in '{owning_path(node)}' takes {in_train} in training and {in_eval} else")
        if isinstance(in_train, (list, tuple)) and isinstance(in_eval, (list, tuple)):
            first, second = cast("list[Any]", in_train), cast("list[Any]", in_eval)
            if type(in_train) is type(in_eval) and len(first) == len(second):
                return type(in_train)(mix(p, q) for p, q in zip(first, second, strict=True))  # pyright: ignore[reportCallIssue, reportUnknownVariableType]
        if type(in_train) is type(in_eval) and in_train == in_eval:
            return in_train
        current = flag(node)
        if (in_train, in_eval) == (True, False):
            return current
        with graph.inserting_before(node):
            chosen = graph.call_function(choose, (current, in_train, in_eval))
        chosen.meta.update(node.meta)
        chosen.meta.pop("val", None)
        return chosen

    names, defaults = _signature(node)
    count = max(len(node.args), len(args))
    if count > len(names) and len(node.args) != len(args):
        raise Mismatch(f"'{node.name}' has {len(node.args)} arguments in training and {len(args)} in evaluation")
    own, other = _filled(node.args, node.kwargs, names, defaults), _filled(args, kwargs, names, defaults)
    by_name = [name for name in {**node.kwargs, **kwargs} if name not in names[:count]]
    node.args = tuple(mix(own[index], other[index]) for index in range(count))
    node.kwargs = {name: mix(own.get(name), other.get(name)) for name in by_name}


def _filled(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], defaults: dict[str, Any]
) -> dict[int | str, Any]:
    """Every argument by position and by name, those left out at their default."""
    values: dict[int | str, Any] = {**defaults, **kwargs}
    for index, name in enumerate(names):
        value = args[index] if index < len(args) else values.get(name)
        values[index] = values[name] = value
    for index, value in enumerate(args):
        values[index] = value
    return values


def _signature(node: fx.Node) -> tuple[list[str], dict[str, Any]]:
    """Names and defaults of the arguments of the node's target, as far as they can be known."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        arguments = list(schema.arguments)
        return [each.name for each in arguments], {each.name: each.default_value for each in arguments}
    if node.op == "call_function" and callable(node.target):
        try:
            parameters = inspect.signature(node.target).parameters
        except ValueError:
            return [], {}
        defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
        return list(parameters), defaults
    return [], {}
