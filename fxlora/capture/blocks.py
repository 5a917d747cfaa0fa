"""SwiGLU blocks in `modules` capture: the module around gate, up and down gets a class that runs all three as one operator.

Its own forward is traced, and replaced only if the trace is such a block and nothing else. The class keeps that forward for
calls in which one of its parts has hooks, or is not what it was. Modules alike share a class. See `fxlora.optimize`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import new_class
from typing import Any, cast

from torch import fx, nn

from fxlora._passes import SELF_CALL, Branch, BranchDtype, BranchSpec, InsertBranches, Instance, Region, lora_meta
from fxlora.capture.codegen import generate_forward
from fxlora.capture.symbolic import trace_in_both_modes
from fxlora.errors import CaptureError
from fxlora.host.saved_modules import plain_class
from fxlora.lowering import lowered_region

Parts = tuple[tuple[str, type[nn.Module]], ...]
"""The children of a block and their classes."""

Reduce = Callable[[nn.Module, Any], tuple[Any, ...]]

_BLOCKS: dict[tuple[type[nn.Module], Parts, str], type[nn.Module]] = {}


def is_block(module: nn.Module) -> bool:
    """Whether a module has a class of this kind."""
    return "_block" in vars(type(module))


def block_regions(model: nn.Module) -> list[Region]:
    """The graphs of all blocks, with the modules that run them."""
    found: dict[type[nn.Module], list[Instance]] = {}
    for name, module in model.named_modules():
        if is_block(module):
            found.setdefault(type(module), []).append(Instance(name, module))
    return [Region(cast(Any, cls)._block, tuple(instances)) for cls, instances in found.items()]


def block_classes(
    model: nn.Module,
    specs: Sequence[BranchSpec],
    classes: Mapping[nn.Module, type[nn.Module]],
    dtype: BranchDtype,
    reduce: Reduce,
) -> dict[nn.Module, type[nn.Module]]:
    """The class of each module that is a block.

    Args:
        model: the whole.
        specs: the branches that run.
        classes: of the modules that have a generated one.
        dtype: which side is cast where dtypes differ.
        reduce: how their instances are pickled.
    """
    inside: dict[str, list[BranchSpec]] = {}
    for spec in specs:
        inside.setdefault(spec.site.rpartition(".")[0], []).append(spec)
    found: dict[nn.Module, type[nn.Module]] = {}
    for name, own in inside.items():
        module = model.get_submodule(name)
        if len(own) == 3 and name and module not in classes and "forward" not in vars(module):
            parts = tuple((part, classes.get(child, type(child))) for part, child in module.named_children())
            branches = tuple(Branch.of(spec, spec.site.rpartition(".")[2]) for spec in own)
            graph = _block(Instance(name, module), branches, dtype)
            if graph is not None:
                found[module] = block_class(plain_class(module), parts, graph, reduce)
    return found


def _block(instance: Instance, branches: tuple[Branch, ...], dtype: BranchDtype) -> fx.Graph | None:
    """The graph of a module that is a block and nothing else."""
    module, before = instance.module, type(instance.module)
    try:
        module.__class__ = plain_class(module)
        region = Region(trace_in_both_modes(module), (Instance("", module),))
        InsertBranches(branches, dtype).run(region)
        graph = lowered_region(region).graph
    except (CaptureError, ValueError):  # it cannot be traced, or does not call these layers
        return None
    finally:
        module.__class__ = before
    return _apart_from_layers(graph)


def _apart_from_layers(graph: fx.Graph) -> fx.Graph | None:
    """The graph without the modules whose calls the operator stands for, None if there is more in it than the operator.

    With DoRA there are the ratios besides, which are the branches' own.
    """
    from fxlora.ops.call import branched_dora_swiglu, branched_swiglu

    own = [node for node in graph.nodes if lora_meta(node) is None or node.target is operator.getitem]
    calls = [node for node in own if node.op not in ("placeholder", "get_attr", "output")]
    inputs = [node for node in own if node.op == "placeholder"]
    targets = [node.target for node in calls]
    known = ([branched_swiglu, operator.getitem], [branched_dora_swiglu, operator.getitem])
    if targets not in known or len(inputs) != 1:
        return None
    call, y = calls
    if call.args[0] is not inputs[0] or next(iter(reversed(graph.nodes))).args != (y,):
        return None
    *others, layers = call.args
    call.args = (*others, [None] * len(cast("Sequence[object]", layers)))
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


def block_class(base: type[nn.Module], parts: Parts, graph: fx.Graph, reduce: Reduce) -> type[nn.Module]:
    """The subclass of `base` that runs a block's graph; one for all blocks alike."""
    key = (base, parts, str(graph))
    if key not in _BLOCKS:
        members: dict[str, Any] = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            SELF_CALL: base.forward,
            "_site_base": base,
            "_block": graph,
            "_parts": parts,
            "__reduce_ex__": reduce,
            "forward": _forward(base.forward, generate_forward(graph), parts),
        }
        _BLOCKS[key] = new_class(f"Lora{base.__name__}", (base,), exec_body=lambda ns: ns.update(members))
    return _BLOCKS[key]


def _forward(plain: Callable[..., Any], fused: Callable[..., Any], parts: Parts) -> Callable[..., Any]:
    from fxlora.ops.call import is_watched

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, cls in parts:
            part = cast(nn.Module, self._modules[name])
            if type(part) is not cls or is_watched(part):
                return plain(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    return forward
