"""Initial factors and base weights beside peft's, from the same seed; then what peft gets wrong."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxlora._passes import BranchSpec
from fxlora._passes import layer_of as known_layer
from fxlora.errors import AdapterError, ConfigError
from fxlora.initialisers import changes_base, check_init, frozen_parts, plain_alpha, to_plain
from fxlora.initialisers import start as start_branch

DECOMPOSING = ["pissa", "pissa_niter_4", "olora", "mica"]
CHANGING = ["pissa", "pissa_niter_4", "olora"]
NAMES: list[bool | str] = [True, False, "gaussian", "orthogonal", *DECOMPOSING]
HALF = [torch.float16, torch.bfloat16]


class Net(nn.Module):
    """Layers `first` and `second`, so that what one layer draws shows in the next."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@dataclass
class Initial:
    """What a branch starts from, its factors by position."""

    A: Tensor
    B: Tensor
    weight: Tensor | None
    frozen: tuple[str, ...]


def _started(spec: BranchSpec, weight: Tensor) -> Initial:
    result = start_branch(spec, weight)
    A, B = list(result.parts.values())[:2]
    return Initial(A, B, result.weight, frozen_parts(spec.init, spec.kind))


def initialise(name: Any, weight: Tensor, r: int, scaling: float, *, site: str = "fc") -> Initial:
    """A linear layer's branch; the weight is `(out, in)`."""
    return _started(
        BranchSpec(site, "default", "linear", weight.shape[1], weight.shape[0], False, r, scaling, init=name), weight
    )


def initialise_embedding(name: Any, weight: Tensor, r: int, *, site: str = "embedding") -> Initial:
    return _started(BranchSpec(site, "default", "embedding", *weight.shape, False, r, 1.0, init=name), weight)


def initialise_conv(name: Any, module: nn.Module, r: int, *, site: str = "conv") -> Initial:
    layer = known_layer(module)
    assert layer is not None
    sizes = (layer.in_features, layer.out_features)
    spec = BranchSpec(site, "default", "conv", *sizes, False, r, 1.0, init=name, options=layer.options)
    return _started(spec, module.weight)


def linears(dtype: torch.dtype = torch.float32, transposed: bool = False) -> Net:
    torch.manual_seed(0)
    net = Net(Conv1D(20, 12), Conv1D(8, 20)) if transposed else Net(nn.Linear(12, 20), nn.Linear(20, 8))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net.to(dtype)


def theirs(net: nn.Module, name: Any, r: int = 4, **config: Any) -> Any:
    torch.manual_seed(3)
    settings = dict(r=r, target_modules=["first", "second"], init_lora_weights=name, **config)
    return peft.get_peft_model(net, peft.LoraConfig(**settings))


def layer_of(model: Any, site: str) -> Any:
    return getattr(model.base_model.model, site)


def placed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """As peft keeps a factor: rounded to the base's dtype, then in float32 on a half-precision base."""
    return factor.to(dtype).float() if dtype in HALF else factor.to(dtype)


def check_equal(start: Initial, layer: Any, before: Tensor, *, transposed: bool = False) -> None:
    """Factors, base weight and what is trained are peft's, bit for bit."""
    a, b = (getattr(layer, name).default for name in ("lora_A", "lora_B"))
    dtype = layer.base_layer.weight.dtype
    assert torch.equal(placed(start.A, dtype), a.weight) and torch.equal(placed(start.B, dtype), b.weight)
    assert start.A.is_contiguous() and start.B.is_contiguous()
    expected = layer.base_layer.weight.detach()
    assert (start.weight is None) == torch.equal(before, expected)
    if start.weight is not None:
        assert start.weight.dtype == dtype
        assert torch.equal(start.weight.T if transposed else start.weight, expected)
    assert start.frozen == (() if b.weight.requires_grad else ("lora_B",)) and a.weight.requires_grad


