"""`verify`: check that a graph and its parameters have the form that the passes promise.

`torch.fx.Graph.lint` looks at order and names only: it accepts factors of the wrong shape, a missing add, a branch on
the wrong input. This pass raises `VerifyError`; it changes nothing, but notes the shapes of inserted nodes in their
`meta["val"]` where it can tell them.
"""

from __future__ import annotations

import functools
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from passes.base import Instance, PassResult, Region, resolve
from passes.branches import KINDS, Branch, BranchForm, BranchSpec, Mode, arrange, containers, has_factors, part_shapes
from passes.callsite import CallSite, Layer
from passes.errors import VerifyError
from passes.freeze import parameter_names
from passes.insert import at, base_sites
from passes.leaves import DROPOUT, FORM_CONTAINERS, SCALING, SWITCH, Scaling, TokenIds, WeightNorm, part_path
from passes.nodes import BranchBuilder, LoraMeta, lora_meta
from passes.sites import base_weight


@dataclass(frozen=True)
class Verify:
    """Check regions against what they should contain.

    Attributes:
        specs: every branch of every adapter that is registered in the model.
        active: names of the adapters whose branches are in the graph, in the order of addition.
        trainable: qualified names of the parameters that may require gradients; None to leave this unchecked.
        elsewhere: sites whose branches are in the graphs of other regions.
        mode: the form of the branches.
        shown: the specs of the branches in the graph; None for those of the active adapters among `specs`.
    """

    name: ClassVar[str] = "verify"
    specs: tuple[BranchSpec, ...]
    active: tuple[str, ...] = ()
    trainable: AbstractSet[str] | None = None
    elsewhere: AbstractSet[str] = frozenset()
    mode: Mode = "plain"
    shown: tuple[BranchSpec, ...] | None = None

    def run(self, region: Region) -> PassResult:
        """Raise at the first violation.

        Raises:
            VerifyError: says which site, and what is expected there.
        """
        _check_order(region)
        shown = self.specs if self.shown is None else self.shown
        by_site: dict[str, list[BranchSpec]] = {}
        for adapter in self.active:
            for spec in shown:
                if spec.adapter == adapter:
                    by_site.setdefault(spec.site, []).append(spec)
        local = _by_instance(region, self.specs)
        first, in_graph = region.instances[0], _by_instance(region, shown)
        here = [
            spec for spec in in_graph[first.name] if spec.adapter in self.active and spec.site not in self.elsewhere
        ]
        sites = base_sites(region, [Branch.of(spec, _local(first, spec.site)) for spec in here])
        for instance in region.instances:
            for spec in local[instance.name]:
                _check_parameters(instance, spec)
            _check_orphans(instance, local[instance.name])
            if self.trainable is not None:
                _check_trainable(instance, self.trainable)
        _check_branches(region, sites, by_site, {spec.site for spec in here}, self.mode)
        _check_shapes(region)
        return PassResult(False)


def _by_instance(region: Region, specs: tuple[BranchSpec, ...]) -> dict[str, list[BranchSpec]]:
    """For each instance, the branches of the sites in it."""
    found: dict[str, list[BranchSpec]] = {instance.name: [] for instance in region.instances}
    for spec in specs:
        name = spec.site
        while name and name not in found:
            name = name.rpartition(".")[0]
        if name in found:
            found[name].append(spec)
    return found


def _check_order(region: Region) -> None:
    """Every input is defined before its use, and every path exists in every instance."""
    defined: set[fx.Node] = set()
    for node in region.graph.nodes:
        for argument in node.all_input_nodes:
            if argument not in defined:
                where = _place(region, node, argument)
                raise VerifyError(f"'{where}': '{node.name}' uses '{argument.name}' before it is defined")
        defined.add(node)
        if node.op in ("call_module", "get_attr"):
            for instance in region.instances:
                try:
                    resolve(instance.module, cast(str, node.target))
                except AttributeError as error:
                    where = _place(region, node)
                    path = instance.qualify(str(node.target))
                    raise VerifyError(f"'{where}': '{node.name}' needs '{path}', which is gone") from error
    try:
        region.graph.lint()
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]  # what follows is the whole graph
        raise VerifyError(f"the graph is not well formed: {reason}") from error


def _place(region: Region, *nodes: fx.Node) -> str:
    """Where in the model nodes are, for messages: the site of the first inserted one, else the first one's name."""
    sites = [region.instances[0].qualify(meta.site) for meta in map(lora_meta, nodes) if meta is not None]
    return sites[0] if sites else nodes[0].name


