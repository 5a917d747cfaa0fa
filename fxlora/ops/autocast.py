"""The operators under autocast: they compute in its dtype, as `linear` does, and cast the small factors themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

_DEVICES = ("CPU", "CUDA", "MPS", "XPU")


def register_autocast(name: str, operator: Callable[..., Any], cast: Collection[int] = ()) -> None:
    """Run an operator of `fxlora` without autocast wherever it is called under it.

    Args:
        name: the operator's, without the namespace.
        operator: the operator.
        cast: positions of arguments, tensors or lists of them, that are cast to autocast's dtype first.
    """
    for device in _DEVICES:
        _library.impl(name, _kernel(device, operator, cast), f"Autocast{device}")


_library = torch.library.Library("fxlora", "FRAGMENT")
"""Holds the registrations: they end with it."""


def _kernel(device: str, operator: Callable[..., Any], cast: Collection[int]) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device.lower())
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*(_cast(arg, dtype) if index in cast else arg for index, arg in enumerate(args)))

    return kernel


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """What autocast makes of an argument: it leaves float64 as it is."""
    if isinstance(value, list):
        return [_cast(each, dtype) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
