"""layer_replication: layers several times over with shared weights, compared with peft."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxlora import AdapterError, CaptureError, ConfigError, LoraConfig, MergeError, lora_transform
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.host.nets import X, assert_same_gradients, gradients, net, peft_from, peft_model, train
from tests.zoo import ARCHITECTURES

ENTRIES = {name: next(each for each in ARCHITECTURES if each.name == name) for name in ("llama", "qwen2", "bert")}
RANGES = [[0, 2], [1, 2], [0, 1]]
CONFIG: dict[str, Any] = {"r": 2, "layer_replication": RANGES}


def targets(name: str) -> list[str]:
    return ["query", "value"] if name == "bert" else ["q_proj", "v_proj"]


def pair(name: str) -> tuple[Any, Any, dict[str, Any]]:
    entry = ENTRIES[name]
    torch.manual_seed(1)
    ours = lora_transform(entry.model_with_seed_kept(), LoraConfig(**CONFIG, target_modules=targets(name))).eval()
    torch.manual_seed(1)
    theirs = peft_model(entry.model_with_seed_kept(), **CONFIG, target_modules=targets(name)).eval()
    assert train(ours) == train(theirs)
    if name == "qwen2":  # peft leaves the list of layer types short, and such a model fails
        theirs.base_model.model.config.layer_types = list(ours.config.layer_types)
    return ours, theirs, entry.batch()


@pytest.mark.parametrize("name", ENTRIES)
def test_outputs_and_gradients_are_pefts(name: str) -> None:
    ours, theirs, batch = pair(name)
    assert ours.capture == "modules" and len(ours._specs()) == 8
    torch.testing.assert_close(ours(**batch)[0], theirs(**batch)[0])
    assert_same_gradients(gradients(ours, **batch), gradients(theirs, **batch))
    assert ours.config.num_hidden_layers == 4
    assert ours.num_parameters() == theirs.base_model.model.num_parameters()
    ours.verify()


def test_generation_keeps_a_cache_for_each_layer() -> None:
    ours, theirs, batch = pair("llama")
    indices = [layer.self_attn.layer_idx for layer in ours.model.layers]
    assert indices == [0, 1, 2, 3]
    settings = dict(do_sample=False, max_new_tokens=4, use_cache=True)
    assert torch.equal(ours.generate(**batch, **settings), theirs.generate(**batch, **settings))
    assert torch.equal(ours.generate(**batch, **settings), ours.generate(**batch, **{**settings, "use_cache": False}))


def test_files_go_to_peft_and_come_back(tmp_path: Path) -> None:
    ours, theirs, batch = pair("llama")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft_from(ENTRIES["llama"].model(), tmp_path / "ours")
    torch.testing.assert_close(loaded(**batch)[0], ours(**batch)[0])
    back = lora_transform(ENTRIES["llama"].model(), tmp_path / "theirs").eval()
    assert torch.equal(back(**batch)[0], ours(**batch)[0])


def test_copies_share_weights_and_unloading_gives_the_layers_back() -> None:
    model = ENTRIES["llama"].model()
    layers, before, batch = model.model.layers, snapshot(model), ENTRIES["llama"].batch()
    ours = lora_transform(model, LoraConfig(**CONFIG, target_modules=["q_proj"])).eval()
    train(ours)
    assert ours.model.layers[1].mlp.up_proj.weight is ours.model.layers[2].mlp.up_proj.weight
    assert ours.model.layers[1].self_attn.config is ours.config
    trained = ours(**batch)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(**batch)[0], trained)
        assert twin.model.layers[1].mlp.up_proj.weight is twin.model.layers[2].mlp.up_proj.weight
        plain = twin.unload()
        assert len(plain.model.layers) == 2 and plain.config.num_hidden_layers == 2
        assert torch.equal(plain(**batch)[0], ENTRIES["llama"].model()(**batch)[0])
    assert ours.unload() is model
    assert model.model.layers is layers and model.config.num_hidden_layers == 2
    assert_unchanged(model, before)


def test_merging_shared_weights_is_refused() -> None:
    ours, _, batch = pair("llama")
    trained, before = ours(**batch)[0], snapshot(ours)
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(MergeError, match="is shared with"):
            merge()
    assert_unchanged(ours, before)
    assert torch.equal(ours(**batch)[0], trained)


def test_later_adapters_have_the_layers_of_the_first() -> None:
    ours, _, batch = pair("llama")
    trained = ours(**batch)[0]
    ours.add_adapter("same", LoraConfig(**CONFIG, target_modules=["k_proj"]))
    ours.add_adapter("without", LoraConfig(r=2, target_modules=["k_proj"]))
    assert len(ours.model.layers) == 4 and torch.equal(ours(**batch)[0], trained)
    with pytest.raises(AdapterError, match="only the first adapter can"):
        ours.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], layer_replication=[[0, 1]]))
    plain = lora_transform(ENTRIES["llama"].model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="only the first adapter can"):
        plain.add_adapter("other", LoraConfig(**CONFIG, target_modules=["q_proj"]))


# ---- mistakes ----

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "beyond the layers": ({"layer_replication": [[0, 3]]}, "[0, 3] is no range of the model's 2 layers"),
    "backwards": ({"layer_replication": [[1, 0]]}, "needs 0 <= start < end <= 2"),
    "no pairs": ({"layer_replication": [0, 1]}, "should be a list of pairs (start, end) of numbers, not [0, 1]"),
    "not numbers": ({"layer_replication": [["0", "1"]]}, "should be a list of pairs"),
    "another field": ({"modules_to_save": ["spare"]}, "no module is called 'spare'"),
    "a target that is not there": ({"target_modules": ["q_porj"]}, "Did you mean"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_changes_nothing(name: str) -> None:
    settings, text = MISTAKES[name]
    model = ENTRIES["llama"].model()
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        lora_transform(model, LoraConfig(**{**CONFIG, "target_modules": ["q_proj"], **settings}))
    assert text in str(caught.value)
    assert_unchanged(model, before)
    assert model.config.num_hidden_layers == 2


def test_a_model_without_a_list_of_layers() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="Net has no list of layers at 'layers'"):
        lora_transform(model, LoraConfig(**CONFIG, target_modules=["fc1"]))
    assert_unchanged(model, before)


def test_whole_graphs_are_refused() -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Layered()
    before = snapshot(model)
    for capture in ("symbolic", "export"):
        with pytest.raises(CaptureError, match="use 'modules'"):
            lora_transform(
                model, LoraConfig(**CONFIG, target_modules=["0"]), capture=capture, example_inputs=X
            )  # fmt: skip
    assert_unchanged(model, before)
    ours = lora_transform(model, LoraConfig(**CONFIG, target_modules=["3"]))
    assert ours.capture == "modules" and len(ours.layers) == 4
    ours(X)