def _check_parameters(instance: Instance, spec: BranchSpec) -> None:
    try:
        owner = cast(nn.Module, resolve(instance.module, _local(instance, spec.owner)))
        weight = base_weight(instance.module, _local(instance, spec.site))[1]
    except AttributeError as error:
        raise VerifyError(f"'{spec.site}': the layer, or the holder of its factors, is gone: {error}") from error
    expected = KINDS[spec.kind].weight_shape(spec.layer)
    if weight.dim() == len(expected) and tuple(weight.shape) != expected:
        raise VerifyError(f"'{spec.site}': the base weight is {tuple(weight.shape)}, not {expected}")
    for part, shape in part_shapes(spec).items():
        path = part_path(part, spec.adapter)
        try:
            factor = owner.get_parameter(path)
        except AttributeError as error:
            raise VerifyError(f"'{spec.site}': there is no parameter '{path}'") from error
        if tuple(factor.shape) != shape:
            raise VerifyError(f"'{spec.site}': '{path}' has shape {tuple(factor.shape)}, not {shape}")
        if not (factor.dtype.is_floating_point or factor.dtype.is_complex):
            raise VerifyError(f"'{spec.site}': '{path}' has dtype {factor.dtype}, which cannot be trained")
        if factor.device != weight.device:
            raise VerifyError(f"'{spec.site}': '{path}' is on {factor.device}, the base weight on {weight.device}")
    if has_factors(spec):
        _check_scaling(owner, spec)


def _check_scaling(owner: nn.Module, spec: BranchSpec) -> None:
    scaling = getattr(getattr(owner, SCALING, None), spec.adapter, None)
    if not isinstance(scaling, Scaling):
        raise VerifyError(f"'{spec.site}': there is no scaling for adapter '{spec.adapter}'")
    if scaling.value != spec.scaling:
        raise VerifyError(f"'{spec.site}': the scaling is {scaling.value:g}, the configuration's {spec.scaling:g}")
    if (
        not scaling.scale.is_meta
        and scaling.scale.item() != torch.tensor(spec.scaling, dtype=scaling.scale.dtype).item()
    ):
        raise VerifyError(f"'{spec.site}': the scaling's buffer holds {scaling.scale.item():g}, not {spec.scaling:g}")


def _local(instance: Instance, path: str) -> str:
    return path[len(instance.name) :].lstrip(".")


def _check_orphans(instance: Instance, specs: list[BranchSpec]) -> None:
    adapters: dict[str, dict[str, bool]] = {}  # by owner and adapter, whether there is a dropout
    for spec in specs:
        of_owner = adapters.setdefault(spec.owner, {})
        of_owner[spec.adapter] = of_owner.get(spec.adapter, False) or bool(spec.dropout)
    ours = containers()
    for name, module in instance.module.named_modules():
        owner, _, leaf = name.rpartition(".")
        if leaf in ours and leaf not in FORM_CONTAINERS:
            known = adapters.get(instance.qualify(owner), {})
            for adapter, _child in module.named_children():
                if adapter not in known:
                    where = instance.qualify(owner)
                    raise VerifyError(f"'{where}': '{leaf}.{adapter}' belongs to no adapter of the plan")
                if leaf == DROPOUT and not known[adapter]:
                    raise VerifyError(f"'{instance.qualify(owner)}': adapter '{adapter}' should have no dropout")


def _check_trainable(instance: Instance, trainable: AbstractSet[str]) -> None:
    for parameter, names in parameter_names(instance).items():
        if parameter.requires_grad and names.isdisjoint(trainable):
            raise VerifyError(f"'{min(names)}' requires gradients, but is not among what should be trained")


def _check_branches(
    region: Region,
    sites: list[CallSite],
    by_site: dict[str, list[BranchSpec]],
    expected_sites: AbstractSet[str],
    mode: Mode,
) -> None:
    inserted: dict[tuple[str, str, int], list[fx.Node]] = {}
    for node in region.graph.nodes:
        meta = lora_meta(node)
        if meta is not None:
            inserted.setdefault((meta.site, meta.kind, meta.call), []).append(node)
    seen: set[str] = set()
    for site in sites:
        name = region.instances[0].qualify(site.name)
        seen.add(name)
        wanted = [Branch.of(spec, site.name) for spec in by_site.get(name, []) if at(Branch.of(spec), site)]
        expected = list(arrange(wanted, mode))
        nodes = inserted.pop((site.name, site.kind, site.call), [])
        _check_one_site(name, site, nodes, expected)
    if inserted:
        name = region.instances[0].qualify(next(iter(inserted))[0])
        raise VerifyError(f"'{name}': a branch without a call site: its site has vanished")
    for name in sorted(expected_sites - seen):
        raise VerifyError(f"'{name}': the call site has vanished from the graph")


