"""`insert-branches`: put the low-rank branches and the scaled add at their call sites, in canonical form.

For a call site `y = linear(x, W, b)` every user of `y` then uses `y' = (y + s₁ + s₂ + …).to(y.dtype)`, with one branch
`s` for each active adapter. The base's own nodes stay untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import PassResult, Region
from passes.branches import KINDS
from passes.branches.base import BranchDtype
from passes.errors import PassError, did_you_mean
from passes.nodes import BranchBuilder, lora_meta
from passes.sites import CallSite, find_sites


@dataclass(frozen=True, slots=True)
class Branch:
    """What a graph must know of a branch; all that differs between instances stays out of it.

    Attributes:
        site: the call site's name, relative to the region's instance.
        adapter: the adapter's name.
        dropout: whether there is a dropout module.
    """

    site: str
    adapter: str
    dropout: bool = False


@dataclass(frozen=True)
class InsertBranches:
    """Insert branches at call sites.

    Attributes:
        branches: in the order in which a site's branches are added up.
        dtype: which side is cast where dtypes differ.
    """

    name: ClassVar[str] = "insert-branches"
    branches: tuple[Branch, ...]
    dtype: BranchDtype = "base"

    def run(self, region: Region) -> PassResult:
        """Insert every branch at every call of its site.

        Raises:
            PassError: when a site is not in the graph, or already has a branch.
        """
        sites = find_sites(region)
        by_name: dict[str, list[CallSite]] = {}
        for site in sites:
            if lora_meta(site.node) is None:
                by_name.setdefault(site.name, []).append(site)
        wanted: dict[str, list[Branch]] = {}
        for branch in self.branches:
            wanted.setdefault(branch.site, []).append(branch)
        missing = [name for name in wanted if name not in by_name]
        if missing:
            raise PassError(f"no call of '{missing[0]}' in the graph.{did_you_mean(missing[0], by_name)}")
        for site in reversed(sites):  # from the end, since an earlier site's output may be a later one's input
            if site.name in wanted and lora_meta(site.node) is None:
                _insert(region.graph, site, wanted[site.name], self.dtype)
        count = sum(len(by_name[name]) for name in wanted)
        return PassResult(bool(wanted), f"{len(self.branches)} branches at {count} calls")


def _insert(graph: fx.Graph, site: CallSite, branches: list[Branch], dtype: BranchDtype) -> None:
    y = site.node
    if any(meta is not None and meta.role == "y" for meta in map(lora_meta, y.users)):
        raise PassError(f"'{site.name}' already has branches; drop them first")
    users = list(y.users)
    with graph.inserting_after(y):
        anchor = graph.call_function(getattr, (y, "dtype"))  # a fixed place to insert before
    with graph.inserting_before(anchor):
        total, shared = y, BranchBuilder(graph, site, "")
        for branch in branches:
            s = KINDS[site.kind].build(graph, site, branch.adapter, branch.dropout, dtype)
            total = shared.call("y", torch.add, total, s)
        result = shared.cast(total, shared.dtype(y), "y")
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(y, result)
