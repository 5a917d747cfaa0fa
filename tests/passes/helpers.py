"""Small models, their regions, and adapters registered by hand: what the tests of passes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.base import Instance, Region, copy_graph
from passes.branches import part_shapes, variant_leaves
from passes.branches.base import Branch, BranchDtype, BranchSpec
from passes.insert import InsertBranches
from passes.leaves import DROPOUT, SCALING, Factor, Scaling
from passes.sites import find_sites, is_leaf


class TwoLayers(nn.Module):
    """The three-line module of most tests: 3 inputs, 4 hidden, 2 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def region_of(model: nn.Module) -> Region:
    """A model traced symbolically: layers are `call_module` nodes."""
    return Region(_Tracer().trace(model), (Instance("", model),))


def exported(
    model: nn.Module, *args: Any, decompose: bool = False, dynamic_shapes: Any = None, **kwargs: Any
) -> Region:
    """A model exported to ATen, over its own parameters: layers are operators on `get_attr` nodes."""
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    if decompose:
        program = program.run_decompositions()
    graph = copy_graph(program.module().graph)
    for node in list(graph.nodes):
        if node.target == "_guards_fn":  # export's check of its inputs is no part of the model
            graph.erase_node(node)
    return Region(graph, (Instance("", model),))


def adapt(
    region: Region,
    *names: str,
    adapter: str = "default",
    r: int = 2,
    scaling: float = 0.5,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    variant: str = "",
) -> tuple[BranchSpec, ...]:
    """Register an adapter with random factors at the named sites (all if none is named) and describe its branches."""
    sites = {site.name: site for site in find_sites(region) if "lora_" not in site.name}
    specs: list[BranchSpec] = []
    for name in names or sites:
        site = sites[name]
        spec = BranchSpec(
            name,
            adapter,
            site.kind,
            site.in_features,
            site.out_features,
            site.transposed,
            r,
            scaling,
            dropout=dropout,
            variant=variant,
            is_parameter=site.weight == site.name,
            options=site.layer.options,
        )
        owner = _owner(region.module, spec.owner)
        for part, shape in part_shapes(spec).items():
            _container(owner, part)[adapter] = Factor(torch.randn(shape).to(dtype))
        _container(owner, SCALING)[adapter] = Scaling(scaling)
        if variant:
            weight = region.module.get_parameter(f"{name}.weight")
            for container, leaf in variant_leaves(spec, weight).items():
                _container(owner, container)[adapter] = leaf
        if dropout:
            _container(owner, DROPOUT)[adapter] = nn.Dropout(dropout)
        specs.append(spec)
    return tuple(specs)


def _owner(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; holders of a bare parameter's factors are made on the way."""
    for part in filter(None, path.split(".")):
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    return model


def _container(owner: nn.Module, name: str) -> nn.ModuleDict:
    if not hasattr(owner, name):
        owner.add_module(name, nn.ModuleDict())
    container = owner.get_submodule(name)
    assert isinstance(container, nn.ModuleDict)
    return container


def insert(region: Region, *specs: BranchSpec, dtype: BranchDtype = "base") -> None:
    """Run `insert-branches` for these branches."""
    InsertBranches(tuple(map(Branch.of, specs)), dtype).run(region)


def run(region: Region, *inputs: Any, **kwargs: Any) -> Any:
    """What the region computes, by the code that torch.fx generates from it."""
    return fx.GraphModule(region.module, copy_graph(region.graph))(*inputs, **kwargs)
