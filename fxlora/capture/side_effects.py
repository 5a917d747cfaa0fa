"""Refuse a forward that changes the model or draws random numbers while it is captured: a capture does so only once."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from fxlora.errors import CaptureError


@contextmanager
def unchanged(model: nn.Module) -> Generator[None]:
    """Restore the model and the random generators, and refuse a forward that changes them: a trace does so only once.

    Raises:
        CaptureError: naming what was changed.
    """
    before = {module: _Held(module) for module in model.modules()}
    states = _random_states()
    try:
        yield
        for module, held in before.items():
            changed = held.changed()
            if changed is not None:
                raise CaptureError(
                    f"its forward changes '{type(module).__name__}.{changed}', which a capture does only once"
                )
        _check_random(states)
    finally:
        for held in before.values():
            held.restore()
        _restore_random(states)


@contextmanager
def stateless(model: nn.Module) -> Generator[None]:
    """Refuse a forward that changes numbers and flags of the model, or draws random numbers outside of torch.

    For `torch.export`, which puts attributes back without a word. It copies containers, so these are not compared; an
    attribute that is filled for the first time is taken for a cache.

    Raises:
        CaptureError: naming what was changed.
    """
    before = {name: _plain_attributes(module) for name, module in model.named_modules()}
    states = _random_states()
    changed: list[str] = []

    def compare(*_: object) -> None:
        for name, module in model.named_modules():
            old, new = before[name], _plain_attributes(module)
            changed.extend(f"{name}.{each}".lstrip(".") for each in old if each in new and new[each] != old[each])

    hook = model.register_forward_hook(compare)
    try:
        yield
        if changed:
            raise CaptureError(f"its forward changes '{changed[0]}', which a capture does only once")
        _check_random(states)
    finally:
        hook.remove()
        _restore_random(states)


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    """Attributes that are a number or a string, but for `training`, which a capture sets itself."""
    plain = (bool, int, float, str)
    return {name: value for name, value in vars(module).items() if type(value) in plain and name != "training"}


def _check_random(states: dict[str, object]) -> None:
    for name, (state, now) in _pairs(states, _random_states()).items():
        if state != now:
            raise CaptureError(f"its forward draws from {name}, and a capture would freeze what was drawn")


class _Held:
    """What a module holds: its attributes, and the contents of every list, dict and set among them, however nested."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._contents: list[tuple[str, Any, Any]] = []
        for name, value in self._attributes.items():
            self._collect(name, value)

    def _collect(self, name: str, value: object) -> None:
        if isinstance(value, (list, set)):
            items = cast("list[object]", value)
            self._contents.append((name, items, copy.copy(items)))
        elif isinstance(value, dict):
            entries = cast("dict[object, object]", value)
            self._contents.append((name, entries, dict(entries)))
            items = entries.values()
        else:
            return
        for item in list(items):
            self._collect(name, item)

    def changed(self) -> str | None:
        """The name of an attribute that is another now, or holds other things."""
        now = vars(self._module)
        for name in {**now, **self._attributes}:
            if now.get(name, self) is not self._attributes.get(name, self) and not name.startswith("_tensor_constant"):
                return name
        for name, container, contents in self._contents:
            if not _same_contents(container, contents):
                return next(_differing(container, contents), name)
        return None

    def restore(self) -> None:
        """Put everything back in place."""
        attributes = vars(self._module)
        attributes.clear()
        attributes.update(self._attributes)
        for _, container, contents in self._contents:
            if isinstance(container, list):
                container[:] = contents
            else:
                container.clear()
                container.update(contents)


def _same_contents(container: Any, contents: Any) -> bool:
    if isinstance(container, dict):
        pairs = zip(cast("dict[Any, Any]", container).items(), contents.items(), strict=False)
        return len(container) == len(contents) and all(a is c and b is d for (a, b), (c, d) in pairs)
    if isinstance(container, set):
        return container == contents
    return len(container) == len(contents) and all(a is b for a, b in zip(container, contents, strict=True))


def _differing(container: Any, contents: Any) -> Iterator[str]:
    """Names in a dict, such as a module's buffers, whose values changed."""
    if isinstance(container, dict):
        entries = cast("dict[Any, Any]", container)
        for name in {**entries, **contents}:
            if isinstance(name, str) and entries.get(name, contents) is not contents.get(name, contents):
                yield name


def _random_states() -> dict[str, object]:
    """The states of the generators that a forward may draw from outside of the graph, as comparable values."""
    states: dict[str, object] = {"Python's random": random.getstate()}
    states["torch's generator"] = torch.get_rng_state().numpy().tobytes()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy's random"] = (kind, keys.tobytes(), *rest)
    return states


def _pairs(before: dict[str, object], after: dict[str, object]) -> dict[str, tuple[object, object]]:
    return {name: (before[name], after[name]) for name in before}


def _restore_random(states: dict[str, object]) -> None:
    random.setstate(cast(Any, states["Python's random"]))
    content = bytearray(cast(bytes, states["torch's generator"]))
    torch.set_rng_state(torch.frombuffer(content, dtype=torch.uint8).clone())
    if "numpy's random" in states:
        import numpy

        kind, keys, *rest = cast("tuple[Any, ...]", states["numpy's random"])
        numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
