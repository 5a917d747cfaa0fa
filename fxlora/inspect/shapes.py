"""The shape that each node of a graph returns, and its FLOPs, without computing anything.

A graph is run on fake tensors, node by node, and so are the graphs nested in it. Where a node cannot be run so (its result
depends on values), its metadata tell the shape if the capture noted one; else it and what depends on it stay unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fxlora._passes import Instance, Region, resolve
from fxlora.capture.inputs import Example, undisturbed

log = logging.getLogger("fxlora")

Shapes = dict[fx.Node, tuple[Any, int]]
"""(fake result, FLOPs) of each node that is known."""


def bind(graph: fx.Graph, example: Example) -> dict[fx.Node, Any] | None:
    """The value of each placeholder for a call of the graph; None if the call does not fit it."""
    positional = pytree.tree_leaves(example.args)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target).lstrip("*")
        if name in example.kwargs:
            values[node] = example.kwargs[name]
        elif positional:
            values[node] = positional.pop(0)
        elif node.args:
            values[node] = node.args[0]
        else:
            return None
    return values


def input_values(
    model: nn.Module | fx.Graph, pieces: Sequence[tuple[Region, Instance]], example: Example | None
) -> list[dict[fx.Node, Any] | None]:
    """What each graph is called with: by the example, or as its placeholders' metadata say; None if not known."""
    if example is not None and any(instance.module is not model for _, instance in pieces):
        return _observed(model, pieces, example) if isinstance(model, nn.Module) else [None] * len(pieces)
    if example is not None:
        return [bind(region.graph, example) for region, _ in pieces]
    return [_from_metadata(region.graph) for region, _ in pieces]


def _observed(
    model: nn.Module, pieces: Sequence[tuple[Region, Instance]], example: Example
) -> list[dict[fx.Node, Any] | None]:
    """Run the whole model on fakes, and note how the modules that run the graphs are called the first time."""
    calls: dict[nn.Module, Example] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, Example(args, kwargs))

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in dict.fromkeys(instance.module for _, instance in pieces)
    ]
    try:
        with undisturbed(model, training=False):
            _run(model, example)
    except Exception as error:  # noqa: BLE001 the model's own code runs on fakes here: anything can come out
        log.info("shapes are not known, since the model cannot be run on fake tensors: %s", _first_line(error))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        bind(region.graph, calls[instance.module]) if instance.module in calls else None for region, instance in pieces
    ]


def _run(model: nn.Module, example: Example) -> None:
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((example.args, example.kwargs))]
    if all(not isinstance(each, Tensor) or each.is_meta or each.dim() == 0 for each in tensors):
        with suppress(Exception):  # fakes can do more than meta tensors, and take several times as long
            example.run(model)
            return
    with _fakes() as mode:
        args, kwargs = pytree.tree_map(partial(_fake, mode), (example.args, example.kwargs))
        Example(args, kwargs).run(model)


@contextmanager
def _fakes() -> Generator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        yield mode


def _result_in(shapes: Shapes, node: fx.Node) -> Any:
    return shapes[node][0]


def _fake(mode: FakeTensorMode, value: object) -> object:
    return mode.from_tensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value


