"""DoRA beside peft and float64: its norms, its dropout, several adapters, and other uses of the factors."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fxlora import LoraConfig, lora_transform
from passes.branches.dora import row_norms, squared_norms
from tests.models.checks import error, same
from tests.oracle import parity
from tests.oracle.cases import ALL, VARIANTS, Case, Layer, Net

CASES = [case for case in VARIANTS if "DoRA" in case.name]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("capture", ALL)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_dora(case: Case, capture: str) -> None:
    parity.check(case, capture)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8, 2), (3, 40, 5), (64, 64, 8)], ids=str)
def test_norms_in_closed_form(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, r = shape
    weight, A, B = (
        torch.randn(rows, columns).to(dtype),
        torch.randn(r, columns).to(dtype),
        torch.randn(rows, r).to(dtype),
    )
    scaling = torch.tensor(0.75, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    found = row_norms(weight, A, B, scaling, squared_norms(weight))
    expected = (weight.double() + 0.75 * B.double() @ A.double()).norm(dim=1)
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype]
    assert found.dtype == scaling.dtype
    assert ((found - expected) / expected).abs().max() < tolerance
    fresh = row_norms(weight, A, torch.zeros_like(B), scaling, squared_norms(weight))
    assert torch.equal(fresh, torch.linalg.norm(weight.to(scaling.dtype), dim=1))  # peft's magnitudes, bit for bit


def two_adapters(library: str, order: tuple[str, ...], *, capture: str = "modules", plain: str = "") -> nn.Module:
    """The same two adapters in either library, active in an order; one of them without DoRA if it is named."""
    torch.manual_seed(0)
    base, model = Net().eval(), None
    for name, r in (("one", 2), ("two", 3)):
        settings = {"r": r, "target_modules": ["fc1", "fc2"], "use_dora": name != plain}
        if model is None and library == "peft":
            model = peft.get_peft_model(base, peft.LoraConfig(**settings), adapter_name=name).eval()
        elif model is None:
            model = lora_transform(base, LoraConfig(**settings), adapter_name=name, capture=capture).eval()
        else:
            model.add_adapter(name, (peft.LoraConfig if library == "peft" else LoraConfig)(**settings))
    generator = torch.Generator().manual_seed(7)
    assert model is not None
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name in sorted(named):
            named[name].add_(0.2 * torch.randn(named[name].shape, generator=generator))
    (model.base_model if library == "peft" else model).set_adapter(list(order))
    return model


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_order_of_adapters(capture: str) -> None:
    """Ours does not depend on it; peft's second adapter takes the first one's output for the base's."""
    with torch.no_grad():
        ours = [two_adapters("fxlora", order, capture=capture)(X) for order in itertools.permutations(("one", "two"))]
        theirs = [two_adapters("peft", order)(X) for order in itertools.permutations(("one", "two"))]
    assert error([ours[0]], [ours[1]]) < 1e-6
    assert error([theirs[0]], [theirs[1]]) > 0.01
    model: Any = two_adapters("fxlora", ("one", "two"), capture=capture)
    model.merge_adapter()
    with torch.no_grad():
        assert error([model(X)], [ours[0]]) < 2e-6


@pytest.mark.parametrize("order", list(itertools.permutations(("one", "two"))), ids=str)
def test_dora_beside_plain(order: tuple[str, str]) -> None:
    """Each adds its own change of the weight: `W' = W + (DoRA's change) + s B A`."""
    model: Any = two_adapters("fxlora", order, plain="two")
    torch.manual_seed(0)
    base = Net().double().eval()
    torch.manual_seed(0)
    base.load_state_dict(Net().state_dict())
    with torch.no_grad():
        for site in ("fc1", "fc2"):
            layer = base.get_submodule(site)
            part = {name: p.double() for name, p in model.get_submodule(site).named_parameters() if "lora_" in name}
            moved = layer.weight + 4 * part["lora_B.one.weight"] @ part["lora_A.one.weight"]
            ratio = part["lora_magnitude_vector.one.weight"] / moved.norm(dim=1)
            change = ratio[:, None] * moved - layer.weight
            layer.weight += change + 8 / 3 * part["lora_B.two.weight"] @ part["lora_A.two.weight"]
        expected = base(X.double())
        assert error([model(X).double()], [expected]) < 2e-6
        model.merge_adapter(["two"])  # the norm of a DoRA branch is that of the weight that it is added to
        model.unmerge_adapter()
        assert error([model(X).double()], [expected]) < 2e-6
        assert error([model.merge_and_unload()(X).double()], [expected]) < 2e-6


