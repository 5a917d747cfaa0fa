"""`adapter_names`: each row of a batch has an adapter of its own, and gives what it gives alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxlora import AdapterError, LoraConfig, lora_transform
from fxlora._passes import RowsError
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import tensors
from tests.oracle.cases import ALL, CASES, Case
from tests.serving.models import largest_error, llama_with_three, moved, names_for, rows_alone, tiny_llama, transformed

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.layer._flat_weights"),
]

LATER = ("activated", "BD-LoRA", "KaSA", "VeLoRA", "MonteCLoRA", "'eva'", "'corda'", "'loftq'", "'lora_ga'")
ONE_ADAPTER = ("bias='all'", "bias='lora_only'")
BATCH_SECOND = (
    "nn.MultiheadAttention, batch second", "nn.MultiheadAttention, kdim and vdim", "nn.LSTM, projections", "nn.GRU",
    "nn.Conv2d, unbatched", "experts (E, out, in)", "experts, two parameters", "experts (E, in, out), two parameters",
)  # fmt: skip
"""Cases whose inputs do not have the rows of a batch in front."""

SERVED = [
    (case, capture)
    for case in CASES
    for capture in case.captures
    if case.name not in (*ONE_ADAPTER, *BATCH_SECOND) and not any(each in case.name for each in LATER)
]
SLOW = [case.name for case in CASES if case.name in ("target_modules: None", "task_type") or "tied" in case.name]
SERVED = [(case, capture) for case, capture in SERVED if capture == "modules" or case.name not in SLOW]

REFUSED = {
    "modules_to_save": ("symbolic", "export"),
    "ensure_weight_tying, modules_to_save": ("export",),
    "nn.ConvTranspose1d": ("export",),
    "nn.ConvTranspose2d, groups": ("export",),
    "nn.Bilinear": ("export",),
    "nn.MultiheadAttention, cross": ("export",),
    "parameter, x @ W": ("symbolic", "export"),
    "Mixtral's experts": ("export",),
    **dict.fromkeys(("nn.RNNCell", "nn.GRUCell", "nn.LSTMCell", "nn.LSTM"), ("export",)),
}
"""What a whole graph cannot give to some rows only: copies of modules, and updates of a weight."""


@pytest.mark.parametrize(("case", "capture"), SERVED, ids=[f"{case.name}-{capture}" for case, capture in SERVED])
def test_each_row_gives_what_it_gives_alone(case: Case, capture: str) -> None:
    model, batch = transformed(case, capture), case.batch()
    rows = next(value for value in batch.values() if isinstance(value, Tensor)).shape[0]
    names = names_for(rows)
    if capture in REFUSED.get(case.name, ()):
        before = snapshot(model)
        with pytest.raises(AdapterError, match="capture='modules'"):
            model(**batch, adapter_names=names)
        assert_unchanged(model, before)
        return
    with torch.no_grad():
        expected = rows_alone(model, names, batch)
        model.set_adapter("a")
        plain = tensors(model(**batch))
        mixed = tensors(model(**batch, adapter_names=names))
        half = mixed[0].dtype in (torch.float16, torch.bfloat16)
        assert largest_error(mixed, expected) < (1e-2 if half else 1e-5)
        assert largest_error(mixed, plain) > 1e-3  # the rows' own adapters, and not the active one
        assert all(torch.equal(x, y) for x, y in zip(tensors(model(**batch)), plain, strict=True))
    model.verify()


TRAINED = [
    (case, capture)
    for case, capture in SERVED
    if capture not in REFUSED.get(case.name, ()) and "float16" not in case.name
]
TRAINED = [(case, capture) for case, capture in TRAINED if "bfloat16" not in case.name and capture == case.captures[-1]]


@pytest.mark.parametrize(("case", "capture"), TRAINED, ids=[f"{case.name}-{capture}" for case, capture in TRAINED])
def test_gradients_are_those_of_the_rows_alone(case: Case, capture: str) -> None:
    if any(value for name, value in case.config.items() if "dropout" in name):
        pytest.skip("dropout draws other masks for other batches: see test_dropout")
    model, batch = transformed(case, capture), case.batch()
    rows = next(value for value in batch.values() if isinstance(value, Tensor)).shape[0]
    names = names_for(rows)
    model.set_adapter(["a"])
    trained = [p for n, p in model.named_parameters() if "lora_" in n or "trainable_tokens" in n or "_to_save" in n]
    for parameter in trained:
        parameter.requires_grad_(True)

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        weights = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
        loss = sum(((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)), torch.zeros(()))
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]

    ours = gradients(tensors(model(**batch, adapter_names=names)))
    for parameter in trained:
        parameter.requires_grad_(True)
    parts: dict[str, list[Tensor]] = {}
    for name in dict.fromkeys(names):
        if name == "__base__":
            continue
        model.set_adapter(name)
        for parameter in trained:
            parameter.requires_grad_(True)
        outputs = tensors(model(**batch))
        mask = torch.tensor([float(each == name) for each in names])
        masked = [out * mask.view(-1, *[1] * (out.dim() - 1)) for out in outputs]
        parts[name] = gradients(masked)
    expected = [sum(each, torch.zeros_like(each[0])) for each in zip(*parts.values(), strict=True)]
    assert largest_error(ours, expected) < 5e-5


# ---- the ways to call ----


def test_adapters_of_other_ranks_targets_and_variants() -> None:
    model, tokens = llama_with_three(), torch.randint(0, 61, (5, 7))
    names = ["a", "__base__", "b", "c", "b"]
    with torch.no_grad():
        expected = rows_alone(model, names, {"input_ids": tokens})
        assert largest_error(tensors(model(tokens, adapter_names=names)), expected) < 1e-5
        with model.adapter_rows(names):
            assert largest_error(tensors(model(input_ids=tokens)), expected) < 1e-5


@pytest.mark.parametrize("slots", [False, True])
def test_generate_with_beams(slots: bool) -> None:
    model, tokens = llama_with_three(), torch.randint(2, 61, (4, 6))
    names = ["a", "__base__", "b", "c"]
    settings: dict[str, Any] = dict(max_new_tokens=6, num_beams=3, do_sample=False, length_penalty=0.7)
    expected: list[Tensor] = []
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            expected.append(model.generate(tokens[row : row + 1], **settings)[0])  # pyright: ignore
    assert len({tuple(each.tolist()) for each in expected}) > 1
    if slots:
        model.use_slots()
    found = model.generate(tokens, adapter_names=names, **settings)  # pyright: ignore
    assert torch.equal(found, torch.stack(expected))
    sampled = model.generate(tokens, adapter_names=names, do_sample=True, num_return_sequences=2, max_new_tokens=3)  # pyright: ignore
    assert sampled.shape == (8, 9)


def test_an_encoder_and_a_decoder_with_beams() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    net = T5ForConditionalGeneration(config).eval()
    model = lora_transform(net, LoraConfig(r=4, target_modules=["q", "v", "wo"]), adapter_name="a", capture="modules")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q", "k"]))
    moved(model)
    model.eval()
    tokens, names = torch.randint(2, 50, (3, 5)), ["b", "__base__", "a"]
    settings: dict[str, Any] = dict(max_new_tokens=5, num_beams=2, do_sample=False)
    expected: list[Tensor] = []
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            expected.append(model.generate(tokens[row : row + 1], **settings)[0])  # pyright: ignore
    found = model.generate(tokens, adapter_names=names, **settings)  # pyright: ignore
    for one, each in zip(found, expected, strict=True):
        assert torch.equal(one[: len(each)], each)


def test_flattened_tokens() -> None:
    """A layer that sees all tokens as rows, as the routers of experts do."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.view(-1, 6)).view(*x.shape[:-1], 5)

    model = lora_transform(Flat(), LoraConfig(r=2, target_modules=["fc"]), adapter_name="a", capture="modules")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["fc"]))
    moved(model)
    x, names = torch.randn(3, 4, 6), ["b", "a", "__base__"]
    with torch.no_grad():
        expected = rows_alone(model, names, {"x": x})
        assert largest_error([model(x, adapter_names=names)], expected) < 1e-5


