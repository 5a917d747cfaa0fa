"""`ensure_weight_tying`: an embedding and the head that shares its weight have one pair of factors, as in peft."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxlora import CheckpointError, ConfigError, LoraConfig, MergeError, lora_transform
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.host.tied import BATCH, EMBEDDING, HEAD, PREFIX, backward, base, logits, ours, quiet, randomise, theirs
from tests.zoo import ARCHITECTURES

CAPTURES = ["modules", "export"]
A, B = (f"{EMBEDDING}.lora_embedding_{name}.default.weight" for name in "AB")
TIED: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
TARGETS = [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"], ".*embed_tokens|.*q_proj"]
FACTORS = {
    f"{EMBEDDING}.lora_embedding_A.default": (A, False),
    f"{EMBEDDING}.lora_embedding_B.default": (B, False),
    f"{HEAD}.lora_A.default.weight": (B, True),
    f"{HEAD}.lora_B.default.weight": (A, True),
}
"""peft's parameters, each with ours and whether it is the transpose."""


def copy_to_peft(model: Any, reference: Any) -> None:
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            own, transposed = FACTORS.get(name.removeprefix(PREFIX), (name.removeprefix(PREFIX), False))
            value = model.get_parameter(own).detach()
            with torch.no_grad():
                parameter.copy_(value.t() if transposed else value)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_initial_values_are_pefts_bit_for_bit(targets: Any, init: Any) -> None:
    fields = {"target_modules": targets, "ensure_weight_tying": True, "init_lora_weights": init}
    models = [base(), base()]
    torch.manual_seed(5)
    model = ours(models[0], **fields)
    after = torch.rand(3)
    torch.manual_seed(5)
    reference = theirs(models[1], **fields)
    assert torch.equal(torch.rand(3), after)
    parameters = {n.removeprefix(PREFIX): p for n, p in reference.named_parameters() if "lora_" in n}
    assert set(FACTORS) <= set(parameters)
    for name, parameter in parameters.items():
        own, transposed = FACTORS.get(name, (name, False))
        value = model.get_parameter(own)
        assert torch.equal(value.t() if transposed else value, parameter), name
    assert len([p for p in model.parameters() if p.requires_grad]) == len(parameters) - 2  # each once, not twice


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("capture", CAPTURES)
def test_outputs_and_gradients_are_pefts(capture: str, dora: bool) -> None:
    model, reference = ours(base(), capture, use_dora=dora, **TIED), theirs(base(), use_dora=dora, **TIED)
    model.verify()
    assert torch.equal(model.get_parameter(A), model.get_parameter(A.replace(EMBEDDING, HEAD)))
    randomise(model)
    if dora:
        for name, parameter in reference.named_parameters():
            if "magnitude" in name:
                with torch.no_grad():
                    parameter.copy_(model.get_parameter(name.removeprefix(PREFIX)))
    copy_to_peft(model, reference)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    backward(model)
    backward(reference)
    expected: dict[str, Tensor] = {}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            own, transposed = FACTORS.get(name.removeprefix(PREFIX), (name.removeprefix(PREFIX), False))
            grad = parameter.grad.t() if transposed else parameter.grad
            expected[own] = expected[own] + grad if own in expected else grad  # one parameter gets both gradients
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(expected)
    for name, grad in trained.items():
        assert grad is not None
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("capture", CAPTURES)
def test_one_update_of_the_shared_weight_is_merged(capture: str) -> None:
    plain = base()
    original = plain.get_parameter(f"{EMBEDDING}.weight").detach().clone()
    model: Any = ours(plain, capture, **TIED)
    randomise(model)
    adapted, keys = logits(model), list(base().state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    change = 4 * (model.get_parameter(B).double() @ model.get_parameter(A).double()).t()
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_parameter(f"{EMBEDDING}.weight"), (original.double() + change).float())
    assert merged.get_parameter(f"{HEAD}.weight") is merged.get_parameter(f"{EMBEDDING}.weight")
    assert list(merged.state_dict()) == keys


UNEQUAL: dict[str, dict[str, Any]] = {
    "not ensured": {"ensure_weight_tying": False},
    "another scaling": {"alpha_pattern": {"lm_head": 3}},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_updates_of_a_shared_weight_are_not_merged(name: str) -> None:
    model = ours(base(), **{**TIED, **UNEQUAL[name]})
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"shared with 'lm_head.weight'"):
        model.merge_adapter()
    assert_unchanged(model, before)