@pytest.mark.parametrize("capture", ALL)
def test_rows_of_zeros(capture: Any) -> None:
    """A layer that starts at zero: peft divides zero by zero."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = Layer(nn.Linear(8, 6)).eval()
        nn.init.zeros_(model.layer.weight[:2])  # pyright: ignore
        return model

    with torch.no_grad():
        theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["layer"], use_dora=True)).eval()
        assert theirs(X).isnan().any()
        base = make()(X)
    model: Any = lora_transform(
        make(), LoraConfig(r=2, target_modules=["layer"], use_dora=True), capture=capture, example_inputs=X
    ).eval()
    assert torch.equal(model(X), base)
    assert error([model.merge_and_unload()(X)], [base]) < 1e-6


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(capture: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = Net().to(dtype).eval().requires_grad_(False)
    expected = base(X.to(dtype))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["fc1", "fc2"], use_dora=True)
    model: Any = lora_transform(Net().to(dtype).eval(), config, capture=capture).eval()
    assert torch.equal(model(X.to(dtype)), expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    live = model(X.to(dtype)).float()
    merged = model.merge_and_unload()(X.to(dtype)).float()
    assert error([live], [merged]) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
@pytest.mark.parametrize("name", ["DoRA, nn.Linear", "DoRA, nn.Conv2d", "DoRA with dropout, nn.Linear"])
def test_autocast(name: str, capture: Any) -> None:
    case = next(case for case in CASES if case.name == name)
    model: Any = parity.ours(case, capture)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    exact = model(**case.batch())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**case.batch())
        half.float().sum().backward()
    assert half.dtype == torch.bfloat16 and error([half.float()], [exact]) < 0.03
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_norm_gets_no_gradient() -> None:
    """Section 4.3 of the paper: the gradient of B is that of `(m / n) s B A x` for a constant n."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["layer"], use_dora=True)
    model: Any = lora_transform(Layer(nn.Linear(8, 6, bias=False)).double(), config)
    layer = model.layer
    A, B, m = (
        getattr(layer, part).default.weight for part in ("lora_A", "lora_B", "lora_magnitude_vector")
    )  # fmt: skip
    with torch.no_grad():
        B.normal_()
    x, g = torch.randn(5, 8).double(), torch.randn(5, 6).double()
    (model(x) * g).sum().backward()
    moved = layer.weight + B.detach() @ A.detach()
    norms: Tensor = moved.norm(dim=1)
    ratio = m.detach() / norms
    assert error([B.grad], [(g * ratio).t() @ (x @ A.detach().t())]) < 1e-12
    assert error([m.grad], [((x @ moved.t()) * g).sum(0) / norms]) < 1e-12


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_norms_follow_the_base(capture: Any) -> None:
    """Of a model that is converted, and of one that gets other weights, or its first ones, from a state dict."""

    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return Layer(nn.Linear(8, 6)).eval()

    def norms(model: Any) -> Tensor:
        return model.layer.lora_weight_norm.default.squared

    config = LoraConfig(r=2, target_modules=["layer"], use_dora=True)
    model: Any = lora_transform(make(), config, capture=capture)
    other: Any = lora_transform(make(1), config, capture=capture)
    with torch.device("meta"):
        bare = Layer(nn.Linear(8, 6))
    empty: Any = lora_transform(bare, config, capture=capture)
    model.load_state_dict(other.state_dict())
    empty.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 8)
    for each in (model, empty.eval()):
        assert torch.equal(norms(each), norms(other)) and torch.equal(each(x), other(x))
    model.to(torch.bfloat16)
    weight = model.layer.weight
    assert norms(model).dtype == torch.float32
    assert error([norms(model)], [weight.float().square().sum(1)]) < 1e-6
    assert norms(model.double()).dtype == torch.float64
    assert error([norms(model)], [weight.double().square().sum(1)]) < 1e-14


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_norms_are_made_anew_when_a_part_of_a_larger_model_is_loaded(capture: Any) -> None:
    config = LoraConfig(r=2, target_modules=["layer"], use_dora=True)
    torch.manual_seed(0)
    real: Any = lora_transform(Layer(nn.Linear(8, 6)), config, capture=capture)
    with torch.device("meta"):
        bare = Layer(nn.Linear(8, 6))
    whole = nn.ModuleDict({"part": lora_transform(bare, config, capture=capture)}).to_empty(device="cpu")
    copied = copy.deepcopy(whole)
    for each in (whole, copied):
        each.load_state_dict({f"part.{name}": value for name, value in real.state_dict().items()})
        x = torch.randn(3, 8)
        assert torch.equal(each["part"](x), real(x))
    whole["part"] = whole["part"].unload()
    assert not whole["part"]._load_state_dict_post_hooks


def test_fresh_adapters_do_not_change_anything_together() -> None:
    torch.manual_seed(0)
    base = Net().eval().requires_grad_(False)
    expected = base(X)
    model: Any = lora_transform(base, LoraConfig(r=2, target_modules=["fc1"], use_dora=True), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["fc1"], use_dora=True))
    model.set_adapter(["one", "two"])
    assert same([model(X)], [expected])
