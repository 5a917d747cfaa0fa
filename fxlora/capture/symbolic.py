"""`symbolic` capture: one graph of a whole model by torch.fx tracing, accepted only where the trace is sound.

Tracing runs the forward once with stand-ins, so it can succeed and still be wrong: optional arguments, Python state,
tensors made on the way and branches on types are frozen as they were. Each of these is refused, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from fxlora._passes import is_leaf, layer_of, resolve
from fxlora.capture.graph_module import LoraGraphModule, adopt_constants, shell_of
from fxlora.capture.inputs import Example, kept_attributes, same_outputs, training_mode
from fxlora.capture.unify import FLAG, TrainingFlag, unify
from fxlora.errors import CaptureError


class _SoundProxy(fx.Proxy):
    """A proxy that refuses questions about its type, since tracing would freeze the answer for a stand-in."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        caller = sys._getframe(1)
        if not caller.f_globals.get("__name__", "").startswith("torch") or caller.f_code.co_name == "is_tensor":
            raise TraceError(
                "the forward asks for the type of a traced value (isinstance, or a function that takes plain numbers)"
            )
        return type(self)


class _Tracer(fx.Tracer):
    """Keeps every layer that can be a call site as one `call_module`."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_leaf(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SoundProxy(node, self)


def capture(model: nn.Module, example: Example | None) -> LoraGraphModule:
    """Trace `model` in both modes into one graph over its own parameters.

    Args:
        model: not changed; may be on the meta device.
        example: inputs with which outputs are compared, if there are any.

    Returns:
        The captured model, without adapters yet.

    Raises:
        CaptureError: when the model cannot be traced, or a trace would not be sound.
    """
    _check_signature(model)
    _check_hooks(model)
    train, evaluation = (_trace_twice(model, mode) for mode in (True, False))
    _check_constants(train, model)
    leaves = {id(model.get_submodule(str(node.target))) for node in train.nodes if node.op == "call_module"}
    tree = shell_of(model, leaves)
    unify(train, evaluation, lambda owner: add_flag(tree, owner))
    adopt_constants(tree, train, model)
    captured = LoraGraphModule.build(tree, train, kept_attributes(model))
    if example is not None and not any(p.is_meta for p in model.parameters()):
        same_outputs(model, captured, example)
    return captured


def add_flag(tree: nn.Module, owner: str) -> str:
    """Register a `TrainingFlag` in a module of the tree and return its path."""
    module = tree.get_submodule(owner)
    name = FLAG
    while hasattr(module, name):
        name += "_"
    module.add_module(name, TrainingFlag().train(module.training))
    return ".".join(part for part in (owner, name) if part)


def _check_signature(model: nn.Module) -> None:
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise CaptureError(f"its forward takes *{parameter.name}, of which a trace sees nothing")
        if parameter.default is not parameter.empty:
            raise CaptureError(
                f"its forward has the optional argument '{parameter.name}', and a trace would freeze whether it is given"
            )


def _check_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        other_leaf = layer_of(module) is None and _Tracer().is_leaf_module(module, name)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) and not other_leaf:  # a hook on a linear would see the base's output, not the branch's
            raise CaptureError(f"'{name or 'the model'}' has hooks, which a trace would lose or call too early")


def _trace_twice(model: nn.Module, training: bool) -> fx.Graph:
    """A trace that comes out the same a second time."""
    first, second = _trace(model, training), _trace(model, training)
    if str(first) != str(second):
        raise CaptureError("tracing it twice gives two different graphs: something outside of the model decides")
    return first


def _trace(model: nn.Module, training: bool) -> fx.Graph:
    with training_mode(model, training), _unchanged(model):
        try:
            return _Tracer().trace(model)
        except CaptureError:
            raise
        except Exception as error:  # tracing runs the user's code on stand-ins: anything can come out
            first_line = (str(error).splitlines() or [""])[0]
            raise CaptureError(f"it cannot be traced: {type(error).__name__}: {first_line}") from error


@contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Restore the model and the random generators, and refuse a forward that changes them: a trace does so only once.

    Raises:
        CaptureError: naming what was changed.
    """
    before = {module: _Held(module) for module in model.modules()}
    states = _random_states()
    try:
        yield
        for module, held in before.items():
            changed = held.changed()
            if changed is not None:
                raise CaptureError(
                    f"its forward changes '{type(module).__name__}.{changed}', which a trace does only once"
                )
        for name, (state, now) in _pairs(states, _random_states()).items():
            if state != now:
                raise CaptureError(f"its forward draws from {name}, and a trace would freeze what was drawn")
    finally:
        for held in before.values():
            held.restore()
        _restore_random(states)


