"""Names: of adapters, as users give them, and of methods that a model may have itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from fxlora.errors import AdapterError

Method = TypeVar("Method", bound=Callable[..., Any])


class LoadResult(NamedTuple):
    """What `load_adapter` gives back, with the names of `load_state_dict`'s result: both are empty, as reading is strict."""

    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()


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
    if name == "__base__":
        raise AdapterError(f"'{name}' cannot be an adapter's name: adapter_names has it for rows without an adapter")
    if name in taken:
        raise AdapterError(f"Adapter with name '{name}' already exists; delete_adapter removes it")


class _Yielding:
    """A method that stands back where the model has something of its name: a method of its class, a parameter, a child."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: nn.Module | None, owner: type | None = None) -> Any:
        if instance is None:
            return self._method
        try:
            return getattr(super(self._owner, instance), self._name)
        except AttributeError:
            own = [cast("dict[str, Any]", vars(instance).get(kind, {})) for kind in _REGISTRIES]
        found = next((each[self._name] for each in own if self._name in each), None)
        return self._method.__get__(instance, owner) if found is None else found


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def yields(method: Method) -> Method:
    """Mark a method of `LoraModel` whose name is common: a model that has the name itself keeps its meaning."""
    return cast(Method, _Yielding(method))
