"""Running a graph or a model on inputs and keeping what each node or module computes; in float64 if asked.

Called by `compare`. It knows nothing of LoRA but the call of a layer's own forward in a template.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from fxlora._passes import SELF_CALL, original_forward, resolve
from fxlora.capture.inputs import Example
from fxlora.inspect.counterparts import Side

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_CASTS = ("half", "bfloat16", "float")


@dataclass(eq=False, slots=True)
class Record:
    """What one run computed.

    Attributes:
        values: of each node, or of each call of a module, by `(name, number of the call)`: copies of all its tensors.
        live: the tensors themselves, for gradients.
        inputs: of each call of a module.
        outputs: what the whole returns.
        parameters: the parameters as the run used them, by name.
        gradients: what `gradients` found.
    """

    values: dict[Any, list[Tensor]] = field(default_factory=dict[Any, list[Tensor]])
    live: dict[Any, list[Tensor]] = field(default_factory=dict[Any, list[Tensor]])
    inputs: dict[Any, list[Tensor]] = field(default_factory=dict[Any, list[Tensor]])
    outputs: list[Tensor] = field(default_factory=list[Tensor])
    parameters: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    gradients: dict[Any, Tensor] = field(default_factory=dict[Any, Tensor])

    def keep(self, key: Any, result: object) -> None:
        """Keep a result, unless it has no tensors or numbers."""
        found = tensors_in(result)
        if found:
            self.values[key] = [each.detach().clone() for each in found]
            self.live[key] = found


def tensors_in(value: object) -> list[Tensor]:
    """The tensors and numbers in a value, numbers as float64 tensors."""
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, (Tensor, float, int))]
    return [leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=torch.float64) for leaf in leaves]


def run_graph(side: Side, example: Example, *, wide: bool = False) -> Record:
    """Run a graph node by node.

    Args:
        side: the graph and its module.
        example: the call of the graph's module.
        wide: compute all that is floating in float64.
    """
    interpreter = _Recording(side, wide)
    module = cast(nn.Module, side.module)
    interpreter.run(*_flat(side.graph, example, wide), enable_io_processing=False)
    record = interpreter.record
    record.parameters = {name: interpreter.wide(p) for name, p in module.named_parameters()}
    return record


def _flat(graph: fx.Graph, example: Example, wide: bool) -> list[Any]:
    """The values of the placeholders for a call."""
    args, kwargs = (pytree.tree_map(widened if wide else _same, each) for each in (example.args, example.kwargs))
    codegen = graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        spec = codegen.pytree_info.in_spec
        names = spec.children()[1].context if spec.num_children == 2 else None
        ordered = {name: kwargs[name] for name in names if name in kwargs} if names else kwargs
        return pytree.tree_leaves((args, ordered))
    values: list[Any] = list(args)
    for node in [node for node in graph.nodes if node.op == "placeholder"][len(values) :]:
        values.append(kwargs[node.target] if node.target in kwargs else node.args[0] if node.args else None)
    return values


def _same(value: Any) -> Any:
    return value


def widened(value: Any) -> Any:
    """A floating tensor, or its dtype, in float64; anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in FLOATS else value
    return torch.float64 if isinstance(value, torch.dtype) and value in FLOATS else value


class _Recording(fx.Interpreter):
    """An interpreter of a region's graph that keeps every result."""

    def __init__(self, side: Side, wide: bool) -> None:
        super().__init__(cast(nn.Module, side.module), garbage_collect_values=False, graph=side.graph)
        self.record, self._wide = Record(), wide
        self._doubles: dict[int, Tensor] = {}

    def wide(self, value: Any) -> Any:
        """A tensor of the model as this run uses it: one for each, so that gradients add up."""
        if not self._wide or not isinstance(value, Tensor) or value.dtype not in FLOATS:
            return value
        if id(value) not in self._doubles:
            self._doubles[id(value)] = value.detach().double().requires_grad_(value.requires_grad)
        return self._doubles[id(value)]

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep its result; in float64 not the checks of inputs, which would refuse it."""
        if self._wide and n.op == "call_module" and not n.users:
            return None
        result = super().run_node(n)
        if n.op == "output":
            self.record.outputs = [each for each in tensors_in(result) if each.is_floating_point()]
        self.record.keep(n, result)
        return result

    def fetch_attr(self, target: str) -> Any:
        """What the path names, also beyond classes that show something else."""
        return self.wide(resolve(self.module, target))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call it, with dtypes in float64 if the run is."""
        return super().call_function(target, *self._widened(args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call it likewise."""
        name = "double" if self._wide and target in _CASTS else target
        return super().call_method(name, *self._widened(args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module, or the own forward of the module that runs a template."""
        module = cast(nn.Module, resolve(self.module, target))
        own = cast("Callable[..., Any]", original_forward(module)) if target == SELF_CALL else None
        if not self._wide:
            return own(module, *args, **kwargs) if own else module(*args, **kwargs)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with _reparametrize_module(module, {name: self.wide(each) for name, each in tensors.items()}):
            return own(module, *args, **kwargs) if own else module(*args, **kwargs)

    def _widened(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return pytree.tree_map(widened, (args, kwargs)) if self._wide else (args, kwargs)


def run_modules(model: nn.Module, example: Example, *, wide: bool = False) -> Record:
    """Run a model and keep what each call of each of its modules takes and returns.

    Args:
        model: not changed.
        example: the call.
        wide: run a copy of the model in float64.
    """
    record = Record()
    if wide:
        model = copy.deepcopy(model).double()
        configs: list[Any] = [each.config for each in model.modules() if hasattr(each, "config")]
        for config in configs:
            if getattr(config, "_experts_implementation", None) is not None:
                config._experts_implementation = "eager"  # grouped products have no float64
        example = Example(*pytree.tree_map(widened, (example.args, example.kwargs)))
    with _kept(model, record):
        result = example.run(model)
    record.outputs = [each for each in tensors_in(result) if each.is_floating_point()]
    record.parameters = dict(model.named_parameters())
    return record


@contextmanager
def _kept(model: nn.Module, record: Record) -> Generator[None]:
    counts: dict[str, int] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: object) -> None:
            del module
            counts[name] = counts.get(name, 0) + 1
            key = (name, counts[name] - 1)
            record.inputs[key] = [each.detach().clone() for each in tensors_in((args, kwargs))]
            record.keep(key, result)

        return hook

    handles = [
        module.register_forward_hook(hook_of(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients(record: Record) -> dict[Any, Tensor]:
    """The gradients of a fixed weighting of all outputs, by parameter name and by key of what was kept."""
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    for each in record.outputs:
        weights = torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each.device)
        loss = loss + (each.double() * weights).sum().cpu()
    points = dict(_points(record))
    if not loss.requires_grad or not points:
        return {}
    found = cast("list[Tensor | None]", torch.autograd.grad(loss, list(points.values()), allow_unused=True))
    return {key: grad for key, grad in zip(points, found, strict=True) if grad is not None}


def _points(record: Record) -> Iterator[tuple[Any, Tensor]]:
    for name, parameter in record.parameters.items():
        if parameter.requires_grad:
            yield name, parameter
    for key, tensors in record.live.items():
        if len(tensors) == 1 and tensors[0].requires_grad and not isinstance(tensors[0], nn.Parameter):
            yield key, tensors[0]
