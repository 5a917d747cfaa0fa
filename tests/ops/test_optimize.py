"""`fxlora.optimize`: the code of an optimized model computes what its canonical graphs do, and is only put in place of theirs."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import AdapterError, LoraConfig, LoraModel, lora_transform, optimize
from fxlora._passes import SELF_CALL
from fxlora.compile import optimized as dynamo_graph

CAPTURES = ("modules", "symbolic", "export")
TARGETS = ["q", "k", "v", "gate", "up", "down"]


class Mlp(nn.Module):
    """A SwiGLU block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 12, bias=False)
        self.up = nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Down of the product."""
        return self.down(self.act(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """Three layers that share an input, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 4)
        self.v = nn.Linear(8, 4)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Mixed."""
        h = torch.tanh(self.q(x)) + torch.cat([self.k(x), self.v(x)], -1)
        return h + self.mlp(h)


def config(**options: Any) -> LoraConfig:
    """Of all layers, with factors that are not zero."""
    settings: dict[str, Any] = {"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **options}
    return LoraConfig(**settings)


_MADE: dict[str, Any] = {}


def transformed(capture: str, net: type[nn.Module] = Net, **options: Any) -> Any:
    """A model with an adapter, the same at each call."""
    key = f"{capture} {net.__qualname__} {options}"
    if key not in _MADE:
        torch.manual_seed(0)
        example = (torch.randn(3, 5, 8),)
        _MADE[key] = lora_transform(net(), config(**options), capture=capture, example_inputs=example)  # pyright: ignore[reportArgumentType]
    return copy.deepcopy(_MADE[key])


def results(model: Any, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """The output and all gradients, from a fixed seed."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    y = (model if call is None else call)(x)
    y.square().sum().backward()
    trained = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.grad is not None]
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in trained)]  # pyright: ignore[reportReturnType]


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    """An input."""
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2), dtype=dtype)


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to rounding, which goes by the largest entry of each tensor."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        largest = max(b.abs().max().item(), 1e-3) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest)


def assert_same(model: Any, canonical: Any, dtype: torch.dtype = torch.float32) -> None:
    """Output and gradients are equal up to rounding."""
    assert_near(results(model, batch(dtype)), results(canonical, batch(dtype)))


def calls(graph: torch.fx.Graph) -> list[int]:
    """How many layers each operator of a graph is for."""
    return [len(node.args[1]) for node in graph.nodes if "branched" in str(node.target)]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("training", [False, True])
def test_computes_what_the_canonical_graphs_do(capture: str, training: bool) -> None:
    model, canonical = transformed(capture).train(training), transformed(capture).train(training)
    report = optimize(model)
    assert sorted(report.lowered) == sorted(["q", "k", "v", "mlp.gate", "mlp.up", "mlp.down"])
    assert not report.kept
    assert_same(model, canonical)
    assert len(results(model, batch())) == 2 + 12
    model.verify()
    assert fxlora.diff(model, canonical).is_empty


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_a_whole_graph_joins_siblings_and_blocks(capture: str) -> None:
    model = transformed(capture)
    report = optimize(model)
    assert report.shared == ("q", "k", "v")
    assert report.blocks == (("mlp.gate", "mlp.up", "mlp.down"),)
    assert calls(model.lowered_regions()[0].graph) == [3, 3]
    difference = fxlora.diff(model.regions()[0].graph, model.lowered_regions()[0].graph)
    assert difference.removed
    assert difference.inserted


@pytest.mark.parametrize("capture", CAPTURES)
def test_is_undone(capture: str) -> None:
    model, canonical = transformed(capture), transformed(capture)
    classes = {name: type(module) for name, module in model.named_modules() if name}
    before = results(model, batch())
    optimize(model)
    report = optimize(model, False)
    assert not report.enabled
    assert str(report) == "The model runs its canonical graphs."
    assert {name: type(module) for name, module in model.named_modules() if name} == classes
    assert all(torch.equal(a, b) for a, b in zip(results(model, batch()), before, strict=True))
    assert fxlora.diff(model, canonical).is_empty


@pytest.mark.parametrize("capture", CAPTURES)
def test_dropout_is_decided_by_the_generator(capture: str) -> None:
    model = transformed(capture, lora_dropout=0.4)
    canonical = results(model.eval(), batch())
    optimize(model)
    assert_near(results(model, batch()), canonical)
    first, second = results(model.train(), batch()), results(model, batch())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.allclose(first[0], canonical[0])
    again = results(model, batch(), lambda x: checkpoint(model, x, use_reentrant=False))  # pyright: ignore[reportArgumentType]
    assert_near(again, first)


