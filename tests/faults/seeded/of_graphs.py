"""Faults of graphs: what a wrong pass, or an edit by hand, leaves behind. For captures with a graph of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxlora._passes import Branch, InsertBranches, Pipeline, Region, lora_meta
from passes.base import PassResult
from tests.faults.seeded.set_ups import Case
from tests.faults.seeded.tools import fault

WHOLE = ["symbolic", "export"]


@fault("B is transposed and reshaped in the graph", "verify", "", captures=WHOLE)
@fault("B is transposed and reshaped in the graph", "doctor", "broken-graph", captures=WHOLE)
@fault("B is transposed and reshaped in the graph", "compare", "output", captures=WHOLE)
@fault("B is transposed and reshaped in the graph", "diff", "", captures=WHOLE)
def transposed_b(case: Case) -> str:
    product = case.node("b")
    shape = tuple(case.factor("B").shape)
    with case.graph.inserting_before(product):
        turned = case.graph.call_method("t", (product.args[1],))
        product.args = (product.args[0], case.graph.call_method("reshape", (turned, shape)))
    return case.site


@fault("A is negated in the graph", "verify", "", captures=WHOLE)
def negated_a(case: Case) -> str:
    product = case.node("a")
    with case.graph.inserting_before(product):
        product.args = (product.args[0], case.graph.call_method("neg", (product.args[1],)))
    return case.site


@fault("the cast to the base's dtype is gone", "verify", "", captures=WHOLE)
@fault("the cast to the base's dtype is gone", "doctor", "broken-graph", captures=WHOLE)
def dropped_cast(case: Case) -> str:
    final = case.nodes("y")[-1]
    final.replace_all_uses_with(final.args[0])
    case.graph.erase_node(final)
    return case.site


@fault("the branch is computed in bfloat16", "verify", "", captures=WHOLE)
@fault("the branch is computed in bfloat16", "compare", "output", captures=WHOLE)
def branch_in_bfloat16(case: Case) -> str:
    product = case.node("a")
    with case.graph.inserting_after(product):
        down = case.graph.call_method("to", (product, torch.bfloat16))
    with case.graph.inserting_after(down):
        up = case.graph.call_method("to", (down, torch.float32))
    case.node("b").replace_input_with(product, up)
    return case.site


@fault("nothing uses the sum with the branch", "verify", "misses the branch", captures=WHOLE)
@fault("nothing uses the sum with the branch", "doctor", "broken-graph", also=["no-gradient"], captures=WHOLE)
@fault("nothing uses the sum with the branch", "compare", "output", captures=WHOLE)
@fault("nothing uses the sum with the branch", "diff", "", captures=WHOLE)
def orphan_branch(case: Case) -> str:
    final = case.nodes("y")[-1]
    final.replace_all_uses_with(_base(case))
    return case.site


@fault("the branch is added twice", "verify", "", captures=WHOLE)
@fault("the branch is added twice", "doctor", "broken-graph", captures=WHOLE)
@fault("the branch is added twice", "compare", "output", captures=WHOLE)
@fault("the branch is added twice", "diff", "", captures=WHOLE)
def added_twice(case: Case) -> str:
    total = case.nodes("y")[0]
    branch = total.args[1]
    with case.graph.inserting_after(total):
        again = case.graph.call_function(torch.add, (total, branch))
    again.meta["lora"] = total.meta["lora"]
    total.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    return case.site


@fault("a pass ran twice", "verify", "", captures=WHOLE)
@fault("a pass ran twice", "compare", "output", captures=WHOLE)
def inserted_twice(case: Case) -> str:
    inserted = case.nodes()
    for node in inserted:
        node.meta["kept"] = node.meta.pop("lora")
    InsertBranches((Branch(case.site, "default"),)).run(case.model.regions()[0])
    for node in inserted:
        node.meta["lora"] = node.meta.pop("kept")
    return case.site


@fault("the branch is on its sibling's output", "verify", "", captures=WHOLE)
@fault("the branch is on its sibling's output", "compare", "output", captures=WHOLE)
def branch_of_the_sibling(case: Case) -> str:
    total, other = case.nodes("y")[0], case.nodes("y", case.host.sibling)[0]
    mine, theirs = total.args[1], other.args[1]
    assert isinstance(mine, fx.Node) and isinstance(theirs, fx.Node)
    for user, branch in ((total, theirs), (other, mine)):
        _ahead_of(user, branch)
    total.replace_input_with(mine, theirs)
    other.replace_input_with(theirs, mine)
    return case.site


@fault("the branch is on its sibling's output", "diff", "", captures=WHOLE)
def branches_swapped(case: Case) -> list[str]:
    return [branch_of_the_sibling(case), case.host.sibling]


@fault("the branch starts at another input", "verify", "starts at", captures=WHOLE)
@fault("the branch starts at another input", "compare", "output", captures=WHOLE)
def branch_on_another_input(case: Case) -> str:
    first = case.node("a")
    start = first.args[0]
    assert isinstance(start, fx.Node)
    with case.graph.inserting_before(first):
        tanh = case.graph.call_function(torch.tanh, (start,))
    first.replace_input_with(start, tanh)
    return case.site


@fault("the branch is subtracted", "verify", "does not add", captures=WHOLE)
@fault("the branch is subtracted", "compare", "output", captures=WHOLE)
def subtracted(case: Case) -> str:
    case.nodes("y")[0].target = torch.sub
    return case.site


@fault("the branch gets no gradient", "compare", "gradient", captures=WHOLE)
@fault("the branch gets no gradient", "verify", "", captures=WHOLE)
@fault("the branch gets no gradient", "doctor", "no-gradient", also=["broken-graph"], captures=WHOLE)
def detached_branch(case: Case) -> str:
    product = case.node("s")
    with case.graph.inserting_after(product):
        cut = case.graph.call_method("detach", (product,))
    product.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)
    return case.site


@dataclass(frozen=True)
class _Rounded:
    """A pass that is meant to be harmless, and rounds what one branch adds."""

    name: ClassVar[str] = "round-branches"
    site: str

    def run(self, region: Region) -> PassResult:
        for node in list(region.graph.nodes):
            meta = lora_meta(node)
            if meta is not None and (meta.site, meta.role) == (self.site, "a"):
                with region.graph.inserting_after(node):
                    rounded = region.graph.call_method("round", (node,), {"decimals": 1})
                node.replace_all_uses_with(rounded, delete_user_cb=lambda user, new=rounded: user is not new)
        return PassResult(True)


@dataclass(frozen=True)
class _Nothing:
    """A pass that changes nothing."""

    name: ClassVar[str] = "nothing"

    def run(self, region: Region) -> PassResult:
        return PassResult(False)


@fault("a pass changes numbers", "bisect_passes", "round-branches", captures=WHOLE)
def pass_that_rounds(case: Case) -> str:
    pipeline = Pipeline((_Nothing(), _Rounded(case.site), _Nothing()), record=True)
    case.stages = (*(case.model.pass_trace if case.capture == "symbolic" else ()), *pipeline.run(case.model.regions()))
    return case.site


def _base(case: Case) -> fx.Node:
    node = case.nodes("y")[0].args[0]
    assert isinstance(node, fx.Node)
    return node


def _ahead_of(user: fx.Node, needed: fx.Node) -> None:
    """Move a node, with all that it is computed of, before another one."""
    if needed > user:
        for each in needed.all_input_nodes:
            _ahead_of(user, each)
        user.prepend(needed)
