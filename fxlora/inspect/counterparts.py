"""Which graph of one model stands for the same modules as which graph of another. Called by `diff` and `trace`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import fx, nn

from fxlora._passes import Instance, Region
from fxlora.errors import CaptureError, ConfigError
from fxlora.model import LoraModel


@dataclass(frozen=True, slots=True)
class Side:
    """A graph, and the module that it reads from, if that is known."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    module: nn.Module | None = None

    @classmethod
    def all_of(cls, region: Region) -> Side:
        """A region's graph with all modules that run it, by name."""
        return cls(region.graph, {instance.name: instance.module for instance in region.instances})

    def of(self, name: str) -> Side:
        """The graph as the module of that name runs it."""
        return Side(self.graph, self.modules, self.modules.get(name))


@dataclass(frozen=True, slots=True)
class Pair:
    """Two graphs that stand for the same, the modules that run them, and the mode if there is a graph for each."""

    a: Side
    b: Side
    names: tuple[str, ...]
    mode: str = ""


def paired_regions(a: object, b: object) -> list[Pair]:
    """The graphs of two graphs or models, in pairs.

    Raises:
        ConfigError: when one has a whole graph and the other has none.
    """
    one, other = _whole(a), _whole(b)
    if one is not None and other is not None:
        count = max(len(one), len(other))
        modes = ("training", "evaluation") if count == 2 else ("",)
        first, second = (each * count if len(each) < count else each for each in (one, other))
        return [
            Pair(Side.all_of(p), Side.all_of(q), ("",), mode) for p, q, mode in zip(first, second, modes, strict=True)
        ]
    if one is not None or other is not None:
        raise ConfigError(
            "one of the two has a graph of the whole model and the other has none: transform both with the same capture"
        )
    return _by_module(_templates(a), _templates(b))


def _whole(value: object) -> list[Region] | None:
    """The graphs of the whole, None for a model that has none."""
    if isinstance(value, fx.Graph):
        owner = value.owning_module
        return [Region(value, (Instance("", owner),) if owner is not None else ())]
    if isinstance(value, Region):
        return [value] if value.instances and not value.instances[0].name else None
    if isinstance(value, fx.GraphModule):
        graphs = getattr(value, "_graphs", None)
        return [Region(graph, (Instance("", value),)) for graph in (graphs() if graphs else [value.graph])]
    if isinstance(value, LoraModel) and value.capture != "modules":
        return value.regions()
    if isinstance(value, (nn.Module, Sequence)):
        return None
    raise ConfigError(f"diff takes graphs, graph modules and models, not {type(value).__name__}")


def whole_side(value: object) -> Side | None:
    """The graph of the whole that runs in evaluation, with its module; None for a model that has none."""
    found = _whole(value)
    if found is None or not found[-1].instances:
        return None
    return Side.all_of(found[-1]).of(found[-1].instances[0].name)


@dataclass(frozen=True, slots=True)
class _Templates:
    """The templates of a model by module and parameter, and the model if it is at hand."""

    regions: dict[tuple[str, str], Region]
    model: nn.Module | None

    def get(self, key: tuple[str, str]) -> Region | None:
        """A module's template; for one without LoRA, the plain call of it."""
        from fxlora.capture.modules import current_template

        if key in self.regions or self.model is None:
            return self.regions.get(key)
        try:
            module = self.model.get_submodule(key[0])
            return Region(current_template(type(module), key[1]), (Instance(key[0], module),))
        except (AttributeError, CaptureError):
            return None


def _templates(value: object) -> _Templates:
    model = value if isinstance(value, nn.Module) else None
    if isinstance(value, LoraModel):
        regions = value.regions()
    elif isinstance(value, nn.Module):
        regions = list[Region]()
    else:
        regions = [value] if isinstance(value, Region) else list(cast("Sequence[Region]", value))
    found: dict[tuple[str, str], Region] = {}
    for region in regions:
        key = _parameter(region.graph)
        found.update({(instance.name, key): region for instance in region.instances})
    return _Templates(found, model)


def _parameter(graph: fx.Graph) -> str:
    """The parameter whose adapted value a template computes; empty for a template of a call."""
    nodes = list(graph.nodes)
    return "" if any(node.op == "placeholder" for node in nodes) else str(nodes[0].target)


def _by_module(a: _Templates, b: _Templates) -> list[Pair]:
    groups: dict[tuple[int, int], Pair] = {}
    plain: dict[tuple[type[nn.Module], str], fx.Graph] = {}
    for key in dict.fromkeys((*a.regions, *b.regions)):
        p, q = (_side(each, key, plain) for each in (a, b))
        found = groups.get((id(p.graph), id(q.graph)), Pair(p, q, ()))
        modules = ({**old.modules, **new.modules} for old, new in ((found.a, p), (found.b, q)))
        sides = [Side(graph, each) for graph, each in zip((p.graph, q.graph), modules, strict=True)]
        groups[id(p.graph), id(q.graph)] = Pair(sides[0], sides[1], (*found.names, key[0]))
    return list(groups.values())


_EMPTY = Region(fx.Graph(), ())


def _side(templates: _Templates, key: tuple[str, str], plain: dict[tuple[type[nn.Module], str], fx.Graph]) -> Side:
    """A module's template; one graph for all plain modules of a class, so that they are matched once."""
    region = templates.get(key) or _EMPTY
    if key not in templates.regions and region.instances:
        region = Region(plain.setdefault((type(region.module), key[1]), region.graph), region.instances)
    module = next((each.module for each in region.instances if each.name == key[0]), None)
    return Side(region.graph, {} if module is None else {key[0]: module})