def _check_one_site(name: str, site: CallSite, nodes: list[fx.Node], expected: list[BranchForm]) -> None:
    branches = [node for node in nodes if _meta(node).last]
    found, adapters = [_meta(node).adapter for node in branches], [form.label for form in expected]
    if found != adapters:
        raise VerifyError(f"'{name}': the graph has branches of {found or 'no adapter'}, expected {adapters or 'none'}")
    if not expected:
        if nodes:
            raise VerifyError(f"'{name}': nodes of a removed branch are left over: {nodes[0].name}")
        return
    for branch, form in zip(branches, expected, strict=True):
        _check_one_branch(name, site, branch, form)
    final = [node for node in nodes if _meta(node).role == "y" and node.op == "call_method"]
    if len(final) != 1:
        raise VerifyError(f"'{name}': expected one sum with the base's output, found {len(final)}")
    if not _is_dtype_of(final[0].args[1], site.node):
        raise VerifyError(f"'{name}': the sum is not cast to the dtype of the base's output")
    sums, node = [], cast(fx.Node, final[0].args[0])
    while node is not site.node:
        if lora_meta(node) is None or _meta(node).role != "y":
            raise VerifyError(f"'{name}': the sum does not start at the base's output")
        sums.append(node)
        node = cast(fx.Node, node.args[0])
    for node, form in zip(sums[::-1], expected, strict=False):
        if _joining(node) != _wanted(site, form).joining:
            raise VerifyError(f"'{name}': '{node.name}' does not add the branch")
    if [node.args[1] for node in sums[::-1]] != branches:
        raise VerifyError(f"'{name}': the sum does not add each branch once")
    strangers = [user for user in site.node.users if lora_meta(user) is None]
    if strangers:
        raise VerifyError(f"'{name}': '{strangers[0].name}' uses the base's output and so misses the branch")


def _joining(node: fx.Node) -> tuple[object, ...]:
    """How a node adds a branch to the sum before it: the function, and what it reads beside the two."""
    return node.target, *map(_path_of, node.args[2:]), *node.kwargs


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a branch, from its end to its input: what a node does, and the tensors that it reads."""

    role: str
    target: object
    paths: tuple[str | None, ...]


def _steps(end: fx.Node, start: fx.Node | None) -> tuple[list[tuple[fx.Node, _Step]], object]:
    """The chain of first arguments from a branch's end, and where it starts."""
    found: list[tuple[fx.Node, _Step]] = []
    node: Any = end
    while isinstance(node, fx.Node) and node is not start and lora_meta(node) is not None:
        operands = [node, *node.args[1:]] if node.op == "call_module" else node.args[1:]
        paths = tuple(map(_path_of, operands)) if _meta(node).role not in ("x", "A") else ()
        found.append((node, _Step(_meta(node).role, node.target, paths)))
        node = node.args[0] if node.args else None
    return found, node