def test_one_layer_without_dropout_among_siblings() -> None:
    model = transformed("symbolic", lora_dropout=0.4)
    optimize(model)
    model.train()
    model.k.lora_dropout.eval()
    torch.manual_seed(0)
    a, b = model(batch()), model.eval()(batch())
    assert not torch.allclose(a, b)
    model.train()
    for name in TARGETS:
        (model.mlp if name in ("gate", "up", "down") else model).get_submodule(name).lora_dropout.eval()
    torch.testing.assert_close(model(batch()), b)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_optimized(capture: str, copied: Callable[[Any], Any]) -> None:
    model = transformed(capture)
    optimize(model)
    other = copied(model)
    assert optimize(other).lowered
    assert_same(other, model)
    optimize(other, False)
    assert_same(other, model)


LIFECYCLE: dict[str, Callable[[Any, Path], object]] = {
    "add": lambda m, _: m.add_adapter("b", config(r=3, target_modules=["q", "up"])),
    "both": lambda m, _: (m.add_adapter("b", config(r=3)), m.set_adapter(["default", "b"])),
    "set": lambda m, _: (m.add_adapter("b", config(r=3, target_modules=["q", "up"])), m.set_adapter("b")),
    "delete": lambda m, _: (m.add_adapter("b", config(r=3)), m.delete_adapter("default")),
    "merge": lambda m, _: m.merge_adapter(),
    "unmerge": lambda m, _: (m.merge_adapter(), m.unmerge_adapter()),
    "load": lambda m, path: (m.save_pretrained(path), m.load_adapter(path, "b"), m.set_adapter("b")),
    "scale": lambda m, _: m.set_scale("default", 0.25),
    "disable": lambda m, _: m.disable_adapter_layers(),
    "enable": lambda m, _: (m.disable_adapter_layers(), m.enable_adapter_layers()),
    "slots": lambda m, _: (m.eval(), m.use_slots(), m.leave_slots()),
    "weighted": lambda m, _: (m.add_weighted_adapter(["default"], [2.0], "c", "linear"), m.set_adapter("c")),
}


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
@pytest.mark.parametrize("step", LIFECYCLE)
def test_holds_through_changes_of_adapters(capture: str, step: str, tmp_path: Path) -> None:
    model, canonical = transformed(capture), transformed(capture)
    optimize(model)
    for each in (model, canonical):
        torch.manual_seed(5)
        LIFECYCLE[step](each, tmp_path / str(each is model))
    assert model._lora.optimized
    assert_same(model, canonical)
    model.verify()
    assert_same(optimize(model, False) and model, canonical)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_follows_a_change_of_dtype(capture: str) -> None:
    model, canonical = transformed(capture), transformed(capture)
    optimize(model)
    assert_same(model.double(), canonical.double(), torch.float64)


def test_float32_factors_on_a_bfloat16_base() -> None:
    model = transformed("modules").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    canonical = copy.deepcopy(model)
    optimize(model)
    ours, theirs = results(model, batch(torch.bfloat16)), results(canonical, batch(torch.bfloat16))
    assert_near(ours, theirs, 0.1)


@pytest.mark.parametrize("capture", CAPTURES)
def test_within_autocast_and_without_gradients(capture: str) -> None:
    model, canonical = transformed(capture), transformed(capture)
    optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch()).dtype == canonical(batch()).dtype
        torch.testing.assert_close(model(batch()), canonical(batch()), rtol=0.02, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), canonical(batch()))
    with torch.inference_mode():
        torch.testing.assert_close(model(batch()), canonical(batch()))


def test_transforms_of_functions_see_the_canonical_computation() -> None:
    model, canonical = transformed("modules"), transformed("modules")
    optimize(model)
    torch.testing.assert_close(torch.vmap(model)(batch()), canonical(batch()))
    tangent = torch.ones_like(batch())
    torch.testing.assert_close(
        torch.func.jvp(model, (batch(),), (tangent,)), torch.func.jvp(canonical, (batch(),), (tangent,))
    )


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (2, 0, 8), (2, 3, 4, 8)])
def test_inputs_of_other_shapes(shape: tuple[int, ...]) -> None:
    model, canonical = transformed("symbolic"), transformed("symbolic")
    optimize(model)
    x = torch.randn(shape)
    assert_near(results(model, x), results(canonical, x))
    x = torch.randn(*shape, 2)[..., 0]
    torch.testing.assert_close(model(x), canonical(x))


