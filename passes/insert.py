"""`insert-branches`: put the low-rank branches and the scaled add at their call sites, in canonical form.

For a call site `y = op(x, W, b)` every user of `y` then uses `y' = (y + s₁ + s₂ + …).to(y.dtype)`, with one branch `s`
for each active adapter, or one for a stack of them: see `passes.branches.forms`. A branch of the form `"weight"` does the same for the node that reads `W`. The base's own nodes
stay untouched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.base import PassResult, Region
from passes.branches import Branch, BranchDtype, Mode, arrange, site_kind
from passes.callsite import CallSite
from passes.errors import PassError, did_you_mean
from passes.nodes import BranchBuilder, lora_meta
from passes.sites import find_sites, weight_sites


@dataclass(frozen=True)
class InsertBranches:
    """Insert branches at call sites.

    Attributes:
        branches: in the order in which a site's branches are added up.
        dtype: which side is cast where dtypes differ.
        mode: the form of the branches.
    """

    name: ClassVar[str] = "insert-branches"
    branches: tuple[Branch, ...]
    dtype: BranchDtype = "base"
    mode: Mode = "plain"

    def run(self, region: Region) -> PassResult:
        """Insert every branch at every call of its site.

        Raises:
            PassError: when a site is not in the graph, or already has a branch.
        """
        wanted: dict[str, list[Branch]] = {}
        for branch in self.branches:
            wanted.setdefault(branch.site, []).append(branch)
        sites = base_sites(region, self.branches)
        known = {(site.name, site.kind): site.call + 1 for site in sites}
        for branch in self.branches:
            _check_calls(branch, known)
        chosen = [(site, [each for each in wanted.get(site.name, ()) if at(each, site)]) for site in sites]
        for site, branches in reversed(chosen):  # from the end, since one site's output may be a later one's input
            if branches:
                _insert(region.graph, site, branches, self.dtype, self.mode)
        count = sum(bool(branches) for _, branches in chosen)
        return PassResult(bool(wanted), f"{len(self.branches)} branches at {count} calls")


def base_sites(region: Region, branches: Iterable[Branch]) -> list[CallSite]:
    """The call sites of the base, not of branches: all calls of layers, and the reads of weights that branches are for."""
    layers = {branch.site: branch.layer for branch in branches if branch.form == "weight"}
    reads = weight_sites(region, layers) if layers else []
    sites = [*(site for site in find_sites(region) if site.name not in layers), *reads]
    order = {node: index for index, node in enumerate(region.graph.nodes)}
    return sorted((site for site in sites if lora_meta(site.node) is None), key=lambda site: order[site.node])


def at(branch: Branch, site: CallSite) -> bool:
    """Whether a branch is for this call of its site; another kind of operation may use the same weight."""
    return _wanted_kind(branch) == site.kind and (not branch.calls or site.call in branch.calls)


def _wanted_kind(branch: Branch) -> str:
    """What the layer of a branch's sites has for its kind; where a weight is read that is the branch's own."""
    return site_kind(branch) if branch.form == "output" else branch.kind


def _check_calls(branch: Branch, known: dict[tuple[str, str], int]) -> None:
    name, count = branch.site, known.get((branch.site, _wanted_kind(branch)), 0)
    if not count:
        raise PassError(f"no call of '{name}' in the graph.{did_you_mean(name, [name for name, _ in known])}")
    beyond = [call for call in branch.calls if call >= count]
    if beyond:
        raise PassError(f"'{name}' is called {count} times in the graph, counted from 0: there is no call {beyond[0]}")


def _insert(graph: fx.Graph, site: CallSite, branches: list[Branch], dtype: BranchDtype, mode: Mode) -> None:
    y = site.node
    if any(meta is not None and meta.role == "y" for meta in map(lora_meta, y.users)):
        raise PassError(f"'{site.name}' already has branches; drop them first")
    users = list(y.users)
    with graph.inserting_after(y):
        anchor = graph.call_function(getattr, (y, "dtype"))  # a fixed place to insert before
    with graph.inserting_before(anchor):
        total, shared = y, BranchBuilder(graph, site, "")
        for form in arrange(branches, mode):
            total = form.join(shared, total, form.build(graph, site, dtype))
        result = shared.cast(total, shared.dtype(y), "y")
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(y, result)
