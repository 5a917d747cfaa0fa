"""From a graph to a `forward` function whose source debuggers and tracebacks can show, from memory or from a file."""

from __future__ import annotations

import functools
import itertools
import linecache
import re
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, cast

from torch import fx

from fxlora._passes import containers

_counter = itertools.count()

BY_MODE = "_fxlora_by_mode"
"""Attribute of a forward that chooses by mode: the functions for training and for evaluation."""

_SOURCE = "_fxlora_source"
"""Attribute of a generated function whose code has been read from a file: the source without comments."""

FORWARD_SPECS = ("_in_spec", "_out_spec")
"""Attributes that hold the structure of inputs and outputs of a model's graph, if it has one."""

EVALUATION_SPECS = ("_evaluation_in_spec", "_evaluation_out_spec")
"""Attributes that hold the structure of inputs and outputs of a model's evaluation graph, if it has one of its own."""


def generate_forward(graph: fx.Graph, specs: tuple[str, str] = FORWARD_SPECS) -> Callable[..., Any]:
    """Compile a graph into a `forward` method.

    Args:
        graph: its paths are looked up on `self`.
        specs: the attributes of `self` with the structure of inputs and outputs, where the graph has one.
    """
    code = graph.python_code("self")
    source = code.src.replace("self._in_spec", f"self.{specs[0]}").replace("self._out_spec", f"self.{specs[1]}")
    source = _read_quickly(source)
    filename = f"<fxlora graph {next(_counter)}>"
    namespace = dict(code.globals)
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102 (what torch.fx does with its graphs)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    return cast(FunctionType, namespace["forward"])


def _read_quickly(source: str) -> str:
    """Source that finds the modules in layers' containers by keys: by attributes it takes three times as long."""
    contained = re.compile(rf"(\bself|\))((?:\.[A-Za-z_]\w*)*\.(?:{'|'.join(sorted(containers()))})\.[A-Za-z_]\w*)\b")
    return contained.sub(lambda found: found[1] + re.sub(r"\.(\w+)", r"._modules['\1']", found[2]), source)


def forward_by_mode(in_training: Callable[..., Any], in_evaluation: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` with the signature of both that runs the one for the mode of `self`, after `self._check_modes()`."""

    @functools.wraps(in_training)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_modes()
        if self.training:
            return in_training(self, *args, **kwargs)
        return in_evaluation(self, *args, **kwargs)

    function = cast(FunctionType, forward)
    function.__dict__[BY_MODE] = (in_training, in_evaluation)
    function.__code__ = function.__code__.replace()  # Dynamo keeps what it compiles by the code object, and not much
    return function


def source_of(forward: Callable[..., Any]) -> str:
    """The source of a generated function, as it was generated."""
    function = cast(FunctionType, forward)
    source = function.__dict__.get(_SOURCE) or "".join(linecache.getlines(function.__code__.co_filename))
    return source.strip()


def run_from(forward: Callable[..., Any], text: str, filename: str) -> None:
    """Let a generated function run the same code as compiled from a file, which debuggers and tracebacks then show.

    Args:
        forward: the function; changed in place, so that all that call it go through the file's lines.
        text: of the file: the function's source with comments.
        filename: absolute, as debuggers compare it.
    """
    function = cast(FunctionType, forward)
    function.__dict__[_SOURCE] = source_of(function)
    parts = compile(text, filename, "exec", dont_inherit=True).co_consts
    function.__code__ = next(each for each in parts if isinstance(each, CodeType) and each.co_name == "forward")
    linecache.checkcache(filename)
