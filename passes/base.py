"""What a pass sees (`Region`), what a pass is (`Pass`), and what happens around passes (`Pipeline`).

Passes do not know how a graph was captured. Timing, logging, verification and all-or-nothing live here, so that a
pass is only its rewrite.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, cast

from torch import fx, nn

from passes.errors import FxloraError

log = logging.getLogger("passes")

SELF_CALL = "base_forward"
"""The `call_module` target by which a template graph runs its own module's original forward."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A module that runs a region's graph.

    Attributes:
        name: qualified name in the model; `""` for the model itself.
        module: the module against which the graph's attribute paths resolve.
    """

    name: str
    module: nn.Module

    def qualify(self, path: str) -> str:
        """`path`, relative to this instance, as a name of the whole model."""
        return ".".join(part for part in (self.name, path) if part)


@dataclass(slots=True)
class Region:
    """One graph and every module that runs it.

    A whole-graph capture has one region with one instance. A template has one region for all instances of a
    signature. Passes replace nothing but `graph`.
    """

    graph: fx.Graph
    instances: tuple[Instance, ...]

    @property
    def module(self) -> nn.Module:
        """The first instance's module: what the graph's paths are resolved on when any instance will do."""
        return self.instances[0].module

    def resolve(self, target: str) -> object:
        """The module or tensor that a `call_module` or `get_attr` target names.

        Raises:
            AttributeError: when the path does not exist.
        """
        return resolve(self.module, target)


def resolve(module: nn.Module, target: str) -> object:
    """Follow a dotted path from `module`; `SELF_CALL` and `""` mean the module itself.

    What is registered is found also where its class gives another value under that name.
    """
    value: object = module
    if target in ("", SELF_CALL):
        return value
    for part in target.split("."):
        registered = _registered(value, part) if isinstance(value, nn.Module) else None
        value = getattr(value, part) if registered is None else registered
    return value


def _registered(module: nn.Module, name: str) -> object:
    stores = (module._parameters, module._modules, module._buffers)
    return next((store[name] for store in stores if store.get(name) is not None), None)


def original_forward(module: nn.Module) -> object:
    """The forward of a module's class, or of the class that it had before it was given a template's forward."""
    return getattr(type(module), SELF_CALL, type(module).forward)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after a call of a module, forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass did: whether it changed the graph (or the parameters), and a line that says what."""

    modified: bool
    summary: str = ""


class Pass(Protocol):
    """A rewrite of one region. Implementations are frozen dataclasses whose fields are the options."""

    name: ClassVar[str]

    def run(self, region: Region) -> PassResult:
        """Change `region.graph` in place and say whether it changed."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass over one region: its time in seconds and the change in the number of nodes by target.

    `before` and `after` are copies of the region, if the pipeline records them.
    """

    pass_name: str
    region: str
    seconds: float
    modified: bool
    nodes: dict[str, int] = field(default_factory=dict[str, int])
    summary: str = ""
    before: Region | None = None
    after: Region | None = None

    def __str__(self) -> str:
        """One log line."""
        diff = ", ".join(f"{count:+d} {name}" for name, count in self.nodes.items()) or "no nodes changed"
        return f"{self.pass_name} on {self.region}: {diff}; {1e3 * self.seconds:.1f} ms {self.summary}".rstrip()


@dataclass(frozen=True)
class Pipeline:
    """Runs passes over regions, all or nothing.

    Each region is rewritten on a copy of its graph. The copies are put in place only when every pass has succeeded
    on every region, so a failure leaves all regions as they were.

    Attributes:
        passes: run in this order on each region.
        verifier: a pass that only checks. It runs after each pass in debug mode (`FXLORA_VERIFY=1`, always in the
            tests), and once at the end otherwise.
        record: keep copies of the graphs before and after each pass in the stages.
    """

    passes: Sequence[Pass]
    verifier: Pass | None = None
    record: bool = False

    def run(self, regions: Sequence[Region]) -> list[Stage]:
        """Rewrite the regions and return what each pass did.

        Raises:
            FxloraError: of the pass's own kind, with the pass and the place in front of the reason.
        """
        drafts = [Region(copy_graph(region.graph), region.instances) for region in regions]
        stages = [stage for draft in drafts for stage in self._run_on(draft)]
        for region, draft in zip(regions, drafts, strict=True):
            region.graph = draft.graph
        return stages

    def _run_on(self, region: Region) -> Iterator[Stage]:
        label = describe(region)
        verify_each = os.environ.get("FXLORA_VERIFY") == "1"
        copied = self._copied(region)
        for index, each in enumerate(self.passes):
            before, start = _node_counts(region.graph), time.perf_counter()
            try:
                result = each.run(region)
                if self.verifier is not None and (verify_each or index == len(self.passes) - 1):
                    self.verifier.run(region)
            except FxloraError as error:
                raise type(error)(f"after pass '{each.name}' at {label}: {error}") from error
            counts = _node_counts(region.graph)
            counts.subtract(before)
            changed = {name: count for name, count in sorted(counts.items()) if count}
            seconds = time.perf_counter() - start
            earlier, copied = copied, self._copied(region)
            stage = Stage(each.name, label, seconds, result.modified, changed, result.summary, earlier, copied)
            log.debug("%s", stage)
            yield stage

    def _copied(self, region: Region) -> Region | None:
        return Region(copy_graph(region.graph), region.instances) if self.record else None


def describe(region: Region) -> str:
    """A short name of a region for messages."""
    first = region.instances[0].name
    if len(region.instances) == 1:
        return f"'{first}'" if first else "the model"
    return f"'{first}' and {len(region.instances) - 1} like it"


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with the same node names, metadata and calling convention."""
    duplicate = fx.Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = duplicate.node_copy(node, lambda old: mapping[old])
    duplicate.set_codegen(graph._codegen)
    return duplicate


def _node_counts(graph: fx.Graph) -> Counter[str]:
    return Counter(target_name(node) for node in graph.nodes)


def target_name(node: fx.Node) -> str:
    """What a node does, in a word: the operator's name, or the kind of node for all others."""
    if node.op != "call_function":
        return node.op if node.op != "call_method" else f".{node.target}"
    return cast(str, getattr(node.target, "__name__", str(node.target)))
