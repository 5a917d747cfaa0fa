"""The bar of `merge_and_unload(progressbar=True)`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxlora import LoraConfig, lora_transform
from tests.zoo import MLP


@pytest.mark.parametrize("capture", ["symbolic", "export", "modules"])
def test_progress(capture: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def merged(progressbar: bool) -> tuple[str, str]:
        config = LoraConfig(r=2, target_modules=["fc1", "fc2"])
        model = lora_transform(MLP(), config, capture=capture, example_inputs=torch.ones(2, 8))
        model.merge_and_unload(progressbar=progressbar)
        return capsys.readouterr()

    assert merged(False) == ("", "")
    out, err = merged(True)
    assert out == "" and "Merging layers" in err and "2/2" in err
