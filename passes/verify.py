"""`verify`: check that a graph and its parameters have the form that the passes promise.

`torch.fx.Graph.lint` looks at order and names only: it accepts factors of the wrong shape, a missing add, a branch on
the wrong input. This pass changes nothing and raises `VerifyError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from passes.base import Instance, PassResult, Region, resolve
from passes.branches import KINDS, BranchSpec
from passes.errors import VerifyError
from passes.leaves import CONTAINERS, DROPOUT, FACTOR_A, FACTOR_B, SCALING, Scaling
from passes.merge import base_weight
from passes.nodes import LoraMeta, lora_meta
from passes.sites import CallSite, find_sites


@dataclass(frozen=True)
class Verify:
    """Check regions against what they should contain.

    Attributes:
        specs: every branch of every adapter that is registered in the model.
        active: names of the adapters whose branches are in the graph, in the order of addition.
        trainable: qualified names of the parameters that may require gradients; None to leave this unchecked.
    """

    name: ClassVar[str] = "verify"
    specs: tuple[BranchSpec, ...]
    active: tuple[str, ...] = ()
    trainable: Set[str] | None = None

    def run(self, region: Region) -> PassResult:
        """Raise at the first violation.

        Raises:
            VerifyError: says which site, and what is expected there.
        """
        _check_order(region.graph)
        by_site: dict[str, dict[str, BranchSpec]] = {}
        for spec in self.specs:
            by_site.setdefault(spec.site, {})[spec.adapter] = spec
        sites = [site for site in find_sites(region) if lora_meta(site.node) is None]
        for instance in region.instances:
            for spec in _within(instance, self.specs):
                _check_parameters(instance, spec)
            _check_orphans(instance, self.specs)
            if self.trainable is not None:
                _check_trainable(instance, self.trainable)
        _check_branches(region, sites, by_site, self.active)
        _check_shapes(region)
        return PassResult(False)


def _within(instance: Instance, specs: tuple[BranchSpec, ...]) -> Iterator[BranchSpec]:
    for spec in specs:
        if spec.site == instance.name or not instance.name or spec.site.startswith(instance.name + "."):
            yield spec


def _check_order(graph: fx.Graph) -> None:
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"the graph is not well formed: {error}") from error


def _check_parameters(instance: Instance, spec: BranchSpec) -> None:
    owner = cast(nn.Module, resolve(instance.module, _local(instance, spec.owner)))
    weight = base_weight(instance.module, _local(instance, spec.site))[1]
    expected = (spec.in_features, spec.out_features) if spec.transposed else (spec.out_features, spec.in_features)
    if weight.dim() == 2 and tuple(weight.shape) != expected:
        raise VerifyError(f"'{spec.site}': the base weight is {tuple(weight.shape)}, not {expected}")
    for container, shape in KINDS[spec.kind].params(spec).items():
        path = f"{container}.{spec.adapter}.weight"
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
    scaling = getattr(getattr(owner, SCALING, None), spec.adapter, None)
    if not isinstance(scaling, Scaling):
        raise VerifyError(f"'{spec.site}': there is no scaling for adapter '{spec.adapter}'")
    if scaling.value != spec.scaling:
        raise VerifyError(f"'{spec.site}': the scaling is {scaling.value:g}, the configuration's {spec.scaling:g}")
    if not scaling.scale.is_meta and scaling.scale.item() != torch.tensor(spec.scaling, dtype=torch.float32).item():
        raise VerifyError(f"'{spec.site}': the scaling's buffer holds {scaling.scale.item():g}, not {spec.scaling:g}")


def _local(instance: Instance, path: str) -> str:
    return path[len(instance.name) :].lstrip(".")


def _check_orphans(instance: Instance, specs: tuple[BranchSpec, ...]) -> None:
    adapters: dict[str, dict[str, BranchSpec]] = {}
    for spec in specs:
        adapters.setdefault(spec.owner, {})[spec.adapter] = spec
    for name, module in instance.module.named_modules():
        owner, _, leaf = name.rpartition(".")
        if leaf in CONTAINERS:
            known = adapters.get(instance.qualify(owner), {})
            for adapter, _child in module.named_children():
                if adapter not in known:
                    where = instance.qualify(owner)
                    raise VerifyError(f"'{where}': '{leaf}.{adapter}' belongs to no adapter of the plan")
                if leaf == DROPOUT and not known[adapter].dropout:
                    raise VerifyError(f"'{instance.qualify(owner)}': adapter '{adapter}' should have no dropout")


def _check_trainable(instance: Instance, trainable: Set[str]) -> None:
    for path, parameter in instance.module.named_parameters():
        name = instance.qualify(path)
        if parameter.requires_grad and name not in trainable:
            raise VerifyError(f"'{name}' requires gradients, but is not among what should be trained")


def _check_branches(
    region: Region, sites: list[CallSite], by_site: dict[str, dict[str, BranchSpec]], active: tuple[str, ...]
) -> None:
    inserted: dict[tuple[str, int], list[fx.Node]] = {}
    for node in region.graph.nodes:
        meta = lora_meta(node)
        if meta is not None:
            inserted.setdefault((meta.site, meta.call), []).append(node)
    seen: set[str] = set()
    for site in sites:
        name = region.instances[0].qualify(site.name)
        seen.add(name)
        expected = [adapter for adapter in active if adapter in by_site.get(name, {})]
        nodes = inserted.pop((site.name, site.call), [])
        _check_one_site(name, site, nodes, expected, by_site.get(name, {}))
    if inserted:
        raise VerifyError(f"'{next(iter(inserted))[0]}': a branch without a call site: its site has vanished")
    for spec in _within(region.instances[0], tuple(s for adapters in by_site.values() for s in adapters.values())):
        if spec.adapter in active and spec.site not in seen:
            raise VerifyError(f"'{spec.site}': the call site has vanished from the graph")


def _check_one_site(
    name: str, site: CallSite, nodes: list[fx.Node], expected: list[str], specs: dict[str, BranchSpec]
) -> None:
    branches = [node for node in nodes if _meta(node).role == "s"]
    found = [_meta(node).adapter for node in branches]
    if found != expected:
        raise VerifyError(f"'{name}': the graph has branches of {found or 'no adapter'}, expected {expected or 'none'}")
    if not expected:
        if nodes:
            raise VerifyError(f"'{name}': nodes of a removed branch are left over: {nodes[0].name}")
        return
    for branch in branches:
        _check_one_branch(name, site, branch, specs[_meta(branch).adapter])
    final = [node for node in nodes if _meta(node).role == "y" and node.op == "call_method"]
    if len(final) != 1:
        raise VerifyError(f"'{name}': expected one sum with the base's output, found {len(final)}")
    summands, node = [], cast(fx.Node, final[0].args[0])
    while node is not site.node:
        if lora_meta(node) is None or _meta(node).role != "y":
            raise VerifyError(f"'{name}': the sum does not start at the base's output")
        summands.append(node.args[1])
        node = cast(fx.Node, node.args[0])
    if summands[::-1] != branches:
        raise VerifyError(f"'{name}': the sum does not add each branch once")
    strangers = [user for user in site.node.users if lora_meta(user) is None]
    if strangers:
        raise VerifyError(f"'{name}': '{strangers[0].name}' uses the base's output and so misses the branch")


def _check_one_branch(name: str, site: CallSite, s: fx.Node, spec: BranchSpec) -> None:
    """Walk one branch from its end to the call site's input: every step must be there, in order."""
    adapter = _meta(s).adapter
    chain: list[str] = []
    node: Any = s
    while isinstance(node, fx.Node) and node is not site.x and lora_meta(node) is not None:
        meta = _meta(node)
        if meta.adapter != adapter:
            raise VerifyError(f"'{name}': the branch of '{adapter}' uses '{node.name}' of '{meta.adapter}'")
        chain.append(meta.role)
        if meta.role in ("a", "b"):
            path = _parameter_path(node.args[1])
            wanted = f"{FACTOR_A if meta.role == 'a' else FACTOR_B}.{adapter}.weight"
            if path is None or not f".{path}".endswith(f".{wanted}"):
                raise VerifyError(f"'{name}': '{node.name}' multiplies by '{path}', not by '{wanted}'")
        node = node.args[0]
    if node is not site.x:
        raise VerifyError(f"'{name}': the branch of '{adapter}' starts at '{node}', not at the site's input '{site.x}'")
    wanted_chain = ["s", "b", "a", *(["lora_dropout"] if spec.dropout else [])]
    if [role for role in chain if role != "x"] != wanted_chain:
        raise VerifyError(f"'{name}': the branch of '{adapter}' is {' <- '.join(chain)}, not {' <- '.join(wanted_chain)}")


