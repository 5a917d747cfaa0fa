"""`verify` accepts what the passes make, and notices every way of breaking it: one mutation for each test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from passes.base import SELF_CALL, Instance, Pipeline, Region, copy_graph
from passes.branches.base import Branch, BranchSpec
from passes.drop import DropBranches
from passes.errors import VerifyError
from passes.freeze import FreezeBase
from passes.insert import InsertBranches
from passes.leaves import Factor, Scaling
from passes.nodes import LoraMeta, lora_meta
from passes.printer import print_graph
from passes.sites import find_sites
from passes.verify import Verify
from tests.passes.helpers import TwoLayers, adapt, exported, insert, region_of

X = torch.randn(5, 3)


class Net(nn.Module):
    """Two layers of equal shape, a bare weight, and an output with two users."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 3)
        self.fc2 = nn.Linear(3, 3)
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc1(x))
        y = self.fc2(y) + y
        return torch.tanh(F.linear(y, self.w))


@dataclass
class Case:
    """A region with branches, and what verifies it."""

    region: Region
    verify: Verify

    @property
    def model(self) -> Any:
        return self.region.module

    def node(self, name: str) -> fx.Node:
        (node,) = [node for node in self.region.graph.nodes if node.name == name]
        return node

    def role(self, site: str, role: str, adapter: str = "one") -> fx.Node:
        """The last node of a role."""
        meta = LoraMeta(site, 0, adapter, cast(Any, role), kind="linear")
        found = [(node, lora_meta(node)) for node in self.region.graph.nodes]
        return [node for node, each in found if each is not None and replace(each, last=False) == meta][-1]

    def base(self, site: str) -> fx.Node:
        """The base operation of a site."""
        (found,) = [s for s in find_sites(self.region) if s.name == site and lora_meta(s.node) is None]
        return found.node

    def respecify(self, site: str, **changes: Any) -> None:
        specs = tuple(replace(spec, **changes) if spec.site == site else spec for spec in self.verify.specs)
        self.verify = replace(self.verify, specs=specs)

    def check(self) -> None:
        self.verify.run(self.region)


@cache
def prototype(capture: str) -> Case:
    """Adapter `one` at all three sites, with dropout at the layers; `two` at `fc1`; `off` registered, not active."""
    region = CAPTURES[capture](Net())
    one = (*adapt(region, "fc1", "fc2", adapter="one", dropout=0.1), *adapt(region, "w", adapter="one"))
    two = adapt(region, "fc1", adapter="two", r=3, scaling=2.0)
    off = adapt(region, "fc2", adapter="off", r=1)
    insert(region, *one, *two)
    trained = {f"{spec.owner}.lora_{name}.{spec.adapter}.weight" for spec in (*one, *two) for name in "AB"}
    FreezeBase(trained).run(region)
    return Case(region, Verify((*one, *two, *off), ("one", "two"), frozenset(trained)))


def make(capture: str = "symbolic") -> Case:
    """A copy of the prototype, to be broken."""
    case = prototype(capture)
    instance = Instance("", copy.deepcopy(case.region.module))
    return Case(Region(copy_graph(case.region.graph), (instance,)), case.verify)


CAPTURES: dict[str, Callable[[nn.Module], Region]] = {
    "symbolic": region_of,
    "export": lambda model: exported(model, X),
}


@pytest.mark.parametrize("capture", CAPTURES)
def test_good_graph(capture: str) -> None:
    case = make(capture)
    text = print_graph(case.region.graph) if capture == "symbolic" else None
    assert not case.verify.run(case.region).modified
    if text is not None:
        assert print_graph(case.region.graph) == text


def test_plain_graph_without_adapters() -> None:
    for capture in CAPTURES.values():
        Verify(()).run(capture(Net()))


def test_registered_adapters_without_branches() -> None:
    case = make()
    DropBranches().run(case.region)
    replace(case.verify, active=()).run(case.region)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_factors_of_any_floating_dtype(dtype: torch.dtype) -> None:
    region = region_of(TwoLayers())
    specs = adapt(region, dtype=dtype)
    insert(region, *specs)
    Verify(specs, ("default",)).run(region)


