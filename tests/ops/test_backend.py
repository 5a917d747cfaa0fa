"""`torch.compile(model, backend="fxlora")`: operators in real models, unchanged numbers, no breaks, modes, fallback."""

from __future__ import annotations

import contextlib
import logging
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends import registry
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fxlora
import fxlora.compile
from fxlora import LoraConfig, lora_transform
from fxlora.compile import backend
from fxlora.ops import choice
from tests.ops.compiling import BLOCK, Recorder, adapted, close, output, with_gradients
from tests.zoo import ARCHITECTURES

ZOO = {entry.name: entry for entry in ARCHITECTURES}


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=backend, fullgraph=True, **options)


LAYERS = {
    "llama": ([3, 1, 3, 1], 2),  # of both blocks: query, key, value; output
    "qwen2": ([3, 1, 3, 1], 2),  # with biases
    "gemma2": ([3, 1, 2, 1, 3, 1, 2, 1], 0),  # GELU in place of SiLU
    "qwen3-moe": ([3, 1, 3, 1], 0),
    "bert": ([2, 1, 1, 1, 2, 1, 1, 1, 1], 0),
    "vit": ([2, 2], 0),
    "gpt2": ([], 0),  # Conv1D stays canonical
}


def skip_if_torch_breaks(model: nn.Module, batch: Any) -> None:
    """Some versions of torch cannot make one graph of a mixture of experts, forward or backward."""
    if not any(name.endswith("experts") for name, _ in model.named_modules()):
        return
    try:
        with_gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"without our backend it is not one graph either: {error}")
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "train"), [*((name, False) for name in LAYERS), ("llama", True), ("bert", True)])
def test_models(name: str, train: bool, recorder: Recorder) -> None:
    model, batch = adapted(ZOO[name], train=train), ZOO[name].batch()
    skip_if_torch_breaks(model, batch)
    right = with_gradients(model, model, batch)
    found = with_gradients(model, compiled(model), batch)
    assert close(found, right)
    assert len(recorder.graphs) == 1  # fullgraph raises at a break
    siblings, blocks = LAYERS[name]
    assert (recorder.calls("lora_linear_siblings"), recorder.calls("lora_swiglu")) == (siblings, [3] * blocks)


def check(model: nn.Module, recorder: Recorder, siblings: list[int], blocks: int, tolerance: float = 1e-5) -> None:
    """The compiled block computes what the model does, by these operators."""
    x = torch.randn(3, 5, 8, dtype=next(model.parameters()).dtype)
    assert close(with_gradients(model, compiled(model), x), with_gradients(model, model, x), tolerance)
    assert (recorder.calls("lora_linear_siblings"), recorder.calls("lora_swiglu")) == (siblings, [3] * blocks)


def test_block(recorder: Recorder) -> None:
    check(adapted(BLOCK), recorder, [3, 1], 1)


def test_no_grad(recorder: Recorder) -> None:
    model, x = adapted(BLOCK), torch.randn(3, 5, 8)
    with torch.no_grad():
        assert close([output(compiled(model), x)], [output(model, x)])
    assert recorder.calls("lora_swiglu") == [3]


