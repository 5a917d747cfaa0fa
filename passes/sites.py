"""Call sites: the calls of layers in a region's graph, each with its qualified name.

The kinds know how their layers are spelled (`Kind.layer` for modules, `Kind.match` for functions and operators);
this module searches with them and finds names. It must not know about adapters, configurations or selection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

from torch import Tensor, fx, nn

from passes.base import Region
from passes.branches import KINDS
from passes.branches.base import Match
from passes.callsite import CallSite, Layer
from passes.operands import owning_path, peel


def layer_of(module: nn.Module) -> Layer | None:
    """The kind, sizes and options of a module that is a layer, else None."""
    for kind in KINDS.values():
        layer = kind.layer(module)
        if layer is not None:
            return layer
    return None


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing must keep a module as one call: a layer whose own forward is the operation."""
    layer = layer_of(module)
    return layer is not None and layer.form == "output"


def find_sites(region: Region) -> list[CallSite]:
    """All call sites of a region, in graph order, calls of the same layer numbered from 0."""
    names = _Names(region.module)
    found = [_match(node, region, names) for node in region.graph.nodes]
    return _numbered(site for site in found if site is not None)


def weight_sites(region: Region, layers: dict[str, Layer]) -> list[CallSite]:
    """All reads of some parameters in a region, in graph order: the sites of branches of the form `"weight"`.

    Args:
        region: whose graph has `get_attr` nodes of the parameters.
        layers: what each is, by the site's name: the layer's, or the parameter's own.
    """
    names = _Names(region.module)
    paths = {weight_path(region.module, site): site for site in layers}
    found: list[CallSite] = []
    for node in region.graph.nodes:
        if node.op != "get_attr":
            continue
        value = region.resolve(cast(str, node.target))
        path = names.path_of(value, cast(str, node.target)) if isinstance(value, Tensor) else None
        if path in paths:
            site = paths[path]
            found.append(CallSite(site, layers[site], node, None, path, "weight"))
    return _numbered(found)


def weight_path(model: nn.Module, site: str) -> str:
    """Path of a site's weight: the layer's `weight`, or the bare parameter that the site is."""
    owner, _, leaf = site.rpartition(".")
    parent = model.get_submodule(owner)
    is_parameter = leaf in parent._parameters
    return site if is_parameter else ".".join(part for part in (site, "weight") if part)


def base_weight(model: nn.Module, site: str) -> tuple[str, nn.Parameter]:
    """(path, parameter) of a site's weight: the layer's `weight`, or the bare parameter that the site is.

    Raises:
        AttributeError: when there is none.
    """
    path = weight_path(model, site)
    weight = parameter_at(model, path)
    if weight is None:
        raise AttributeError(f"there is no parameter '{path}'")
    return path, weight


def parameter_at(model: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter registered at a path, also where its module's class computes another value under that name."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner)._parameters.get(name)


def _numbered(sites: Iterable[CallSite]) -> list[CallSite]:
    calls: dict[tuple[str, str], int] = {}
    numbered: list[CallSite] = []
    for site in sites:
        key = site.name, site.kind
        call = calls[key] = calls.get(key, -1) + 1
        numbered.append(replace(site, call=call))
    return numbered


def _match(node: fx.Node, region: Region, names: _Names) -> CallSite | None:
    if node.op == "call_module":
        return _match_module(node, region, names)
    if node.op in ("call_function", "call_method"):
        for kind in KINDS.values():
            match = kind.match(node)
            if match is not None:
                return _match_functional(node, match, region, names)
    return None


def _match_module(node: fx.Node, region: Region, names: _Names) -> CallSite | None:
    module = region.resolve(cast(str, node.target))
    layer = layer_of(module) if isinstance(module, nn.Module) else None
    x = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if layer is None or layer.form != "output" or not isinstance(x, fx.Node):
        return None
    name = names.of_module(cast(nn.Module, module))
    prefix = f"{name}." if name else ""
    bias = None if getattr(module, "bias", None) is None else f"{prefix}bias"
    return CallSite(name, layer, node, x, f"{prefix}weight", type(module).__name__, bias)


def _match_functional(node: fx.Node, match: Match, region: Region, names: _Names) -> CallSite | None:
    weight, flipped = peel(match.weight)
    if not isinstance(match.x, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    tensor = region.resolve(cast(str, weight.target))
    if not isinstance(tensor, nn.Parameter):
        return None
    layer = match.layer(tuple(tensor.shape), flipped)
    if layer is None:
        return None
    name, path = names.of_parameter(tensor, owning_path(node), cast(str, weight.target))
    bias = match.bias if isinstance(match.bias, fx.Node) else None
    return CallSite(name, layer, node, match.x, path, match.spelling, bias)


class _Names:
    """Canonical qualified names: the first under which `named_modules` and `named_parameters` show an object."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules = {id(module): name for name, module in root.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in root.named_parameters()}

    def of_module(self, module: nn.Module) -> str:
        return self._modules[id(module)]

    def path_of(self, tensor: Tensor, target: str) -> str:
        return self._parameters.get(id(tensor), target)

    def of_parameter(self, parameter: nn.Parameter, caller: str, target: str) -> tuple[str, str]:
        """(site name, path of the weight) for a parameter that `caller`'s code uses.

        A weight that two layers share is named after the layer that makes the call, as far as the graph tells.
        """
        path = self.path_of(parameter, target)
        for candidate in (f"{caller}.weight", path):
            owner, _, leaf = candidate.rpartition(".")
            if owner and leaf == "weight" and self._parameter(candidate) is parameter:
                module = self._root.get_submodule(owner)
                owner = self._modules.get(id(module), owner)
                return owner, f"{owner}.weight"
        return path, path

    def _parameter(self, path: str) -> object:
        try:
            return self._root.get_parameter(path)
        except AttributeError:
            return None