def test_meta_device() -> None:
    region = region_of(TwoLayers())
    specs = adapt(region)
    region.module.to("meta")
    insert(region, *specs)
    Verify(specs, ("default",)).run(region)


# ---- mutations ----

MUTATIONS: dict[str, tuple[Callable[[Case], object], str]] = {}
"""By description: how to break a good case, and what the error must say."""


def breaks(message: str) -> Callable[[Callable[[Case], object]], Callable[[Case], object]]:
    def register(mutation: Callable[[Case], object]) -> Callable[[Case], object]:
        MUTATIONS[mutation.__name__] = (mutation, message)
        return mutation

    return register


# of parameters


@breaks("'fc1': 'lora_A.one.weight' has shape (5, 3), not (2, 3)")
def wrong_rank_of_a(case: Case) -> None:
    case.model.fc1.lora_A["one"] = Factor(torch.zeros(5, 3))


@breaks("'fc1': 'lora_B.two.weight' has shape (3,), not (3, 3)")
def wrong_dimensions_of_b(case: Case) -> None:
    case.model.fc1.lora_B["two"] = Factor(torch.zeros(3))


@breaks("'w': 'lora_A.one.weight' has shape (4, 2), not (2, 3)")
def factors_of_a_bare_weight_swapped(case: Case) -> None:
    holder = case.model.lora_parameters.w
    holder.lora_A["one"], holder.lora_B["one"] = holder.lora_B["one"], holder.lora_A["one"]


@breaks("'fc2': 'lora_A.off.weight' has shape (4, 3), not (1, 3)")
def wrong_rank_of_an_inactive_adapter(case: Case) -> None:
    case.model.fc2.lora_A["off"] = Factor(torch.zeros(4, 3))


@breaks("'fc2': there is no parameter 'lora_A.off.weight'")
def missing_factor_of_an_inactive_adapter(case: Case) -> None:
    del case.model.fc2.lora_A["off"]


@breaks("'fc1': 'fc1_lora_A' needs 'fc1.lora_A.one.weight', which is gone")
def missing_factor(case: Case) -> None:
    del case.model.fc1.lora_A["one"]


@breaks("'fc1': 'lora_A.one.weight' has dtype torch.int64, which cannot be trained")
def integer_factor(case: Case) -> None:
    factor = Factor(torch.zeros(2, 3))
    factor.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int64), requires_grad=False)
    case.model.fc1.lora_A["one"] = factor


@breaks("'fc1': 'lora_B.one.weight' is on meta, the base weight on cpu")
def factor_on_another_device(case: Case) -> None:
    case.model.fc1.lora_B["one"].to("meta")


@breaks("'fc2': the base weight is (3, 5), not (3, 3)")
def replaced_base_weight(case: Case) -> None:
    case.model.fc2.weight = nn.Parameter(torch.zeros(3, 5), requires_grad=False)


@breaks("'w': the base weight is (4, 3), not (3, 4)")
def wrong_orientation(case: Case) -> None:
    case.respecify("w", transposed=True)


@breaks("'fc1': the scaling is 0.25, the configuration's 0.5")
def wrong_scale(case: Case) -> None:
    case.model.fc1.lora_scaling["one"].value = 0.25


@breaks("'fc1': the scaling's buffer holds 3, not 0.5")
def wrong_buffer_of_the_scale(case: Case) -> None:
    case.model.fc1.lora_scaling["one"].scale.fill_(3)


@breaks("'fc2': there is no scaling for adapter 'off'")
def missing_scale(case: Case) -> None:
    del case.model.fc2.lora_scaling["off"]


@breaks("'fc2': there is no scaling for adapter 'one'")
def another_module_for_the_scale(case: Case) -> None:
    case.model.fc2.lora_scaling["one"] = nn.Identity()


@breaks("'fc1': 'lora_A.stray' belongs to no adapter of the plan")
def orphaned_factor(case: Case) -> None:
    case.model.fc1.lora_A["stray"] = Factor(torch.zeros(2, 3))


