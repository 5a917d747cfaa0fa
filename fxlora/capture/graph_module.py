"""The results of whole-graph captures: `CapturedModule`, a graph over a model's own parameters, and `LoraGraphModule`.

Both are built as what they are (changing the class of a `GraphModule` instance breaks it) and own their copying and
pickling. They know nothing of how a graph was captured.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode, _PyTreeCodeGen

from fxlora._passes import (
    Branch,
    BranchSpec,
    CallSite,
    DropBranches,
    InsertBranches,
    Instance,
    Mode,
    Pipeline,
    RedirectSaved,
    Region,
    Stage,
    Tied,
    VerifySaved,
    check_sharing,
    comment_sites,
    copy_graph,
    find_sites,
    parameter_at,
    print_graph,
    resolve,
    uses_beside_sites,
    weight_sites,
)
from fxlora.capture.codegen import BY_MODE, EVALUATION_SPECS, FORWARD_SPECS, forward_by_mode, generate_forward
from fxlora.capture.graph_codec import EncodedGraph, decode, encode
from fxlora.capture.unify import differing_owners
from fxlora.compound import CAPTURED_COMPOUND, CAPTURED_LAYER, TRANSPOSED, compound_class
from fxlora.errors import CaptureError, NoTargetError
from fxlora.host.saved_modules import check_copies
from fxlora.lowering import lowered_region
from fxlora.model import LoraModel
from fxlora.plan import Plan, by_weight, original_layer
from fxlora.rounding import RoundingReport
from fxlora.state import LoraState
from fxlora.tying import check_tokens_in_graph

MODES = ("training", "evaluation")
"""The modes of two graphs, in their order."""


class Shell(nn.Module):
    """A module of the original model without its code: it holds parameters, buffers and children under their names.

    The graph has the code. Calling a shell is an error, so that nothing runs beside the graph by accident.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original_name = type(original).__name__
        setattr(self, CAPTURED_COMPOUND, compound_class(original))
        setattr(self, CAPTURED_LAYER, original_layer(original))
        if hasattr(original, TRANSPOSED):
            setattr(self, TRANSPOSED, getattr(original, TRANSPOSED))
        _share_contents(original, self)

    def forward(self, *args: object, **kwargs: object) -> None:
        """Refuses.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"this {self._original_name} is part of a captured graph and has no code of its own; call the whole model"
        )

    def _get_name(self) -> str:
        return self._original_name


def _share_contents(original: nn.Module, copied: nn.Module) -> None:
    copied._parameters = dict(original._parameters)
    copied._buffers = dict(original._buffers)
    copied._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
    copied.training = original.training


def shell_of(
    model: nn.Module, leaves: set[int], memo: dict[int, nn.Module] | None = None, *, whole: bool = False
) -> nn.Module:
    """The module tree of `model` for a graph to run on: same names, same parameters, no code.

    Args:
        model: the original; not changed.
        leaves: ids of modules that the graph calls; of these a copy is made that shares all tensors.
        memo: shells already made, so that a module reached under two names stays one.
        whole: whether the model is a part of such a module, and so is copied like it.
    """
    memo = {} if memo is None else memo
    if id(model) in memo:
        return memo[id(model)]
    whole = whole or id(model) in leaves
    if whole:
        shell = type(model).__new__(type(model))  # not copy.copy, which parametrized modules refuse
        shell.__dict__ = dict(model.__dict__)
        _share_contents(model, shell)
        _copy_hooks(shell)
    elif isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        shell = type(model)() if type(model) in (nn.ModuleList, nn.ModuleDict) else Shell(model)
        shell.training = model.training
    else:
        shell = Shell(model)
    memo[id(model)] = shell
    children = {
        name: None if child is None else shell_of(child, leaves, memo, whole=whole)
        for name, child in model._modules.items()
    }
    shell.__dict__["_modules"] = children
    return shell


def _copy_hooks(module: nn.Module) -> None:
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            module.__dict__[name] = copy.copy(cast("dict[Any, Any]", value))


@dataclass(frozen=True, slots=True)
class Compiled:
    """Graphs of a `CapturedModule`, and the forward and its source that torch.fx made of them."""

    graphs: list[fx.Graph]
    forward: Callable[..., Any]
    code: str


class CapturedModule(fx.GraphModule):
    """A whole model as one graph over the original's parameters, which are shared and keep their names.

    Where training and evaluation compute different things (stochastic depth, `if self.training:`) there are two graphs
    over these parameters; a call runs the one for the model's own mode, and `graph` is that one. Each is of one mode
    throughout: a call is refused while a part of the model whose code differs between the modes is in another mode
    than the whole.

    Pickling and deep copies keep the graphs node by node, with their metadata and their output classes.

    Attributes:
        two_graphs: why there are two graphs; empty if there is one.
    """

    meta: dict[str, Any]
    two_graphs: str = ""
    _evaluation: fx.Graph | None = None
    _mode_owners: tuple[str, ...] = ()
    _absent: tuple[frozenset[str], ...] = (frozenset(),)
    """For each region, the call sites that only another region has."""

    @classmethod
    def build(
        cls,
        tree: nn.Module,
        graphs: Sequence[fx.Graph],
        attributes: dict[str, Any] | None = None,
        two_graphs: str = "",
    ) -> Self:
        """Put a graph, or one for each mode, on a module tree.

        Args:
            tree: from `shell_of`.
            graphs: whose paths exist in `tree`; one for both modes, or one for training and one for evaluation.
            attributes: further attributes of the result, such as the original's `config`.
            two_graphs: why there are two.
        """
        name = tree._get_name()
        self = cls(nn.Module(), fx.Graph(), name)
        for key, value in tree.__dict__.items():
            if key in nn.Module().__dict__ or key == TRANSPOSED:
                self.__dict__[key] = value
        self.__dict__.update(attributes or {})
        self._put(graphs)
        if len(graphs) > 1:
            self.two_graphs, self._mode_owners = two_graphs, differing_owners(*graphs)
            in_training, in_evaluation = ({site.name for site in find_sites(region)} for region in self.regions())
            self._absent = (frozenset(in_evaluation - in_training), frozenset(in_training - in_evaluation))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"{error}. This is a captured graph: it has the model's parameters and modules, but not its other methods "
                "and attributes; capture='modules' keeps the model's own class"
            ) from None

    def regions(self) -> list[Region]:
        """The graph as the one region of this model, or those of training and evaluation."""
        return [Region(graph, (Instance("", self),)) for graph in self._graphs()]

    @property
    def graph(self) -> fx.Graph:
        """The graph for the model's mode; tools that read it, such as `torch.export`, see what a call runs."""
        graphs = self._graphs()
        return graphs[0] if self.training else graphs[-1]

    @graph.setter
    def graph(self, g: fx.Graph) -> None:
        if self._evaluation is None:
            self._put([g])
        else:
            self._put([g, self._evaluation] if self.training else [self._graph, g])

    def recompile(self) -> PythonCode:
        """See `torch.fx.GraphModule`; with two graphs, `forward` chooses one by the model's mode."""
        code = super().recompile()
        if self._evaluation is not None:
            codegen = self._evaluation._codegen
            if isinstance(codegen, _PyTreeCodeGen):
                specs = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
                self.__dict__.update(zip(EVALUATION_SPECS, specs, strict=True))
            cls = cast(Any, type(self))
            cls.forward = forward_by_mode(cls.forward, generate_forward(self._evaluation, EVALUATION_SPECS))
        return code

    def _graphs(self) -> list[fx.Graph]:
        """The one graph, or those of training and evaluation."""
        return [self._graph] if self._evaluation is None else [self._graph, self._evaluation]

    def _put(self, graphs: Sequence[fx.Graph]) -> None:
        """Run these graphs from now on: one for both modes, or one for training and one for evaluation."""
        self._graph, self._evaluation = graphs[0], graphs[1] if len(graphs) > 1 else None
        for graph in graphs:
            graph.owning_module = self
        self.recompile()

    def _compiled(self) -> Compiled:
        """The graphs that run now, with the code that was made of them."""
        return Compiled(self._graphs(), cast(Any, type(self)).forward, self._code)

    def _put_compiled(self, compiled: Compiled) -> None:
        """Run graphs again that have run before."""
        self._graph, self._evaluation = compiled.graphs[0], compiled.graphs[1] if len(compiled.graphs) > 1 else None
        cast(Any, type(self)).forward, self._code = compiled.forward, compiled.code

    def _forwards(self) -> list[Callable[..., Any] | None]:
        """The generated function of each region."""
        forward = cast(Any, type(self)).forward
        return list(getattr(forward, BY_MODE, (forward,)))

    def _check_modes(self) -> None:
        for path in self._mode_owners:
            if self.get_submodule(path).training != self.training:
                own, whole = ("evaluation", "training") if self.training else ("training", "evaluation")
                raise CaptureError(
                    f"'{path}' is in {own} while the model is in {whole}, and this captured model can only be in one of "
                    f"them: it has a graph for each, since {self.two_graphs}. Call train() or eval() on the whole model; "
                    "capture='modules' allows a mode for each module"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        state = copy.deepcopy(self._state(), memo)
        copied = _rebuild(_plain_class(self), self._get_name(), state, [copy_graph(graph) for graph in self._graphs()])
        memo[id(self)] = copied
        return cast(Self, copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (_plain_class(self), self._get_name(), self._state(), list(map(encode, self._graphs())))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def _state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _internals()}


@functools.cache
def _internals() -> set[str]:
    """What torch.fx keeps in a graph module's dict and rebuilds itself."""
    ours = {"_in_spec", "_out_spec", "_evaluation", *EVALUATION_SPECS}
    return set(fx.GraphModule(nn.Module(), fx.Graph()).__dict__) - set(nn.Module().__dict__) | ours


def _plain_class(module: CapturedModule) -> type[CapturedModule]:
    """The class before torch.fx made one of its own for this instance."""
    return next(each for each in type(module).__mro__ if not each.__qualname__.endswith("GraphModuleImpl"))


def _rebuild(
    cls: type[CapturedModule], name: str, state: dict[str, Any], graphs: Sequence[fx.Graph | EncodedGraph]
) -> nn.Module:
    module = cls(nn.Module(), fx.Graph(), name)
    module.__dict__.update(state)
    module._put([decode(graph) if isinstance(graph, EncodedGraph) else graph for graph in graphs])
    return module


def adopt_constants(tree: nn.Module, graph: fx.Graph, source: nn.Module) -> None:
    """Give `tree` every tensor and nested graph that `graph` reads and that is no part of the original module tree.

    Tensors become non-persistent buffers, so that they move with the model and stay out of its state dict.
    """
    for target in _targets(graph):
        try:
            resolve(tree, target)
            continue
        except AttributeError:
            value = resolve(source, target)
        owner_path, _, name = target.rpartition(".")
        owner = tree.get_submodule(owner_path)
        if isinstance(value, nn.Module):
            owner.add_module(name, value)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            owner.register_buffer(name, value, persistent=False)
        else:
            setattr(owner, name, value)


def _targets(graph: fx.Graph) -> Iterable[str]:
    return [cast(str, node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]


class LoraGraphModule(CapturedModule, LoraModel):
    """A captured model with LoRA: what `lora_transform` returns for whole-graph captures."""

    _fixed_dtype: bool = False
    """Whether the graph holds dtypes and devices as constants, as exported graphs do."""

    def print_graph(self) -> str:
        """The graph as text, inserted nodes marked with `+`; with two graphs, first that of training."""
        if self._evaluation is None:
            return super().print_graph()
        return "\n".join(f"# {mode}\n{print_graph(g)}" for mode, g in zip(MODES, self._graphs(), strict=True))

    def print_readable(self, print_output: bool = True, *args: Any, **options: Any) -> str:
        """See `torch.fx.GraphModule.print_readable`; comments name the site of each inserted node.

        With two graphs it shows that of the model's mode.
        """
        code = fx.GraphModule.print_readable(self, False, *args, **options)
        text = comment_sites(code, Region(self.graph, (Instance("", self),)))
        if print_output:
            print(text)
        return text

    def recompile(self) -> PythonCode:
        """See `CapturedModule.recompile`; the code of an optimized model is that of its lowered graphs."""
        code = super().recompile()
        state = cast("LoraState | None", self.__dict__.get("_lora"))
        if state is not None and state.optimized and state.rendered and state.mode == "plain":
            first, *others = [
                generate_forward(region.graph, specs)
                for region, specs in zip(self.lowered_regions(), (FORWARD_SPECS, EVALUATION_SPECS), strict=False)
            ]
            cast(Any, type(self)).forward = forward_by_mode(first, others[0]) if others else first
        return code

    def lowered_regions(self) -> list[Region]:
        """See `LoraModel.lowered_regions`."""
        return [lowered_region(region) for region in self.regions()]

    def _sites(self) -> list[CallSite]:
        return [site for region in self._base_regions() for site in find_sites(region)]

    def _place(self, plan: Plan) -> Plan:
        return in_graphs(self._base_regions(), plan)

    def _base_regions(self) -> list[Region]:
        """The graphs without branches, which may hide what they are for."""
        regions = [Region(copy_graph(region.graph), region.instances) for region in self.regions()]
        for region in regions:
            DropBranches().run(region)
        return regions

    def _elsewhere(self) -> list[frozenset[str]]:
        """For each region, the adapted sites that only another region has: calls, or reads of a weight."""
        regions = self.regions()
        if len(regions) == 1:
            return [frozenset()]
        weights = {spec.site: spec.layer for spec in self._specs() if spec.form == "weight"}
        read = [{site.name for site in weight_sites(region, weights)} for region in regions]
        return [
            absent - weights.keys() | (weights.keys() - here) for absent, here in zip(self._absent, read, strict=True)
        ]

    def _rewrite(self, active: tuple[str, ...], mode: Mode) -> None:
        """Rewrite each graph with the branches of the sites that it calls."""
        key = (mode, active, self._lora.copies)
        if key not in self._lora.transient.renderings:
            self._put(self._graphs_with(active, mode))
            self._lora.transient.renderings[key] = self._compiled()
        self._put_compiled(self._lora.transient.renderings[key])

    def _graphs_with(self, active: tuple[str, ...], mode: Mode) -> list[fx.Graph]:
        branches = [Branch.of(spec) for spec in self._branches_of(active, mode)]
        copies = tuple((saved.module, saved.adapter) for saved in self._lora.copies)
        regions, stages = self.regions(), list[Stage]()
        for region, elsewhere in zip(regions, self._elsewhere(), strict=True):
            own = tuple(branch for branch in branches if branch.site not in elsewhere)
            drop, insert = DropBranches(), InsertBranches(own, self._lora.branch_dtype, mode)
            verifiers = [replace(self._verifier(region, names, mode), elsewhere=elsewhere) for names in ((), active)]
            saved = VerifySaved(copies, self._registered_copies())
            for each, verifier in ((drop, verifiers[0]), (RedirectSaved(copies), saved), (insert, verifiers[1])):
                stages += Pipeline((each,), verifier, self._lora.traced).run([region])
        self._note(stages)
        return [region.graph for region in regions]

    def _fold(
        self,
        names: Sequence[str],
        replaced: dict[str, Tensor],
        tied: Tied,
        on_folded: Callable[[str], None] | None = None,
    ) -> RoundingReport:
        """See `LoraModel._fold`, which looks for other uses of a weight in the first graph only."""
        specs = [spec for name in names for spec in self._lora.adapters[name].branches]
        for region in self.regions()[1:]:
            check_sharing(region, specs, tied)
        return super()._fold(names, replaced, tied, on_folded)

    def verify(self) -> None:
        """See `LoraModel.verify`; also checks which copies of modules the graph runs."""
        copies = tuple((saved.module, saved.adapter) for saved in self._lora.copies)
        for region, elsewhere in zip(self.regions(), self._elsewhere(), strict=True):
            VerifySaved(copies, self._registered_copies()).run(region)
            replace(self._verifier(region, self._shown(), self._lora.mode), elsewhere=elsewhere).run(region)
        check_copies(self, self._lora.adapters.values())

    def _registered_copies(self) -> tuple[tuple[str, str], ...]:
        return tuple((saved.module, saved.adapter) for plan in self._lora.adapters.values() for saved in plan.saved)

    def _strip(self) -> nn.Module:
        """The captured model without LoRA."""
        state = {key: value for key, value in self._state().items() if key != "_lora"}
        return _rebuild(CapturedModule, self._get_name(), state, [copy_graph(graph) for graph in self._graphs()])

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self._fixed_dtype:
            probe = next((p for p in self.parameters() if p.is_floating_point()), None)
            if probe is not None:
                with torch.no_grad():
                    after = fn(probe[:0] if probe.dim() else probe)
                if (after.dtype, after.device) != (probe.dtype, probe.device):
                    raise TypeError(
                        f"an exported graph holds its dtype and device as constants: it cannot go from {probe.dtype} on "
                        f"{probe.device} to {after.dtype} on {after.device}. Convert the model first and then transform "
                        "it, or use capture='modules'"
                    )
        return super()._apply(fn, recurse)


def in_graphs(regions: Sequence[Region], found: Plan) -> Plan:
    """The plan with branches moved into the weights where the graphs read these in more ways than a layer's calls.

    Args:
        regions: the base's graphs, without branches.
        found: the plan.

    Raises:
        CaptureError: for a target that the graphs do not use at all; for chosen calls of a layer that is not called
            equally often in training and in evaluation.
        ConfigError: for a branch that cannot be in the weight.
        NoTargetError: for a call that does not exist.
    """
    sites = [site for region in regions for site in find_sites(region)]
    visible = {site.name for site in sites}
    layers = {spec.site: spec.layer for spec in found.branches}
    seen = {site.name for region in regions for site in weight_sites(region, layers)}
    elsewhere = {key for region in regions for key in uses_beside_sites(region)}
    for region in regions:
        check_tokens_in_graph(region, found.branches, sites)
    branches: list[BranchSpec] = []
    hidden: list[str] = []
    for spec in found.branches:
        otherwise = spec.is_parameter and id(parameter_at(regions[0].module, spec.site)) in elsewhere
        if spec.form == "output" and spec.site in visible and not otherwise:
            branches.append(spec)
        elif spec.site in seen:
            branches.append(by_weight(spec, "the graph reads its weight otherwise than by calling it"))
        else:
            hidden.append(spec.site)
    for spec in branches:
        _check_calls(spec, regions)
    if hidden:
        raise CaptureError(
            f"'{hidden[0]}' is a target, but the captured graph never calls it"
            f"{f' ({len(hidden)} such layers)' if len(hidden) > 1 else ''}: it is unused, or hidden inside a module that "
            "is kept whole, or runs where gradients are off. Leave it out of the targets, or try another capture"
        )
    return replace(found, branches=tuple(branches))


def _check_calls(spec: BranchSpec, regions: Sequence[Region]) -> None:
    if not spec.calls:
        return
    counts = [_count_calls(region, spec.site) for region in regions]
    if len(set(counts)) > 1:
        raise CaptureError(
            f"call_sites: '{spec.site}' is called {counts[0]} times in training and {counts[-1]} times in evaluation, so "
            "that its calls have no numbers which hold for both; adapt all of its calls"
        )
    if spec.calls[-1] >= counts[0]:
        raise NoTargetError(
            f"call_sites: '{spec.site}' is called {counts[0]} times in the graph, counted from 0; there is no call "
            f"{spec.calls[-1]}"
        )


def _count_calls(region: Region, name: str) -> int:
    return 1 + max((site.call for site in find_sites(region) if site.name == name), default=-1)
