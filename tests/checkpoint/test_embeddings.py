"""`save_embedding_layers` against peft's files, and reading such files back; peft's keywords of loading."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fxlora import AdapterError, CheckpointError, ConfigError, LoraConfig, lora_transform, merge_checkpoint
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.models.checks import randomise
from tests.zoo import MLP

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
IDS = torch.tensor([[1, 5, 7], [0, 2, 3]])
COPIES = ("original_module", "modules_to_save")
"""What peft writes a second time of modules that are saved whole."""


def llama(vocabulary: int = 32, *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=vocabulary,
        max_position_embeddings=64, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


CONFIGS: dict[str, dict[str, Any]] = {
    "no embedding": {"target_modules": ["q_proj"]},
    "input": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "expression": {"target_modules": ".*(q_proj|embed_tokens)"},
    "full name": {"target_modules": ["q_proj", "model.embed_tokens"]},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "one saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
}


def ours(model: Any, capture: Any = "modules", **config: Any) -> Any:
    return lora_transform(model, LoraConfig(r=2, **config), capture=capture, example_inputs={"input_ids": IDS})


def theirs(model: Any, **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, **config))


def saved_by(model: Any, directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory, **options)
    return load_file(directory / WEIGHTS)


@pytest.mark.parametrize("capture", ["modules", "export"])
@pytest.mark.parametrize("wanted", ["auto", True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_pefts(name: str, wanted: Any, capture: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = ours(llama(), capture, **config)
    expected = saved_by(theirs(llama(), **config), tmp_path / "theirs", save_embedding_layers=wanted)
    found = saved_by(model, tmp_path / "ours", save_embedding_layers=wanted)
    assert found.keys() == {key for key in expected if not any(f".{copy}." in key for copy in COPIES)}
    base = llama().state_dict()
    for key in found:
        if "lora_" not in key and "trainable_tokens" not in key:
            assert torch.equal(found[key], expected[key])
    for directory in ("theirs", "ours"):  # both are read, and change nothing in the base
        back = lora_transform(llama(), tmp_path / directory)
        assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in base.items())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # peft misses nothing
        read = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(read(input_ids=IDS).logits, model.eval()(input_ids=IDS)[0])


@pytest.mark.parametrize("name", ["no embedding", "saved whole", "input"])
def test_resized_vocabulary(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The base on disk has 32 entries, the model 40: peft writes the embeddings, and so do we."""
    llama().save_pretrained(tmp_path / "base")

    def resized() -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(1)
        model.resize_token_embeddings(40, mean_resizing=False)
        return model.eval()

    model = ours(resized(), **CONFIGS[name])
    randomise(model)
    found = saved_by(model, tmp_path / "ours")
    expected = saved_by(theirs(resized(), **CONFIGS[name]), tmp_path / "theirs")
    assert found.keys() == {key for key in expected if not any(f".{copy}." in key for copy in COPIES)}
    assert ("the vocabulary has 40 entries, and 32 in" in caplog.text) == (name != "input")
    lora_transform(resized(), tmp_path / "theirs").verify()
    other = llama(40)  # other rows, as if they had been drawn anew
    before = snapshot(other)
    if name == "saved whole":  # the copies are what counts
        lora_transform(other, tmp_path / "ours")
        return
    with pytest.raises(CheckpointError, match="differs from this base's.*load_base_weights=True"):
        lora_transform(other, tmp_path / "ours")
    assert_unchanged(other, before)
    words = r"\(2, 40\)" if name == "input" else r"\(40, 16\), and .*\(32, 16\).*resize_token_embeddings"
    with pytest.raises(CheckpointError, match=words):
        lora_transform(llama(), tmp_path / "ours", load_base_weights=True)


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_taking_base_weights(capture: Any, tmp_path: Path) -> None:
    source = llama()
    with torch.no_grad():
        source.get_input_embeddings().weight.normal_()
    model = ours(source, capture, target_modules=["q_proj", "embed_tokens"])
    randomise(model)
    model.save_pretrained(tmp_path)
    expected = source.get_input_embeddings().weight
    taken = lora_transform(
        llama(), tmp_path, capture=capture, example_inputs={"input_ids": IDS}, load_base_weights=True
    ).eval()
    assert torch.equal(taken(input_ids=IDS)[0], model.eval()(input_ids=IDS)[0])
    taken.load_adapter(tmp_path, "again")  # the base has these weights now
    other = ours(llama(), capture, target_modules=["q_proj", "embed_tokens"])
    other.merge_adapter()
    before = snapshot(other)
    with pytest.raises(AdapterError, match="'model.embed_tokens.weight' is to be loaded.*unmerge_adapter first"):
        other.load_adapter(tmp_path, "loaded", load_base_weights=True)
    assert_unchanged(other, before)
    other.unmerge_adapter()
    with pytest.raises(CheckpointError, match="differs from this base's"):
        other.load_adapter(tmp_path, "loaded")
    assert other.load_adapter(tmp_path, "loaded", load_base_weights=True) == ((), (), ())
    other.delete_adapter("loaded")
    assert torch.equal(other.unload().state_dict()["model.embed_tokens.weight"], expected)  # it stays