def test_half_of_the_layers_have_branches(recorder: Recorder) -> None:
    """Gate has none: nothing to fuse with up."""
    model = adapted(BLOCK, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    check(model, recorder, [2, 1, 1], 0)


def test_other_ranks_in_a_block(recorder: Recorder) -> None:
    check(adapted(BLOCK, rank_pattern={"up_proj": 2, "down_proj": 7, "k_proj": 1}), recorder, [3, 1], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora(dtype: torch.dtype, recorder: Recorder) -> None:
    model, x = adapted(BLOCK, use_dora=True).to(dtype), torch.randn(3, 5, 8, dtype=dtype)
    right = with_gradients(model, model, x)
    assert close(with_gradients(model, compiled(model), x), right, 1e-5 if dtype == torch.float32 else 0.05)
    assert (recorder.calls("lora_dora_siblings"), recorder.calls("lora_dora_swiglu")) == ([3, 1], [3])


def test_dora_under_autocast(recorder: Recorder) -> None:
    model, x = adapted(BLOCK, use_dora=True), torch.randn(3, 5, 8)

    def under_autocast(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    right = with_gradients(model, under_autocast, x)
    assert close(with_gradients(model, compiled(under_autocast), x), right, 0.05)
    assert (recorder.calls("lora_dora_siblings"), recorder.calls("lora_dora_swiglu")) == ([3, 1], [3])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_on_a_cpu(dtype: torch.dtype, autocast: bool, composed: None, recorder: Recorder) -> None:
    """In torch's own operations, with biases and without."""
    model, x = adapted(BLOCK, use_dora=True).to(dtype), torch.randn(3, 5, 8, dtype=dtype)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5

    def call(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    right = with_gradients(model, call, x)
    found = with_gradients(model, compiled(call), x)
    assert found[0].dtype == right[0].dtype
    assert close(found, right, 0.05 if autocast or dtype == torch.bfloat16 else 1e-5)
    assert not [node for node in recorder.nodes() if "fxlora" in str(node.target)]


def test_dora_and_checkpointing(recorder: Recorder) -> None:
    config = LoraConfig(r=4, target_modules=["q", "k"], init_lora_weights=False, use_dora=True)
    model = lora_transform(Checkpointed(), config)
    x = torch.randn(5, 16)
    assert close(with_gradients(model, compiled(model), x), with_gradients(model, model, x))
    assert recorder.calls("lora_dora_siblings") == [2]


def test_float32_factors_of_a_16_bit_model(recorder: Recorder) -> None:
    model = adapted(BLOCK).to(torch.bfloat16)
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in factors:
        parameter.data = parameter.data.float()
    check(model, recorder, [3, 1], 1, 0.05)
    assert all(factor.grad is not None and factor.grad.dtype == torch.float32 for factor in factors)


def test_trained_base_weights_and_biases(recorder: Recorder) -> None:
    model = adapted(BLOCK).requires_grad_(True)
    check(model, recorder, [3, 1], 1)


def test_autocast(recorder: Recorder) -> None:
    model, x = adapted(BLOCK), torch.randn(3, 5, 8)

    def under_autocast(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    right = with_gradients(model, under_autocast, x)
    assert close(with_gradients(model, compiled(under_autocast), x), right, 0.03)
    assert recorder.calls("lora_linear_siblings") == [3, 1] and recorder.calls("lora_swiglu") == [3]
    assert not close(right, with_gradients(model, model, x), 1e-4)  # autocast does round
    assert output(compiled(under_autocast), x).dtype == output(under_autocast, x).dtype == torch.float32
    calls = [node for node in recorder.nodes() if str(node.target).startswith("fxlora.lora_")]
    assert not any("residual" in call.kwargs for call in calls)  # which is wider than what the layers give


class Checkpointed(nn.Module):
    """Two layers on one input, recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found = checkpoint(lambda x: torch.tanh(self.q(x)) + self.k(x), x, use_reentrant=False)
        assert isinstance(found, Tensor)
        return found


def test_checkpointing_of_a_block(recorder: Recorder) -> None:
    """The branches are in a graph within the graph."""
    model = lora_transform(Checkpointed(), LoraConfig(r=4, target_modules=["q", "k"], init_lora_weights=False))
    x = torch.randn(5, 16)
    assert close(with_gradients(model, compiled(model), x), with_gradients(model, model, x))
    assert recorder.calls("lora_linear_siblings") == [2]


def test_checkpointing_with_dropout(recorder: Recorder) -> None:
    """With base weights of zero the loss is linear in each factor: `<B, dB> = loss` if and only if the masks are equal."""
    config = LoraConfig(r=4, target_modules=["k"], lora_dropout=0.5, init_lora_weights=False)
    model = lora_transform(Checkpointed(), config).train()
    with torch.no_grad():
        model.q.weight.zero_()
        model.k.weight.zero_()
    call = compiled(model)
    losses: list[float] = []
    for _ in range(3):
        model.zero_grad()
        loss = call(torch.randn(32, 16)).sum()
        loss.backward()
        for name in ("lora_A", "lora_B"):
            factor = model.k.get_parameter(f"{name}.default.weight")
            assert factor.grad is not None
            torch.testing.assert_close((factor * factor.grad).sum(), loss, atol=1e-3, rtol=1e-4)
        losses.append(loss.item())
    assert recorder.calls("lora_linear_siblings") == [1] and len(recorder.graphs) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_checkpointing_of_transformers(recorder: Recorder) -> None:
    entry = ZOO["llama"]
    model = adapted(entry, train=True)
    right = with_gradients(model, model, entry.batch())
    # the name of it changed in transformers 5.20
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    plain = graphs_without_backend(model, entry.batch())
    call = torch.compile(model, backend=backend)  # transformers' hook on the embedding breaks the graph
    assert close(with_gradients(model, call, entry.batch()), right)
    assert len(recorder.graphs) == plain
    assert recorder.calls("lora_linear_siblings") == [3, 1, 3, 1] and recorder.calls("lora_swiglu") == [3, 3]


def graphs_without_backend(model: nn.Module, *batches: Any, **options: Any) -> int:
    """How many graphs Dynamo makes for these batches."""
    torch._dynamo.reset()
    count = CompileCounter()
    call = torch.compile(model, backend=count, **options)
    for batch in batches:
        output(call, batch)
    torch._dynamo.reset()
    return count.frame_count


def test_dropout_follows_the_seed(recorder: Recorder) -> None:
    model, x = adapted(BLOCK, train=True, lora_dropout=0.5), torch.randn(3, 5, 8)
    call = compiled(model)
    first, again = (with_gradients(model, call, x) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    torch.manual_seed(4)
    assert not torch.equal(call(x), first[0])
    seeds = [node for node in recorder.nodes() if node.target is torch.randint]
    assert len(seeds) == len(recorder.calls("lora_linear_siblings")) + len(recorder.calls("lora_swiglu")) == 3
    model.eval()
    recorder.graphs.clear()
    check(model, recorder, [3, 1], 1)


@pytest.mark.parametrize("how", ["dynamic", "marked", "unmarked"])
def test_lengths(how: str, recorder: Recorder) -> None:
    """As many graphs as without the backend: one for all lengths; without a mark, one more from the second length on."""
    model = adapted(BLOCK)
    batches = [torch.randn(3, length, 8) for length in (11, 7, 16)]
    for x in batches:
        if how == "marked":
            torch._dynamo.mark_dynamic(x, 1)
    options = {"fullgraph": True, "dynamic": True if how == "dynamic" else None}
    expected = 2 if how == "unmarked" else 1
    assert graphs_without_backend(model, *batches, **options) == expected
    call = torch.compile(model, backend=backend, **options)
    for x in batches:
        assert close(with_gradients(model, call, x), with_gradients(model, model, x))
    assert len(recorder.graphs) == expected and recorder.calls("lora_swiglu") == [3] * expected


def test_several_adapters(recorder: Recorder) -> None:
    """The first branch of each layer is in the operator, those of further adapters stay canonical."""
    model = adapted(BLOCK)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for active, siblings, blocks in ((["default"], [3, 1], 1), (["other"], [1], 0), (["default", "other"], [3, 1], 1)):
        torch._dynamo.reset()
        recorder.graphs.clear()
        model.set_adapter(active)
        check(model, recorder, siblings, blocks)


def test_disabled_and_merged(recorder: Recorder) -> None:
    model, x = adapted(BLOCK), torch.randn(3, 5, 8)
    call = compiled(model)
    with_branches = output(call, x)
    with model.disable_adapter():
        base = output(call, x)
        assert close([base], [output(model, x)])
    assert not torch.allclose(base, with_branches)
    assert torch.equal(output(call, x), with_branches)
    model.merge_adapter()
    assert close([output(call, x)], [with_branches])
    assert recorder.calls("lora_swiglu") == [3]  # of the first graph alone


def test_modes_and_options_are_passed_on(recorder: Recorder) -> None:
    model = nn.Linear(3, 3)
    cases: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
        ({}, None),
        ({"mode": "default"}, None),
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True, "coordinate_descent_tuning": True}),
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        (
            {"options": {"max-autotune": True, "epilogue_fusion": False}},
            {"max_autotune": True, "epilogue_fusion": False},
        ),
    ]
    for options, patches in cases:
        torch._dynamo.reset()
        compiled(model, **options)(torch.randn(2, 3))
        found = recorder.patches[-1]
        assert found is patches is None or (
            found is not None and patches is not None and patches.items() <= found.items()
        )


def test_what_the_host_would_wait_for_is_left_to_torch(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless launches are recorded in CUDA graphs."""
    asked: list[tuple[str, int, float]] = []

    def waits(device: torch.device, layers: int, multiplications: float) -> bool:
        asked.append((device.type, layers, multiplications))
        return True

    monkeypatch.setattr(choice, "waits_for_host", waits)
    model, x = adapted(BLOCK), torch.randn(3, 5, 8)
    right = with_gradients(model, model, x)
    with caplog.at_level("INFO", "fxlora"):
        assert close(with_gradients(model, compiled(model), x), right)
    branches = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert asked == [("cpu", 7, 15 * (4 * 8 * 8 + 3 * 8 * 12 + branches))]
    assert recorder.calls("lora_swiglu") == []
    assert "7 layers with branches are left to torch's own operations" in caplog.text
    torch._dynamo.reset()
    compiled(model, mode="reduce-overhead")(x)
    assert recorder.calls("lora_swiglu") == [3]


class Halves(nn.Module):
    """A layer whose device is not that of the branched one."""

    def forward(self, x: Any, W: Any, y: Any, V: Any, A: Any, B: Any, scale: Any) -> Any:
        first, base = F.linear(x, W), F.linear(y, V)
        return first, base + F.linear(F.linear(y, A), B) * scale


def test_the_host_waits_for_the_device_of_the_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, float]] = []
    monkeypatch.setattr(
        choice, "waits_for_host", lambda device, layers, count: asked.append((device.type, layers, count))
    )
    graph = fx.symbolic_trace(Halves()).graph
    sizes = {"x": (50, 8), "W": (4, 8), "y": (6, 8), "V": (4, 8), "A": (2, 8), "B": (4, 2), "scale": ()}
    examples = {name: torch.empty(size, device="meta" if name in "xW" else "cpu") for name, size in sizes.items()}
    for node in graph.nodes:
        node.meta["example_value"] = examples.get(node.target, torch.empty(6, 2))  # of the others only one is read
    assert not fxlora.compile._waits_for_host(graph)
    assert asked == [("cpu", 1, 6 * (8 * 4 + 8 * 2 + 2 * 4))]


@pytest.mark.parametrize("step", ["lower", "fuse_siblings", "fuse_swiglu", "fuse_residual", "recompute"])
def test_fallback(
    step: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault in the rewriting costs speed, and nothing else."""
    original = getattr(fxlora.compile, step)

    def failing(graph: Any, *args: Any, **options: Any) -> int:
        original(graph, *args, **options)  # what is half done must not be seen
        raise KeyError("what a graph may have in it")

    monkeypatch.setattr(fxlora.compile, step, failing)
    model, x = adapted(BLOCK), torch.randn(3, 5, 8)
    with caplog.at_level(logging.WARNING, logger="fxlora"), _propagating():
        found = with_gradients(model, compiled(model), x)
    assert "the graph is compiled without fxlora's operators" in caplog.text
    assert "what a graph may have in it" in caplog.text
    assert close(found, with_gradients(model, model, x))
    assert not recorder.calls("lora_linear_siblings") and not recorder.calls("lora_swiglu")


@contextlib.contextmanager
def _propagating() -> Any:
    logger = logging.getLogger("fxlora")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def test_parameters_stay_known_as_such(recorder: Recorder) -> None:
    """Inductor's CUDA graphs copy all inputs whose place in memory may change, but not parameters."""
    compiled(adapted(BLOCK))(torch.randn(3, 5, 8))
    (gm,) = recorder.graphs
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    assert hasattr(gm, "_param_name_to_source")
    assert inputs and all(hasattr(node, "_dynamo_source") for node in inputs)


def test_tensor_subclasses_stay(recorder: Recorder) -> None:
    """Their `linear` is theirs: quantized and distributed weights."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = lora_transform(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    layer = model.get_submodule("0")
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach().clone()), requires_grad=False)
    compiled(model)(torch.randn(3, 4))
    assert len(recorder.graphs) == 1 and not recorder.calls("lora_linear_siblings")


def test_the_name_is_registered(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch finds it where the package is installed: by the entry point that pyproject.toml declares."""
    file = Path(fxlora.__file__).parents[1] / "pyproject.toml"
    declared = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["entry-points"]["torch_dynamo_backends"]
    entry = EntryPoint("fxlora", declared["fxlora"], "torch_dynamo_backends")
    registry.list_backends()  # torch looks for entry points once
    monkeypatch.setitem(registry._BACKENDS, "fxlora", entry)
    monkeypatch.setitem(registry._COMPILER_FNS, "fxlora", None)
    monkeypatch.delitem(registry._COMPILER_FNS, "fxlora")
    torch.compile(adapted(BLOCK), backend="fxlora")(torch.randn(3, 5, 8))
    assert registry.lookup_backend("fxlora") is backend
    assert recorder.calls("lora_swiglu") == [3]


@pytest.mark.slow
def test_inductor() -> None:
    """The real compiler, whose cache on disk takes the graphs, also those with dropout."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = adapted(BLOCK, lora_dropout=0.5), torch.randn(3, 5, 8)
    assert close(with_gradients(model, compiled(model), x), with_gradients(model, model, x))
    model.train()
    found = with_gradients(model, compiled(model), x)
    again = with_gradients(model, compiled(model), x)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    assert not torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_bypass"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_sources_and_residuals(use_dora: bool, recorder: Recorder) -> None:
    """Of each block: the two norms' inputs are kept in place of their outputs, and both sums are parts of operators."""
    entry = ZOO["llama"]
    model = adapted(entry, train=True, use_dora=use_dora)
    right = with_gradients(model, model, entry.batch())
    assert close(with_gradients(model, compiled(model), entry.batch()), right)
    calls = [node for node in recorder.nodes() if str(node.target).startswith("fxlora.lora_")]
    assert [name in call.kwargs for call in calls for name in ("source", "residual")] == [
        *(True, False), *(False, True), *(True, True),
    ] * 2  # fmt: skip


def test_graphs_are_logged(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FXLORA_LOGS", "graph")
    with caplog.at_level(logging.INFO, logger="fxlora"), _propagating():
        output(compiled(adapted(BLOCK)), torch.randn(3, 5, 8))
    lines = caplog.text.splitlines()
    assert any("lora_swiglu" in line and "residual=" in line for line in lines)


@pytest.mark.parametrize("of_torch", [False, True])
def test_the_source_is_kept_in_place_of_the_input(of_torch: bool) -> None:
    """As much is kept for the backward pass as the norm keeps, and what has a rank for features."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 48, bias=False)

        def forward(self, h: Tensor) -> Tensor:
            if of_torch:
                return self.layer(F.rms_norm(h, (64,), eps=1e-6))
            return self.layer(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    model = lora_transform(Normed(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    h = torch.randn(32, 64, requires_grad=True)
    torch._dynamo.reset()
    call = compiled(model)
    call(h)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        call(h)
    activations = [value for value in kept.values() if value.dim() and len(value) == 32]
    assert sum(value.numel() for value in activations) <= 32 * (64 + 2 + 2)
