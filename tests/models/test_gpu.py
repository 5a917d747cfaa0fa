"""The same promises on a CUDA device, and through Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxlora import LoraConfig, lora_transform
from tests.models.checks import randomise
from tests.zoo import ARCHITECTURES, MLP

pytestmark = pytest.mark.gpu

LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA.targets)


def cuda_batch() -> dict[str, Any]:
    return {name: tensor.cuda() for name, tensor in LLAMA.batch().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capture", ["modules", "export"])
def test_fresh_adapter_is_the_base(capture: Any, dtype: torch.dtype) -> None:
    base = LLAMA.model().to("cuda", dtype).requires_grad_(False)
    batch = cuda_batch()
    with torch.no_grad():
        expected = base(**batch).logits
    model = LLAMA.model().to("cuda", dtype)
    torch.manual_seed(3)
    lora = lora_transform(model, CONFIG, capture=capture, example_inputs=batch)
    with torch.no_grad():
        found = lora.eval()(**batch).logits
        if capture == "export":  # which makes the causal mask a tensor, and so takes another attention kernel
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
            with lora.disable_adapter():
                expected = lora(**batch).logits
        assert torch.equal(found, expected)
    model = LLAMA.model().to(dtype)
    torch.manual_seed(3)
    on_cpu = lora_transform(model, CONFIG)  # factors are drawn on the CPU for any device
    for name, parameter in on_cpu.named_parameters():
        if "lora_" in name:
            assert torch.equal(lora.get_parameter(name).cpu(), parameter)
            assert parameter.dtype == torch.float32 and lora.get_parameter(name).is_cuda


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_merge_equals_branches(capture: Any) -> None:
    batch = cuda_batch()
    lora: Any = lora_transform(LLAMA.model().cuda(), CONFIG, capture=capture, example_inputs=batch).eval()
    randomise_on_device(lora)
    with torch.no_grad():
        live = lora(**batch).logits
        weight = lora.get_parameter("model.layers.0.self_attn.q_proj.weight").clone()
        lora.merge_adapter()
        torch.testing.assert_close(lora(**batch).logits, live, rtol=1e-4, atol=1e-4)
        lora.unmerge_adapter()
    assert torch.equal(lora.get_parameter("model.layers.0.self_attn.q_proj.weight"), weight)


def randomise_on_device(model: Any) -> None:
    device = next(model.parameters()).device
    model.requires_grad_(model.training)
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        with torch.no_grad():
            parameter.copy_((torch.randn(parameter.shape) * 0.3).to(device))


def test_moving_a_transformed_model() -> None:
    lora: Any = lora_transform(LLAMA.model(), CONFIG).eval()
    randomise(lora)
    with torch.no_grad():
        expected = lora(**LLAMA.batch()).logits
        lora.to("cuda")
        found = lora(**cuda_batch()).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    lora.verify()
    plain: Any = lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"]), capture="symbolic").eval()
    randomise(plain)
    x = torch.randn(4, 8)
    expected = plain(x)
    torch.testing.assert_close(plain.cuda()(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    plain.verify()


@pytest.mark.parametrize("capture", ["modules", "export"])
@pytest.mark.filterwarnings("ignore")  # Inductor's advice on TensorFloat32 and the like
def test_inductor(capture: Any) -> None:
    batch = cuda_batch()
    lora: Any = lora_transform(LLAMA.model().cuda(), CONFIG, capture=capture, example_inputs=batch).eval()
    randomise_on_device(lora)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = lora(**batch).logits
        found = torch.compile(lora, fullgraph=True)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Everything(torch.nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.conv = torch.nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.cell = torch.nn.LSTM(8, 8, batch_first=True)
        self.experts = torch.nn.Parameter(torch.randn(3, 8, 8))
        self.head = torch.nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.cell(x)[0]
        return self.head(torch.einsum("bti,eoi->bto", x, self.experts))


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.filterwarnings("ignore:The tensor attributes self.cell._flat_weights")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("capture", ["modules", "export"])
def test_every_kind(capture: Any, dora: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 6), device="cuda")
    model = Everything().cuda().eval()
    targets = ["embed", "conv", "head"] + ([] if dora else ["attention", "cell"])
    parameters = None if dora else ["experts"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, target_parameters=parameters, use_dora=dora)
    lora: Any = lora_transform(model, config, capture=capture, example_inputs=ids).eval()
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data += (torch.randn(parameter.shape) * 0.1).cuda()
    lora.train()(ids).sum().backward()  # cuDNN's recurrent layers have no backward pass in evaluation
    with torch.no_grad():
        live = lora.eval()(ids)
    grads = [p.grad for p in lora.parameters() if p.requires_grad]
    assert grads and all(grad is not None and grad.is_cuda for grad in grads)
    lora.verify()
    with torch.no_grad():
        torch.testing.assert_close(lora.merge_and_unload()(ids), live, rtol=1e-3, atol=1e-3)