@breaks("'fc1': 'lora_scaling.stray' belongs to no adapter of the plan")
def orphaned_scale(case: Case) -> None:
    case.model.fc1.lora_scaling["stray"] = Scaling(1.0)


@breaks("'lora_parameters.w': 'lora_B.stray' belongs to no adapter of the plan")
def orphaned_factor_of_a_bare_weight(case: Case) -> None:
    case.model.lora_parameters.w.lora_B["stray"] = Factor(torch.zeros(4, 2))


@breaks("'fc2': 'lora_A.off' belongs to no adapter of the plan")
def adapter_that_was_deleted_from_the_plan_only(case: Case) -> None:
    specs = tuple(spec for spec in case.verify.specs if spec.adapter != "off")
    case.verify = replace(case.verify, specs=specs)


@breaks("'fc1': adapter 'two' should have no dropout")
def dropout_that_was_not_asked_for(case: Case) -> None:
    case.model.fc1.lora_dropout["two"] = nn.Dropout(0.5)


@breaks("'fc2.weight' requires gradients, but is not among what should be trained")
def trained_base_weight(case: Case) -> None:
    case.model.fc2.weight.requires_grad_()


@breaks("'fc2.lora_A.off.weight' requires gradients, but is not among what should be trained")
def trained_inactive_adapter(case: Case) -> None:
    case.model.fc2.lora_A["off"].weight.requires_grad_()


@breaks("'lora_parameters.w.lora_A.one.weight' requires gradients")
def trained_factor_that_should_be_frozen(case: Case) -> None:
    assert case.verify.trainable is not None
    case.verify = replace(case.verify, trainable=case.verify.trainable - {"lora_parameters.w.lora_A.one.weight"})


# of the graph: one branch


@breaks("'fc2': the branch of 'one' starts at '")
def branch_that_skips_what_lies_between(case: Case) -> None:
    case.role("fc2", "lora_dropout").args = (case.base("fc1"),)


@breaks("'fc2': the branch of 'one' starts at 'x', not at the site's input 'relu'")
def branch_on_the_models_input(case: Case) -> None:
    case.role("fc2", "lora_dropout").args = (case.node("x"),)


@breaks("'fc1': 'fc1_lora_b' uses 'fc1.lora_A.one.weight', not 'fc1.lora_B.one.weight'")
def factors_swapped(case: Case) -> None:
    a, b = case.role("fc1", "a"), case.role("fc1", "b")
    a.args, b.args = (a.args[0], b.args[1]), (b.args[0], a.args[1])


@breaks("'fc1': 'fc1_lora_a' uses 'fc1.lora_A.two.weight', not 'fc1.lora_A.one.weight'")
def factor_of_another_adapter(case: Case) -> None:
    case.node("fc1_lora_A").target = "fc1.lora_A.two.weight"


@breaks("'fc2': 'fc2_lora_b' uses 'fc1.lora_B.one.weight', not 'fc2.lora_B.one.weight'")
def factor_of_another_site(case: Case) -> None:
    case.node("fc2_lora_B").target = "fc1.lora_B.one.weight"


@breaks("'fc2': 'fc2_lora_a' uses 'fc2.weight', not 'fc2.lora_A.one.weight'")
def base_weight_for_a_factor(case: Case) -> None:
    case.node("fc2_lora_A").target = "fc2.weight"


@breaks("'fc2': 'fc2_lora_a' uses 'None', not 'fc2.lora_A.one.weight'")
def computed_factor(case: Case) -> None:
    case.role("fc2", "a").args = (case.role("fc2", "lora_dropout"), case.node("relu"))


@breaks("'fc1': 'fc1_lora_s' uses 'fc1.lora_scaling.two', not 'fc1.lora_scaling.one'")
def scale_of_another_adapter(case: Case) -> None:
    case.role("fc1", "lora_scaling").target = "fc1.lora_scaling.two"


@breaks("'fc2': 'fc2_lora_s' uses 'fc1.lora_scaling.one', not 'fc2.lora_scaling.one'")
def scale_of_another_site(case: Case) -> None:
    case.role("fc2", "lora_scaling").target = "fc1.lora_scaling.one"


