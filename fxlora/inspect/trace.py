"""`PassTrace`: what each pass did to each graph, from a recorded pipeline; `bisect_passes`: which pass broke one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxlora._passes import DropBranches, MergeBranches, Region, Stage, copy_graph, lora_meta
from fxlora.capture.inputs import Example, undisturbed
from fxlora.errors import ConfigError
from fxlora.inspect.compare import Comparison, compare_graphs
from fxlora.inspect.counterparts import Pair, Side
from fxlora.inspect.diff import GraphDiff, diff_of
from fxlora.inspect.matching import target_text
from fxlora.rendering import Rendered, Section, aligned, json_data


@dataclass(frozen=True, slots=True)
class PassTrace(Rendered):
    """The stages of all pipeline runs of a model, in their order, each with its graphs before and after.

    A merge into the weights is a stage without graphs.

    Attributes:
        stages: one pass over one region each.
        model: the model that the passes were for.
    """

    stages: tuple[Stage, ...]
    model: nn.Module | None = None

    def __len__(self) -> int:
        """Number of stages."""
        return len(self.stages)

    def __getitem__(self, index: int) -> Stage:
        """One stage."""
        return self.stages[index]

    def __iter__(self) -> Iterator[Stage]:
        """The stages in their order."""
        return iter(self.stages)

    def diff(self, i: int, j: int | None = None) -> GraphDiff:
        """What stages `i` to `j`, both included, did; `i` alone if there is no `j`.

        Raises:
            IndexError: for a stage that does not exist.
        """
        last = i if j is None else j
        indices = range(_index(i, len(self)), _index(last, len(self)) + 1)
        chosen = [self.stages[index] for index in indices if not _of_weights(self.stages[index])]
        ends: dict[tuple[Any, ...], tuple[Region, Region]] = {}
        for stage in chosen:
            before, after = _regions(stage)
            key = _place(after)
            ends[key] = (ends[key][0] if key in ends else before, after)
        return diff_of(
            Pair(Side.all_of(before), Side.all_of(after), tuple(instance.name for instance in after.instances))
            for before, after in ends.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """Each stage's figures, for JSON."""
        stages = [
            {
                "pass": stage.pass_name,
                "region": stage.region,
                "seconds": stage.seconds,
                "modified": stage.modified,
                "nodes": stage.nodes,
                "summary": stage.summary,
            }
            for stage in self.stages
        ]
        return json_data({"stages": stages})

    def __str__(self) -> str:
        """A table: pass, graph, time, number of nodes, and how many of which operation came or went."""
        return "\n".join(aligned([_HEADER, *self._rows()]))

    def sections(self) -> list[Section]:
        """The table."""
        return [Section(header=_HEADER, rows=tuple(self._rows()), right=(0, 3))]

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for index, stage in enumerate(self.stages):
            regions = () if _of_weights(stage) else _regions(stage)
            sizes = " → ".join(str(len(list(region.graph.nodes))) for region in regions) or "–"
            unchanged = stage.summary if _of_weights(stage) else "none"
            change = ", ".join(f"{count:+d} {name}" for name, count in stage.nodes.items()) or unchanged
            yield str(index), stage.pass_name, stage.region, f"{1e3 * stage.seconds:.1f}", sizes, change


_HEADER = ("", "pass", "graph", "ms", "nodes", "change")


def _index(i: int, count: int) -> int:
    if not -count <= i < count:
        raise IndexError(f"stage {i}: the trace has {count} stages, counted from 0")
    return i % count


def _of_weights(stage: Stage) -> bool:
    """Whether a stage changed weights, and no graph."""
    return stage.pass_name == MergeBranches.name


def _place(region: Region) -> tuple[Any, ...]:
    """What tells one graph of a model from another: who runs it, its inputs, and the parameter if it is a weight's."""
    nodes = list(region.graph.nodes)
    inputs = tuple(target_text(node.target) for node in nodes if node.op == "placeholder")
    return (*(instance.name for instance in region.instances), *(inputs or (str(nodes[0].target),)))


