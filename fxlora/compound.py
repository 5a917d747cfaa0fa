"""Modules that are several layers in one: targeting them adapts each of their weights.

`nn.MultiheadAttention` has the packed (or separate) projections of its inputs and `out_proj`; recurrent cells have the
weights of their input and of their state. None of these is called as a layer of its own.
"""

from __future__ import annotations

from torch import nn

ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
OUT_PROJ = "out_proj"


CAPTURED_LAYER, CAPTURED_COMPOUND = "_captured_layer", "_captured_compound"
"""Attributes of the code-free modules of a captured graph: what kind of layer, or which compound, the original was."""

TRANSPOSED = "is_transposed"
"""Attribute by which a module says that its experts are stored `(E, in, out)`, as those of transformers do."""

COMPOUNDS = (nn.MultiheadAttention, nn.RNNCellBase, nn.RNNBase)


def compound_class(module: nn.Module) -> type[nn.Module] | None:
    """Which of those a module is, or was before a whole graph was captured; None for any other module."""
    kept = getattr(module, CAPTURED_COMPOUND, None)
    return kept or next((cls for cls in COMPOUNDS if isinstance(module, cls)), None)


def is_compound(module: nn.Module) -> bool:
    """Whether a module is one of those."""
    return compound_class(module) is not None


def weights_of(module: nn.Module) -> list[str]:
    """Names of the parameters of a compound module that are layers' weights, in the order in which they are drawn."""
    if compound_class(module) is nn.MultiheadAttention:
        return [name for name in ATTENTION_WEIGHTS if module._parameters.get(name) is not None]
    return [name for name, parameter in module._parameters.items() if parameter is not None and parameter.dim() == 2]


def layers_of(module: nn.Module) -> list[str]:
    """Names of the children of a compound module that are adapted with it."""
    return [OUT_PROJ] if compound_class(module) is nn.MultiheadAttention else []


def compound_of(model: nn.Module, site: str) -> str | None:
    """The compound module that a layer or parameter belongs to, None if it belongs to none."""
    owner, _, leaf = site.rpartition(".")
    module = model.get_submodule(owner)
    if is_compound(module) and leaf in (*weights_of(module), *layers_of(module)):
        return owner
    return None