def _parameter_path(node: object) -> str | None:
    while isinstance(node, fx.Node) and node.op == "call_method":
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _meta(node: fx.Node) -> LoraMeta:
    meta = lora_meta(node)
    assert meta is not None
    return meta


def _check_shapes(region: Region) -> None:
    """Run the inserted nodes on fake tensors wherever the shape of a site's input is known from the capture."""
    values: dict[fx.Node, Any] = {}
    for node in region.graph.nodes:
        if lora_meta(node) is None:
            if isinstance(node.meta.get("val"), Tensor):
                values[node] = node.meta["val"]
        elif all(argument in values or argument.op == "get_attr" for argument in node.all_input_nodes):
            mode = next((value.fake_mode for value in values.values() if hasattr(value, "fake_mode")), None)
            if mode is not None:
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
                    f"'{meta.site}': the branch turns {tuple(before.shape)} {before.dtype} into "
                    f"{tuple(value.shape)} {value.dtype}"
                )


def _fake_run(region: Region, node: fx.Node, values: dict[fx.Node, Any], mode: FakeTensorMode) -> Any:
    if node.op == "get_attr":
        return mode.from_tensor(cast(Tensor, region.resolve(cast(str, node.target))), static_shapes=True)
    args = fx.map_arg(node.args, lambda argument: values[argument])
    with mode:
        try:
            if node.op == "call_module":
                module = region.resolve(cast(str, node.target))
                if isinstance(module, Scaling):
                    return torch.empty((), dtype=torch.float32)
                return args[0]  # dropout
            if node.op == "call_method":
                return getattr(args[0], cast(str, node.target))(*args[1:])
            return cast(Any, node.target)(*args)
        except (RuntimeError, ValueError) as error:
            raise VerifyError(f"'{_meta(node).site}': '{node.name}' cannot be computed: {error}") from error
