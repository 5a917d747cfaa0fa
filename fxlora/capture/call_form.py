"""Which calls of a forward a trace stands for: its real inputs, and the arguments that are fixed in it.

A trace freezes whatever is no traced value: whether an optional argument is given, and what a flag or a number is.
So these are fixed as one call has them, and the captured model refuses every other value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxlora.capture.inputs import Example
from fxlora.errors import CaptureError

_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_CONSTANT_TYPES = (type(None), bool, int, str)


@dataclass(frozen=True)
class CallForm:
    """One form of call.

    Attributes:
        names: the forward's parameters, but for `*args` and `**kwargs`, which are empty.
        defaults: of those that have one.
        positional: how many of them are given by position.
        keywords: names of those given by keyword.
        fixed: the values of the arguments that are no inputs of the trace.
    """

    names: tuple[str, ...]
    defaults: Mapping[str, object]
    positional: int
    keywords: tuple[str, ...]
    fixed: Mapping[str, object]

    @classmethod
    def complete(cls, model: nn.Module) -> Self:
        """The one form of call of a forward whose arguments are all required; each is an input.

        Raises:
            CaptureError: when the forward can be called in other ways too.
        """
        parameters = inspect.signature(model.forward).parameters
        for name, parameter in parameters.items():
            if parameter.kind in _STARRED:
                raise CaptureError(f"its forward takes *{name}, of which a trace sees nothing")
            if parameter.default is not parameter.empty:
                raise CaptureError(
                    f"its forward has the optional argument '{name}', and a trace would freeze whether it is given"
                )
        by_keyword = tuple(name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY)
        return cls(tuple(parameters), {}, len(parameters) - len(by_keyword), by_keyword, {})

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Self:
        """The form of an example. What it leaves out, or gives as None, bool, int or str, is fixed.

        Raises:
            CaptureError: when the forward does not take the example, or the example gives what a trace cannot hold.
        """
        signature = inspect.signature(model.forward)
        try:
            given = signature.bind(*example.args, **example.kwargs).arguments
        except TypeError as error:
            raise CaptureError(f"its forward does not take the example_inputs: {error}") from error
        fixed: dict[str, object] = {}
        for name, parameter in signature.parameters.items():
            if parameter.kind in _STARRED:
                if given.get(name):
                    raise CaptureError(f"example_inputs give values to *{name}, of which a trace sees nothing")
            elif name not in given or _is_constant(given[name]):
                fixed[name] = given.get(name, parameter.default)
            elif any(leaf is None for leaf in pytree.tree_leaves(given[name])):
                raise CaptureError(f"'{name}' of example_inputs holds None among its values, which a trace cannot tell")
        named = {name: each for name, each in signature.parameters.items() if each.kind not in _STARRED}
        defaults = {name: each.default for name, each in named.items() if each.default is not each.empty}
        return cls(tuple(named), defaults, len(example.args), tuple(example.kwargs), fixed)

    @property
    def is_complete(self) -> bool:
        """Whether the model takes no call of another form."""
        return not self.fixed and not self.defaults

    def call(self, function: Callable[..., Any], model: nn.Module, inputs: Mapping[str, object]) -> Any:
        """Call an unbound forward in this form.

        Args:
            function: the forward.
            model: its `self`.
            inputs: a value for each name that is not fixed.
        """
        values = {**inputs, **self.fixed}
        args = [values[name] for name in self.names[: self.positional]]
        return function(model, *args, **{name: values[name] for name in self.keywords})


def _is_constant(value: object) -> bool:
    """Whether a value, or everything in a container, is None, a bool, an int or a string."""
    return all(type(leaf) in _CONSTANT_TYPES for leaf in pytree.tree_leaves(value))


class CallCheck(nn.Module):
    """Refuses calls of another form than the one that was traced; a leaf module at the start of the graph.

    Attributes:
        names: of the arguments.
        fixed: the values of those that are no inputs of the trace.
    """

    def __init__(self, names: Sequence[str], fixed: Mapping[str, object]) -> None:
        super().__init__()
        self.names, self.fixed = tuple(names), dict(fixed)

    def forward(self, *values: Any) -> None:
        """Compare the arguments with the form of call.

        Raises:
            ValueError: names the argument and says what to do.
        """
        for name, value in zip(self.names, values, strict=True):
            if name in self.fixed:
                if not _same(value, self.fixed[name]):
                    raise ValueError(
                        f"'{name}' is {_shown(value)}, but the model was traced with {_shown(self.fixed[name])} there: "
                        f"transform it again with example_inputs that give '{name}' so, or use capture='modules', which "
                        "takes every call"
                    )
            elif any(leaf is None for leaf in pytree.tree_leaves(value)):
                raise ValueError(
                    f"'{name}' is left out or holds None, but the model was traced with it: give it, transform the model "
                    "again with example_inputs that leave it out, or use capture='modules', which takes every call"
                )


def _same(value: object, fixed: object) -> bool:
    return value is fixed or (type(value) is type(fixed) and not isinstance(value, Tensor) and value == fixed)


def _shown(value: object) -> str:
    return f"a tensor of sizes {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def insert_check(graphs: Sequence[fx.Graph], tree: nn.Module, check: nn.Module, name: str) -> None:
    """Call a check on all inputs at the start of graphs.

    Args:
        graphs: with the same inputs.
        tree: the module tree in which the check is registered.
        check: a leaf module without parameters.
        name: under which it is registered, if that is free.
    """
    while hasattr(tree, name):
        name += "_"
    tree.add_module(name, check)
    for graph in graphs:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_after(inputs[-1] if inputs else None):
            graph.call_module(name, tuple(inputs))
