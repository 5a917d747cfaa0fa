"""Every spelling of a linear layer is found, with its name, its sizes and its orientation; nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from passes.base import SELF_CALL, Instance, Region
from passes.callsite import CallSite, Layer, branch_owner
from passes.operands import owning_path
from passes.sites import find_sites, layer_of
from tests.passes.helpers import exported, region_of

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of x (5, 3), a weight stored (4, 3) and a bias (4).
OUT_IN: dict[str, Call] = {
    "F.linear": lambda x, w, b: F.linear(x, w),
    "F.linear with bias": lambda x, w, b: F.linear(x, w, b),
    "F.linear, weight by name": lambda x, w, b: F.linear(x, weight=w),
    "F.linear, all by name": lambda x, w, b: F.linear(bias=b, weight=w, input=x),
    "W.T": lambda x, w, b: x @ w.T,
    "W.t()": lambda x, w, b: x @ w.t() + b,
    "W.mT": lambda x, w, b: x @ w.mT,
    "torch.t": lambda x, w, b: x @ torch.t(w),
    "torch.t by name": lambda x, w, b: x @ torch.t(input=w),
    "transpose(0, 1)": lambda x, w, b: x @ w.transpose(0, 1),
    "transpose(1, 0)": lambda x, w, b: x @ w.transpose(1, 0),
    "transpose(-1, -2)": lambda x, w, b: x @ w.transpose(-1, -2),
    "transpose(0, -1)": lambda x, w, b: x @ w.transpose(0, -1),
    "transpose by name": lambda x, w, b: x @ w.transpose(dim0=0, dim1=1),
    "torch.transpose": lambda x, w, b: x @ torch.transpose(w, 0, 1),
    "torch.transpose by name": lambda x, w, b: x @ torch.transpose(dim0=-2, dim1=-1, input=w),
    "swapaxes": lambda x, w, b: x @ w.swapaxes(0, 1),
    "torch.swapaxes by name": lambda x, w, b: x @ torch.swapaxes(w, axis0=0, axis1=1),
    "swapdims": lambda x, w, b: x @ w.swapdims(0, 1),
    "permute(1, 0)": lambda x, w, b: x @ w.permute(1, 0),
    "permute((1, 0))": lambda x, w, b: x @ w.permute((1, 0)),
    "permute([-1, -2])": lambda x, w, b: x @ w.permute([-1, -2]),
    "permute by name": lambda x, w, b: x @ w.permute(dims=(1, 0)),
    "torch.permute": lambda x, w, b: x @ torch.permute(w, (1, 0)),
    "transposed thrice": lambda x, w, b: x @ w.T.t().mT,
    "torch.matmul": lambda x, w, b: torch.matmul(x, w.T),
    "torch.matmul by name": lambda x, w, b: torch.matmul(input=x, other=w.T),
    "torch.mm": lambda x, w, b: torch.mm(x, w.T),
    "torch.mm by name": lambda x, w, b: torch.mm(x, mat2=w.T),
    "x.matmul": lambda x, w, b: x.matmul(w.T),
    "x.matmul by name": lambda x, w, b: x.matmul(other=w.T),
    "x.mm": lambda x, w, b: x.mm(w.T),
    "torch.addmm": lambda x, w, b: torch.addmm(b, x, w.T),
    "torch.addmm by name": lambda x, w, b: torch.addmm(mat1=x, input=b, mat2=w.t()),
    "torch.addmm, factors of 1": lambda x, w, b: torch.addmm(b, x, w.t(), beta=1, alpha=1.0),
    "to(x.dtype)": lambda x, w, b: F.linear(x, w.to(x.dtype)),
    "to(dtype=)": lambda x, w, b: F.linear(x, w.to(dtype=torch.float32)),
    "to(x)": lambda x, w, b: F.linear(x, w.to(x)),
    "to(x.device)": lambda x, w, b: F.linear(x, w.to(x.device)),
    "to(device, dtype)": lambda x, w, b: F.linear(x, w.to(x.device, torch.float32)),
    "type_as": lambda x, w, b: F.linear(x, w.type_as(x)),
    "float": lambda x, w, b: F.linear(x.float(), w.float()),
    "double": lambda x, w, b: F.linear(x.double(), w.double()).float(),
    "half and back": lambda x, w, b: F.linear(x, w.half().float()),
    "cast, transposed and contiguous": lambda x, w, b: x.bfloat16() @ w.to(torch.bfloat16).T.contiguous(),
}
# The same of a weight stored (3, 4).
IN_OUT: dict[str, Call] = {
    "x @ W": lambda x, w, b: x @ w,
    "torch.matmul": lambda x, w, b: torch.matmul(x, w),
    "torch.mm": lambda x, w, b: torch.mm(x, w),
    "x.matmul": lambda x, w, b: x.matmul(w),
    "torch.addmm": lambda x, w, b: torch.addmm(b, x, w),
    "F.linear of W.T": lambda x, w, b: F.linear(x, w.T, b),
    "transposed twice": lambda x, w, b: x @ w.T.T,
    "casted": lambda x, w, b: x @ w.to(x.dtype),
}
SPELLINGS = {(name, False): call for name, call in OUT_IN.items()} | {(n, True): call for n, call in IN_OUT.items()}


class Spelled(nn.Module):
    """A bare weight, used by one function."""

    def __init__(self, call: Call, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.call = call
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w, self.b)


class Each(nn.Module):
    """Calls each of its children, so that all of them are captured at once."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.each = nn.ModuleList(models)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [model(x) for model in self.each]