def test_a_base_that_is_trained_too() -> None:
    model, canonical = transformed("symbolic"), transformed("symbolic")
    optimize(model)
    for each in (model, canonical):
        each.requires_grad_(True)
    assert len(results(model, batch())) == len(results(canonical, batch())) == 2 + 12 + 9
    assert_same(model, canonical)


def test_outputs_can_be_changed_in_place() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x)
            return y.mul_(2) + self.k(x)

    model, canonical = (transformed("symbolic", Changing, target_modules=["q", "k"]) for _ in range(2))
    assert not optimize(model).shared, "what lies behind a write is computed there"
    assert_same(model, canonical)


def test_inputs_that_change_between_two_layers() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            y = self.q(x)
            x.mul_(2)
            return y + self.k(x)

    model, canonical = (transformed("symbolic", Changing, target_modules=["q", "k"]) for _ in range(2))
    assert not optimize(model).shared
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), canonical(batch()))


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_hooks_see_what_they_would(capture: str) -> None:
    model, canonical = transformed(capture), transformed(capture)
    optimize(model)
    seen: dict[str, list[Tensor]] = {}
    for each in (model, canonical):
        for name in ("q", "mlp.gate"):
            module = each.get_submodule(name)
            module.register_forward_hook(
                lambda _m, _x, y, e=each, n=name: seen.setdefault(f"{e is model} {n}", []).append(y)
            )
            module.register_forward_pre_hook(lambda _m, x: (x[0] * 2,))
    assert_same(model, canonical)
    for name in ("q", "mlp.gate"):
        torch.testing.assert_close(seen[f"True {name}"], seen[f"False {name}"])


def test_says_what_stays_and_why() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), Own(8, 8)
            self.conv = nn.Conv1d(5, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.q(x) + self.k(x))

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    targets = ["q", "k", "conv"]
    model, canonical = (transformed("modules", Mixed, target_modules=targets) for _ in range(2))
    report = optimize(model)
    assert report.lowered == ("q",)
    assert {sites: reason for reason, sites in report.kept.items()} == {
        ("k",): "its class has a forward of its own",
        ("conv",): "layers of kind 'conv' have no operator",
    }
    assert_same(model, canonical)
    for each in (model, canonical):
        torch.manual_seed(3)
        each.add_adapter("b", config(target_modules=["q"]))
        each.set_adapter(["default", "b"])
    assert_same(model, canonical)
    assert "adapter 'b' is added to what the operator of another adapter gives" in optimize(model).kept
    with model.adapter_rows(["default", "b", "default"]), canonical.adapter_rows(["default", "b", "default"]):
        torch.testing.assert_close(model.eval()(batch()), canonical.eval()(batch()))


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"use_dora": True, "lora_dropout": 0.3},
            "DoRA with dropout multiplies the layer's own weight with the dropped",
        ),
        ({"lora_bias": True}, "the branch has a bias"),
    ],
)
def test_other_branches_stay(capture: str, options: dict[str, Any], reason: str) -> None:
    model, canonical = transformed(capture, **options), transformed(capture, **options)
    report = optimize(model)
    assert not report.lowered
    (only,) = report.kept
    assert reason in only
    assert all(torch.equal(a, b) for a, b in zip(results(model, batch()), results(canonical, batch()), strict=True))


def test_the_report_as_text_and_data() -> None:
    report = optimize(transformed("symbolic"))
    assert json.loads(json.dumps(report.to_dict()))["shared"] == ["q", "k", "v"]
    text = str(report)
    assert "6 layers with branches are lowered: 3 share a call, 1 SwiGLU block in one call each." in text
    assert "1 × float32 8 -> 8 + 4 + 4, r 2: ATen's products (no Triton kernels on cpu)" in text


def calls_when_compiled(model: nn.Module, canonical: nn.Module) -> list[list[int]]:
    """The numbers of layers in all calls of operators, by graph, of a model that computes what the canonical one does."""
    seen: list[list[int]] = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        changed = dynamo_graph(gm)
        seen.append([len(node.args[1]) for node in changed.graph.nodes if "fxlora.lora_" in str(node.target)])  # pyright: ignore[reportArgumentType]
        return changed.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_near(results(model, batch(), compiled), results(canonical, batch()))
    return seen


@pytest.mark.parametrize("capture", CAPTURES)
def test_compiles_in_one_graph(capture: str) -> None:
    torch._dynamo.reset()
    model, canonical = transformed(capture), transformed(capture)
    optimize(model)
    assert calls_when_compiled(model, canonical) == [[3, 3]]