def _regions(stage: Stage) -> tuple[Region, Region]:
    if stage.before is None or stage.after is None:
        raise ConfigError(f"stage '{stage.pass_name}' was recorded without its graphs; use Pipeline(..., record=True)")
    return stage.before, stage.after


@dataclass(frozen=True, slots=True)
class BrokenPass:
    """The first stage whose result computes something else than its input.

    Attributes:
        index: of the stage in the trace.
        stage: the stage.
        comparison: of the graphs before and after it; None if the graph could not be run any more.
        error: why it could not.
    """

    index: int
    stage: Stage
    comparison: Comparison | None
    error: str = ""

    def __str__(self) -> str:
        """The pass, and what it broke."""
        found = self.error if self.comparison is None else str(self.comparison)
        return f"stage {self.index}, pass '{self.stage.pass_name}' on {self.stage.region}: {found}"


def bisect_passes(traced: object, inputs: object) -> BrokenPass | None:
    """Find the pass that made a graph compute something else.

    The graphs before and after each stage are run on the inputs, with the weights as they are now; those of single
    layers on what the layer gets when the model runs. Branches that a pass adds or takes away are meant to change the
    output: such a stage is judged by the graphs without them.

    Args:
        traced: a model that was transformed with `trace_passes=True`, or a `PassTrace`.
        inputs: for the model, as for `compare`.

    Returns:
        The first stage that broke something; None if none did.

    Raises:
        ConfigError: without inputs, for anything else than a trace, or a trace without graphs.
    """
    trace = traced if isinstance(traced, PassTrace) else getattr(traced, "pass_trace", None)
    example = Example.of(inputs)
    if not isinstance(trace, PassTrace) or example is None:
        raise ConfigError("bisect_passes takes a model with a pass trace, or the trace, and inputs for the model")
    calls = _Calls(trace.model, example)
    for index, stage in enumerate(trace):
        if _of_weights(stage):
            continue
        before, after = _regions(stage)
        call = calls.of(after)
        if call is None:
            continue
        with undisturbed(after.module, training=False):
            try:
                if _branches(before.graph) != _branches(after.graph):
                    before, after = _bare(before), _bare(after)
                comparison = compare_graphs(_side(before), _side(after), call)
            except Exception as error:  # noqa: BLE001 (a broken graph may fail in any way)
                return BrokenPass(index, stage, None, f"{type(error).__name__}: {error}")
        if not comparison.agrees:
            return BrokenPass(index, stage, comparison)
    return None


def _side(region: Region) -> Side:
    return Side.all_of(region).of(region.instances[0].name)


def _bare(region: Region) -> Region:
    copied = Region(copy_graph(region.graph), region.instances)
    DropBranches().run(copied)
    return copied


def _branches(graph: fx.Graph) -> set[tuple[str, int, str]]:
    return {(meta.site, meta.call, meta.adapter) for node in graph.nodes if (meta := lora_meta(node)) and meta.last}


class _Calls:
    """How the modules that run regions are called when the model runs on the example."""

    def __init__(self, model: nn.Module | None, example: Example) -> None:
        self._model, self._example = model, example
        self._seen: dict[nn.Module, Example | None] = {}

    def of(self, region: Region) -> Example | None:
        """The call of a region's first module; None if it is not called."""
        if region.instances[0].name == "":
            return self._example
        if not any(node.op == "placeholder" for node in region.graph.nodes):
            return Example((), {})
        module = region.module
        if module not in self._seen:
            self._seen[module] = self._call_of(module)
        return self._seen[module]

    def _call_of(self, module: nn.Module) -> Example | None:
        if self._model is None:
            raise ConfigError("the trace does not know its model; pass the model in place of the trace")
        seen: list[Example] = []

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            del module
            seen.append(Example(args, kwargs))

        handle = module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with undisturbed(self._model, training=False):
                self._example.run(self._model)
        finally:
            handle.remove()
        return seen[0] if seen else None
