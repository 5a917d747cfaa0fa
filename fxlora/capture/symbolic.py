"""`symbolic` capture: one graph of a whole model by torch.fx tracing, accepted only where the trace is sound.

Tracing runs the forward once with stand-ins, so it can succeed and still be wrong: optional arguments, Python state,
tensors made on the way and branches on types are frozen as they were, and contexts such as `torch.no_grad()` are lost. Each
of these is refused, with the reason.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from fxlora._passes import has_hooks, is_leaf, layer_of, resolve
from fxlora.capture.call_form import CallCheck, CallForm, insert_check
from fxlora.capture.graph_module import LoraGraphModule, adopt_constants, shell_of
from fxlora.capture.inputs import Example, kept_attributes, same_outputs, training_mode
from fxlora.capture.side_effects import unchanged
from fxlora.capture.unify import combine
from fxlora.errors import CaptureError

log = logging.getLogger("fxlora")


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


_OPENED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer)
"""Containers of torch's own that are traced into where that succeeds, and are one call otherwise.

`nn.MultiheadAttention` and `nn.Transformer` branch on the rank of their inputs: they are always one call.
"""


class _Tracer(fx.Tracer):
    """Traces one form of call and keeps every layer that can be a call site as one `call_module`.

    It knows the names of all parameters and buffers, for each of which torch.fx would look through the whole model.
    """

    def __init__(self, form: CallForm) -> None:
        super().__init__(autowrap_functions=())
        self._form = form
        self._closed: set[nn.Module] = set()
        self._contexts = _contexts()
        self._parameter_paths: dict[int, str] = {}
        self._buffer_paths: dict[int, str] = {}

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        changed = [name for name, value in _contexts().items() if value != self._contexts[name]]
        if changed and kind != "output":
            raise CaptureError(f"its forward runs a part under {changed[0]}, which a trace would lose")
        return super().create_node(kind, *args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        self._parameter_paths = {id(parameter): name for name, parameter in self.root.named_parameters()}
        self._buffer_paths = {id(buffer): name for name, buffer in self.root.named_buffers()}
        form = self._form
        defaults = {name: (form.defaults[name],) if name in form.defaults else () for name in form.names}
        inputs = {name: self.create_proxy("placeholder", name, defaults[name], {}) for name in form.names}

        def call(*proxies: Any) -> Any:
            return form.call(root_fn, self.root, dict(zip(form.names, proxies, strict=True)))

        return call, list(inputs.values())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in _OPENED:
            return m in self._closed
        if is_leaf(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if type(m) not in _OPENED or m in self._closed:
            return super().call_module(m, forward, args, kwargs)
        before, stack, calls = set(self.graph.nodes), dict(self.module_stack), dict(self.num_calls)
        try:
            return super().call_module(m, forward, args, kwargs)
        except (RuntimeError, TypeError, ValueError):  # a stand-in was asked for what it cannot tell
            for node in reversed(self.graph.nodes):
                if node not in before and node.op != "get_attr":  # parameters' nodes are kept by torch.fx for later
                    self.graph.erase_node(node)
            self.num_calls = calls
            self.module_stack.clear()
            self.module_stack.update(stack)
            self._closed.add(m)
            return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        path = self._parameter_paths.get(id(attr_val))
        if path is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if path not in parameter_proxy_cache:
            parameter_proxy_cache[path] = self.create_proxy("get_attr", path, (), {})
        return parameter_proxy_cache[path]

    def create_arg(self, a: Any) -> Any:
        path = self._parameter_paths.get(id(a)) or self._buffer_paths.get(id(a))
        return super().create_arg(a) if path is None else self.create_node("get_attr", path, (), {})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SoundProxy(node, self)


def _contexts() -> dict[str, object]:
    """By its name, what is in force of the contexts that change what operations do and that no node shows."""
    return {
        "torch.inference_mode()": torch.is_inference_mode_enabled(),
        "torch.no_grad(), enable_grad() or set_grad_enabled()": torch.is_grad_enabled(),
        "torch.autocast()": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    }


def capture(model: nn.Module, example: Example | None, *, restricted: bool = True) -> LoraGraphModule:
    """Trace `model` in both modes into one graph over its own parameters, or two where the modes differ too much.

    Args:
        model: not changed; may be on the meta device.
        example: inputs with which outputs are compared, if there are any. Arguments that it leaves out, or gives as
            None, bool, int or str, are fixed so: the captured model refuses other values.
        restricted: whether the captured model may take fewer calls, or other mixtures of modes, than the model does.

    Returns:
        The captured model, without adapters yet.

    Raises:
        CaptureError: when the model cannot be traced, or a trace would not be sound.
    """
    form = _call_form(model, example, restricted)
    _check_hooks(model, form)
    train, evaluation = (_trace_twice(model, form, mode) for mode in (True, False))
    called = {str(node.target) for graph in (train, evaluation) for node in graph.nodes if node.op == "call_module"}
    for graph in (train, evaluation):
        _check_constants(graph, model)
    tree = shell_of(model, {id(model.get_submodule(path)) for path in called})
    graphs, reason = combine(train, evaluation, tree)
    if reason and not restricted:
        raise CaptureError(reason)
    if reason:
        log.info("training and evaluation stay two graphs, since %s", reason)
    if not form.is_complete:
        insert_check(graphs, tree, CallCheck(form.names, form.fixed), "call_check")
    for graph in graphs:
        adopt_constants(tree, graph, model)
    captured = LoraGraphModule.build(tree, graphs, kept_attributes(model), reason)
    if example is not None and not any(p.is_meta for p in model.parameters()):
        same_outputs(model, captured, example)
    return captured


def trace_in_both_modes(module: nn.Module) -> fx.Graph:
    """The graph of a module's forward that is the same in training and in evaluation; its layers are calls.

    Raises:
        CaptureError: when it cannot be traced, differs between the modes, or a trace would not be sound.
    """
    form = CallForm.complete(module)
    _check_hooks(module, form)
    train, evaluation = (_trace_twice(module, form, mode) for mode in (True, False))
    if str(train) != str(evaluation):
        raise CaptureError("it computes different things in training and in evaluation")
    _check_constants(train, module)
    return train


def _call_form(model: nn.Module, example: Example | None, restricted: bool) -> CallForm:
    if restricted and example is not None:
        return CallForm.of(model, example)
    try:
        return CallForm.complete(model)
    except CaptureError as error:
        hint = "; pass example_inputs, and the graph takes the calls of their form" if restricted else ""
        raise CaptureError(f"{error}{hint}") from None


def _check_hooks(model: nn.Module, form: CallForm) -> None:
    tracer = _Tracer(form)
    for name, module in model.named_modules():
        other_leaf = layer_of(module) is None and tracer.is_leaf_module(module, name)
        if has_hooks(module) and not other_leaf:  # a hook on a linear would see the base's output, not the branch's
            raise CaptureError(f"'{name or 'the model'}' has hooks, which a trace would lose or call too early")


def _trace_twice(model: nn.Module, form: CallForm, training: bool) -> fx.Graph:
    """A trace that comes out the same a second time."""
    first, second = _trace(model, form, training), _trace(model, form, training)
    if _lines(first) != _lines(second):
        raise CaptureError("tracing it twice gives two different graphs: something outside of the model decides")
    return first


def _lines(graph: fx.Graph) -> list[str | None]:
    """A graph as text, which `str(graph)` takes quadratic time to put together."""
    return [node.format_node() for node in graph.nodes]


def _trace(model: nn.Module, form: CallForm, training: bool) -> fx.Graph:
    with training_mode(model, training), unchanged(model), _traceable_torch():
        try:
            return _Tracer(form).trace(model)
        except CaptureError:
            raise
        except Exception as error:  # tracing runs the user's code on stand-ins: anything can come out
            first_line = (str(error).splitlines() or [""])[0]
            raise CaptureError(f"it cannot be traced{_place(error)}: {type(error).__name__}: {first_line}") from error


def _place(error: Exception) -> str:
    """Where the traced code was when a trace broke off, as far as it is not torch's."""
    frames = [
        (frame.f_globals.get("__name__", ""), frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    own = [(frame, line) for name, frame, line in frames if not name.startswith(("torch", "fxlora.capture"))]
    return f" ({Path(own[-1][0].f_code.co_filename).name}, line {own[-1][1]})" if own else ""


@contextmanager
def _traceable_torch() -> Generator[None]:
    """Let torch's own code be traced where it asks a traced value for what makes no difference to the result.

    Its fused attention is an optimization, looked for in many ways. The length of a sequence matters to it only beside
    a mask, whose sizes it then compares, which no trace allows. Functions that make a tensor are nodes where its size is
    a traced value: torch would ask that for its type.
    """
    patches: list[tuple[Any, str, Any]] = [(transformer, "_get_seq_len", _no_length)]
    patches += [(torch, name, _traced(getattr(torch, name))) for name in _FACTORIES]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        torch.backends.mha.set_fastpath_enabled(fast_path)


_FACTORIES = ("arange", "empty", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros")


def _no_length(*_: object) -> None:
    """Stands for the length of a sequence."""


def _traced(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Record a call with traced arguments as a node; others are made, and found among the constants later."""

    def call(*args: Any, **kwargs: Any) -> Any:
        proxies = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
        if not proxies:
            return factory(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", factory, args, kwargs)

    return call


def _check_constants(graph: fx.Graph, model: nn.Module) -> None:
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise CaptureError(
                "its forward makes a tensor of its own (such as torch.arange or torch.zeros), which a trace would "
                "freeze as a constant; register it as a buffer"
            )
        if node.op == "get_attr" and not isinstance(resolve(model, str(node.target)), Tensor):
            raise CaptureError(f"its forward reads '{node.target}', which is not a tensor")