@breaks("'fc1': 'fc1_lora_s' uses 'None', not 'fc1.lora_scaling.one'")
def scale_as_a_constant(case: Case) -> None:
    s = case.role("fc1", "s")
    s.args = (s.args[0], 0.5)


@breaks("'fc1': 'fc1_lora_s' does not multiply by the scaling")
def division_by_the_scale(case: Case) -> None:
    case.role("fc1", "s").target = torch.div


@breaks("'fc2': 'fc2_lora_dropout' uses 'fc1.lora_dropout.one', not 'fc2.lora_dropout.one'")
def dropout_of_another_site(case: Case) -> None:
    case.role("fc2", "lora_dropout").target = "fc1.lora_dropout.one"


@breaks("'fc1': the branch of 'one' is s <- b <- a, not s <- b <- a <- lora_dropout")
def missing_dropout(case: Case) -> None:
    case.role("fc1", "a").replace_input_with(case.role("fc1", "lora_dropout"), case.node("x"))


@breaks("'fc1': the branch of 'one' is s <- a <- lora_dropout, not s <- b <- a <- lora_dropout")
def missing_product_with_b(case: Case) -> None:
    case.role("fc1", "s").replace_input_with(case.role("fc1", "b"), case.role("fc1", "a"))


@breaks("'fc1': the branch of 'one' is s <- b <- b <- a <- lora_dropout")
def product_with_b_twice(case: Case) -> None:
    b, s = case.role("fc1", "b"), case.role("fc1", "s")
    with case.region.graph.inserting_before(s):
        again = case.region.graph.call_function(F.linear, (b, b.args[1]))
    again.meta["lora"] = b.meta["lora"]
    s.replace_input_with(b, again)


@breaks("'fc1': the branch of 'two' uses 'fc1_lora_b' of 'one'")
def branch_that_goes_on_in_another(case: Case) -> None:
    case.role("fc1", "s", "two").replace_input_with(case.role("fc1", "b", "two"), case.role("fc1", "b", "one"))


@breaks("'fc1': the branch of 'one' starts at 'None', not at the site's input 'x'")
def operands_of_a_product_swapped(case: Case) -> None:
    a = case.role("fc1", "a")
    a.args = (case.node("fc1_lora_A"), a.args[1])


# of the graph: the sum


@breaks("'fc2': the sum does not add each branch once")
def missing_add(case: Case) -> None:
    final = case.role("fc2", "y", "")
    final.args = (case.base("fc2"), final.args[1])


@breaks("'fc1': the sum does not add each branch once")
def missing_add_of_one_of_two(case: Case) -> None:
    final = case.role("fc1", "y", "")
    final.args = (final.args[0].args[0], final.args[1])


@breaks("'fc1': the sum does not add each branch once")
def one_branch_added_twice(case: Case) -> None:
    case.role("fc1", "y", "").args[0].replace_input_with(case.role("fc1", "s", "two"), case.role("fc1", "s", "one"))


@breaks("'fc2': 'fc2_lora_y' does not add the branch")
def subtraction(case: Case) -> None:
    case.node("fc2_lora_y").target = torch.sub


@breaks("'fc2': 'fc2_lora_y' does not add the branch")
def sum_with_a_factor(case: Case) -> None:
    case.node("fc2_lora_y").kwargs = {"alpha": 2}


@breaks("'fc2': the sum does not start at the base's output")
def sum_with_the_input(case: Case) -> None:
    case.node("fc2_lora_y").args = (case.node("relu"), case.role("fc2", "s"))


@breaks("'fc2': expected one sum with the base's output, found 0")
def no_final_cast(case: Case) -> None:
    final = case.role("fc2", "y", "")
    final.replace_all_uses_with(final.args[0])
    case.region.graph.erase_node(final)


@breaks("'fc2': the sum is not cast to the dtype of the base's output")
def cast_to_a_constant(case: Case) -> None:
    final = case.role("fc2", "y", "")
    final.args = (final.args[0], torch.float16)


