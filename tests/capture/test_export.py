"""`export` capture: one graph for both modes, its input checks, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxlora import CaptureError, LoraConfig, lora_transform
from fxlora._passes import print_graph
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.zoo import ARCHITECTURES, MLP, BatchNormNet, OptionalInput

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
T5 = next(entry for entry in ARCHITECTURES if entry.name == "t5")


@cache
def llama() -> Any:
    return lora_transform(
        LLAMA.model(), LoraConfig(r=2, target_modules=["q_proj"]), capture="export", example_inputs=LLAMA.batch()
    )


def test_needs_example_inputs() -> None:
    with pytest.raises(CaptureError, match="needs example_inputs"):
        lora_transform(MLP(), {"target_modules": ["fc1"]}, capture="export")


def test_sizes_vary_and_types_are_checked() -> None:
    model = llama()
    assert model(input_ids=torch.ones(5, 7, dtype=torch.long)).logits.shape == (5, 7, 64)
    with pytest.raises(ValueError, match=r"'input_ids' is torch\.int32 .* exported for torch\.int64"):
        model(input_ids=torch.ones(5, 7, dtype=torch.int32))
    with pytest.raises(TypeError, match="labels"):
        model(input_ids=torch.ones(5, 7, dtype=torch.long), labels=torch.ones(5, 7, dtype=torch.long))


def test_fixed_sizes_and_constants_are_checked() -> None:
    lora = lora_transform(MLP(), {"target_modules": ["fc1"]}, capture="export", example_inputs=torch.randn(4, 8))
    assert lora(torch.randn(9, 8)).shape == (9, 4)
    with pytest.raises(ValueError, match=r"sizes \(4, 9\)"):
        lora(torch.randn(4, 9))
    masked = lora_transform(
        OptionalInput(), {"target_modules": ["fc"]}, capture="export", example_inputs={"x": torch.randn(4, 8)}
    )
    with pytest.raises(TypeError, match="mask"):
        masked(torch.randn(4, 8), mask=torch.ones(4, 8))


def test_pickle_keeps_the_output_class() -> None:
    model = llama()
    tokens = LLAMA.batch()["input_ids"]
    restored = pickle.loads(pickle.dumps(model))
    output = restored(input_ids=tokens)
    assert type(output) is type(model(input_ids=tokens))
    assert torch.equal(output.logits, model(input_ids=tokens).logits)


def test_dtype_of_an_exported_graph_is_fixed() -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"cannot go from torch\.float32 .*Convert the model first"):
        model.to(torch.bfloat16)
    assert_unchanged(model, before)
    model.to("cpu")


def test_batch_norm_counts_batches_in_training_only() -> None:
    model = BatchNormNet()
    reference = copy.deepcopy(model)
    x = torch.randn(4, 8)
    lora = lora_transform(model, {"target_modules": ["fc1"]}, capture="export", example_inputs=x)
    assert lora.get_buffer("norm.num_batches_tracked").item() == 0  # capturing leaves no trace
    for training in (True, True, False):
        assert torch.equal(lora.train(training)(x), reference.train(training)(x))
    assert lora.get_buffer("norm.num_batches_tracked").item() == 2
    assert torch.equal(lora.get_buffer("norm.running_mean"), reference.norm.running_mean)


def test_a_failing_export_says_why() -> None:
    class Data(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"torch\.export refuses it"):
        lora_transform(Data(), {"target_modules": ["fc"]}, capture="export", example_inputs=torch.randn(4, 8))


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(x) * (1 if self.calls < 10 else 0)


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training and random.random() < 0.5 else self.fc(x)


@pytest.mark.parametrize(
    ("cls", "words"), [(CountsCalls, "changes 'calls'"), (LayerDrop, "draws from Python's random")]
)
def test_what_export_would_freeze_is_refused(cls: type[nn.Module], words: str) -> None:
    model = cls()
    before, state = snapshot(model), random.getstate()
    with pytest.raises(CaptureError, match=words):
        lora_transform(model, {"target_modules": ["fc"]}, capture="export", example_inputs=torch.randn(4, 8))
    assert_unchanged(model, before)
    assert random.getstate() == state and vars(model).get("calls", 0) == 0


def test_captured_model_exports_compiles_and_drops_out() -> None:
    """The canonical form is plain PyTorch: it can be exported again, and compiled as one graph."""
    model = lora_transform(
        MLP().eval(), {"target_modules": ["fc1"], "lora_dropout": 0.2}, capture="export",
        example_inputs=torch.randn(4, 8),
    )  # fmt: skip
    nn.init.normal_(model.get_parameter("fc1.lora_B.default.weight"))
    x = torch.randn(6, 8)
    again = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(again(x), model(x))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_auto_takes_export_when_only_a_graph_will_do() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
            return self.fc(self.fc(x)) * scale

    config = LoraConfig(r=2, target_modules=["fc"], call_sites={"fc": [1]})
    x = torch.randn(4, 8)
    with pytest.raises(CaptureError, match="pass example_inputs"):
        lora_transform(Twice(), config)
    model = lora_transform(Twice(), config, example_inputs=x)
    assert model._lora.capture == "export"
    assert print_graph(model.graph).count("lora_A.default.weight") == 1


@cache
def t5() -> tuple[Any, Any]:
    """A model that returns its caches, and its graph."""
    model = T5.model()
    model.config.use_cache = model.decoder.config.use_cache = True
    config = LoraConfig(r=2, target_modules=["q"])
    return model, lora_transform(copy.deepcopy(model), config, capture="export", example_inputs=T5.batch())


def test_encoder_decoder_inputs_share_their_batch_size() -> None:
    _, lora = t5()
    ids = torch.ones(4, 9, dtype=torch.long)
    assert lora(input_ids=ids, decoder_input_ids=ids[:, :3]).logits.shape == (4, 3, 64)
    with pytest.raises(ValueError, match="'decoder_input_ids' has sizes"):
        lora(input_ids=ids, decoder_input_ids=ids[:2, :3])


def cached(window: int | None = None) -> Any:
    """A language model that returns its cache, in which a window makes numbers depend on the length of the text."""
    import transformers

    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    sizes |= dict(num_hidden_layers=1, vocab_size=64, max_position_embeddings=64, attention_dropout=0.1)
    config = transformers.MistralConfig(**sizes, sliding_window=window, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config)


def exported(model: Any) -> Any:
    tokens = torch.arange(14).reshape(2, 7)
    config = LoraConfig(r=2, target_modules=["k_proj"])
    lora = lora_transform(model, config, capture="export", example_inputs={"input_ids": tokens})
    nn.init.normal_(lora.get_parameter("model.layers.0.self_attn.k_proj.lora_B.default.weight"))
    return lora


@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_is_returned_as_the_model_returns_it(window: int | None) -> None:
    """Also by a copy, and by a graph that is unpickled where nothing knows of caches yet."""
    host = cached(window)
    lora = exported(copy.deepcopy(host))
    assert host.config.use_cache and lora.config.use_cache
    weight = host.model.layers[0].self_attn.k_proj.weight
    site = "model.layers.0.self_attn.k_proj.lora_{}.default.weight"
    factors = [lora.get_parameter(site.format(name)) for name in "AB"]
    copied, pickled = copy.deepcopy(lora), pickle.dumps(lora)
    pytree._deregister_pytree_node(type(lora(input_ids=torch.ones(2, 5, dtype=torch.long)).past_key_values))
    restored = pickle.loads(pickled)
    with torch.no_grad():
        weight += 4 * factors[1] @ factors[0]
    tokens, following = torch.arange(33).reshape(3, 11), torch.ones(3, 1, dtype=torch.long)
    for training in (True, False):
        for each in (lora, copied, restored):
            torch.manual_seed(0)
            expected = host.train(training)(tokens)
            torch.manual_seed(0)
            found = each.train(training)(input_ids=tokens)
            assert type(found) is type(expected)
            assert type(found.past_key_values) is type(expected.past_key_values)
            torch.testing.assert_close(found.logits, expected.logits)
            (ours,), (theirs,) = found.past_key_values.layers, expected.past_key_values.layers
            torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values))
            assert vars(ours).keys() == vars(theirs).keys()
            host.eval()
            further = [host(following, past_key_values=each.past_key_values).logits for each in (found, expected)]
            torch.testing.assert_close(*further)
            assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 12


def test_caches_of_an_encoder_decoder() -> None:
    host, lora = t5()
    batch = T5.batch()
    expected, found = host.eval()(**batch).past_key_values, lora.eval()(**batch).past_key_values
    assert type(found) is type(expected) and found.is_updated == expected.is_updated
    for part in ("self_attention_cache", "cross_attention_cache"):
        for ours, theirs in zip(getattr(found, part).layers, getattr(expected, part).layers, strict=True):
            torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values))


def test_a_cache_among_the_inputs_is_refused() -> None:
    model = cached()
    tokens = torch.ones(2, 4, dtype=torch.long)
    inputs = {"input_ids": tokens, "past_key_values": model(tokens).past_key_values}
    with pytest.raises(CaptureError, match=r"give a DynamicCache as argument 'past_key_values', .* Leave it out"):
        lora_transform(model, {"target_modules": ["q_proj"]}, capture="export", example_inputs=inputs)
    assert inputs["past_key_values"].get_seq_length() == 4
