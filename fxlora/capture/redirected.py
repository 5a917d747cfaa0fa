"""The generated class of a module of `modules_to_save` in `modules` capture: it runs an adapter's trained copy.

Its forward is the template `self.base_forward(*args, **kwargs)` after `redirect-saved`, and what the module has is read
from the copy, so that code which uses a parameter or a child of the module without calling it gets the trained one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from fxlora._passes import (
    SAVED,
    Instance,
    Pipeline,
    RedirectSaved,
    Region,
    SavedModule,
    Stage,
    VerifySaved,
    is_inserted,
    spread_template,
)


@dataclass(frozen=True, slots=True)
class Redirection:
    """What a generated class depends on.

    Attributes:
        adapter: whose copy runs; empty if the module runs itself.
        names: of the parameters, buffers and children that are read from the copy.
    """

    adapter: str
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, adapter: str) -> Redirection:
        """For a module that holds copies."""
        names = [*module._parameters, *module._buffers, *module._modules] if adapter else []
        return cls(adapter, tuple(name for name in names if not is_inserted(name)))

    def needed(self, cls: type[nn.Module]) -> bool:
        """Whether a module of this class needs a generated one: also if it only has to overlook its copies."""
        return bool(self.adapter) or issubclass(cls, nn.Sequential)

    def members(self, cls: type[nn.Module]) -> dict[str, Any]:
        """The attributes of the generated class, beside its forward."""
        members: dict[str, Any] = {name: _read_from_copy(name, self.adapter) for name in self.names}
        if issubclass(cls, nn.Sequential):
            members.update(_overlooking_copies(self.adapter))
        return members


def _read_from_copy(name: str, adapter: str) -> property:
    def read(self: nn.Module) -> Any:
        return getattr(_copy(self, adapter), name)

    return property(read)


def _copy(module: nn.Module, adapter: str) -> nn.Module:
    return cast(nn.Module, cast(nn.Module, module._modules[SAVED])._modules[adapter])


def _overlooking_copies(adapter: str) -> dict[str, Any]:
    """How a sequence is read as the sequence that it was: its own children, or those of the copy that runs."""

    def parts(self: nn.Sequential) -> list[nn.Module]:
        owner = _copy(self, adapter) if adapter else self
        return [cast(nn.Module, child) for name, child in owner._modules.items() if not is_inserted(name)]

    def iterate(self: nn.Sequential) -> Iterator[nn.Module]:
        return iter(parts(self))

    def length(self: nn.Sequential) -> int:
        return len(parts(self))

    def item(self: nn.Sequential, index: int | slice) -> nn.Module:
        found = parts(self)[index]
        return nn.Sequential(*found) if isinstance(found, list) else found

    return {"__iter__": iterate, "__len__": length, "__getitem__": item}


def redirected_graph(
    module: nn.Module, name: str, adapter: str, adapters: tuple[str, ...], record: bool = False
) -> tuple[fx.Graph, list[Stage]]:
    """The template of a module that holds copies, after `redirect-saved`.

    Args:
        module: the module.
        name: its qualified name.
        adapter: whose copy runs; empty for none.
        adapters: all that have a copy of it.
        record: keep copies of the graphs in the stages.
    """
    copies = (("", adapter),) if adapter else ()
    region = Region(spread_template(), (Instance(name, module),))
    verifier = VerifySaved(copies, tuple(("", each) for each in adapters))
    stages = Pipeline((RedirectSaved(copies),), verifier, record).run([region])
    return region.graph, stages


def adapters_by_module(saved: tuple[SavedModule, ...]) -> dict[str, tuple[str, ...]]:
    """By module, the adapters that have a copy of it."""
    found: dict[str, tuple[str, ...]] = {}
    for each in saved:
        found[each.module] = (*found.get(each.module, ()), each.adapter)
    return found
