"""`compare` finds seeded faults at the right node and site, and none in healthy models; `bisect_passes` finds the pass."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import fx, nn

from fxlora import Comparison, ConfigError, LoraConfig, LoraModel, PassTrace, bisect_passes, compare, lora_transform
from fxlora._passes import Pipeline, Region, lora_meta
from passes.base import PassResult
from tests.zoo import ARCHITECTURES, Attention, FunctionalWeight, Residual

ZOO = {entry.name: entry for entry in ARCHITECTURES}
SITES = ["q_proj", "k_proj", "v_proj", "o_proj"]
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def randomised(model: LoraModel) -> LoraModel:
    """With a B that is not zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def attention(capture: Any = "symbolic", dtype: torch.dtype = torch.float32) -> LoraModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=SITES, lora_dropout=0.1)
    return randomised(lora_transform(Attention().to(dtype), config, capture=capture, trace_passes=True))


def node(model: Any, site: str, role: str) -> fx.Node:
    """The first node of a role at a site."""
    found = [each for each in model.graph.nodes if (meta := lora_meta(each)) and (meta.site, meta.role) == (site, role)]
    return cast(fx.Node, found[0])


def first(a: object, b: object, **options: Any) -> Any:
    found = compare(a, b, X, **options)
    assert not found.agrees
    return found.first


# ---- seeded faults ----


def test_a_wrong_scale() -> None:
    right, wrong = attention(), attention()
    scaling = cast(Any, wrong.get_submodule("k_proj.lora_scaling.default"))
    scaling.value = 2 * scaling.value
    found = first(right, wrong)
    assert found.site.startswith("k_proj") and "scaling" in found.b
    assert found.values[1] == 2 * found.values[0]


def test_a_wrong_scale_in_the_merged_model() -> None:
    right, wrong = attention(), attention()
    wrong.scale_adapter(1.01)
    assert compare(right, copy.deepcopy(right).merge_and_unload(), X).agrees
    found = first(right, wrong.merge_and_unload())
    assert found.site == "q_proj" and found.equal_inputs == ("x",)


def test_a_transposed_factor() -> None:
    right, wrong = attention(), attention()
    factor = wrong.get_parameter("v_proj.lora_A.default.weight")
    factor.data = wrong.get_parameter("v_proj.lora_B.default.weight").data.t().clone()
    assert first(right, wrong).b == node(wrong, "v_proj", "A").name
    turned = attention()
    product = node(turned, "v_proj", "b")
    with cast(Any, turned).graph.inserting_before(product):
        other = cast(Any, turned).graph.call_method("reshape", (product.args[1], (2, 8)))
        product.args = (product.args[0], cast(Any, turned).graph.call_method("t", (other,)))
    found = first(right, turned)
    assert (found.b, found.site) == (product.name, "v_proj")
    assert found.equal_inputs == (cast(fx.Node, product.args[0]).name,) and "→ t" in found.other_inputs[0]


def test_a_cast_to_fewer_digits() -> None:
    right, wrong = attention(), attention()
    product, graph = node(wrong, "o_proj", "a"), cast(Any, wrong).graph
    with graph.inserting_after(product):
        cast_down = graph.call_method("to", (product, torch.bfloat16))
    with graph.inserting_after(cast_down):
        cast_up = graph.call_method("to", (cast_down, torch.float32))
    node(wrong, "o_proj", "b").replace_input_with(product, cast_up)
    found = first(right, wrong)
    assert found.site == "o_proj" and found.b == node(wrong, "o_proj", "b").name
    assert any(f"{product.name} → " in name for name in found.other_inputs)


def test_a_branch_on_the_wrong_input() -> None:
    right, wrong = attention(), attention()
    dropout = node(wrong, "o_proj", "lora_dropout")
    x = next(each for each in cast(Any, wrong).graph.nodes if each.op == "placeholder")
    dropout.args = (x,)
    found = first(right, wrong)
    assert found.site.startswith("o_proj") and found.b == dropout.name
    assert found.other_inputs and found.other_inputs[0].endswith("→ x")


