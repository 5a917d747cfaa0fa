"""The forms that hold several adapters: as text, dropped again, and `verify` on what breaks them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from passes.base import Region
from passes.branches import Mode, arrange
from passes.branches.base import Branch, BranchSpec
from passes.drop import DropBranches
from passes.errors import VerifyError
from passes.insert import InsertBranches
from passes.leaves import SLOTS, SWITCH
from passes.nodes import lora_meta
from passes.printer import print_graph
from passes.rows import Switch
from passes.verify import Verify
from tests.passes.helpers import TwoLayers, _container, adapt, exported, region_of, run

assert_expected_inline = pytest.importorskip("expecttest").assert_expected_inline

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(7))


def two_adapters(mode: Mode, region: Region | None = None) -> tuple[Region, tuple[BranchSpec, ...], Switch]:
    region = region_of(TwoLayers()) if region is None else region
    specs = (*adapt(region, "fc1", adapter="a"), *adapt(region, "fc1", adapter="b", r=3, scaling=2.0))
    layer = region.module.get_submodule("fc1")
    switch = Switch(("a", "b"), [("a", "b")])
    _container(layer, SWITCH)["a"] = switch
    if mode == "slots":
        stack = torch.nn.Module()
        factors = [
            {part: layer.get_parameter(f"lora_{part}.{s.adapter}.weight").detach() for part in "AB"} for s in specs
        ]
        stack.A = torch.stack([F.pad(each["A"], (0, 0, 0, 3 - len(each["A"]))) for each in factors])
        stack.B = torch.stack([F.pad(each["B"].t(), (0, 0, 0, 3 - len(each["A"]))) for each in factors])
        stack.scale = torch.tensor([spec.scaling for spec in specs])
        _container(layer, SLOTS)["a"] = stack
    InsertBranches(tuple(map(Branch.of, specs)), mode=mode).run(region)
    return region, specs, switch


def by_hand(region: Region, specs: tuple[BranchSpec, ...], rows: list[str]) -> torch.Tensor:
    layer = region.module.get_submodule("fc1")
    outputs: list[torch.Tensor] = []
    for x, name in zip(X, rows, strict=True):
        y = F.linear(x, layer.get_parameter("weight"), layer.get_parameter("bias"))
        for spec in specs:
            if spec.adapter == name:
                A, B = (layer.get_parameter(f"lora_{part}.{name}.weight") for part in "AB")
                y = y + spec.scaling * B @ A @ x
        outputs.append(y)
    return region.module.get_submodule("fc2")(torch.relu(torch.stack(outputs)))


def test_rows() -> None:
    region, specs, switch = two_adapters("rows")
    region.graph.lint()
    assert_expected_inline(
        print_graph(region.graph),
        """\
  x                  = input
  fc1                = self.fc1(x)
+ fc1_lora_switch    = self.fc1.lora_switch.a(('a', 'b'))
+ fc1_lora_dtype     = x.dtype
+ fc1_lora_A         = self.fc1.lora_A.a.weight
+ fc1_lora_A_1       = self.fc1.lora_A.b.weight
+ fc1_lora_B         = self.fc1.lora_B.a.weight
+ fc1_lora_B_1       = self.fc1.lora_B.b.weight
+ fc1_lora_scaling   = self.fc1.lora_scaling.a.scale
+ fc1_lora_scaling_1 = self.fc1.lora_scaling.b.scale
+ fc1_lora_A_2       = stack_parts(fc1_lora_switch, 'A', None, fc1_lora_dtype, fc1_lora_A, fc1_lora_A_1)
+ fc1_lora_B_2       = stack_parts(fc1_lora_switch, 'B', None, fc1_lora_dtype, fc1_lora_B, fc1_lora_B_1)
+ fc1_lora_scale     = stack_parts(fc1_lora_switch, 'other', None, None, fc1_lora_scaling, fc1_lora_scaling_1)
+ fc1_lora_stacked   = stacked_product(x, fc1_lora_A_2, fc1_lora_B_2, fc1_lora_scale, fc1_lora_switch, ('dim', 0))
+ fc1_lora_y         = add(fc1, fc1_lora_stacked)
+ fc1_lora_dtype_1   = fc1.dtype
+ fc1_lora_y_1       = fc1_lora_y.to(fc1_lora_dtype_1)
  relu               = relu(fc1_lora_y_1)
  fc2                = self.fc2(relu)
  return fc2""",
    )
    rows = ["b", "none", "a", "b"]
    switch.choose(rows, "none")
    assert torch.allclose(run(region, X), by_hand(region, specs, rows), atol=1e-6)


def test_slots() -> None:
    region, specs, switch = two_adapters("slots")
    region.graph.lint()
    assert_expected_inline(
        print_graph(region.graph),
        """\
  x                = input
  fc1              = self.fc1(x)
