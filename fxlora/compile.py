"""`torch.compile(model, backend="fxlora")`: Inductor, after LoRA's branches in Dynamo's graph have become operators.

It only ever optimises: a graph that cannot be rewritten is compiled as it is, and computes the same.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from fxlora._passes import BranchedLinear, arg, functional_base, fuse_siblings, fuse_swiglu, lower
from fxlora.ops import draw_seed, lora_linear_siblings, lora_swiglu

log = logging.getLogger("fxlora")

_LINEAR = lora_linear_siblings._opoverload
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
        options: Inductor's, as for `torch.compile`.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    return compile_fx(optimized(gm), list(example_inputs), config_patches=patches or None)


def optimized(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with operators in place of branches; the graph itself where that fails."""
    draft = fx.GraphModule(gm, fx.Graph())
    mapping: dict[fx.Node, fx.Node] = {}
    draft.graph.output(draft.graph.graph_copy(gm.graph, mapping))
    try:
        count = lower(draft.graph, functional_base, _write)
        shared = fuse_siblings(draft.graph, _LINEAR)
        blocks = fuse_swiglu(draft.graph, _LINEAR, _SWIGLU, _fits)
        draft.graph.lint()
        draft.recompile()
    except Exception:  # noqa: BLE001 whatever a user's graph has in it: the graph as it is computes the same
        log.warning("the graph is compiled without fxlora's operators", exc_info=True)
        return gm
    log.info("%d layers with branches are operators: %d of them share a call, %d SwiGLU blocks are one", count, shared, blocks)
    return draft


def _write(graph: fx.Graph, found: BranchedLinear) -> fx.Node:
    base, p, seed = found.base, _rate(found.dropout), None
    if p:
        device = base.x.meta["example_value"].device
        seed = graph.call_function(draw_seed, (device,))
    args = (base.x, [base.weight], [base.bias], [found.A], [found.B], [found.scaling], p, seed)
    return graph.call_function(operator.getitem, (graph.call_function(_LINEAR, args), 0))


def _fits(weights: list[fx.Node], As: list[fx.Node]) -> bool:
    """Whether a block is one for the operator, which gives no gradients to weights, and takes one rank."""
    if not all("example_value" in node.meta for node in (*weights, *As)):
        return False
    frozen = not any(node.meta["example_value"].requires_grad for node in weights)
    return frozen and len({node.meta["example_value"].shape[0] for node in As}) == 1


def _rate(dropout: fx.Node | None) -> float:
    """The probability in a call of `dropout`, 0 outside of training."""
    if dropout is None or not arg(dropout, 2, "training", default=True):
        return 0.0
    return cast(float, arg(dropout, 1, "p", default=0.5))
