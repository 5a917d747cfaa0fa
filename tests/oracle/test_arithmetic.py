"""Numbers beside peft's: dtypes, several adapters, scaling rules, weighted sums."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fxlora import AdapterError, LoraConfig, lora_transform
from tests.models.checks import randomise
from tests.zoo import MLP

CAPTURES = ["symbolic", "export", "modules"]
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MLP().to(dtype).eval()


def both(capture: str, dtype: torch.dtype = torch.float32, *, ours: dict[str, Any] | None = None, **config: Any) -> Any:
    """The same adapter in a model of ours and of peft's, with the same random B."""
    config = {"r": 4, "target_modules": ["fc1", "fc2"], **config}
    models = []
    for make in (
        lambda: lora_transform(
            net(dtype), LoraConfig(**config, **(ours or {})), capture=capture, example_inputs=X.to(dtype)
        ),
        lambda: peft.get_peft_model(net(dtype), peft.LoraConfig(**config)).eval(),
    ):
        model = make()
        torch.manual_seed(9)
        models.append(model)
    randomise(models[0])
    randomise(models[1])
    return models


def factor(model: Any, name: str) -> torch.Tensor:
    prefix = "base_model.model." if isinstance(model, peft.PeftModel) else ""
    return model.get_parameter(prefix + name)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_initial_factors(capture: Any, init: bool | str, dtype: torch.dtype) -> None:
    models = []
    for make in (
        lambda m: lora_transform(
            m, LoraConfig(r=4, target_modules=["fc1", "fc2"], init_lora_weights=init), capture=capture,
            example_inputs=X.to(dtype),
        ),
        lambda m: peft.get_peft_model(m, peft.LoraConfig(r=4, target_modules=["fc1", "fc2"], init_lora_weights=init)),
    ):  # fmt: skip
        model = net(dtype)
        torch.manual_seed(3)
        models.append(make(model))
    for name in ("fc1.lora_A", "fc1.lora_B", "fc2.lora_A", "fc2.lora_B"):
        ours, theirs = (factor(model, f"{name}.default.weight") for model in models)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_branch_dtype_adapter_is_pefts_arithmetic_bit_for_bit(capture: Any, dtype: torch.dtype) -> None:
    ours, theirs = both(capture, dtype, ours={"branch_dtype": "adapter"})
    x = X.to(dtype)
    assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == dtype


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_branch_dtype_base_keeps_the_base_dtype(capture: Any, dtype: torch.dtype) -> None:
    ours, theirs = both(capture, dtype)
    x = X.to(dtype)
    found, expected = ours(x), theirs(x)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert all(p.dtype == torch.float32 for n, p in ours.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_autocast(capture: Any) -> None:
    ours, theirs = both(capture)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(X), theirs(X))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc2": 5}},
        {"rank_pattern": {"^fc2": 7, "fc.": 3}, "use_rslora": True},
        {"lora_alpha": 0.5},
        {"exclude_modules": ["fc2"]},
        {"target_modules": "fc.*"},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_configurations(capture: Any, config: dict[str, Any]) -> None:
    ours, theirs = both(capture, **config)
    torch.testing.assert_close(ours(X), theirs(X))
    assert not torch.equal(ours(X), net()(X))


@pytest.mark.parametrize("capture", CAPTURES)
def test_dropout_draws_as_peft(capture: Any) -> None:
    ours, theirs = both(capture, lora_dropout=0.4)
    for model in (ours, theirs):
        model.train()
    torch.manual_seed(1)
    expected = theirs(X)
    torch.manual_seed(1)
    torch.testing.assert_close(ours(X), expected)