def test_tied_weights_that_differ_in_the_file(tmp_path: Path) -> None:
    saved_by(ours(llama(), target_modules=["q_proj"]), tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{PREFIX}lm_head.weight"] + 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="lm_head.weight.*are tied in this model and differ in the file"):
        lora_transform(llama(tied=True), tmp_path, load_base_weights=True)


def test_merged_weights_are_not_saved(tmp_path: Path) -> None:
    model = ours(llama(), target_modules=["q_proj", "embed_tokens"])
    randomise(model)
    model.merge_adapter()
    found = saved_by(model, tmp_path)
    assert torch.equal(
        found[f"{PREFIX}model.embed_tokens.base_layer.weight"], llama().state_dict()["model.embed_tokens.weight"]
    )


def test_files_with_copies_are_merged_into_files(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    reference = theirs(llama(), **CONFIGS["saved whole"])
    with torch.no_grad():
        reference.base_model.model.lm_head.modules_to_save["default"].weight.fill_(0.5)
    saved_by(reference, tmp_path / "theirs", save_embedding_layers=True)
    merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    assert (load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"] == 0.5).all()


def test_not_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_by(lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"])), tmp_path, save_embedding_layers=True)
    assert "its embeddings are not known" in caplog.text


# ---- peft's keywords of loading ----


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_key_mapping(capture: Any, tmp_path: Path) -> None:
    x = torch.ones(2, 8)
    model: Any = lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"]), capture=capture).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors = {key.replace("fc1", "old.first"): value for key, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    before = snapshot(model)
    for mapping in (None, {"old": "new"}):
        with pytest.raises(CheckpointError, match=r"old\.first.*belongs to no target"):
            model.load_adapter(tmp_path, "again", key_mapping=mapping)
    with pytest.raises(ConfigError, match=r"key_mapping: '\(' and 'x' cannot be used"):
        model.load_adapter(tmp_path, "again", key_mapping={"(": "x"})
    assert_unchanged(model, before)
    expected = model(x)
    mapping = {r"^old\.first": "fc1", "fc1": "never"}  # the first that matches is used
    model.load_adapter(tmp_path, "again", key_mapping=mapping, torch_device="cpu", low_cpu_mem_usage=True)
    model.set_adapter("again")
    assert torch.equal(model(x), expected)


def test_dtypes_of_factors(tmp_path: Path) -> None:
    model: Any = lora_transform(MLP().bfloat16(), LoraConfig(r=2, target_modules=["fc1"]), capture="modules")
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "narrow", autocast_adapter_dtype=False)
    model.add_adapter("drawn", LoraConfig(r=2, target_modules=["fc1"]), autocast_adapter_dtype=False)
    found = {name: model.get_parameter(f"fc1.lora_A.{name}.weight").dtype for name in ("default", "narrow", "drawn")}
    assert found == {"default": torch.float32, "narrow": torch.bfloat16, "drawn": torch.bfloat16}


def test_branch_dtype_of_a_saved_adapter(tmp_path: Path) -> None:
    lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"])).save_pretrained(tmp_path)
    assert lora_transform(MLP(), tmp_path)._lora.branch_dtype == "base"
    assert lora_transform(MLP(), tmp_path, branch_dtype="adapter")._lora.branch_dtype == "adapter"
    with pytest.raises(ConfigError, match="`branch_dtype` should be one of 'base', 'adapter', not 'bsae'"):
        lora_transform(MLP(), tmp_path, branch_dtype="bsae")  # pyright: ignore[reportArgumentType]


# ---- model cards ----


def test_card(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    model = ours(llama(), target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="someone/ba: 'se'")
    model.create_or_update_model_card(tmp_path / "new")
    text = (tmp_path / "new" / "README.md").read_text()
    expected = {
        "library_name": "peft",
        "base_model": "someone/ba: 'se'",
        "tags": ["base_model:adapter:someone/ba: 'se'", "lora", "transformers"],
        "pipeline_tag": "text-generation",
    }
    assert yaml.safe_load(text.split("---\n")[1]) == expected
    assert text.endswith("---\n\n# Adapter\n\n### Framework versions\n\n- PEFT 0.21.2\n")
    model.create_or_update_model_card(tmp_path / "new")
    assert (tmp_path / "new" / "README.md").read_text() == text


def test_card_that_someone_wrote(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    written = "---\nlicense: mit\ntags:\n- old\nbase_model: x\npipeline_tag: other\n---\n# Mine\n\n### Framework versions\n\n- torch\n"
    (tmp_path / "README.md").write_text(written)
    lora_transform(MLP(), LoraConfig(r=2, target_modules=["fc1"])).create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "license": "mit",
        "pipeline_tag": "other",
        "library_name": "peft",
        "tags": ["lora"],
        "base_model": "x",
    }
    assert text.split("---\n")[2] == "# Mine\n\n### Framework versions\n\n- PEFT 0.21.2\n- torch\n"


def test_card_agrees_with_pefts(tmp_path: Path) -> None:
    """The fields that say what the adapter is for, read with the hub's own library."""
    hub = pytest.importorskip("huggingface_hub")
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    base = llama()
    base.config._name_or_path = base.name_or_path = "someone/base"
    theirs(base, **settings).create_or_update_model_card(str(tmp_path))
    expected = hub.ModelCard.load(tmp_path / "README.md").data.to_dict()
    (tmp_path / "README.md").unlink()
    base = llama()
    base.config._name_or_path = base.name_or_path = "someone/base"
    ours(base, **settings).create_or_update_model_card(tmp_path)
    assert hub.ModelCard.load(tmp_path / "README.md").data.to_dict() == expected
