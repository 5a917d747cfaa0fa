"""Arguments of lifecycle calls: names of adapters, as users give them, and devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import nn

from fxlora.errors import AdapterError
from fxlora.serving import BASE


class LoadResult(NamedTuple):
    """What `load_adapter` gives back, by the keys of the file, with the names that torch and transformers have for it.

    All are empty after a strict reading.

    Attributes:
        missing_keys: what the model wants and the file does not have.
        unexpected_keys: what was not used: unknown keys, and those of layers of which another part is missing or misshapen.
        mismatched_keys: (key, shape in the file, shape that the model needs).
    """

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    mismatched_keys: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()


def names_of(adapter_names: object) -> tuple[str, ...]:
    """One adapter's name, or several, as a tuple that has each once.

    Raises:
        AdapterError: when it is neither.
    """
    if isinstance(adapter_names, str):
        return (adapter_names,)
    names = list(cast("Iterable[object]", adapter_names)) if isinstance(adapter_names, Iterable) else [adapter_names]
    for name in names:
        if not isinstance(name, str):
            raise AdapterError(f"adapters are given by a name or a list of names, not by {name!r}")
    return tuple(dict.fromkeys(cast("list[str]", names)))


def check_device(device: str | torch.device | None) -> None:
    """Refuse what names no device.

    Raises:
        AdapterError: with torch's reason.
    """
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise AdapterError(
            f"torch_device={device!r} is no device ({error}); use one such as 'cpu' or 'cuda:0'"
        ) from error


def check_adapter_name(name: object, taken: Mapping[str, object]) -> None:
    """Refuse a name that cannot be part of a parameter's path, or that is taken.

    Raises:
        AdapterError: with the reason.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError(f"an adapter's name must be a string that is not empty, not {name!r}")
    if "/" in name or "\\" in name:
        raise AdapterError(f"an adapter's name cannot contain a slash, since it is the name of a folder: '{name}'")
    if "." in name:
        raise AdapterError(f"an adapter's name cannot contain a dot, since it is part of parameter paths: '{name}'")
    if hasattr(nn.ModuleDict, name) or name == "training":
        raise AdapterError(f"'{name}' cannot be an adapter's name: torch.nn.ModuleDict has an attribute of that name")
    if name == BASE:
        raise AdapterError(f"'{name}' cannot be an adapter's name: adapter_names has it for rows without an adapter")
    if name in taken:
        raise AdapterError(f"Adapter with name '{name}' already exists; delete_adapter removes it")