CAPTURES: dict[str, Callable[[nn.Module], Region]] = {
    "symbolic": region_of,
    "export": lambda model: exported(model, torch.randn(5, 3)),
}


def only_site(region: Region) -> CallSite:
    (site,) = find_sites(region)
    return site


def origins(node: fx.Node) -> set[str]:
    """Names of the inputs and parameters that a node is computed from."""
    inputs = node.all_input_nodes
    return set().union(*map(origins, inputs)) if inputs else {node.name}


@pytest.mark.parametrize("capture", CAPTURES)
def test_spellings(capture: str) -> None:
    models = [Spelled(call, (3, 4) if transposed else (4, 3)) for (_, transposed), call in SPELLINGS.items()]
    region = CAPTURES[capture](Each(*models))
    found = {site.name: site for site in find_sites(region)}
    missed = [key for index, key in enumerate(SPELLINGS) if f"each.{index}.w" not in found]
    assert not missed
    assert len(found) == len(SPELLINGS)
    for index, (name, transposed) in enumerate(SPELLINGS):
        site = found[f"each.{index}.w"]
        assert (site.weight, site.kind, site.call) == (f"each.{index}.w", "linear", 0), name
        assert (site.in_features, site.out_features, site.transposed) == (3, 4, transposed), name
        assert site.owner == f"each.{index}.lora_parameters.w"
        assert origins(site.x) == {"x"}, name


@pytest.mark.parametrize(
    ("call", "spelling"),
    [
        (lambda x, w, b: F.linear(x, w.T), "linear"),
        (lambda x, w, b: torch.addmm(b, x, w), "addmm"),
        (lambda x, w, b: x @ w, "matmul"),
    ],
)
def test_name_of_the_spelling(call: Call, spelling: str) -> None:
    assert only_site(region_of(Spelled(call, (3, 4)))).spelling == spelling


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch copies a class that it has deprecated
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)], ids=["matrix", "batch"])
def test_decomposed_export(shape: tuple[int, ...]) -> None:
    """After `run_decompositions` a layer is `addmm` or `mm` of a permuted weight, inside of views."""
    region = exported(Each(nn.Linear(3, 4), nn.Linear(3, 4, bias=False)), torch.randn(shape), decompose=True)
    sites = find_sites(region)
    assert [site.spelling for site in sites] == ["addmm", "matmul"]
    assert [site.name for site in sites] == ["each.0", "each.1"]
    assert {(site.in_features, site.out_features, site.transposed) for site in sites} == {(3, 4, False)}


def test_more_dimensions_of_x() -> None:
    calls: list[Call] = [lambda x, w, b: x @ w.T, lambda x, w, b: F.linear(x, w, b)]
    region = exported(Each(*(Spelled(call, (4, 3)) for call in calls)), torch.randn(2, 5, 3))
    assert [(site.in_features, site.out_features) for site in find_sites(region)] == [(3, 4)] * 2


# ---- what must not match ----

