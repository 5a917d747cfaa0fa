"""bias="all" and bias="lora_only": biases of the base that an adapter trains, compared with peft."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxlora import AdapterError, CheckpointError, ConfigError, LoraConfig, export_merged, lora_transform
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.host.nets import X, assert_same_gradients, gradients, net, peft_from, peft_model, train

CAPTURES = ["modules", "symbolic", "export"]
BIASES = {
    "lora_only": {"fc1.bias"},
    "all": {"fc1.bias", "norm.bias", "head.0.bias", "head.1.bias", "classifier.bias"},
}


def config(bias: str, **more: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": ["fc1", "fc2"], "bias": bias, **more}


def transform(model: nn.Module, capture: Any, **settings: Any) -> Any:
    return lora_transform(model, LoraConfig(**settings), capture=capture, example_inputs=X)


def pair(capture: str, bias: str, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    ours = transform(net(), capture, **config(bias, **more)).eval()
    torch.manual_seed(1)
    theirs = peft_model(net(), **config(bias, **more)).eval()
    assert train(ours) == train(theirs)
    return ours, theirs


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("bias", BIASES)
def test_outputs_and_gradients_are_pefts(bias: str, capture: str) -> None:
    ours, theirs = pair(capture, bias)
    assert {name for name, p in ours.named_parameters() if p.requires_grad and "lora_" not in name} == BIASES[bias]
    torch.testing.assert_close(ours(X), theirs(X))
    assert_same_gradients(gradients(ours, X), gradients(theirs, X))
    ours.verify()


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("bias", BIASES)
def test_files_go_to_peft_and_come_back(bias: str, capture: str, tmp_path: Path) -> None:
    ours, theirs = pair(capture, bias, lora_bias=True, target_modules=["fc1"])
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes a bias of B for a shard
        theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and "base_model.model.fc1.base_layer.bias" in files[0]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    torch.testing.assert_close(peft_from(net(), tmp_path / "ours")(X), ours(X))
    back = lora_transform(net(), tmp_path / "theirs", capture=capture, example_inputs=X).eval()
    assert torch.equal(back(X), ours(X))
    assert not any(p.requires_grad for p in back.parameters())


def test_with_modules_that_are_saved_whole(tmp_path: Path) -> None:
    ours, theirs = pair("modules", "all", modules_to_save=["classifier"])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")]
    # peft also writes the base's bias and the trained one a second time
    doubled = {f"base_model.model.classifier.{each}.bias" for each in ("original_module", "modules_to_save")}
    assert files[1].keys() - files[0].keys() == doubled and files[0].keys() < files[1].keys()
    torch.testing.assert_close(peft_from(net(), tmp_path / "ours")(X), ours(X))
    back = lora_transform(net(), tmp_path / "theirs").eval()
    assert torch.equal(back(X), ours(X))
    assert torch.equal(back.classifier._parameters["bias"], net().classifier.bias)


def test_bare_parameters_and_attention(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.proj(x)[None]
            return self.out(self.attention(h, h, h)[0][0])

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Attention().eval()

    for number, settings in enumerate(
        [{"target_modules": ["attention"]}, {"target_modules": [], "target_parameters": ["proj.weight"]}]
    ):
        for bias in BIASES:
            directory = tmp_path / f"{number}{bias}"
            ours = lora_transform(make(), LoraConfig(r=2, bias=bias, **settings), capture="modules").eval()
            train(ours)
            ours.save_pretrained(directory)
            theirs = peft_from(make(), directory)
            if "target_parameters" in settings:  # peft does not run a loaded output projection of an attention
                torch.testing.assert_close(theirs(X), ours(X))
            theirs.save_pretrained(directory / "again")
            files = [load_file(each / "adapter_model.safetensors") for each in (directory, directory / "again")]
            assert files[0].keys() == files[1].keys() and any(key.endswith("base_layer.bias") for key in files[0])
            assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.mark.parametrize("capture", CAPTURES)
def test_unloading_restores_the_base_and_merging_keeps_the_biases(
    capture: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = pair(capture, "all", lora_bias=True, target_modules=["fc1"])
    trained, base = ours(X), net()
    with caplog.at_level(logging.WARNING, logger="fxlora"), ours.disable_adapter():
        pass
    assert "keep their trained values" in caplog.text
    merged, unloaded = copy.deepcopy(ours).merge_and_unload(), copy.deepcopy(ours).unload()
    torch.testing.assert_close(merged(X), trained)
    torch.testing.assert_close(merged(X), theirs.merge_and_unload()(X))
    for name, value in base.state_dict().items():
        assert torch.equal(unloaded.state_dict()[name], value)
    ours.merge_adapter()
    back = copy.deepcopy(ours).unload()
    assert all(torch.equal(back.state_dict()[name], value) for name, value in base.state_dict().items())
    ours.unmerge_adapter()
    assert torch.equal(ours(X), trained)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
    ours.set_adapter("other")
    assert not ours.fc1.bias.requires_grad
    ours.set_adapter("default")
    assert ours.fc1.bias.requires_grad
    ours.delete_adapter("default")
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in base.state_dict().items())


def test_a_merged_checkpoint_has_the_biases(tmp_path: Path) -> None:
    ours, _ = pair("modules", "all")
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"]))
    export_merged(ours, tmp_path / "trained")
    export_merged(ours, tmp_path / "other", adapter_names=["other"])
    plain = net()
    plain.load_state_dict(load_file(tmp_path / "trained" / "model.safetensors"))
    torch.testing.assert_close(plain(X), ours(X))
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(other[name], value) for name, value in net().state_dict().items())
    merged = ours.merge_and_unload(adapter_names=["other"])
    assert all(torch.equal(merged.state_dict()[name], value) for name, value in net().state_dict().items())


# ---- mistakes ----


def test_one_adapter_with_biases() -> None:
    ours = transform(net(), "modules", **config("all"))
    before = snapshot(ours)
    with pytest.raises(AdapterError, match="only 1 adapter with bias is supported, and 'default' trains biases"):
        ours.add_adapter("other", LoraConfig(**config("lora_only")))
    with pytest.raises(AdapterError, match="of which there is no sum"):
        ours.add_weighted_adapter(["default"], [1.0], "sum")
    assert_unchanged(ours, before)
    theirs = peft_model(net(), **config("all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        theirs.add_adapter("other", peft_model(net(), **config("lora_only")).peft_config["default"])


def test_an_unknown_choice() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="`bias` should be one of 'none', 'all', 'lora_only', not 'some'"):
        transform(model, "modules", **config("some"))
    assert_unchanged(model, before)


@pytest.mark.parametrize("bias", BIASES)
def test_biases_in_a_file_whose_configuration_has_none_are_refused(bias: str, tmp_path: Path) -> None:
    ours, _ = pair("modules", bias)
    ours.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"bias": "{bias}"', '"bias": "none"'))
    model = net()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"bias'"):
        lora_transform(model, tmp_path)
    assert_unchanged(model, before)


def test_broken_files_change_nothing(tmp_path: Path) -> None:
    ours, _ = pair("modules", "all")
    ours.save_pretrained(tmp_path)
    file, key = load_file(tmp_path / "adapter_model.safetensors"), "base_model.model.norm.bias"
    for text, tensors in {
        "lacks 'base_model.model.norm.bias'": {k: v for k, v in file.items() if k != key},
        "has shape (7,)": {**file, key: torch.zeros(7)},
        "infinite": {**file, key: torch.full((8,), torch.inf)},
    }.items():
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        model = net()
        before = snapshot(model)
        with pytest.raises(CheckpointError) as caught:
            lora_transform(model, tmp_path)
        assert text in str(caught.value)
        assert_unchanged(model, before)
