"""Caches of transformers' models as structures of tensors, which `torch.export` can give back.

A `DynamicCache` is no known container for `torch.utils._pytree` until someone registers it; transformers does so only in
its own exporters. Called by `export` capture and when a captured graph is unpickled.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from fxlora.capture.inputs import Example
from fxlora.errors import CaptureError


def register_caches(model: nn.Module) -> None:
    """Make known the caches that `model` may return, if it has a part from transformers. Stays so in this process."""
    owners: list[Any] = [module for module in model.modules() if _is_pretrained(module)]
    if not owners:
        return
    try:
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model as register
    except ImportError:  # an older transformers, which exports no other cache than this
        _register_dynamic_cache()
        return
    for owner in owners:
        register(owner)


def refuse_caches(example: Example) -> None:
    """Refuse a cache among the inputs: a model adds to it in place, so that no two runs on the example are alike.

    Raises:
        CaptureError: naming the argument.
    """
    caches = sys.modules.get("transformers.cache_utils")
    for name, value in (*enumerate(example.args), *example.kwargs.items()):
        if caches is not None and isinstance(value, caches.Cache):
            raise CaptureError(
                f"example_inputs give a {type(value).__name__} as argument '{name}', to which the model adds in place, so "
                "that an exported graph would hold the state of one call. Leave it out, or use capture='modules', which "
                "takes every call"
            )


def register_kind(kind: type) -> None:
    """Make a class known that a captured graph takes or gives, if it is a cache of transformers'."""
    caches = sys.modules.get("transformers.cache_utils")
    if caches is None or not issubclass(kind, caches.Cache) or kind in pytree.SUPPORTED_NODES:
        return
    try:
        from transformers.exporters.exporter_dynamo import register_pytree_node
    except ImportError:
        _register_dynamic_cache()
    else:
        register_pytree_node(kind)


def _register_dynamic_cache() -> None:
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()


def _is_pretrained(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)
