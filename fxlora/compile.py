"""`torch.compile(model, backend="fxlora")`: Inductor, after LoRA's branches in Dynamo's graph have become operators.

It only ever optimises: a graph that cannot be rewritten is compiled as it is, and computes the same.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxlora import logs
from fxlora._passes import (
    Base,
    BranchedLinear,
    arg,
    branched_linear,
    copy_graph,
    functional_base,
    fuse_norms,
    fuse_residual,
    fuse_siblings,
    fuse_swiglu,
    lower,
    print_graph,
    recompute,
    resolve,
)
from fxlora.ops import (
    autotune,
    choice,
    lora_dora_siblings,
    lora_dora_swiglu,
    lora_linear_siblings,
    lora_swiglu,
)
from fxlora.ops.composed import is_narrow
from fxlora.ops.mask import SEEDS
from fxlora.ops.norms import row_norms

log = logging.getLogger("fxlora")

_LINEAR = lora_linear_siblings._opoverload
_DORA = lora_dora_siblings._opoverload
_NORMS = row_norms._opoverload
_DORA_SWIGLU = lora_dora_swiglu._opoverload
_SWIGLU = lora_swiglu._opoverload


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's; registered as a backend of `torch.compile` under the name `fxlora`.

    Args:
        gm: Dynamo's graph.
        example_inputs: as Dynamo gives them.
        mode: one of Inductor's: `default`, `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`.
        options: Inductor's, as for `torch.compile`; and `autotune`, see `fxlora.optimize`.
    """
    from torch._inductor import config as inductor
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    chosen = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    if chosen.pop("autotune", False):
        autotune.switch(True)
    patches = {**(list_mode_options(mode) if mode else {}), **chosen}
    rewritten = optimized(gm, records=patches.get("triton.cudagraphs", inductor.triton.cudagraphs))
    return cast("Callable[..., Any]", compile_fx(rewritten, list(example_inputs), config_patches=patches or None))


def optimized(gm: fx.GraphModule, records: bool = False) -> fx.GraphModule:
    """A graph of Dynamo's, and those within it, with operators in place of branches; as it was where that fails.

    Args:
        gm: changed in place.
        records: whether launches are recorded in CUDA graphs, so that it does not matter what they cost the host.
    """
    try:
        parts = [part for part in _parts(gm) if records or not _waits_for_host(part.graph)]
        drafts = [(part, draft) for part, draft in ((part, _draft(part)) for part in parts) if draft is not None]
    except Exception:  # whatever a user's graph has in it: the graph as it is computes the same
        log.warning("the graph is compiled without fxlora's operators", exc_info=True)
        return gm
    for part, draft in drafts:
        part.graph = draft
        part.recompile()
    return gm


