"""`modules` capture: one class for each signature, the host's class, and compiled blocks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fxlora import CaptureError, LoraConfig, lora_transform
from fxlora._passes import print_graph
from tests.models.checks import randomise
from tests.zoo import ARCHITECTURES, MLP

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_one_class_for_each_signature() -> None:
    lora = lora_transform(
        LLAMA.model(), LoraConfig(r=2, target_modules=TARGETS, rank_pattern={"k_proj": 3}, alpha_pattern={"v_proj": 1})
    )
    classes = {type(lora.get_submodule(spec.site)) for spec in lora._specs()}
    assert len(classes) == 1  # rank and scale are no part of it
    (region,) = lora.regions()
    assert len(region.instances) == 14
    cls = classes.pop()
    assert issubclass(cls, nn.Linear) and cls.__name__ == "LoraLinear"


def test_template_reads_well() -> None:
    lora = lora_transform(MLP(), {"target_modules": ["fc1"]}, capture="modules")
    assert (
        print_graph(lora.regions()[0].graph)
        == """\
  input_1      = input
  base_forward = self.base_forward(input_1)
+ lora_A       = self.lora_A.default.weight
+ lora_B       = self.lora_B.default.weight
+ lora_dtype   = input_1.dtype
+ lora_A_1     = lora_A.to(lora_dtype)
+ lora_B_1     = lora_B.to(lora_dtype)
+ lora_a       = linear(input_1, lora_A_1)
+ lora_b       = linear(lora_a, lora_B_1)
+ lora_scaling = self.lora_scaling.default()
+ lora_s       = mul(lora_b, lora_scaling)
+ lora_y       = add(base_forward, lora_s)
+ lora_dtype_1 = base_forward.dtype
+ lora_y_1     = lora_y.to(lora_dtype_1)
  return lora_y_1"""
    )


def twelve_blocks() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def compiled_graphs(model: Any, call: Any) -> CompileCounter:
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter)
    call(model)
    return counter


def inference(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=torch.ones(2, 7, dtype=torch.long))


def training(model: Any) -> None:
    tokens = torch.ones(2, 7, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()


def training_with_input_grads(model: Any) -> None:
    model.enable_input_require_grads()
    training(model)


# Dynamo looks at the gradient of a hidden state, which torch warns about
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("call", [inference, training, training_with_input_grads])
def test_equal_blocks_compile_once(call: Any) -> None:
    """As many graphs as the base whose embedding is frozen too, as any LoRA leaves it; then none for new values."""
    base = twelve_blocks()
    base.model.embed_tokens.requires_grad_(False)
    expected = compiled_graphs(base, call).frame_count
    lora: Any = lora_transform(twelve_blocks(), LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.1))
    counter = compiled_graphs(lora, call)
    assert counter.frame_count == expected
    assert expected == (2 if call is training else 1)  # the first block's input needs no gradient
    lora.set_scale("default", 3.0)
    randomise(lora)
    call(lora)
    assert counter.frame_count == expected


def test_copies_and_classes_are_shared() -> None:
    lora = lora_transform(LLAMA.model(), LoraConfig(r=2, target_modules=TARGETS))
    randomise(lora)
    for copied in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        assert type(copied) is type(lora)
        for spec in lora._specs():
            assert type(copied.get_submodule(spec.site)) is type(lora.get_submodule(spec.site))
        batch = LLAMA.batch()
        assert torch.equal(copied(**batch).logits, lora(**batch).logits)
        copied.merge_and_unload()
        lora.verify()


def test_pickle_in_a_new_process(tmp_path: Any) -> None:
    import subprocess
    import sys

    lora = lora_transform(LLAMA.model(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    randomise(lora)
    torch.save((lora, LLAMA.batch(), lora(**LLAMA.batch()).logits), tmp_path / "model.pt")
    code = (
        "import sys, torch; lora, batch, logits = torch.load(sys.argv[1], weights_only=False);"
        "assert torch.equal(lora(**batch).logits, logits); lora.verify(); lora.merge_and_unload()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_layers_with_a_bias_or_a_subclass_keep_their_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8, bias=False)).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    lora = lora_transform(model, {"target_modules": ["0", "1"]}, capture="modules")
    assert torch.equal(lora(x), expected)
    assert isinstance(lora.get_submodule("0"), Doubled)


def test_a_layer_with_more_inputs() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor, by: float = 1.0, *, plus: float = 0.0) -> torch.Tensor:
            return super().forward(input) * by + plus

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Scaled(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x, 2.0, plus=1.0) + self.fc(x)

    model, x = Net(), torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(lora_transform(model, {"target_modules": ["fc"]}, capture="modules")(x), expected)


def test_a_layer_with_star_inputs_is_refused() -> None:
    class Star(nn.Linear):
        def forward(self, *args: Any) -> torch.Tensor:
            return super().forward(*args)

    with pytest.raises(CaptureError, match=r"Star\.forward takes \*args"):
        lora_transform(nn.Sequential(Star(8, 8)), {"target_modules": ["0"]}, capture="modules")


@pytest.mark.parametrize("name", ["_plan", "_render", "capture", "scale_adapter"])
def test_names_of_the_model_are_not_hidden(name: str) -> None:
    """A module, or a private method, of the model's own under a name that our methods use is refused by name."""
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(3, 3))
    model.add_module(name, nn.Linear(3, 3))
    with pytest.raises(CaptureError, match=f"'{name}' of its own"):
        lora_transform(model, LoraConfig(target_modules=["fc"]), capture="modules")
    assert type(model) is nn.Sequential


def test_private_methods_of_the_model_are_not_hidden() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def _merge(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._merge(self.fc(x))

    with pytest.raises(CaptureError, match="'_merge' of its own"):
        lora_transform(Net(), LoraConfig(target_modules=["fc"]), capture="modules")