@breaks("'fc2': the sum is not cast to the dtype of the base's output")
def cast_to_another_dtype(case: Case) -> None:
    final = case.role("fc2", "y", "")
    final.args[1].args = (case.node("x"), "dtype")


@breaks("'fc2': 'add' uses the base's output and so misses the branch")
def user_that_bypasses_the_sum(case: Case) -> None:
    add = case.node("add")
    add.replace_input_with(case.role("fc2", "y", ""), case.base("fc2"))


@breaks("'fc2': the graph has branches of no adapter, expected ['one']")
def sum_and_branch_that_look_like_the_models_own(case: Case) -> None:
    for node in case.region.graph.nodes:
        if node.op == "call_function" and lora_meta(node) is not None and lora_meta(node).site == "fc2":
            del node.meta["lora"]


# of the graph: sites and adapters


@breaks("'fc1': the graph has branches of ['one', 'two'], expected ['two', 'one']")
def order_of_adapters_swapped(case: Case) -> None:
    case.verify = replace(case.verify, active=("two", "one"))


@breaks("'fc1': the graph has branches of ['one', 'two'], expected ['one']")
def branch_of_an_adapter_that_is_not_active(case: Case) -> None:
    case.verify = replace(case.verify, active=("one",))


@breaks("'fc2': the graph has branches of ['one'], expected ['one', 'off']")
def missing_branch_of_an_active_adapter(case: Case) -> None:
    case.verify = replace(case.verify, active=("one", "two", "off"))


@breaks("'fc1': the graph has branches of ['one', 'two'], expected none")
def branches_that_should_be_gone(case: Case) -> None:
    case.verify = replace(case.verify, active=())


@breaks("'fc2': the graph has branches of ['other'], expected ['one']")
def branch_marked_as_anothers(case: Case) -> None:
    for node in case.region.graph.nodes:
        meta = lora_meta(node)
        if meta is not None and meta.site == "fc2" and meta.adapter:
            node.meta["lora"] = replace(meta, adapter="other")


@breaks("'w': nodes of a removed branch are left over")
def leftovers(case: Case) -> None:
    specs = tuple(spec for spec in case.verify.specs if spec.site != "w")
    case.verify = replace(case.verify, specs=specs)
    graph = case.region.graph
    case.role("w", "y", "").replace_all_uses_with(case.base("w"))
    del case.model.lora_parameters
    for node in reversed(graph.nodes):
        meta = lora_meta(node)
        if meta is not None and meta.site == "w" and node.target is not getattr and not node.users:
            graph.erase_node(node)


@breaks("'fc2': a branch without a call site: its site has vanished")
def base_operation_that_is_gone(case: Case) -> None:
    y = case.base("fc2")
    with case.region.graph.inserting_before(y):
        relu = case.region.graph.call_function(torch.relu, (case.node("relu"),))
    y.replace_all_uses_with(relu)
    case.region.graph.erase_node(y)


@breaks("'fc2': the call site has vanished from the graph")
def site_that_is_gone_with_its_branch(case: Case) -> None:
    y = case.base("fc2")
    case.role("fc2", "y", "").replace_all_uses_with(case.node("relu"))
    for node in reversed(case.region.graph.nodes):
        meta = lora_meta(node)
        if not node.users and (node is y or (meta is not None and meta.site == "fc2")):
            case.region.graph.erase_node(node)


@breaks("'fc2': the graph has branches of ['one', 'one'], expected ['one']")
def branch_inserted_twice(case: Case) -> None:
    inserted = [
        node for node in case.region.graph.nodes if lora_meta(node) is not None and lora_meta(node).site == "fc2"
    ]
    for node in inserted:
        node.meta["kept"] = node.meta.pop("lora")
    InsertBranches((Branch("fc2", "one", dropout=True),)).run(case.region)
    for node in inserted:
        node.meta["lora"] = node.meta.pop("kept")


# of the graph: order and paths


