"""The results of whole-graph captures: `CapturedModule`, a graph over a model's own parameters, and `LoraGraphModule`.

Both are built as what they are (changing the class of a `GraphModule` instance breaks it) and own their copying and
pickling. They know nothing of how a graph was captured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn

from fxlora._passes import (
    Branch,
    BranchSpec,
    CallSite,
    DropBranches,
    InsertBranches,
    Instance,
    Pipeline,
    Region,
    copy_graph,
    find_sites,
    parameter_at,
    resolve,
    uses_beside_sites,
    weight_sites,
)
from fxlora.capture.graph_codec import EncodedGraph, decode, encode
from fxlora.compound import CAPTURED_COMPOUND, CAPTURED_LAYER, compound_class
from fxlora.errors import CaptureError
from fxlora.model import LoraModel
from fxlora.plan import Plan, by_weight, original_layer


class Shell(nn.Module):
    """A module of the original model without its code: it holds parameters, buffers and children under their names.

    The graph has the code. Calling a shell is an error, so that nothing runs beside the graph by accident.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original_name = type(original).__name__
        setattr(self, CAPTURED_COMPOUND, compound_class(original))
        setattr(self, CAPTURED_LAYER, original_layer(original))
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


def shell_of(model: nn.Module, leaves: set[int], memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """The module tree of `model` for a graph to run on: same names, same parameters, no code.

    Args:
        model: the original; not changed.
        leaves: ids of modules that the graph calls; of these a copy is made that shares all tensors.
        memo: shells already made, so that a module reached under two names stays one.
    """
    memo = {} if memo is None else memo
    if id(model) in memo:
        return memo[id(model)]
    if id(model) in leaves:
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
    if id(model) in leaves:
        leaves = leaves | {id(child) for child in model.modules()}
    children = {name: child and shell_of(child, leaves, memo) for name, child in model._modules.items()}
    shell.__dict__["_modules"] = children
    return shell


def _copy_hooks(module: nn.Module) -> None:
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            module.__dict__[name] = copy.copy(cast("dict[Any, Any]", value))


class CapturedModule(fx.GraphModule):
    """A whole model as one graph over the original's parameters, which are shared and keep their names.

    Pickling and deep copies keep the graph node by node, with its metadata and its output classes.
    """

    meta: dict[str, Any]

    @classmethod
    def build(cls, tree: nn.Module, graph: fx.Graph, attributes: dict[str, Any] | None = None) -> Self:
        """Put a graph on a module tree.

        Args:
            tree: from `shell_of`.
            graph: whose paths exist in `tree`.
            attributes: further attributes of the result, such as the original's `config`.
        """
        name = tree._get_name()
        self = cls(nn.Module(), fx.Graph(), name)
        for key, value in tree.__dict__.items():
            if key in nn.Module().__dict__:
                self.__dict__[key] = value
        self.__dict__.update(attributes or {})
        self.graph = graph
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
        """The graph as the one region of this model."""
        return [Region(self.graph, (Instance("", self),))]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        state = copy.deepcopy(self._state(), memo)
        copied = _rebuild(_plain_class(self), self._get_name(), state, copy_graph(self.graph))
        memo[id(self)] = copied
        return cast(Self, copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (_plain_class(self), self._get_name(), self._state(), encode(self.graph))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def _state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _internals()}


def _internals() -> set[str]:
    """What torch.fx keeps in a graph module's dict and rebuilds itself."""
    return set(fx.GraphModule(nn.Module(), fx.Graph()).__dict__) - set(nn.Module().__dict__) | {"_in_spec", "_out_spec"}


def _plain_class(module: CapturedModule) -> type[CapturedModule]:
    """The class before torch.fx made one of its own for this instance."""
    return next(each for each in type(module).__mro__ if not each.__qualname__.endswith("GraphModuleImpl"))


def _rebuild(cls: type[CapturedModule], name: str, state: dict[str, Any], graph: fx.Graph | EncodedGraph) -> nn.Module:
    module = cls(nn.Module(), fx.Graph(), name)
    module.__dict__.update(state)
    module.graph = decode(graph) if isinstance(graph, EncodedGraph) else graph
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

    def _sites(self) -> list[CallSite]:
        return find_sites(self._base_region())

    def _place(self, plan: Plan) -> Plan:
        return in_graph(self._base_region(), plan)

    def _base_region(self) -> Region:
        """The graph without branches, which may hide what they are for."""
        region = Region(copy_graph(self.graph), (Instance("", self),))
        DropBranches().run(region)
        return region

    def _render(self, active: tuple[str, ...]) -> None:
        branches = tuple(Branch.of(spec) for name in active for spec in self._lora.adapters[name].branches)
        regions = self.regions()
        drop, insert = DropBranches(), InsertBranches(branches, self._lora.branch_dtype)
        self._lora.stages = [
            *Pipeline((drop,), self._verifier(regions[0], ())).run(regions),
            *Pipeline((insert,), self._verifier(regions[0], active)).run(regions),
        ]
        self.graph = regions[0].graph

    def _strip(self) -> nn.Module:
        """The captured model without LoRA."""
        state = {key: value for key, value in self._state().items() if key != "_lora"}
        return _rebuild(CapturedModule, self._get_name(), state, copy_graph(self.graph))

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


def in_graph(region: Region, found: Plan) -> Plan:
    """The plan with branches moved into the weights where the graph reads these in more ways than a layer's calls.

    Args:
        region: the base's graph, without branches.
        found: the plan.

    Raises:
        CaptureError: for a target that the graph does not use at all.
        ConfigError: for a branch that cannot be in the weight.
    """
    visible = {site.name for site in find_sites(region)}
    seen = {site.name for site in weight_sites(region, {spec.site: spec.layer for spec in found.branches})}
    elsewhere = uses_beside_sites(region)
    branches: list[BranchSpec] = []
    hidden: list[str] = []
    for spec in found.branches:
        otherwise = spec.is_parameter and id(parameter_at(region.module, spec.site)) in elsewhere
        if spec.form == "output" and spec.site in visible and not otherwise:
            branches.append(spec)
        elif spec.site in seen:
            branches.append(by_weight(spec, "the graph reads its weight otherwise than by calling it"))
        else:
            hidden.append(spec.site)
    if hidden:
        raise CaptureError(
            f"'{hidden[0]}' is a target, but the captured graph never calls it"
            f"{f' ({len(hidden)} such layers)' if len(hidden) > 1 else ''}: it is unused, or hidden inside a module that "
            "is kept whole, or runs where gradients are off. Leave it out of the targets, or try another capture"
        )
    return replace(found, branches=tuple(branches))
