"""Exports each model once in a process: most of the time of tests with `export` capture is torch's.

Two models of the same classes and attributes have the same export for examples of the same sizes: export sees no values
of parameters, buffers and inputs. Each capture gets a copy of it. `tests/capture` goes without this.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxlora._passes import copy_graph
from fxlora.capture import export
from fxlora.capture.inputs import Example

_LARGE = 10_000_000
"""Parameters of a model whose export is not kept, since that holds them."""

_EXPORTS: dict[bytes, fx.GraphModule] = {}


@contextmanager
def exports_shared() -> Generator[None]:
    """Share exports between captures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_export", _shared(export._export))
        yield


def _shared(make: Callable[..., fx.GraphModule]) -> Callable[..., fx.GraphModule]:
    def shared(model: nn.Module, example: Example, dynamic_shapes: Any, training: bool) -> fx.GraphModule:
        if sum(parameter.numel() for parameter in model.parameters()) > _LARGE:
            return make(model, example, dynamic_shapes, training)
        try:
            key = _content(model, example, dynamic_shapes, training)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):  # a local class, a parametrized module
            return make(model, example, dynamic_shapes, training)
        if key not in _EXPORTS:
            _EXPORTS[key] = make(model, example, dynamic_shapes, training)
        return _copied(_EXPORTS[key])

    return shared


def _content(model: nn.Module, example: Example, *settings: object) -> bytes:
    buffer = io.BytesIO()
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    unseen = {id(each) for each in (*model.parameters(), *model.buffers(), *leaves)}
    _Pickler(buffer, unseen).dump((model, example, *settings))
    return hashlib.sha256(buffer.getvalue()).digest()


class _Pickler(pickle.Pickler):
    """Writes of a tensor what export sees: its kind, and the numbers of one that becomes a constant."""

    def __init__(self, file: io.BytesIO, unseen: set[int]) -> None:
        super().__init__(file)
        self.unseen = unseen

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        kind = type(obj).__name__, str(obj.dtype), tuple(obj.shape), obj.stride(), obj.requires_grad, str(obj.device)
        seen = id(obj) not in self.unseen and not obj.is_meta
        numbers = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if seen else b""
        return dict, ([("kind", kind), ("numbers", numbers)],)


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    copied = fx.GraphModule(module, copy_graph(module.graph))
    for node in copied.graph.nodes:
        value = getattr(copied, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, fx.GraphModule):
            setattr(copied, str(node.target), _copied(value))
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            setattr(copied, str(node.target), value.clone())
    return copied