@breaks("'fc1': 'fc1_lora_dtype' uses 'fc1_lora_dropout' before it is defined")
def undefined_use(case: Case) -> None:
    case.node("fc1_lora_a").append(case.role("fc1", "lora_dropout"))


@breaks("'fc1': 'relu' uses 'fc1_lora_y_2' before it is defined")
def order_swapped(case: Case) -> None:
    case.role("fc1", "y", "").prepend(case.node("relu"))


@breaks("'tanh': 'tanh' uses 'nowhere' before it is defined")
def use_of_another_graphs_node(case: Case) -> None:
    case.node("tanh").args = (fx.Graph().placeholder("nowhere"),)


@breaks("'fc1': 'fc1_lora_dropout' needs 'fc1.lora_dropout.one', which is gone")
def missing_dropout_module(case: Case) -> None:
    del case.model.fc1.lora_dropout["one"]


@breaks("'w': 'w_lora_A' needs 'lora_parameters.w.lora_A.one.weight', which is gone")
def missing_holder(case: Case) -> None:
    del case.model.lora_parameters


@breaks("needs 'fc2")
def missing_layer(case: Case) -> None:
    del case.model.fc2


@breaks("'nowhere': the layer, or the holder of its factors, is gone")
def planned_layer_that_never_was(case: Case) -> None:
    case.verify = replace(case.verify, specs=(*case.verify.specs, replace(case.verify.specs[0], site="nowhere")))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name: str, capture: str) -> None:
    mutation, message = MUTATIONS[name]
    case = make(capture)
    case.check()
    mutation(case)
    with pytest.raises(VerifyError) as caught:
        case.check()
    assert message in str(caught.value)


# ---- templates ----


def template(*layers: nn.Module) -> Case:
    """One graph for several layers, with two adapters."""
    graph = fx.Graph()
    graph.output(graph.call_module(SELF_CALL, (graph.placeholder("input"),)))
    region = Region(graph, tuple(Instance(f"h.{i}.fc", layer) for i, layer in enumerate(layers)))
    specs: list[BranchSpec] = []
    for instance in region.instances:
        host = nn.Sequential(instance.module)
        for spec in (*adapt(region_of(host), adapter="one", dropout=0.1), *adapt(region_of(host), adapter="two")):
            specs.append(replace(spec, site=instance.name))
    InsertBranches((Branch("", "one", dropout=True), Branch("", "two"))).run(region)
    return Case(region, Verify(tuple(specs), ("one", "two")))


def test_template() -> None:
    template(nn.Linear(3, 4), nn.Linear(5, 6)).check()


def test_every_instance_of_a_template_is_checked() -> None:
    case = template(nn.Linear(3, 4), nn.Linear(5, 6), nn.Linear(5, 6))
    case.region.instances[1].module.lora_A["two"] = Factor(torch.zeros(2, 3))
    with pytest.raises(VerifyError, match=r"^'h.1.fc': 'lora_A.two.weight' has shape \(2, 3\), not \(2, 5\)$"):
        case.check()
    del case.region.instances[1].module.lora_A["two"]
    with pytest.raises(VerifyError, match="needs 'h.1.fc.lora_A.two.weight', which is gone$"):
        case.check()


def test_graph_of_a_template_is_checked() -> None:
    case = template(nn.Linear(3, 4), nn.Linear(3, 4))
    case.node("lora_A").target = "lora_A.two.weight"
    with pytest.raises(VerifyError, match="^'h.0.fc': 'lora_a' uses 'lora_A.two.weight', not 'lora_A.one.weight'$"):
        case.check()


def test_other_regions_branches_are_not_missed_in_a_template() -> None:
    """A model has several templates; each is checked against its own layers only."""
    case = template(nn.Linear(3, 4))
    elsewhere = tuple(replace(spec, site=f"other.{spec.site}", r=9) for spec in case.verify.specs)
    replace(case.verify, specs=(*case.verify.specs, *elsewhere)).run(case.region)


# ---- gradients of tied parameters ----


def test_tied_parameter_is_known_by_all_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    region = region_of(model)
    Verify((), trainable={"1.weight"}).run(region)
    with pytest.raises(VerifyError, match="^'0.weight' requires gradients"):
        Verify((), trainable={"weight"}).run(region)