class _Held:
    """What a module holds: its attributes, and the contents of every list, dict and set among them, however nested."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._contents: list[tuple[str, Any, Any]] = []
        for name, value in self._attributes.items():
            self._collect(name, value)

    def _collect(self, name: str, value: object) -> None:
        if isinstance(value, (list, set)):
            items = cast("list[object]", value)
            self._contents.append((name, items, copy.copy(items)))
        elif isinstance(value, dict):
            entries = cast("dict[object, object]", value)
            self._contents.append((name, entries, dict(entries)))
            items = entries.values()
        else:
            return
        for item in list(items):
            self._collect(name, item)

    def changed(self) -> str | None:
        """The name of an attribute that is another now, or holds other things."""
        now = vars(self._module)
        for name in {**now, **self._attributes}:
            if now.get(name, self) is not self._attributes.get(name, self) and not name.startswith("_tensor_constant"):
                return name
        for name, container, contents in self._contents:
            if not _same_contents(container, contents):
                return next(_differing(container, contents), name)
        return None

    def restore(self) -> None:
        """Put everything back in place."""
        attributes = vars(self._module)
        attributes.clear()
        attributes.update(self._attributes)
        for _, container, contents in self._contents:
            if isinstance(container, list):
                container[:] = contents
            else:
                container.clear()
                container.update(contents)


def _same_contents(container: Any, contents: Any) -> bool:
    if isinstance(container, dict):
        pairs = zip(cast("dict[Any, Any]", container).items(), contents.items(), strict=False)
        return len(container) == len(contents) and all(a is c and b is d for (a, b), (c, d) in pairs)
    if isinstance(container, set):
        return container == contents
    return len(container) == len(contents) and all(a is b for a, b in zip(container, contents, strict=True))


def _differing(container: Any, contents: Any) -> Iterator[str]:
    """Names in a dict, such as a module's buffers, whose values changed."""
    if isinstance(container, dict):
        entries = cast("dict[Any, Any]", container)
        for name in {**entries, **contents}:
            if isinstance(name, str) and entries.get(name, contents) is not contents.get(name, contents):
                yield name


def _random_states() -> dict[str, object]:
    """The states of the generators that a forward may draw from outside of the graph, as comparable values."""
    states: dict[str, object] = {"Python's random": random.getstate()}
    states["torch's generator"] = torch.get_rng_state().numpy().tobytes()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy's random"] = (kind, keys.tobytes(), *rest)
    return states


def _pairs(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    return {name: (before[name], after[name]) for name in before}


def _restore_random(states: dict[str, object]) -> None:
    random.setstate(cast(Any, states["Python's random"]))
    content = bytearray(cast(bytes, states["torch's generator"]))
    torch.set_rng_state(torch.frombuffer(content, dtype=torch.uint8).clone())
    if "numpy's random" in states:
        import numpy

        kind, keys, *rest = cast("tuple[Any, ...]", states["numpy's random"])
        numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


def _check_constants(graph: fx.Graph, model: nn.Module) -> None:
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise CaptureError(
                "its forward makes a tensor of its own (such as torch.arange or torch.zeros), which a trace would "
                "freeze as a constant; register it as a buffer"
            )
        if node.op == "get_attr" and not isinstance(resolve(model, str(node.target)), Tensor):
            raise CaptureError(f"its forward reads '{node.target}', which is not a tensor")