OTHERS: dict[str, tuple[tuple[int, ...], Call]] = {
    "einsum over all of the weight": ((4, 3), lambda x, w, b: torch.einsum("bi,oi->b", x, w)),
    "three-dimensional weight": ((2, 3, 4), lambda x, w, b: x @ w),
    "one-dimensional weight": ((3,), lambda x, w, b: x @ w),
    "activations": ((4, 3), lambda x, w, b: x @ x.T + w.sum()),
    "W @ x": ((4, 5), lambda x, w, b: w @ x),
    "addmm(b, W, x)": ((4, 5), lambda x, w, b: torch.addmm(b[:3], w, x)),
    "addmm with beta": ((3, 4), lambda x, w, b: torch.addmm(b, x, w, beta=2)),
    "addmm with alpha": ((3, 4), lambda x, w, b: torch.addmm(b, x, w, alpha=0.5)),
    "scaled weight": ((4, 3), lambda x, w, b: F.linear(x, w * 2)),
    "computed weight": ((4, 3), lambda x, w, b: F.linear(x, w.abs())),
    "sliced weight": ((8, 3), lambda x, w, b: F.linear(x, w[:4])),
    "permuted not at all": ((3, 4), lambda x, w, b: x @ w.permute(0, 1)),
    "transposed along one dimension": ((3, 4), lambda x, w, b: x @ w.transpose(1, 1)),
    "reshaped": ((4, 3), lambda x, w, b: x @ w.reshape(3, 4)),
    "elementwise": ((5, 3), lambda x, w, b: x * w),
    "einsum of three": ((4, 3), lambda x, w, b: torch.einsum("bi,oi,o->bo", x, w, w[:, 0])),
}


class Fixed(nn.Module):
    """A weight that is no parameter."""

    w: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


@pytest.mark.parametrize("capture", CAPTURES)
def test_nothing_else_matches(capture: str) -> None:
    models = [Spelled(call, shape) for shape, call in OTHERS.values()]
    region = CAPTURES[capture](Each(*models, Fixed()))
    wrong = [site.name for site in find_sites(region)]
    assert [(*OTHERS, "buffer")[int(name.split(".")[1])] for name in wrong] == []


def test_other_modules_are_no_layers() -> None:
    layers: list[nn.Module] = [nn.LayerNorm(2), nn.Dropout(), nn.Identity(), nn.Sequential(nn.Linear(2, 2))]
    assert [layer_of(layer) for layer in layers] == [None] * len(layers)

    class Conv1D(nn.Module):  # the name alone does not make it transformers' class
        weight = nn.Parameter(torch.zeros(2, 3))

    assert layer_of(Conv1D()) is None


# ---- modules ----


class Special(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), Layer("linear", 3, 4, transposed=False)),
        (nn.Linear(3, 4, bias=False), Layer("linear", 3, 4, transposed=False)),
        (Special(3, 4), Layer("linear", 3, 4, transposed=False)),
        (Conv1D(4, 3), Layer("linear", 3, 4, transposed=True)),
        (type("Sub", (Conv1D,), {})(4, 3), Layer("linear", 3, 4, transposed=True)),
    ],
    ids=["Linear", "without bias", "subclass", "Conv1D", "subclass of Conv1D"],
)
def test_layer_as_call_module(layer: nn.Module, shape: Layer) -> None:
    assert layer_of(layer) == shape
    site = only_site(region_of(nn.Sequential(layer)))
    assert (site.name, site.weight, site.owner, site.spelling) == ("0", "0.weight", "0", type(layer).__name__)
    assert site.layer == shape
    assert site.x.op == "placeholder" and site.node.op == "call_module"


@pytest.mark.parametrize(
    ("layer", "spelling", "transposed"),
    [(nn.Linear(3, 4), "linear", False), (nn.Linear(3, 4, bias=False), "linear", False), (Conv1D(4, 3), "addmm", True)],
    ids=["Linear", "without bias", "Conv1D"],
)
def test_layer_exported(layer: nn.Module, spelling: str, transposed: bool) -> None:
    site = only_site(exported(nn.Sequential(layer), torch.randn(5, 3)))
    assert (site.name, site.weight, site.owner, site.spelling) == ("0", "0.weight", "0", spelling)
    assert (site.in_features, site.out_features, site.transposed) == (3, 4, transposed)


def test_input_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    assert only_site(region_of(Keyword())).x.name == "x"


def test_template() -> None:
    """A layer's own original forward, called from the graph that replaces it."""
    graph = fx.Graph()
    graph.output(graph.call_module(SELF_CALL, (graph.placeholder("input"),)))
    site = only_site(Region(graph, (Instance("h.0.fc", nn.Linear(3, 4)), Instance("h.1.fc", nn.Linear(5, 6)))))
    assert (site.name, site.weight, site.owner) == ("", "weight", "")
    assert (site.in_features, site.out_features) == (3, 4)  # of the first instance


