"""Every layer kind beside peft, or beside a float64 reference where peft is wrong, under every capture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxlora import LoraConfig, MergeError, lora_transform
from tests.models.checks import error, same, tensors
from tests.oracle import parity
from tests.oracle.cases import ALL, KINDS, Case, Layer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (  # torch's own, about what the base does
        "The tensor attributes self.layer._flat_weights",
        "LSTM with projections is not supported with oneDNN",
        "Using padding='same' with even kernel lengths",
    )
]

BY_NAME = {case.name: case for case in KINDS}
PLACES = [
    (case, capture) for case in KINDS for capture in ALL if (case.name, capture) != ("Mixtral's experts", "export")
]
"""Mixtral's export takes ten seconds; tests/models has it."""

ids = [f"{case.name}-{capture}" for case, capture in PLACES]


@pytest.mark.parametrize(("case", "capture"), PLACES, ids=ids)
def test_kind(case: Case, capture: str) -> None:
    parity.check(case, capture)


LATER = [(case, "modules") for case in KINDS if "modules" in case.captures]
LATER += [(BY_NAME["experts (E, in, out), two parameters"], "symbolic")]
LATER += [
    (BY_NAME[name], "export")
    for name in ("nn.MultiheadAttention, self", "nn.ConvTranspose1d", "nn.Bilinear", "functional weight", "nn.RNNCell")
]


@pytest.mark.parametrize(("case", "capture"), LATER, ids=[f"{case.name}-{capture}" for case, capture in LATER])
def test_adapter_that_is_loaded_later(case: Case, capture: str, tmp_path: Path) -> None:
    model: Any = parity.ours(case, capture)
    model.save_pretrained(tmp_path)
    save_file(parity.shifted(load_file(tmp_path / parity.WEIGHTS)), tmp_path / parity.WEIGHTS)
    first = lora_transform(case.model(), tmp_path, capture=capture, example_inputs=case.batch()).eval()
    expected = parity.run(first, case)
    base = parity.run(case.model().requires_grad_(False), case)
    assert error(expected, base) > 0.01
    model.load_adapter(tmp_path, "second")
    assert same(parity.run(model, case), base)  # not active yet
    model.set_adapter("second")
    assert error(parity.run(model, case), expected) < 2e-6
    model.delete_adapter("default")
    model.verify()
    assert same(parity.run(model.unload().requires_grad_(False), case), base)


@pytest.mark.parametrize("name", ["nn.MultiheadAttention, self", "nn.MultiheadAttention, cross"])
def test_peft_adds_the_update_of_out_proj_twice(name: str) -> None:
    case = BY_NAME[name]
    theirs = parity.peft_side(case)
    model = parity.ours(case, "modules")
    initial = parity.shifted(theirs.initial)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                key = path.replace("lora_parameters.in_proj_weight.", "").replace("out_proj", "base_layer.out_proj")
                twice = 2 if "out_proj.lora_B" in path else 1
                parameter.copy_(twice * initial["base_model.model." + key.replace(".default", "")])
    assert error([out.double() for out in theirs.outputs], parity.reference_side(model, case).outputs) < 2e-5


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("layer", ["attention", "encoder"])
def test_fast_path_of_evaluation(layer: str, need_weights: bool) -> None:
    """Without gradients torch's fused kernels read the weights, not the layers."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x, x, x, need_weights=need_weights)

    def make() -> nn.Module:
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        return (Layer(encoder) if layer == "encoder" else Attention()).eval().requires_grad_(False)

    targets = ["self_attn", "linear1", "linear2"] if layer == "encoder" else ["layer"]
    x = torch.randn(3, 5, 8)
    model: Any = lora_transform(make(), LoraConfig(r=2, target_modules=targets), capture="modules").eval()
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert same(tensors(model(x)), tensors(make()(x)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        live = tensors(model(x))
    slow = [out.detach() for out in tensors(model(x))]
    assert error(live, slow) < 2e-5 and error(live, tensors(make()(x))) > 0.01
    with torch.no_grad():
        assert error(tensors(model.merge_and_unload()(x)), live) < 2e-5


@pytest.mark.parametrize(
    "name", ["nn.Linear", "nn.Conv2d, groups", "nn.MultiheadAttention, self", "experts, two parameters", "nn.GRU"]
)
def test_gradient_checkpointing(name: str) -> None:
    case = BY_NAME[name]

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = case.model()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if self.training else self.inner(x)

    settings = copy.deepcopy(case.settings)
    model: Any = lora_transform(Checkpointed(), LoraConfig(**settings), capture="modules")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                parameter.normal_()
    for module in model.modules():
        if isinstance(module, (nn.MultiheadAttention, nn.Dropout)):
            module.dropout, module.p = 0.0, 0.0
    found: list[list[Tensor]] = []
    for training in (True, False):
        model.train(training).zero_grad()
        parity.backward(model, case.batch())
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 2 * len(model._specs()) and error(found[0], found[1]) < 1e-6


def test_max_norm_is_not_merged() -> None:
    model: Any = parity.ours(BY_NAME["nn.Embedding, max_norm"], "modules")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(MergeError, match="'layer': this embedding has a max_norm"):
        model.merge_and_unload()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_untargeted_layers_whose_weights_are_read_do_not_hinder_a_trace() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.Linear(11, 3)).eval().requires_grad_(False)

    x = torch.randn(2, 4, 9)
    model: Any = lora_transform(make(), LoraConfig(r=2, target_modules=["1"]), capture="symbolic").eval()
    assert torch.equal(model(x), make()(x))
