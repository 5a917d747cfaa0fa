"""`export` capture: one graph for both modes, its input checks, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from torch import nn

from fxlora import CaptureError, LoraConfig, lora_transform
from fxlora._passes import print_graph
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.zoo import ARCHITECTURES, MLP, BatchNormNet, OptionalInput

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
T5 = next(entry for entry in ARCHITECTURES if entry.name == "t5")


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


def test_encoder_decoder_inputs_share_their_batch_size() -> None:
    model = lora_transform(
        T5.model(), LoraConfig(r=2, target_modules=["q"]), capture="export", example_inputs=T5.batch()
    )
    ids = torch.ones(4, 9, dtype=torch.long)
    assert model(input_ids=ids, decoder_input_ids=ids[:, :3]).logits.shape == (4, 3, 64)
    with pytest.raises(ValueError, match="'decoder_input_ids' has sizes"):
        model(input_ids=ids, decoder_input_ids=ids[:2, :3])