# ---- one seed, one adapter: linear layers ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_linear(name: Any, dtype: torch.dtype, rslora: bool) -> None:
    before = linears(dtype).state_dict()
    model = theirs(linears(dtype), name, lora_alpha=6, use_rslora=rslora)
    torch.manual_seed(3)
    for site in ("first", "second"):
        weight = before[f"{site}.weight"]
        start = initialise(name, weight, 4, 6 / math.sqrt(4) if rslora else 6 / 4)
        check_equal(start, layer_of(model, site), weight)
        assert (start.weight is not None) == changes_base(name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_conv1d(name: Any, dtype: torch.dtype) -> None:
    before = linears(dtype, transposed=True).state_dict()
    model = theirs(linears(dtype, transposed=True), name, fan_in_fan_out=True)
    torch.manual_seed(3)
    for site in ("first", "second"):
        weight = before[f"{site}.weight"]
        check_equal(initialise(name, weight.T, 4, 2.0), layer_of(model, site), weight, transposed=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_a_transposed_weight(name: Any) -> None:
    """A copy in place of the view gives the same bits, but for the matrix products of a randomised decomposition."""
    stored = torch.randn(12, 20)
    torch.manual_seed(3)
    view = initialise(name, stored.T, 4, 2.0)
    torch.manual_seed(3)
    copy = initialise(name, stored.T.contiguous(), 4, 2.0)
    for ours, other in ((view.A, copy.A), (view.B, copy.B), (view.weight, copy.weight)):
        if name == "pissa_niter_4":
            torch.testing.assert_close(ours, other, rtol=0, atol=5e-6)
        else:
            assert ours is other is None or (ours is not None and other is not None and torch.equal(ours, other))


@pytest.mark.parametrize("name", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("r", [8, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_ranks_where_the_weight_is_not_read(name: Any, r: int, dtype: torch.dtype) -> None:
    before = linears(dtype).state_dict()
    model = theirs(linears(dtype), name, r)
    torch.manual_seed(3)
    for site in ("first", "second"):
        weight = before[f"{site}.weight"]
        check_equal(initialise(name, weight, r, 1.0), layer_of(model, site), weight)


@pytest.mark.parametrize("name", DECOMPOSING)
def test_full_rank(name: str) -> None:
    before = linears().state_dict()
    model = theirs(linears(), name, 8)
    torch.manual_seed(3)
    for site in ("first", "second"):
        weight = before[f"{site}.weight"]
        check_equal(initialise(name, weight, 8, 1.0), layer_of(model, site), weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_adapter_starts_from_what_the_first_left(name: Any) -> None:
    weight = linears().first.get_parameter("weight").detach()
    model = theirs(linears(), name)
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=name))
    layer = layer_of(model, "first")
    other = linears().second.get_parameter("weight").detach()
    torch.manual_seed(3)
    first = initialise(name, weight, 4, 2.0)
    initialise(name, other, 4, 2.0)
    second = initialise(name, weight if first.weight is None else first.weight, 2, 4.0)
    assert torch.equal(second.A, layer.lora_A.more.weight) and torch.equal(second.B, layer.lora_B.more.weight)
    assert second.weight is None or torch.equal(second.weight, layer.base_layer.weight)


@pytest.mark.parametrize("name", ["Gaussian", "OLoRA", "pissa_niter_0", "pissa_niter_12"])
def test_spellings(name: str) -> None:
    before = linears().state_dict()
    model = theirs(linears(), name)
    torch.manual_seed(3)
    for site in ("first", "second"):
        weight = before[f"{site}.weight"]
        check_equal(initialise(name, weight, 4, 2.0), layer_of(model, site), weight)


@pytest.mark.parametrize("name", NAMES)
def test_the_given_weight_is_not_changed_or_shared(name: Any) -> None:
    weight = nn.Parameter(torch.randn(6, 5))
    before = weight.detach().clone()
    start = initialise(name, weight, 2, 0.5)
    assert torch.equal(weight, before)
    results = [start.A, start.B, *([start.weight] if start.weight is not None else [])]
    for tensor in results:
        assert not tensor.requires_grad
        assert tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# ---- the model computes what it did ----


def error(start: Initial, weight: Tensor, scaling: float, *, cast: bool) -> float:
    """`|W' + s B A - W|` in float64, relative to the largest entry of W; `cast` rounds the factors first."""
    A, B = (placed(factor.detach(), weight.dtype) if cast else factor.detach() for factor in (start.A, start.B))
    base = weight if start.weight is None else start.weight
    difference = base.detach().double() + scaling * B.double() @ A.double() - weight.double()
    return float(difference.abs().max() / weight.abs().max())


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize(
    ("dtype", "bound", "bound_cast"),
    [(torch.float32, 3e-7, 3e-7), (torch.float16, 4e-4, 7e-4), (torch.bfloat16, 3e-3, 6e-3)],
    ids=str,
)
@pytest.mark.parametrize("scaling", [0.25, 2.0, 32.0])
def test_the_changed_weight_and_its_branch_are_the_original(
    name: str, dtype: torch.dtype, bound: float, bound_cast: float, scaling: float
) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    start = initialise(name, weight, 16, scaling)
    size = max(1.0, scaling) if name == "olora" else 1.0  # olora takes out s times a part of the weight
    assert error(start, weight, scaling, cast=False) <= bound * size
    assert error(start, weight, scaling, cast=True) <= bound_cast * size


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(CHANGING),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    scaling=st.floats(0.01, 100),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_shape_rank_and_scaling(
    name: str, shape: tuple[int, int], scaling: float, size: float, seed: int, data: st.DataObject
) -> None:
    r = data.draw(st.integers(1, min(shape)))
    torch.manual_seed(seed)
    weight = torch.randn(shape) * size
    start = initialise(name, weight, r, scaling)
    assert start.A.shape == (r, shape[1]) and start.B.shape == (shape[0], r)
    size = max(1.0, scaling) if name == "olora" else 1.0
    assert error(start, weight, scaling, cast=False) <= 1e-6 * size


def test_pissa_takes_the_principal_part_out() -> None:
    """Beside a decomposition in float64: the rest has the smaller singular values, the factors the larger."""
    weight = torch.randn(30, 20)
    expected = torch.linalg.svdvals(weight.double())
    start = initialise("pissa", weight, 5, 0.7)
    assert start.weight is not None
    found = torch.linalg.svdvals(start.weight.double())
    torch.testing.assert_close(found[:15], expected[5:], rtol=1e-6, atol=1e-5)
    assert found[15:].max() < 1e-5 * expected[0]
    part = torch.linalg.svdvals(0.7 * start.B.double() @ start.A.double())
    torch.testing.assert_close(part[:5], expected[:5], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("r", [2, 8])
def test_orthogonal_factors_cancel(r: int) -> None:
    start = initialise("orthogonal", torch.empty(20, 12), r, 1.0)
    assert (start.B @ start.A).abs().max() < 1e-7 < start.A.abs().max() * start.B.abs().max()


def test_mica_is_blind_to_the_principal_part() -> None:
    weight = torch.randn(20, 12)
    start = initialise("mica", weight, 3, 1.0)
    torch.testing.assert_close(start.B.T @ start.B, torch.eye(3), rtol=0, atol=1e-6)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close((start.B.T @ weight).norm(dim=1), values[-3:], rtol=1e-5, atol=1e-6)
    assert not start.A.any()


# ---- where peft is wrong ----


def test_olora_on_weights_stored_transposed() -> None:
    """The values are those of a linear layer with the same weight; peft's model does not compute what it did."""
    flat = linears(transposed=True).first.get_parameter("weight").detach()
    linear = Net(nn.Linear(12, 20), nn.Identity())
    with torch.no_grad():
        linear.first.get_parameter("weight").copy_(flat.T)
    torch.manual_seed(3)
    expected = peft.get_peft_model(
        linear, peft.LoraConfig(r=4, target_modules=["first"], init_lora_weights="olora", lora_alpha=8)
    )
    check_equal(initialise("olora", flat.T, 4, 2.0), layer_of(expected, "first"), flat.T)

    square = Net(Conv1D(12, 12), nn.Identity())
    nn.init.normal_(square.first.get_parameter("weight"))
    x = torch.randn(5, 12)
    before, weight = square(x), square.first.get_parameter("weight").detach().clone()
    config = peft.LoraConfig(r=4, target_modules=["first"], init_lora_weights="olora", fan_in_fan_out=True)
    assert (peft.get_peft_model(square, config)(x) - before).abs().max() > 1
    assert error(initialise("olora", weight.T, 4, 2.0), weight.T, 2.0, cast=False) < 1e-6


@pytest.mark.parametrize("name", CHANGING)
def test_autocast_does_not_reach_the_decomposition(name: str) -> None:
    weight = linears().first.get_parameter("weight").detach()
    torch.manual_seed(3)
    expected = initialise(name, weight, 4, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        start = initialise(name, weight, 4, 2.0)
        layer = layer_of(theirs(linears(), name), "first")
    assert start.weight is not None and expected.weight is not None
    assert torch.equal(start.weight, expected.weight)
    assert torch.equal(start.A, expected.A) and torch.equal(start.B, expected.B)
    peft_start = Initial(layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer.weight, ())
    assert error(peft_start, weight, 2.0, cast=False) > 1e-3


def test_autocast_does_not_reach_orthogonal_factors() -> None:
    weight = torch.empty(20, 12)
    torch.manual_seed(3)
    expected = initialise("orthogonal", weight, 4, 2.0)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        start = initialise("orthogonal", weight, 4, 2.0)
    assert torch.equal(start.A, expected.A) and torch.equal(start.B, expected.B)


@pytest.mark.parametrize("name", DECOMPOSING)
def test_ranks_that_a_decomposition_does_not_have(name: str) -> None:
    with pytest.raises(ConfigError, match=r"'h.0'.*\(20, 8\).*rank 8 at most.*r=9.*rank_pattern"):
        initialise(name, torch.randn(20, 8), 9, 1.0, site="h.0")
    if name == "mica":
        with pytest.raises(ValueError, match="MiCA requires"):
            theirs(linears(), name, 9)
    else:
        assert layer_of(theirs(linears(), name, 9), "second").lora_A.default.weight.shape == (8, 20)


# ---- refused ----


@pytest.mark.parametrize("name", DECOMPOSING)
def test_dtypes_that_peft_refuses(name: str) -> None:
    with pytest.raises(TypeError):
        theirs(linears(torch.float64), name)
    for dtype in ("float64", "int8"):
        weight = torch.ones(6, 5, dtype=getattr(torch, dtype))
        with pytest.raises(ConfigError, match=f"init_lora_weights='{name}'.*'h.0'.* but is {dtype}; convert the model"):
            initialise(name, weight, 2, 1.0, site="h.0")


@pytest.mark.parametrize("name", DECOMPOSING)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(name: str, value: float) -> None:
    weight = torch.randn(6, 5)
    weight[1, 2] = value
    with pytest.raises(ConfigError, match="'h.0', but 1 of its 30 entries are NaN or infinite"):
        initialise(name, weight, 2, 1.0, site="h.0")
    initialise(True, weight, 2, 1.0)


@pytest.mark.parametrize("name", ["orthogonal", *DECOMPOSING])
def test_meta_weights(name: Any) -> None:
    state = torch.get_rng_state()
    weight = torch.empty(6, 5, device="meta")
    with pytest.raises(ConfigError, match="'h.0', whose weight is on the meta device"):
        initialise(name, weight, 2, 1.0, site="h.0")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("scaling", [0.0, -1.0])
def test_pissa_needs_a_positive_scaling(name: str, scaling: float) -> None:
    with pytest.raises(ConfigError, match="root of the scaling.*'h.0' is"):
        initialise(name, torch.randn(6, 5), 2, scaling, site="h.0")


def test_a_changed_weight_that_overflows() -> None:
    weight = torch.full((4, 4), 40000.0, dtype=torch.float16)
    assert initialise("olora", weight, 2, 1.0).weight is not None
    with pytest.raises(ConfigError, match="base weight of 'h.0' to values that float16 cannot hold"):
        initialise("olora", weight, 2, -1.0, site="h.0")


def test_orthogonal_in_a_half_precision_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert initialise(True, torch.empty(6, 5), 2, 1.0).A.dtype == torch.bfloat16
        with pytest.raises(ConfigError, match="default dtype, bfloat16, which has no QR"):
            initialise("orthogonal", torch.empty(6, 5), 2, 1.0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_orthogonal_needs_an_even_rank() -> None:
    with pytest.raises(ValueError, match="even"):
        theirs(linears(), "orthogonal", 3)
    with pytest.raises(ConfigError, match="r=3; use 4"):
        check_init("orthogonal", 3)
    with pytest.raises(ConfigError, match="r=3; use 4"):
        initialise("orthogonal", torch.randn(6, 5), 3, 1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pisa", "Did you mean 'pissa'"),
        ("PISSA", "Did you mean 'pissa'"),
        ("MiCA", "Did you mean 'mica'"),
        ("orthogonl", "Did you mean 'orthogonal'"),
        ("true", "Known: True, False, 'gaussian', 'orthogonal', 'pissa', 'olora', 'mica', 'pissa_niter_N'"),
        ("", "Known"),
        ("pissafoo", "Did you mean 'pissa'"),
        ("pissa_niter_", "number of power iterations"),
        ("pissa_niter_x", "number of power iterations"),
        ("pissa_niter_-3", "number of power iterations"),
        ("pissa_niter_1_0", "number of power iterations"),
        (None, "not None"),
        (1, "not 1"),
    ],
)
def test_unknown_names(name: Any, message: str) -> None:
    for refused in (lambda: check_init(name, 4), lambda: initialise(name, torch.randn(6, 5), 4, 1.0)):
        with pytest.raises(ConfigError, match=message):
            refused()


@pytest.mark.parametrize("name", ["corda", "eva", "loftq", "lora_ga"])
def test_names_that_need_more_than_the_weight(name: str) -> None:
    for refused in (
        lambda: check_init(name, 4),
        lambda: initialise(name, torch.randn(6, 5), 4, 1.0),
        lambda: initialise_embedding(name, torch.randn(6, 5), 4),
        lambda: initialise_conv(name, nn.Conv1d(5, 6, 3), 4),
    ):
        with pytest.raises(NotImplementedError, match=f"'{name}' is not supported: .*what works instead: "):
            refused()
    assert changes_base(name) == (name != "eva")


# ---- embeddings and convolutions ----


def embeddings(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net(nn.Embedding(30, 12), nn.Embedding(9, 16, padding_idx=0)).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embedding(name: Any, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fxlora")
    before = embeddings(dtype).state_dict()
    model = theirs(embeddings(dtype), name)
    torch.manual_seed(3)
    for site in ("first", "second"):
        weight, layer = before[f"{site}.weight"], layer_of(model, site)
        start = initialise_embedding(name, weight, 4, site=site)
        assert torch.equal(placed(start.A, dtype), layer.lora_embedding_A.default)
        assert torch.equal(placed(start.B, dtype), layer.lora_embedding_B.default)
        assert start.weight is None and torch.equal(weight, layer.base_layer.weight)
        assert start.frozen == (("lora_embedding_B",) if name == "mica" else ())
        trained = layer.lora_embedding_B.default.requires_grad
        if Version(peft.__version__) >= Version("0.21.2"):  # its cast to float32 makes a new, trained parameter
            assert trained == (not start.frozen or dtype in HALF)
    logged = name in ("orthogonal", *CHANGING)
    assert [f"'{site}' starts as with True" in caplog.text for site in ("first", "second")] == [logged, logged]


def test_embedding_refuses_what_a_linear_layer_refuses() -> None:
    with pytest.raises(ConfigError, match="rank 5 at most"):
        initialise_embedding("mica", torch.randn(30, 5), 6)
    with pytest.raises(ConfigError, match="float64"):
        initialise_embedding("mica", torch.randn(30, 5).double(), 2)
    with pytest.raises(ConfigError, match="Unknown"):  # peft takes any string here
        initialise_embedding("foo", torch.randn(30, 5), 2)


CONVS = {
    "1d": lambda: Net(nn.Conv1d(6, 8, 3), nn.Conv1d(8, 10, 1)),
    "2d": lambda: Net(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(8, 10, (1, 5))),
    "3d": lambda: Net(nn.Conv3d(2, 8, 3), nn.Conv3d(8, 10, 2)),
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("name", [True, False, "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_conv(kind: str, name: Any, dtype: torch.dtype) -> None:
    net = CONVS[kind]().to(dtype)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = theirs(net, name)
    torch.manual_seed(3)
    for site in ("first", "second"):
        layer, weight = layer_of(model, site), before[f"{site}.weight"]
        check_equal(initialise_conv(name, layer.base_layer, 4), layer, weight)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_conv_refuses_what_peft_refuses() -> None:
    for name in ("orthogonal", *DECOMPOSING):
        with pytest.raises(ValueError, match="Unknown initialization|unsupported variant"):
            theirs(CONVS["2d"](), name)
        with pytest.raises(ConfigError, match=f"'{name}' is for linear layers, but 'stem' is of the kind 'conv'"):
            initialise_conv(name, nn.Conv2d(6, 8, 3), 4, site="stem")


# ---- back to the original base weight ----


def trained(name: str, directory: Path, **config: Any) -> tuple[Any, dict[str, Tensor]]:
    """peft's way: save the initial adapter as one with plain initialisation, then train."""
    model = theirs(linears(), name, **config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(directory / "initial")
    initial = load_file(directory / "initial" / "adapter_model.safetensors")
    torch.manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model, initial


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_to_plain_is_pefts_conversion(name: str, rslora: bool, tmp_path: Path) -> None:
    model, initial = trained(name, tmp_path, lora_alpha=6, use_rslora=rslora)
    now = peft.get_peft_model_state_dict(model)
    live = model(X := torch.randn(5, 12))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    expected = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    for site in ("first", "second"):
        keys = [f"base_model.model.{site}.lora_{factor}.weight" for factor in "AB"]
        plain = to_plain(*(now[key] for key in keys), *(initial[key] for key in keys))
        for key, factor in zip(keys, plain, strict=True):
            assert torch.equal(factor, expected.pop(key))
    assert not expected
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["lora_alpha"] == plain_alpha(6, rslora)
    again = peft.PeftModel.from_pretrained(linears(), tmp_path / "plain")
    torch.testing.assert_close(again(X), live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("alpha", [1, 6, 0.3])
def test_to_plain_with_the_original_weight_is_the_trained_layer(name: str, rslora: bool, alpha: float) -> None:
    def scaling(alpha: float, r: int) -> float:
        return alpha / math.sqrt(r) if rslora else alpha / r

    weight = torch.randn(20, 12)
    start = initialise(name, weight, 4, scaling(alpha, 4))
    A, B = start.A + 0.1 * torch.randn(4, 12), start.B + 0.1 * torch.randn(20, 4)
    A2, B2 = to_plain(A, B, start.A, start.B)
    assert start.weight is not None and A2.shape == (8, 12) and B2.shape == (20, 8)
    expected = start.weight.double() + scaling(alpha, 4) * B.double() @ A.double()
    found = weight.double() + scaling(plain_alpha(alpha, rslora), 8) * B2.double() @ A2.double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_patterns_convert_where_peft_gives_up(tmp_path: Path) -> None:
    """With rsLoRA and patterns peft refuses; the rule for alpha holds for each layer all the same."""
    with pytest.warns(UserWarning, match="Rank-Stabilized LoRA with rank_pattern"):
        model, _ = trained("pissa", tmp_path, use_rslora=True, rank_pattern={"second": 2}, alpha_pattern={"first": 5})
    with pytest.raises(ValueError, match="not supported when using `rank_pattern`"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    for alpha, r in ((5, 4), (8, 2)):
        assert plain_alpha(alpha, True) / math.sqrt(2 * r) == pytest.approx(alpha / math.sqrt(r), rel=1e-15)


def test_to_plain_wants_the_initial_values_of_the_same_adapter() -> None:
    A, B = torch.randn(4, 12), torch.randn(20, 4)
    with pytest.raises(AdapterError, match=r"\(4, 12\) and \(20, 4\).*\(2, 12\) and \(20, 2\)"):
        to_plain(A, B, A[:2], B[:, :2])
    with pytest.raises(AdapterError, match="this very adapter"):
        to_plain(A, B, A, B.T)