def test_a_missing_sum() -> None:
    right, wrong = attention(), attention()
    total = [each for each in cast(Any, wrong).graph.nodes if (meta := lora_meta(each)) and meta.role == "y"
             and meta.site == "v_proj"]  # fmt: skip
    base = cast(fx.Node, total[0].args[0])
    total[-1].replace_all_uses_with(base)
    found = first(right, wrong)
    assert found.other_inputs == (f"{total[-1].name} → {base.name}",)


def test_a_stale_merge() -> None:
    """The weights of one site changed after the merge."""
    model = attention()
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        model.get_parameter("v_proj.lora_B.default.weight").mul_(1.5)
    found = first(model, merged)
    assert found.site == "v_proj" and found.equal_inputs == ("x",)


def test_swapped_sites() -> None:
    right, wrong = attention(), attention()
    for part in ("lora_A", "lora_B"):
        one, other = (wrong.get_parameter(f"{site}.{part}.default.weight") for site in ("k_proj", "v_proj"))
        one.data, other.data = other.data, one.data
    merged = wrong.merge_and_unload()
    found = first(right, merged)
    assert found.site == "k_proj"
    assert compare(right, copy.deepcopy(right).merge_and_unload(), X).agrees


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_one_wrong_entry_of_a_weight(capture: str) -> None:
    model = attention(capture)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        merged.get_parameter("o_proj.weight")[3, 5] += 0.01
    found = first(model, merged)
    assert found.site == "o_proj" and found.position[-1] == 3
    assert found.equal_inputs and not found.other_inputs


def test_one_wrong_entry_of_a_frozen_weight_and_of_a_factor() -> None:
    for path, position in (("q_proj.lora_A.default.weight", (1, 4)), ("k_proj.lora_B.default.weight", (7, 0))):
        right, wrong = attention(), attention()
        with torch.no_grad():
            wrong.get_parameter(path)[position] += 1e-6
        found = first(right, wrong)
        assert found.position == position and path.startswith(f"{found.site}.")


def test_a_wrong_gradient() -> None:
    """The same values, but the gradient is cut at one site."""
    right, wrong = attention(), attention()
    product, graph = node(wrong, "v_proj", "a"), cast(Any, wrong).graph
    with graph.inserting_after(product):
        cut = graph.call_method("detach", (product,))
    node(wrong, "v_proj", "b").replace_input_with(product, cut)
    found = compare(right, wrong, X, backward=True)
    assert found.first is None and found.gradient is not None and found.gradients > 0
    assert "v_proj" in (found.gradient.site or found.gradient.b)
    assert compare(right, attention(), X, backward=True).agrees


def test_a_module_that_computes_something_else() -> None:
    model = attention("modules")
    merged = copy.deepcopy(model).merge_and_unload()
    merged.get_submodule("k_proj").register_forward_hook(lambda module, args, output: output * 1.001)
    found = first(model, merged)
    assert (found.a, found.site, found.where) == ("k_proj", "k_proj", "torch.nn.modules.linear.Linear")
    assert found.equal_inputs == ("input 0",)


def test_a_value_that_is_nan() -> None:
    right, wrong = attention(), attention()
    with torch.no_grad():
        wrong.get_parameter("k_proj.bias")[2] = float("nan")
    found = first(right, wrong)
    assert found.error == float("inf") and found.site == "k_proj" and found.position[-1] == 2


# ---- passes ----


@dataclass(frozen=True)
class Break:
    """A pass that gives one node another input."""

    name: ClassVar[str] = "break"
    site: str = "v_proj"

    def run(self, region: Region) -> PassResult:
        for each in region.graph.nodes:
            meta = lora_meta(each)
            if meta is not None and meta.site == self.site and meta.role == "s":
                each.args = (each.args[0], 3.0)
        return PassResult(True)