@pytest.mark.parametrize("targets", TARGETS[:3], ids=str)
@pytest.mark.parametrize("capture", CAPTURES)
def test_files_go_to_peft_and_back(capture: str, targets: Any, tmp_path: Path) -> None:
    model = ours(base(), capture, target_modules=targets, ensure_weight_tying=True)
    randomise(model)
    model.save_pretrained(tmp_path / "ours")
    with quiet():
        reference = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
        reference.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(reference), logits(model), rtol=1e-4, atol=1e-4)
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")]
    copies = {key for key in files[1] if key.endswith("base_layer.weight")}
    assert len(copies) == (2 if "embed_tokens" in targets else 0)
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    back = lora_transform(base(), tmp_path / "theirs", capture=capture, example_inputs=BATCH)  # pyright: ignore[reportArgumentType]
    assert torch.equal(logits(back), logits(model))


def test_a_file_that_is_not_tied_or_changes_the_base_is_refused(tmp_path: Path) -> None:
    model = theirs(base(), **TIED)
    with quiet():
        model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    plain = base()
    before = snapshot(plain)
    for key, message in (
        (f"{PREFIX}{HEAD}.lora_B.weight", f"the factors of '{HEAD}' are not those of '{EMBEDDING}'"),
        (f"{PREFIX}{EMBEDDING}.base_layer.weight", "a weight of the base model"),
    ):
        save_file({**tensors, key: tensors[key] + 1}, path)
        with pytest.raises(CheckpointError, match=message):
            lora_transform(plain, tmp_path)
        assert_unchanged(plain, {**before, "values": dict(before["values"])})
    save_file(tensors, path)
    lora_transform(plain, tmp_path)


def test_life(tmp_path: Path) -> None:
    plain = base()
    expected = logits(plain)
    model: Any = ours(plain, **TIED)
    randomise(model)
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(copied), adapted)
    assert copied.get_parameter(A) is copied.get_parameter(A.replace(EMBEDDING, HEAD))
    before = model.get_parameter(B).detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward(model)
    optimizer.step()
    assert not torch.equal(model.get_parameter(B), before) and len(optimizer.state) == 4
    model.verify()
    assert torch.equal(logits(model.unload()), expected)


def test_tokens_are_tied_too() -> None:
    fields: dict[str, Any] = {"trainable_token_indices": [3, 1], "ensure_weight_tying": True}
    model = ours(base(), **fields)
    assert [spec.tied_to for spec in model._specs() if spec.variant] == ["", EMBEDDING]


@pytest.mark.parametrize(
    ("tied", "fields", "message"),
    [
        (False, TIED, "no tied modules were found in the model"),
        (True, {"ensure_weight_tying": True}, "no tied modules are added in either"),
        (True, {"target_modules": ["lm_head"]}, "`ensure_weight_tying` is not set to True"),
    ],
)
def test_warnings(tied: bool, fields: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as pefts:
        warnings.simplefilter("always")
        peft.get_peft_model(base(tied), peft.LoraConfig(**{"target_modules": ["q_proj"], **fields}))
    model = ours(base(tied), **fields)
    assert message in caplog.text and any(message in str(warning.message) for warning in pefts)
    assert not any(spec.tied_to for spec in model._specs())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": ({"rank_pattern": {"lm_head": 3}}, "has another rank in `rank_pattern`: \\[3, 2\\]"),
    "a bias": ({"lora_bias": True}, "`lora_bias` cannot be used for 'model.embed_tokens'"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_leave_the_model_alone(name: str) -> None:
    fields, message = BAD[name]
    model = base()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        ours(model, **{**TIED, **fields})
    assert_unchanged(model, before)


def test_the_configuration_says_so(tmp_path: Path) -> None:
    ours(base(), **TIED).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ensure_weight_tying"] is True


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_copies_of_tied_modules_stay_tied(capture: Any, tmp_path: Path) -> None:
    """Naming one end of a tied pair in `modules_to_save` trains one copy of the weight for both, as in peft."""
    entry = next(each for each in ARCHITECTURES if each.name == "llama")

    def model() -> Any:
        import transformers

        config = entry.model().config
        config.tie_word_embeddings = True
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()

    settings: dict[str, Any] = dict(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    mine: Any = lora_transform(model(), LoraConfig(**settings), capture=capture, example_inputs=entry.batch())
    copies = [mine.get_submodule(f"{name}.modules_to_save.default") for name in ("model.embed_tokens", "lm_head")]
    assert copies[0].weight is copies[1].weight and copies[0].weight.requires_grad
    other = peft.get_peft_model(model(), peft.LoraConfig(**settings))
    assert mine.get_nb_trainable_parameters()[0] == other.get_nb_trainable_parameters()[0]
    copies[0].weight.data += 0.1 * torch.randn(copies[0].weight.shape)
    live = mine(**entry.batch()).logits
    mine.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    keys = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    assert all(torch.equal(file[key], copies[0].weight) for key in keys)
    reader = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    torch.testing.assert_close(reader(**entry.batch()).logits, live)
    merged = mine.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    torch.testing.assert_close(merged(**entry.batch()).logits, live)