def _from_metadata(graph: fx.Graph) -> dict[fx.Node, Any] | None:
    """Inputs of the sizes that a placeholder's `val` has, symbols replaced by the sizes they were made from."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        sizes = [hint(size) for size in value.shape] if isinstance(value, Tensor) else None
        if sizes is None or None in sizes:
            return None
        values[node] = torch.empty(cast("list[int]", sizes), dtype=value.dtype, device="meta")
    return values


def hint(size: int | torch.SymInt) -> int | None:
    """A size as a number; of a symbol the one that it was made from, None if there is none."""
    if isinstance(size, int):
        return size
    found = getattr(size.node, "hint", None)
    return found if isinstance(found, int) else None


def run_on_shapes(graph: fx.Graph, module: nn.Module, inputs: Mapping[fx.Node, Any] | None) -> Shapes:
    """Run a graph on fakes.

    Args:
        graph: whose paths exist in `module`.
        module: not changed.
        inputs: of each placeholder; tensors of which only shape and dtype are read. None runs nothing.

    Returns:
        What is known of each node.
    """
    if inputs is None:
        return {}
    shapes: Shapes = {}
    with _fakes() as mode, _Counting() as counter:
        interpreter = _Runner(module, graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                shapes[node] = (_fake(mode, _beside(module, inputs[node])), 0)
                continue
            if node.op == "output":
                continue
            counter.flops = 0
            try:
                args, kwargs = map_arg((node.args, node.kwargs), partial(_result_in, shapes))
                result = getattr(interpreter, node.op)(node.target, args, kwargs)
                shapes[node] = (_fake(mode, result), counter.flops)
            except Exception as error:  # noqa: BLE001 a node may be anything that Python can call
                log.debug("'%s' cannot be run on fake tensors: %s", node.name, _first_line(error))
                noted = _noted(mode, module, node)
                if noted is not None:
                    shapes[node] = (noted, 0)
    return shapes


def _noted(mode: FakeTensorMode, module: nn.Module, node: fx.Node) -> Any:
    """A result like the one that a node's metadata hold; None if they hold none, or one of unknown sizes."""
    try:
        return pytree.tree_map(partial(_with_sizes, mode, module), node.meta.get("val", node.meta.get("example_value")))
    except ValueError:
        return None


def _with_sizes(mode: FakeTensorMode, module: nn.Module, value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    sizes = [hint(size) for size in value.shape]
    if None in sizes:
        raise ValueError(f"a size of {tuple(value.shape)} is not known")
    return _fake(mode, _beside(module, torch.empty(cast("list[int]", sizes), dtype=value.dtype, device="meta")))


def _beside(module: nn.Module, value: object) -> object:
    """An input without values on the device of the module's tensors: operators refuse two devices."""
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
    if not isinstance(value, Tensor) or not value.is_meta or device is None:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


Signature = tuple[object, ...]


def signature(graph: fx.Graph, module: nn.Module, inputs: Mapping[fx.Node, Any] | None) -> Signature:
    """What the shapes of a graph depend on: modules that agree in it need only one run."""
    named = [*module.named_parameters(), *module.named_buffers()]
    tensors = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in named)
    leaves = pytree.tree_leaves(list((inputs or {}).values()))
    values = tuple((v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in leaves)
    return graph, inputs is None, tensors, values


class _Runner(fx.Interpreter):
    """Finds what a graph names as passes do, and so in a module that only runs it too."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)

    def fetch_attr(self, target: str) -> Any:
        """The registered module or tensor, which a class may hide."""
        value = resolve(self.module, target)
        return value.detach() if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The module's own forward where a template's graph stands in its place."""
        value = resolve(self.module, target)
        return getattr(value, target)(*args, **kwargs) if value is self.module else cast(Any, value)(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A nested graph where the operator only sets a mode around it: such operators do not count what is in them."""
        context = _MODES.get(getattr(target, "__name__", ""))
        if context is None:
            return super().call_function(target, args, kwargs)
        index = next(index for index, each in enumerate(args) if isinstance(each, fx.GraphModule))
        with context(*args[:index]):
            return args[index](*args[index + 1 :], **kwargs)


_MODES = {"wrap_with_set_grad_enabled": torch.set_grad_enabled, "wrap_with_autocast": torch.autocast}
"""Operators of exported graphs that are called as `(settings…, graph, inputs…)`, and what takes these settings."""


class _Counting(TorchDispatchMode):
    """Adds up the FLOPs of operators as torch's own counter knows them."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # which torch leaves out
            self.flops += int(sdpa_flop_count(*(each.shape for each in args[:3])))
        elif formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