@pytest.mark.parametrize("capture", CAPTURES)
def test_several_adapters_at_once(capture: Any) -> None:
    ours, theirs = both(capture)
    ours.add_adapter("other", LoraConfig(r=2, lora_alpha=6, target_modules=["fc1"]))
    theirs.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["fc1"]))
    with torch.no_grad():
        for name in ("fc1.lora_A.other.weight", "fc1.lora_B.other.weight"):
            factor(ours, name).copy_(torch.randn(factor(ours, name).shape))
            factor(theirs, name).copy_(factor(ours, name))
    alone = theirs(X)
    torch.testing.assert_close(ours(X), alone)
    for active in (["default", "other"], ["other"], ["default"]):
        ours.set_adapter(active)
        theirs.base_model.set_adapter(active)
        torch.testing.assert_close(ours(X), theirs(X))
        flags = {n: p.requires_grad for n, p in ours.named_parameters()}
        assert flags == {
            n.removeprefix("base_model.model.").replace(".base_layer", ""): p.requires_grad
            for n, p in theirs.named_parameters()
        }
    with ours.disable_adapter():
        assert torch.equal(ours(X), net()(X))
    torch.testing.assert_close(ours(X), alone)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]], ids=str)
def test_weighted_sums(capture: Any, kind: str, weights: list[float]) -> None:
    ours, theirs = both(capture)
    for model, cls in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        model.add_adapter("other", cls(r=4, lora_alpha=6, target_modules=["fc1", "fc2"]))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".other." in name:
                parameter.copy_(torch.randn(parameter.shape))
                factor(theirs, name).copy_(parameter)
    ours.add_weighted_adapter(["default", "other"], weights, "sum", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.base_model.add_weighted_adapter(["default", "other"], weights, "sum", kind)
    ours.set_adapter("sum")
    theirs.set_adapter("sum")
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-4)
    ours.verify()


@pytest.mark.parametrize("capture", CAPTURES)
def test_merge_unmerge_and_order(capture: Any) -> None:
    ours, _ = both(capture, torch.bfloat16)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
    with torch.no_grad():
        ours.get_parameter("fc1.lora_B.other.weight").normal_()
    original = {n: p.clone() for n, p in ours.named_parameters()}
    weights = []
    for order in (["default", "other"], ["other", "default"]):
        for name in order:
            ours.merge_adapter([name])
        weights.append(ours.get_parameter("fc1.weight").clone())
        ours.unmerge_adapter()
        assert all(torch.equal(p, original[n]) for n, p in ours.named_parameters())
    assert torch.equal(*weights)
    assert weights[0].dtype == torch.bfloat16


@pytest.mark.parametrize("capture", CAPTURES)
def test_merging_one_of_two_active_adapters(capture: Any) -> None:
    ours, _ = both(capture)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
    with torch.no_grad():
        ours.get_parameter("fc1.lora_B.other.weight").normal_()
    ours.set_adapter(["default", "other"])
    expected = ours(X)
    ours.merge_adapter(["other"])
    torch.testing.assert_close(ours(X), expected)  # "default" stays a branch; peft would drop it
    with ours.disable_adapter():
        assert torch.equal(ours(X), net()(X))
    torch.testing.assert_close(ours(X), expected)
    ours.unmerge_adapter()
    assert torch.equal(ours(X), expected)


@pytest.mark.parametrize("capture", CAPTURES)
def test_delete_and_unload(capture: Any) -> None:
    ours, _ = both(capture)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
    ours.delete_adapter("default")
    assert ours.active_adapters == ["other"] and list(ours.peft_config) == ["other"]
    assert not [name for name in ours.state_dict() if ".default." in name]
    plain = ours.unload()
    assert list(plain.state_dict()) == list(net().state_dict())
    assert torch.equal(plain(X), net()(X))


@pytest.mark.parametrize("capture", CAPTURES)
def test_leaving_disabled_states(capture: Any) -> None:
    """A choice made inside holds after; unloading inside is refused; a copy made inside can be switched on."""
    ours, _ = both(capture)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
    with torch.no_grad():
        ours.get_parameter("fc1.lora_B.other.weight").normal_()
    default = ours(X)
    ours.merge_adapter()
    with ours.disable_adapter():
        ours.set_adapter("other")
        with pytest.raises(AdapterError, match="disabled"):
            ours.unload()
        copied = copy.deepcopy(ours)
    inside = ours(X)
    ours.set_adapter("default")
    assert torch.equal(ours(X), default)
    ours.set_adapter(["other", "other"])
    assert torch.equal(ours(X), inside) and ours.active_adapters == ["other"]
    assert torch.equal(copied(X), net()(X))
    copied.enable_adapter_layers()
    assert torch.equal(copied(X), inside)
    copied.disable_adapter_layers()
    assert torch.equal(copied(X), net()(X))