def test_dropout_differs_from_row_to_row() -> None:
    """Each row has its own adapter's probability, in training only, and its expectation stays."""
    layer = nn.Sequential(nn.Linear(64, 3, bias=False)).double()
    model = lora_transform(layer, LoraConfig(r=1, target_modules=["0"], lora_dropout=0.5), adapter_name="dropped")
    model.add_adapter("none", LoraConfig(r=1, target_modules=["0"]))
    moved(model)
    model.train()
    x, names = torch.randn(3, 64).double(), ["dropped", "none", "__base__"]
    with torch.no_grad():
        model.eval()
        exact = model(x, adapter_names=names)
        model.train()
        draws = torch.stack([model(x, adapter_names=names) for _ in range(4000)])
    assert torch.allclose(draws[0, 1:], exact[1:], rtol=0, atol=1e-12)
    assert draws[:, 0].std(0).min() > 0
    error = (draws[:, 0].mean(0) - exact[0]).abs() / (draws[:, 0].std(0) / 4000**0.5)
    assert error.max() < 5


def test_dora_with_dropout_trains() -> None:
    settings: dict[str, Any] = dict(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    model = lora_transform(nn.Sequential(nn.Linear(6, 4)), LoraConfig(**settings), adapter_name="a")
    model.add_adapter("b", LoraConfig(**settings))
    moved(model)
    model.train()
    model(torch.randn(3, 6), adapter_names=["a", "b", "a"]).sum().backward()
    a = model.get_parameter("0.lora_A.a.weight").grad
    assert a is not None and float(a.abs().max()) > 0


def test_gradient_checkpointing_needs_the_context() -> None:
    model, tokens = llama_with_three(), torch.randint(0, 61, (2, 5))
    model.set_adapter(["a", "b"])
    model.train()
    modern = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # pyright: ignore
    modern({"use_reentrant": False})
    loss = model(tokens, labels=tokens, adapter_names=["a", "__base__"]).loss
    with pytest.raises(RowsError, match="with model.adapter_rows"):
        loss.backward()
    with model.adapter_rows(["a", "__base__"]):
        model(tokens, labels=tokens).loss.backward()
    ours = [p.grad.clone() for n, p in model.named_parameters() if ".a.weight" in n and p.grad is not None]
    model.zero_grad()
    for module in model.modules():
        vars(module).pop("gradient_checkpointing", None)
    model(tokens, labels=tokens, adapter_names=["a", "__base__"]).loss.backward()
    theirs = [p.grad for n, p in model.named_parameters() if ".a.weight" in n and p.grad is not None]
    assert len(ours) == 8 and largest_error(ours, theirs) < 1e-5


def test_training_in_mixed_batches_then_plain_ones() -> None:
    """After a mixed batch in training the model is the ordinary one again at the next call."""
    model, tokens = llama_with_three(), torch.randint(0, 61, (2, 5))
    model.set_adapter("a")
    plain = model(tokens).logits
    model(tokens, adapter_names=["b", "c"]).logits.sum().backward()
    assert torch.equal(model(tokens).logits, plain)
    model.verify()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_copies(copied: Any, capture: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    model = lora_transform(net, LoraConfig(r=2, target_modules=["0", "2"]), adapter_name="a", capture=capture)
    model.add_adapter("b", LoraConfig(r=3, target_modules=["2"]))
    moved(model)
    x, names = torch.randn(3, 6), ["b", "a", "__base__"]
    expected = model(x, adapter_names=names)  # with gradients: the form for rows stays until the next call
    other = copied(model)
    plain = model(x)
    assert torch.equal(other(x), plain)
    assert torch.equal(other(x, adapter_names=names), expected)
    other.set_adapter("b")
    assert torch.equal(model(x), plain)


def test_disabled_adapters_are_disabled_in_a_mixed_batch() -> None:
    model, tokens = llama_with_three(), torch.randint(0, 61, (2, 5))
    with torch.no_grad(), model.disable_adapter():
        base = model(tokens).logits
        assert torch.equal(model(tokens, adapter_names=["a", "b"]).logits, base)


# ---- refusals ----


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("a", TypeError, "must be a list of names"),
        ([1, 2], TypeError, "must be a list of names"),
        ([], AdapterError, "empty"),
        (["a", "bb"], AdapterError, "no adapter is called 'bb'.*Did you mean 'b'"),
        (["a"], RowsError, "1 names, but the batch has 2 rows"),
        (["a", "b", "c"], RowsError, "3 names, but the batch has 2 rows"),
    ],
)
def test_bad_names(names: Any, error: type[Exception], message: str) -> None:
    model, tokens = llama_with_three(), torch.randint(0, 61, (2, 5))
    with torch.no_grad():
        model(tokens, adapter_names=["a", "b"])  # the form for rows stays ready
        plain, before = model(tokens).logits, snapshot(model)
        with pytest.raises(error, match=message):
            model(tokens, adapter_names=names)
        assert torch.equal(model(tokens).logits, plain)
    assert_unchanged(model, before)