# ---- shapes ----


def test_shapes_of_inserted_nodes_are_noted() -> None:
    region = exported(TwoLayers(), X)
    (spec,) = adapt(region, "fc2")
    insert(region, spec)
    Verify((spec,), ("default",)).run(region)
    shapes = {
        lora_meta(node).role: tuple(node.meta["val"].shape)
        for node in region.graph.nodes
        if lora_meta(node) is not None and isinstance(node.meta["val"], FakeTensor)
    }
    assert shapes == {"A": (2, 4), "B": (2, 2), "a": (5, 2), "b": (5, 2), "lora_scaling": (), "s": (5, 2), "y": (5, 2)}


def test_shapes_with_a_free_dimension() -> None:
    region = exported(TwoLayers(), X, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    specs = adapt(region, dropout=0.5)
    insert(region, *specs)
    Verify(specs, ("default",)).run(region)
    (y,) = [n for n in region.graph.nodes if n.name == "fc2_lora_y_1"]
    assert y.meta["val"].shape[1] == 2 and not isinstance(y.meta["val"].shape[0], int)


def fake(region: Region, node: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Let the capture have seen another shape at a node."""
    (found,) = [n for n in region.graph.nodes if n.name == node]
    with found.meta["val"].fake_mode:
        found.meta["val"] = torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("node", "shape", "dtype", "message"),
    [
        ("relu", (5, 7), torch.float32, "'fc2': 'fc2_lora_a' cannot be computed"),
        ("relu", (6, 4), torch.float32, "'fc2': .*"),
        ("linear_1", (5, 9), torch.float32, "'fc2': 'fc2_lora_y' cannot be computed"),
        (
            "linear_1",
            (1, 2),
            torch.float32,
            r"'fc2': the branch turns \(1, 2\) torch.float32 into \(5, 2\) torch.float32",
        ),
        ("linear_1", (2,), torch.float32, r"'fc2': the branch turns \(2,\) torch.float32 into \(5, 2\) torch.float32"),
    ],
)
def test_shape_that_does_not_fit(node: str, shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    region = exported(TwoLayers(), X)
    specs = adapt(region, "fc2")
    insert(region, *specs)
    fake(region, node, shape, dtype)
    with pytest.raises(VerifyError, match=f"^{message}"):
        Verify(specs, ("default",)).run(region)


def test_partly_known_shapes() -> None:
    """A graph that was loaded has no shapes; one that was edited has some. Neither is an error."""
    for forgotten in (None, "x", "relu", "linear_1", "fc2_weight"):
        region = exported(TwoLayers(), X)
        specs = adapt(region)
        insert(region, *specs)
        for node in region.graph.nodes:
            if forgotten in (None, node.name):
                node.meta.pop("val", None)
        Verify(specs, ("default",)).run(region)


def test_input_that_is_a_parameter_of_unknown_shape() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(5, 3))
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.queries) + x

    region = exported(Queries(), torch.randn(5, 4))
    specs = adapt(region, "fc")
    insert(region, *specs)
    for node in region.graph.nodes:
        if node.op == "get_attr":
            node.meta.pop("val", None)
    Verify(specs, ("default",)).run(region)


# ---- in a pipeline ----


def test_in_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXLORA_VERIFY", "1")
    region = region_of(TwoLayers())
    specs = adapt(region)
    before = region.graph
    wrong = (*specs[:1], replace(specs[1], scaling=3.0))
    branches = tuple(Branch(spec.site, spec.adapter) for spec in specs)
    with pytest.raises(VerifyError, match="^after pass 'insert-branches' at the model: 'fc2': the scaling is 0.5, the"):
        Pipeline((InsertBranches(branches),), Verify(wrong, ("default",))).run([region])
    assert region.graph is before
    Pipeline((InsertBranches(branches),), Verify(specs, ("default",))).run([region])
    Pipeline((DropBranches(),), Verify(specs)).run([region])
    assert print_graph(region.graph) == print_graph(before)