@pytest.mark.parametrize("capture", CAPTURES)
def test_exported_programs_are_canonical(capture: str) -> None:
    model, canonical = transformed(capture).eval(), transformed(capture).eval()
    optimize(model)
    program = torch.export.export(model, (batch(),))
    assert not [node for node in program.graph.nodes if "fxlora" in str(node.target)]
    torch.testing.assert_close(program.module()(batch()), canonical(batch()))


def test_needs_a_transformed_model() -> None:
    with pytest.raises(AdapterError, match="a model from lora_transform, not a plain Net"):
        optimize(Net())


def test_layers_alike_share_a_class() -> None:
    model = transformed("modules")
    optimize(model)
    assert type(model.q) is type(model.k)
    assert issubclass(type(model.q), nn.Linear)
    assert getattr(type(model.q), SELF_CALL) is nn.Linear.forward
    assert isinstance(model, LoraModel)


class Deep(nn.Module):
    """Two nets in sequence, of which each has a block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(), Net()])

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_blocks_among_modules() -> None:
    model, canonical = transformed("modules", Deep), transformed("modules", Deep)
    report = optimize(model)
    assert report.blocks == tuple(tuple(f"layers.{i}.mlp.{n}" for n in ("gate", "up", "down")) for i in (0, 1))
    first, second = model.layers[0].mlp, model.layers[1].mlp
    assert type(first) is type(second) is not Mlp
    assert isinstance(first, Mlp)
    assert_same(model, canonical)
    assert fxlora.diff(model, canonical).is_empty
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.layers[0].mlp) is type(first)
        assert_same(copied, canonical)
    optimize(model, False)
    assert type(first) is Mlp
    assert set(vars(first)) == set(vars(Mlp()))


@pytest.mark.parametrize("training", [False, True])
def test_blocks_heed_hooks_and_dropout(training: bool) -> None:
    model, canonical = transformed("modules", lora_dropout=0.3), transformed("modules", lora_dropout=0.3)
    assert optimize(model).blocks
    seen: list[str] = []
    handle = model.mlp.up.register_forward_hook(lambda *_: seen.append("up"))
    model.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    assert_same(model.eval(), canonical.eval())
    assert seen == ["up", "mlp"]
    handle.remove()
    model.train(training)
    first, second = results(model, batch()), results(model, batch())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.allclose(first[0], canonical(batch()), rtol=1e-4, atol=1e-3) is not training
    assert seen[2:] == ["mlp", "mlp"]


def test_no_block_where_the_module_does_more() -> None:
    class Scaled(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Branching(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training or x.sum() > 0 else x

    class WithBias(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(12, 8)

    for net in (Scaled, Branching, WithBias):
        model, canonical = (transformed("modules", net, target_modules=["gate", "up", "down"]) for _ in range(2))
        assert not optimize(model).blocks
        assert_same(model, canonical)
    kept = ["gate", "up"]
    model, canonical = (transformed("modules", target_modules=kept) for _ in range(2))
    assert not optimize(model).blocks
    assert_same(model, canonical)


def test_blocks_of_unequal_ranks_and_trained_weights() -> None:
    model, canonical = (transformed("modules", rank_pattern={"down": 5, "gate": 3}) for _ in range(2))
    assert optimize(model).blocks
    assert_same(model, canonical)
    for each in (model, canonical):
        each.mlp.requires_grad_(True)
    assert len(results(model, batch())) == 2 + 12 + 3
    assert_same(model, canonical)


def test_a_replaced_part_runs() -> None:
    model = transformed("modules")
    optimize(model)
    model.mlp.down = nn.Linear(12, 8, bias=False)
    gate, up = model.mlp.gate(batch()), model.mlp.up(batch())
    torch.testing.assert_close(model.mlp(batch()), model.mlp.down(nn.functional.silu(gate) * up))


@pytest.mark.parametrize("optimizing", [False, True])
def test_the_backend_makes_no_block_of_unequal_ranks_or_trained_weights(optimizing: bool) -> None:
    for options, trained in (({"rank_pattern": {"down": 5}}, False), ({}, True)):
        torch._dynamo.reset()
        model, canonical = transformed("modules", **options), transformed("modules", **options)
        if optimizing:
            optimize(model)
        for each in (model, canonical):
            each.mlp.down.weight.requires_grad_(trained)
        compiled = torch.compile(model, backend=lambda gm, _: dynamo_graph(gm).forward)
        assert len(results(canonical, batch())) == 2 + 12 + trained
        assert_near(results(model, batch(), compiled), results(canonical, batch()))