def test_merged_adapters_are_refused() -> None:
    model, tokens = llama_with_three(), torch.randint(0, 61, (2, 5))
    model.merge_adapter(["a"])
    with pytest.raises(AdapterError, match="a is merged.*unmerge_adapter"):
        model(tokens, adapter_names=["a", "b"])


def test_no_other_adapters_inside_the_context() -> None:
    model = llama_with_three()
    with model.adapter_rows(["a", "b"]):
        for change in (lambda: model.set_adapter("b"), lambda: model.delete_adapter("c"), model.use_slots):
            with pytest.raises(AdapterError, match="inside adapter_rows"):
                change()
    model.verify()
    assert model.active_adapters == ["a"]


def test_rows_that_cannot_be_told_apart() -> None:
    """Tokens that are routed to experts by number are no rows of the batch; the layer is named."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            flat = x.view(-1, 4)
            return self.experts[0](flat[:4]).sum() + self.experts[1](flat[4:]).sum()

    model = lora_transform(Routed(), LoraConfig(r=2, target_modules=["0", "1"]), adapter_name="a", capture="modules")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0", "1"]))
    with torch.no_grad(), pytest.raises(RowsError, match=r"'experts.0': .*\(4, 4\)"):
        model(torch.randn(2, 5, 4), adapter_names=["a", "b"])


def test_the_name_for_no_adapter_is_reserved() -> None:
    with pytest.raises(AdapterError, match="__base__"):
        lora_transform(tiny_llama(), LoraConfig(target_modules=["q_proj"]), adapter_name="__base__")


@pytest.mark.parametrize("capture", ALL)
def test_nothing_is_left_behind(capture: Any) -> None:
    """After mixed batches and `unload` the model has no trace of them."""
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(2, 6)
    before = [name for name, _ in net.named_modules()]
    model = lora_transform(net, LoraConfig(target_modules=["0"]), capture=capture, example_inputs=x)
    model(x, adapter_names=["default", "__base__"])
    assert [name for name, _ in model.unload().named_modules() if "input_check" not in name] == before


def test_compiled_models_take_adapter_names() -> None:
    """Also as one graph; a mixed batch with gradients leaves nothing that a later call would trace."""
    model, tokens = llama_with_three(), torch.randint(0, 61, (3, 5))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = model(tokens, use_cache=False).logits
    assert torch.equal(compiled(tokens, use_cache=False).logits, plain)
    expected = model(tokens, adapter_names=["a", "b", "c"], use_cache=False).logits
    expected.sum().backward()
    assert torch.equal(compiled(tokens, use_cache=False).logits, plain)
    assert torch.equal(compiled(tokens, use_cache=False, adapter_names=["a", "b", "c"]).logits, expected)
    assert torch.equal(compiled(tokens, use_cache=False).logits, plain)


def test_inputs_of_a_layer_that_is_run_once_for_each_adapter() -> None:
    """Positions are shared, also where there are as many as rows; a cache, which holds all rows, is refused."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor, cache_position: Tensor, cache: object = None) -> Tensor:
            return (x * cache_position.view(1, -1, 1)) @ self.weight

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mixer()

        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            return self.mixer(x, cache_position=torch.arange(x.shape[1]), cache=cache)

    config = LoraConfig(r=2, target_modules=[], target_parameters=["mixer.weight"])
    model = lora_transform(Net(), config, adapter_name="a", capture="modules")
    model.add_adapter("b", config)
    moved(model)
    x, names = torch.randn(3, 3, 4), ["a", "__base__", "b"]
    with torch.no_grad():
        expected = rows_alone(model, names, {"x": x})
        assert largest_error([model(x, adapter_names=names)], expected) < 1e-5
        with pytest.raises(RowsError, match="'mixer': .* gets a object here.*a cache does"):
            model(x, cache=object(), adapter_names=names)