@dataclass(frozen=True)
class Harmless:
    name: ClassVar[str] = "harmless"

    def run(self, region: Region) -> PassResult:
        for each in list(region.graph.nodes):
            if each.op == "call_method" and each.target == "softmax":
                with region.graph.inserting_before(each):
                    new = region.graph.call_function(torch.softmax, each.args)
                each.replace_all_uses_with(new)
                region.graph.erase_node(each)
        return PassResult(True)


def test_the_pass_that_broke_a_node() -> None:
    model = attention()
    assert bisect_passes(model, X) is None
    passes = (Harmless(), Break(), Harmless())
    stages = Pipeline(passes, record=True).run(model.regions())
    found = bisect_passes(PassTrace((*model.pass_trace, *stages), model), X)
    assert found is not None and found.stage.pass_name == "break" and found.index == len(model.pass_trace) + 1
    assert found.comparison is not None and found.comparison.first is not None
    assert found.comparison.first.site == "v_proj" and "pass 'break' on the model" in str(found)


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_healthy_passes_are_not_blamed(capture: str) -> None:
    model = attention(capture)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    randomised(model)
    assert len(model.pass_trace) > 1 and bisect_passes(model, X) is None


def test_bisecting_needs_a_trace() -> None:
    with pytest.raises(ConfigError, match="pass trace"):
        bisect_passes(nn.Linear(2, 2), X)


# ---- healthy models ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capture", ["symbolic", "modules", "export"])
def test_merged_and_unmerged(capture: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8).to(dtype)
    model = lora_transform(
        Residual().to(dtype),
        LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1),
        capture=capture,
        example_inputs=x,
    )
    merged = copy.deepcopy(randomised(model)).merge_and_unload()
    found = compare(model, merged, x, backward=True)
    assert found.agrees and found.reference and found.gradients > 0, found
    assert found.by == ("modules" if capture == "modules" else "nodes") and found.compared > 5
    assert compare(model, model, x, backward=True).worst == 0


def test_a_weight_that_is_read_twice() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    for capture in ("symbolic", "modules"):
        config = LoraConfig(r=2, target_modules=["proj", "out"])
        model = randomised(lora_transform(FunctionalWeight(), config, capture=capture, example_inputs=x))
        assert compare(model, copy.deepcopy(model).merge_and_unload(), x, backward=True).agrees


def test_a_layer_that_is_bypassed() -> None:
    """Without example inputs `modules` capture cannot know that the layer is never called."""
    torch.manual_seed(0)
    model = randomised(lora_transform(FunctionalWeight(), LoraConfig(r=2, target_modules=["proj"]), capture="modules"))
    found = compare(model, copy.deepcopy(model).merge_and_unload(), torch.randn(5, 8))
    assert found.first is not None and found.first.site == "out" and found.first.other_inputs == ("input 0",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "t5", "vit", "mixtral", "albert"])
def test_merged_and_unmerged_architectures(name: str, dtype: torch.dtype) -> None:
    entry = ZOO[name]
    model = randomised(
        lora_transform(entry.model().to(dtype), LoraConfig(r=4, target_modules=entry.targets), capture="modules")
    )
    merged = copy.deepcopy(model).merge_and_unload()
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in entry.batch().items()}
    found = compare(model, merged, batch, backward=True)
    assert found.agrees and found.gradients > 0, found


# ---- the report ----


def test_the_report() -> None:
    right, wrong = attention(), attention()
    wrong.scale_adapter(2.0)
    found = compare(right, wrong, X)
    assert isinstance(found, Comparison)
    text = str(found)
    assert "first to differ: '" in text and "with float64 as the reference" in text
    assert json.loads(json.dumps(found.to_dict()))["first"]["error"] > 0
    assert "first to differ" in found._repr_html_()
    assert str(compare(right, right, X)).startswith("no difference beyond rounding")


def test_nothing_is_left_changed() -> None:
    model = attention()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    model.train()
    compare(model, copy.deepcopy(model).merge_and_unload(), X, backward=True)
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="meta device"):
        compare(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="give it inputs"):
        compare(nn.Linear(2, 2), nn.Linear(2, 2), None)