@pytest.mark.parametrize("capture", CAPTURES)
def test_deleting_what_was_merged_while_disabled(capture: Any) -> None:
    """What is left of the merge is there again after."""
    ours, _ = both(capture)
    for name in ("other", "more"):
        ours.add_adapter(name, LoraConfig(r=2, target_modules=["fc1"]))
        with torch.no_grad():
            ours.get_parameter(f"fc1.lora_B.{name}.weight").normal_()
    ours.merge_adapter(["more"])
    expected = ours(X)
    ours.merge_adapter(["other"])
    with ours.disable_adapter():
        ours.delete_adapter("other")
    assert ours._lora.merged == ("more",) and torch.equal(ours(X), expected)
    ours.verify()


@pytest.mark.parametrize("capture", CAPTURES)
def test_weighted_sum_of_unlike_adapters(capture: Any) -> None:
    """Other targets and other dropout; then everything that reads the new adapter's configuration."""
    ours, _ = both(capture, target_modules=["fc1"])
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc2"], lora_dropout=0.3))
    ours.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    ours.set_scale("sum", 2.0)
    ours.set_adapter("sum")
    ours.verify()
    ours.unload()


def test_names_that_end_other_names(tmp_path: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.sub = nn.Linear(8, 8), nn.ModuleDict({"a": nn.Linear(8, 8), "z": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.sub["z"](self.sub["a"](self.a(x)))

    lora = lora_transform(Net(), LoraConfig(r=2, target_modules=["a", "z"], exclude_modules=["sub.a"]))
    lora.add_weighted_adapter(["default"], [1.0], "sum", "cat")
    lora.set_scale("sum", 3.0)
    assert [spec.scaling for spec in lora._lora.adapters["sum"].branches] == [3.0, 3.0]
    lora.save_pretrained(tmp_path, selected_adapters=["sum"])
    lora.load_adapter(tmp_path / "sum", "again")
    nested = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    specs = lora_transform(nested, LoraConfig(r=2, target_modules="all-linear"))._specs()
    assert [spec.site for spec in specs] == ["0", "1.1"]


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_meta_model_that_gets_its_weights_by_assignment(capture: Any) -> None:
    real: Any = lora_transform(net(), LoraConfig(r=2, target_modules=["fc1"]), capture=capture).eval()
    randomise(real)
    with torch.device("meta"):
        empty = MLP()
    lora = lora_transform(empty, LoraConfig(r=2, target_modules=["fc1"]), capture=capture).eval()
    lora.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(lora(X), real(X))
    lora.verify()


def test_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 8), nn.Tanh())
    lora: Any = lora_transform(model, LoraConfig(r=2, target_modules=["0"]), capture="modules")
    assert lora.peft_config["default"].fan_in_fan_out
    randomise(lora)
    live = lora(X)
    torch.testing.assert_close(lora.merge_and_unload()(X), live)


@pytest.mark.parametrize("capture", CAPTURES)
def test_states_do_not_mix(capture: Any) -> None:
    """Disabling twice, choosing another adapter while one is merged, merging while disabled."""
    ours, _ = both(capture)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
    with torch.no_grad():
        ours.get_parameter("fc1.lora_B.other.weight").normal_()
    base, default = net()(X), ours(X)
    with ours.disable_adapter():
        with ours.disable_adapter():
            assert torch.equal(ours(X), base)
        assert torch.equal(ours(X), base)
        with pytest.raises(AdapterError, match="disabled"):
            ours.merge_adapter()
        ours.set_adapter("other")
        assert torch.equal(ours(X), base)
    other = ours(X)
    assert not torch.equal(other, default) and not torch.equal(other, base)
    ours.merge_adapter()
    ours.set_adapter("default")  # as in peft, the merged adapter is taken out first
    assert torch.equal(ours(X), default)
    ours.merge_adapter()
    with pytest.raises(RuntimeError, match="boom"), ours.disable_adapter():
        raise RuntimeError("boom")
    torch.testing.assert_close(ours(X), default)
    with pytest.raises(AdapterError, match="merged"):
        ours.delete_adapter("default")
    ours.unmerge_adapter()
    assert torch.equal(ours(X), default)
    ours.verify()