def _parts(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and those that it hands to operators, as checkpointing does."""
    yield gm
    for node in gm.graph.nodes:
        inner = resolve(gm, cast(str, node.target)) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            yield from _parts(inner)


def _draft(gm: fx.GraphModule) -> fx.Graph | None:
    """The rewritten graph, None if there is nothing to rewrite."""
    graph = _copied(gm.graph)
    count = lower(graph, _base, _write)
    # those of models that are optimized have the operators already
    if not count and not any(node.target in (_LINEAR, _DORA) for node in graph.nodes):
        return None
    fuse_norms(graph, _DORA, _NORMS)
    shared = fuse_siblings(graph, _LINEAR) + fuse_siblings(graph, _DORA)
    blocks = fuse_swiglu(graph, _LINEAR, _SWIGLU) + fuse_swiglu(graph, _DORA, _DORA_SWIGLU)
    operators = (_LINEAR, _SWIGLU, _DORA, _DORA_SWIGLU)
    sums = fuse_residual(graph, operators, single=(_LINEAR, _DORA))
    sources = recompute(graph, operators)
    graph.lint()
    log.info(
        "%d layers with branches are lowered: %d of them share an operator, %d SwiGLU blocks are one; %d calls add a residual, "
        "%d keep the source of their input",
        *(count, shared, blocks, sums, sources),
    )
    if logs.wanted("graph"):
        log.info("graph that is compiled\n%s", print_graph(graph))
    return graph


def _waits_for_host(graph: fx.Graph) -> bool:
    """Whether launches of the operators would take longer than what they do; symbolic sizes count as what they are now."""
    branched = [found.base for found in (branched_linear(node, _base) for node in graph.nodes) if found is not None]
    devices = {_example(base.x).device for base in branched}
    if len(devices) != 1:
        return False
    bases = [base for base in map(_base, graph.nodes) if base is not None and _example(base.x).device in devices]
    multiplications = sum(_hint(_example(base.x).numel()) * _hint(_example(base.weight).shape[0]) for base in bases)
    layers = len(branched)
    if not choice.waits_for_host(devices.pop(), layers, multiplications):
        return False
    log.info(
        "%d layers with branches are left to torch's own operations: to launch the operators would take longer than to run "
        "them. With torch.compile's mode 'reduce-overhead' they are recorded once, and used.", layers,
    )  # fmt: skip
    return True


def _hint(size: Any) -> float:
    """A size, or of a symbolic one what it is now."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return torch.inf if hint is None else hint


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy with what Dynamo notes at inputs: which are parameters, whose memory stays where it is."""
    duplicate = copy_graph(graph)
    for node, other in zip(graph.nodes, duplicate.nodes, strict=True):
        if hasattr(node, "_dynamo_source"):
            setattr(other, "_dynamo_source", node._dynamo_source)  # noqa: B010 an attribute that fx does not declare
    return duplicate


def _base(node: fx.Node) -> Base | None:
    """A linear layer on plain tensors: subclasses, such as quantized or distributed weights, have a `linear` of their own."""
    base = functional_base(node)
    if base is None:
        return None
    values = [_example(operand) for operand in (base.x, base.weight)]
    return base if all(_is_plain(value) for value in values) and values[1].dim() == 2 else None


def _example(node: fx.Node | str) -> Any:
    return cast(fx.Node, node).meta.get("example_value")


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not is_traceable_wrapper_subclass(value)


def _write(graph: fx.Graph, found: BranchedLinear) -> fx.Node:
    if choice.composes(_example(found.base.x).device):
        return _write_composed(graph, found)
    base, p, seed = found.base, _rate(found.dropout), None
    lists = ([base.weight], [base.bias], [found.A], [found.B], [found.scaling])
    if found.ratio is not None:
        call = graph.call_function(_DORA, (base.x, *lists, [found.ratio]))
        return graph.call_function(operator.getitem, (call, 0))
    if p:
        # as in `draw_seed`, but torch keeps on disk only what it compiled of its own functions
        options = {"dtype": torch.int64, "device": _example(base.x).device}
        seed = graph.call_function(torch.randint, (0, SEEDS, (1,)), options)
    call = graph.call_function(_LINEAR, (base.x, *lists, p, seed))
    return graph.call_function(operator.getitem, (call, 0))


def _write_composed(graph: fx.Graph, found: BranchedLinear) -> fx.Node:
    """See `fxlora.ops.composed`: Inductor compiles what no operator hides from it."""
    base, x, A = found.base, _example(found.base.x), _example(found.A)
    is_static = all(isinstance(size, int) for size in x.shape)
    dtype = A.dtype if is_static and is_narrow(x.dtype, x.shape[:-1].numel(), A) else x.dtype

    def cast_to(node: fx.Node, source: torch.dtype, target: torch.dtype) -> fx.Node:
        return node if source == target else graph.call_method("to", (node, target))

    y = graph.call_function(F.linear, (base.x, base.weight, base.bias if found.ratio is None else None))
    low = cast_to(base.x if found.dropout is None else found.dropout, x.dtype, dtype)
    xs = graph.call_function(F.linear, (low, cast_to(found.A, A.dtype, dtype)))
    scaled = graph.call_function(torch.mul, (xs, found.scaling))
    s = graph.call_function(F.linear, (scaled, cast_to(found.B, _example(found.B).dtype, dtype)))
    total = cast_to(graph.call_function(torch.add, (y, s)), dtype, x.dtype)
    if found.ratio is None:
        return total
    wide = graph.call_function(torch.mul, (total, found.ratio))
    wide = wide if base.bias is None else graph.call_function(torch.add, (wide, base.bias))
    return graph.call_method("type_as", (wide, y))


def _rate(dropout: fx.Node | None) -> float:
    """The probability in a call of `dropout`, 0 outside of training."""
    if dropout is None or not arg(dropout, 2, "training", default=True):
        return 0.0
    return cast(float, arg(dropout, 1, "p", default=0.5))
