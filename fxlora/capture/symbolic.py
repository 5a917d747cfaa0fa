"""`symbolic` capture: one graph of a whole model by torch.fx tracing, accepted only where the trace is sound.

Tracing runs the forward once with stand-ins, so it can succeed and still be wrong: optional arguments, Python state,
tensors made on the way and branches on types are frozen as they were. Each of these is refused, with the reason.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from fxlora._passes import linear_shape, resolve
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
        return linear_shape(m) is not None or super().is_leaf_module(m, module_qualified_name)

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
    train, evaluation = (_trace(model, mode) for mode in (True, False))
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
        is_leaf = linear_shape(module) is not None or _Tracer().is_leaf_module(module, name)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) and not is_leaf:
            raise CaptureError(f"'{name or 'the model'}' has hooks, which a trace would lose")


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
    """Restore every module's attributes, and refuse a forward that changes them: a trace would do so only once.

    Raises:
        CaptureError: naming the attribute.
    """
    before = {module: _snapshot(module) for module in model.modules()}
    try:
        yield
        for module, snapshot in before.items():
            for (_, name), value in _snapshot(module).items():
                if snapshot.get((_, name), before) is not value and not name.startswith("_tensor_constant"):
                    raise CaptureError(
                        f"its forward changes '{type(module).__name__}.{name}', which a trace would do only once"
                    )
    finally:
        for module, snapshot in before.items():
            _restore(module, snapshot)


_CONTENTS = ("_parameters", "_buffers", "_modules")


def _snapshot(module: nn.Module) -> dict[tuple[str, str], object]:
    """What a module holds, by (dict of tensors or children, or "" for a plain attribute; name)."""
    held = {("", name): value for name, value in vars(module).items() if name not in _CONTENTS}
    for key in _CONTENTS:
        held.update({(key, name): value for name, value in vars(module)[key].items()})
    return held


def _restore(module: nn.Module, snapshot: dict[tuple[str, str], object]) -> None:
    attributes = vars(module)
    for name in [name for name in attributes if name not in _CONTENTS and ("", name) not in snapshot]:
        del attributes[name]
    for key in _CONTENTS:
        attributes[key].clear()
    for (key, name), value in snapshot.items():
        (attributes[key] if key else attributes)[name] = value


def _check_constants(graph: fx.Graph, model: nn.Module) -> None:
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise CaptureError(
                "its forward makes a tensor of its own (such as torch.arange or torch.zeros), which a trace would "
                "freeze as a constant; register it as a buffer"
            )
        if node.op == "get_attr" and not isinstance(resolve(model, str(node.target)), Tensor):
            raise CaptureError(f"its forward reads '{node.target}', which is not a tensor")