# ---- names ----


class Net(nn.Module):
    """Two layers and a function that uses them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def named(region: Region) -> list[tuple[str, str, int]]:
    return [(site.name, site.weight, site.call) for site in find_sites(region)]


def both(model: nn.Module) -> list[Region]:
    return [capture(model) for capture in CAPTURES.values()]


def test_calls_of_one_module_are_numbered() -> None:
    model = Net(lambda m, x: m.a(m.b(m.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    for region in both(model):
        assert named(region) == [("a", "a.weight", 0), ("b", "b.weight", 0), ("a", "a.weight", 1)]


def test_calls_of_one_bare_parameter_are_numbered() -> None:
    model = Net(lambda m, x: F.linear(x, m.w) + x @ m.w.T, w=nn.Parameter(torch.randn(3, 3)))
    for region in both(model):
        assert named(region) == [("w", "w", 0), ("w", "w", 1)]


def test_module_under_two_names_has_its_first() -> None:
    layer = nn.Linear(3, 3)
    model = Net(lambda m, x: m.second(m.first(x)), first=layer, second=layer)
    for region in both(model):
        assert named(region) == [("first", "first.weight", 0), ("first", "first.weight", 1)]


def test_block_under_two_names_has_its_first() -> None:
    block = nn.Sequential(nn.Linear(3, 3))
    model = Net(lambda m, x: m.second(x), first=block, second=block)
    for region in both(model):
        assert named(region) == [("first.0", "first.0.weight", 0)]


def test_parameter_shared_by_two_layers_has_two_sites() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    model = Net(lambda m, x: m.b(m.a(x)), a=a, b=b)
    for region in both(model):
        assert named(region) == [("a", "a.weight", 0), ("b", "b.weight", 0)]


def test_head_tied_to_the_embedding() -> None:
    embedding, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
    head.weight = embedding.weight
    model = Net(lambda m, x: m.head(m.embedding(x)), embedding=embedding, head=head)
    for region in (region_of(model), exported(model, torch.arange(5))):
        assert named(region) == [("embedding", "embedding.weight", 0), ("head", "head.weight", 0)]


def test_bare_parameters_of_the_root_and_of_a_block() -> None:
    block = Net(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(3, 3)))
    model = Net(lambda m, x: F.linear(m.block(x), m.w), block=block, w=nn.Parameter(torch.randn(3, 3)))
    for region in both(model):
        assert named(region) == [("block.w", "block.w", 0), ("w", "w", 0)]
        owners = [site.owner for site in find_sites(region)]
        assert owners == ["block.lora_parameters.w", "lora_parameters.w"]


def test_parameter_called_weight_belongs_to_its_module() -> None:
    own = Net(lambda m, x: F.linear(x, m.weight), weight=nn.Parameter(torch.randn(4, 3)))
    model = Net(lambda m, x: m.own(x), own=own)
    for region in both(model):
        assert named(region) == [("own", "own.weight", 0)]
        assert find_sites(region)[0].owner == "own"


def test_weight_of_a_layer_used_by_a_function() -> None:
    model = Net(lambda m, x: F.linear(x, m.fc.weight) + m.fc(x), fc=nn.Linear(3, 4))
    for region in both(model):
        assert named(region) == [("fc", "fc.weight", 0), ("fc", "fc.weight", 1)]


def test_branch_owner() -> None:
    assert branch_owner("h.0.fc", is_parameter=False) == "h.0.fc"
    assert branch_owner("h.0.w", is_parameter=True) == "h.0.lora_parameters.w"
    assert branch_owner("w", is_parameter=True) == "lora_parameters.w"


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        (None, ""),
        ({}, ""),
        ({"a": ("", "Net"), "b": ("h.0", "Block"), "c": ("h.0.fc", "Linear")}, "h.0.fc"),
        ({"a": ("", "Net"), "c": ("h.0.fc@1", "Linear")}, "h.0.fc"),
        ({"a": ("h@12.0.fc", "Linear")}, "h.0.fc"),
        ({"a": ("_empty_nn_module_stack_from_metadata_hook", "")}, ""),
    ],
)
def test_owning_path(stack: dict[str, tuple[str, str]] | None, path: str) -> None:
    node = fx.Graph().placeholder("x")
    if stack is not None:
        node.meta["nn_module_stack"] = stack
    assert owning_path(node) == path
