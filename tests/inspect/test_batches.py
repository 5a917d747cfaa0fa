"""`batch_for` makes what a model of each modality takes."""

from __future__ import annotations

import pytest
import torch

from fxlora.inspect.batches import batch_for
from tests.zoo import ARCHITECTURES, Entry

ENTRIES = [each for each in ARCHITECTURES if each.name in ("llama", "bert", "t5", "bart", "vit", "convnext")]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_model_takes_it(entry: Entry) -> None:
    model = entry.model()
    tokens = torch.randint(5, 60, (2, 7))
    batch = batch_for(model, tokens)
    with torch.no_grad():
        model(**batch)
    assert all(len(each) == 2 for each in batch.values())
    again = batch_for(model, tokens)
    assert all(torch.equal(again[name], each) for name, each in batch.items())
    on_meta = batch_for(model, tokens.to("meta"))
    assert {name: (each.shape, each.dtype) for name, each in on_meta.items()} == {
        name: (each.shape, each.dtype) for name, each in batch.items()
    }
    assert all(each.is_meta for each in on_meta.values())