+ fc1_lora_switch  = self.fc1.lora_switch.a(('a', 'b'))
+ fc1_lora_dtype   = x.dtype
+ fc1_lora_A       = self.fc1.lora_slots.a.A
+ fc1_lora_B       = self.fc1.lora_slots.a.B
+ fc1_lora_scale   = self.fc1.lora_slots.a.scale
+ fc1_lora_A_1     = fc1_lora_A.to(fc1_lora_dtype)
+ fc1_lora_B_1     = fc1_lora_B.to(fc1_lora_dtype)
+ fc1_lora_stacked = stacked_product(x, fc1_lora_A_1, fc1_lora_B_1, fc1_lora_scale, fc1_lora_switch, ('dim', 0))
+ fc1_lora_y       = add(fc1, fc1_lora_stacked)
+ fc1_lora_dtype_1 = fc1.dtype
+ fc1_lora_y_1     = fc1_lora_y.to(fc1_lora_dtype_1)
  relu             = relu(fc1_lora_y_1)
  fc2              = self.fc2(relu)
  return fc2""",
    )
    for name in ("a", "b", "none"):
        switch.open({name: 1.0})
        assert torch.allclose(run(region, X), by_hand(region, specs, [name] * 4), atol=1e-6)


@pytest.mark.parametrize("mode", ["rows", "slots"])
@pytest.mark.parametrize("make", [region_of, lambda model: exported(model, X)], ids=["symbolic", "exported"])
def test_dropping_gives_the_graph_back(mode: Mode, make: Callable[..., Region]) -> None:
    region = make(TwoLayers())
    before = print_graph(region.graph)
    region, specs, _ = two_adapters(mode, region)
    Verify(specs, ("a", "b"), mode=mode).run(region)
    DropBranches().run(region)
    assert print_graph(region.graph) == before


def test_what_cannot_be_stacked_has_a_gate() -> None:
    spec = BranchSpec("w", "a", "parameter", 3, 4, False, 2, 1.0, is_parameter=True, form="weight")
    linear = BranchSpec("w", "b", "linear", 3, 4, False, 2, 1.0)
    branches = [Branch.of(each) for each in (spec, linear, BranchSpec("w", "c", "linear", 3, 4, False, 5, 1.0))]
    assert [(form.label, form.stacked) for form in arrange(branches, "rows")] == [("a", False), ("b/c", True)]
    assert [(form.label, form.stacked) for form in arrange(branches, "plain")] == [
        ("a", False),
        ("b", False),
        ("c", False),
    ]
    dora = Branch.of(BranchSpec("w", "d", "linear", 3, 4, False, 2, 1.0, variant="dora"))
    assert [form.label for form in arrange([*branches, dora], "slots")] == ["a", "b/c", "d"]


def _find(region: Region, role: str) -> fx.Node:
    return next(node for node in region.graph.nodes if (meta := lora_meta(node)) and meta.role == role)


def _wrong_input(region: Region) -> None:
    node = _find(region, "stacked")
    node.args = (
        (next(iter(region.graph.nodes)), *node.args[1:])
        if node.args[0] is not _x(region)
        else (_find(region, "scale"), *node.args[1:])
    )


def _x(region: Region) -> fx.Node:
    return next(iter(region.graph.nodes))


def _no_sum(region: Region) -> None:
    node = _find(region, "y")
    node.target = torch.sub


def _no_switch(region: Region) -> None:
    del region.module.get_submodule("fc1")._modules[SWITCH]


def _no_branch(region: Region) -> None:
    node = _find(region, "y")
    node.replace_all_uses_with(node.args[0])  # pyright: ignore[reportArgumentType]
    region.graph.erase_node(node)


@pytest.mark.parametrize("mode", ["rows", "slots"])
@pytest.mark.parametrize("breaking", [_wrong_input, _no_sum, _no_switch, _no_branch])
def test_verify_notices(mode: Mode, breaking: Callable[[Region], None]) -> None:
    region, specs, _ = two_adapters(mode)
    verify = Verify(specs, ("a", "b"), mode=mode)
    verify.run(region)
    breaking(region)
    with pytest.raises(VerifyError, match="fc1"):
        verify.run(region)


@pytest.mark.parametrize("other", ["plain", "rows"])
def test_verify_knows_the_form(other: Mode) -> None:
    region, specs, _ = two_adapters("slots")
    if other == "plain":
        with pytest.raises(VerifyError, match=r"branches of \['a/b'\], expected \['a', 'b'\]"):
            Verify(specs, ("a", "b"), mode=other).run(region)
    with pytest.raises(VerifyError, match="expected"):
        Verify(specs, ("a",), mode="slots").run(region)