def _check_one_branch(name: str, site: CallSite, end: fx.Node, form: BranchForm) -> None:
    """Walk one branch from its end to its input, beside one that the kind builds anew: they must agree step by step."""
    adapter = _meta(end).adapter
    found, start = _steps(end, site.x)
    wanted = _wanted(site, form).steps
    reads = {step.role: step.paths for step in wanted}
    for node, step in found:
        if _meta(node).adapter != adapter:
            raise VerifyError(f"'{name}': the branch of '{adapter}' uses '{node.name}' of '{_meta(node).adapter}'")
        for path, expected in zip(step.paths, reads.get(step.role, step.paths), strict=False):
            if path != expected:
                raise VerifyError(f"'{name}': '{node.name}' uses '{path}', not '{expected}'")
        if step.role == "s" and node.target is not torch.mul:
            raise VerifyError(f"'{name}': '{node.name}' does not multiply by the scaling")
    if site.x is not None and start is not site.x:
        raise VerifyError(
            f"'{name}': the branch of '{adapter}' starts at '{start}', not at the site's input '{site.x}'"
        )
    chain, wanted_chain = (
        [step.role for step in steps if step.role != "x"] for steps in ([s for _, s in found], wanted)
    )
    if chain != wanted_chain:
        raise VerifyError(
            f"'{name}': the branch of '{adapter}' is {' <- '.join(chain)}, not {' <- '.join(wanted_chain)}"
        )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A branch as its kind builds it: the steps from its end to its input, and how it is added."""

    steps: tuple[_Step, ...]
    joining: tuple[object, ...]


def _wanted(site: CallSite, form: BranchForm) -> _Wanted:
    """The branch that a form asks for."""
    bias = isinstance(site.bias, fx.Node) or site.bias
    return _built(form, site.name, site.layer, site.weight, site.spelling, site.call, site.x is not None, bias)


@functools.lru_cache(maxsize=4096)
def _built(
    form: BranchForm,
    name: str,
    layer: Layer,
    weight: str,
    spelling: str,
    call: int,
    has_x: bool,
    bias: bool | str | None,
) -> _Wanted:
    """A branch in a graph made for the purpose. The same sites are checked after each pass, so this is kept."""
    graph = fx.Graph()
    x = graph.placeholder("x") if has_x else None
    bias_of_site = graph.placeholder("bias") if isinstance(bias, bool) else bias
    site = CallSite(name, layer, graph.placeholder("y"), x, weight, spelling, bias_of_site, call)
    end = form.build(graph, site, "base")
    joined = form.join(BranchBuilder(graph, site, ""), site.node, end)
    return _Wanted(tuple(step for _, step in _steps(end, x)[0]), _joining(joined))


def _path_of(node: object) -> str | None:
    """The path that a node reads, or an inserted one calls, looking through casts; other methods are a part of it."""
    methods = ""
    while isinstance(node, fx.Node) and node.op == "call_method":
        is_cast = node.target == "to" and len(node.args) == 2 and isinstance(node.args[1], fx.Node)
        methods = methods if is_cast else f".{node.target}(){methods}"
        node = node.args[0]
    if isinstance(node, fx.Node) and node.op == "call_module" and lora_meta(node) is None:
        return None
    is_path = isinstance(node, fx.Node) and node.op in ("get_attr", "call_module")
    return f"{cast(fx.Node, node).target}{methods}" if is_path else None


def _is_dtype_of(node: object, value: fx.Node) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args == (value, "dtype")


def _meta(node: fx.Node) -> LoraMeta:
    meta = lora_meta(node)
    assert meta is not None
    return meta


def _check_shapes(region: Region) -> None:
    """Run the inserted nodes on fake tensors wherever the shape of a site's input is known from the capture."""
    known = {node: node.meta["val"] for node in region.graph.nodes if lora_meta(node) is None and "val" in node.meta}
    values: dict[fx.Node, Any] = {node: value for node, value in known.items() if isinstance(value, FakeTensor)}
    if not values:
        return
    mode = next(iter(values.values())).fake_mode
    for node in region.graph.nodes:
        if lora_meta(node) is None or _meta(node).role == SWITCH:
            continue  # what is chosen at run time has no shape
        if all(argument in values for argument in node.all_input_nodes):
            values[node] = node.meta["val"] = _fake_run(region, node, values, mode)
    for node, value in values.items():
        meta = lora_meta(node)
        if meta is not None and meta.role == "y" and node.op == "call_method":
            base: fx.Node = node
            while lora_meta(base) is not None:
                base = cast(fx.Node, base.args[0])
            before = values[base]
            if value.shape != before.shape or value.dtype != before.dtype:
                raise VerifyError(
                    f"'{_place(region, node)}': the branch turns {tuple(before.shape)} {before.dtype} into "
                    f"{tuple(value.shape)} {value.dtype}"
                )


def _fake_run(region: Region, node: fx.Node, values: dict[fx.Node, Any], mode: FakeTensorMode) -> Any:
    if node.op == "get_attr":
        return mode.from_tensor(cast(Tensor, region.resolve(cast(str, node.target))), static_shapes=True)
    args = fx.map_arg(node.args, lambda argument: values[argument])
    with mode, enable_python_dispatcher():  # composite operators of C++ do not take symbolic sizes
        try:
            if node.op == "call_module":
                module = region.resolve(cast(str, node.target))
                if isinstance(module, Scaling):
                    return torch.empty((), dtype=torch.float32)
                if isinstance(module, WeightNorm):
                    return mode.from_tensor(module.squared, static_shapes=True)
                if isinstance(module, TokenIds):
                    return mode.from_tensor(module.table, static_shapes=True)
                return args[0]  # dropout, or the base's output again
            if node.op == "call_method":
                return getattr(args[0], cast(str, node.target))(*args[1:])
            return cast(Any, node.target)(*args)
        except (RuntimeError, TypeError, ValueError) as error:
            raise VerifyError(f"'{_place(region, node)}': '{node.name}' cannot be computed: {error}") from error
