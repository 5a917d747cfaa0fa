"""Adapters of fused experts, and other tensors that models name otherwise than files, merged into the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import CheckpointError, LoraConfig, MergeError, export_merged, lora_transform, merge_checkpoint
from fxlora._passes import factors
from fxlora.checkpoint.fused_experts import fused_experts
from fxlora.checkpoint.renames import other_names
from fxlora.checkpoint.safetensors_io import Entry

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
IDS = torch.arange(12).view(2, 6)
SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "Mixtral": (transformers.MixtralConfig, {"num_local_experts": 3}),
    "Qwen2Moe": (
        transformers.Qwen2MoeConfig,
        {"num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 1},
    ),
    "Qwen3Moe": (transformers.Qwen3MoeConfig, {"num_experts": 3, "moe_intermediate_size": 8, "head_dim": 8}),
    "square": (transformers.Qwen3MoeConfig, {"num_experts": 3, "moe_intermediate_size": 8, "head_dim": 8}),
    "Olmoe": (transformers.OlmoeConfig, {"num_experts": 3}),
    "Phimoe": (transformers.PhimoeConfig, {"num_local_experts": 3}),
    "DeepseekV3": (
        transformers.DeepseekV3Config,
        {
            "n_routed_experts": 4, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
            "kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        },
    ),
    "GraniteMoe": (transformers.GraniteMoeConfig, {"num_local_experts": 3}),
}  # fmt: skip
"""In "square" the parameter's matrices are square: (16, 16) of gate and up."""


def plain(name: str, dtype: torch.dtype = torch.float32) -> Any:
    cls, sizes = CONFIGS[name]
    config = cls(**{**SIZES, **sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().to(dtype)


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS, **options}
    if name == "DeepseekV3":
        settings["target_modules"] = ["o_proj"]
    model = lora_transform(plain(name, dtype), LoraConfig(**settings))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_and_live_model_agree(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(name, dtype, alpha_pattern={r".*down_proj": 3})
    plain(name, dtype).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    names = set(load_file(tmp_path / "base" / WEIGHTS))
    assert any("experts.1." in key for key in names) == (name != "GraniteMoe")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    export_merged(model, tmp_path / "live")
    assert (tmp_path / "files" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()
    assert set(load_file(tmp_path / "files" / WEIGHTS)) == names and set(report.merged) <= names
    if dtype == torch.float32:
        result = type(plain(name)).from_pretrained(tmp_path / "files").eval()
        torch.testing.assert_close(logits(result), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["Mixtral", "Phimoe", "Qwen3Moe"])
def test_routers_and_whole_modules(name: str, tmp_path: Path) -> None:
    model = adapted(name, target_parameters=None, modules_to_save=["mlp"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".modules_to_save." in key:
                parameter.mul_(1.5)
    plain(name).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    export_merged(model, tmp_path / "live")
    assert (tmp_path / "files" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()
    before, after = (load_file(tmp_path / each / WEIGHTS) for each in ("base", "files"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key in before if "experts" in key or ".gate.weight" in key or "router" in key} <= changed


def test_several_adapters_and_only_one_parameter(tmp_path: Path) -> None:
    one = adapted("Mixtral", torch.bfloat16, target_parameters=["experts.down_proj"])
    two = adapted("Mixtral", torch.bfloat16, target_parameters=EXPERTS, r=3)
    plain("Mixtral", torch.bfloat16).save_pretrained(tmp_path / "base")
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    merge_checkpoint(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], tmp_path / "files", weights=[0.5, 2])
    found, before = (load_file(tmp_path / each / WEIGHTS) for each in ("files", "base"))
    name, expected = "model.layers.1.block_sparse_moe.experts.2.w2.weight", 0.0
    for model, weight in ((one, 0.5), (two, 2.0)):
        spec = next(each for each in model._specs() if each.site == "model.layers.1.mlp.experts.down_proj")
        parts = factors(model, spec)
        A, B = parts["lora_A"].double(), parts["lora_B"].double()
        A, B = A.view(3, spec.r, -1)[2], B.view(B.shape[0], spec.r, 3)[..., 2]
        expected = expected + weight * spec.scaling * (B @ A)
    assert torch.equal(found[name], (before[name].double() + expected).float().bfloat16())


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")
def test_adapters_of_single_experts(tmp_path: Path) -> None:
    """As peft made them with transformers 4, where each expert was a module: with the names of the files."""
    plain("Mixtral").save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / WEIGHTS)
    targets = [name for name in before if "experts" in name]
    torch.manual_seed(3)
    saved: dict[str, Tensor] = {}
    for name in targets:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        saved[f"{key}.lora_A.weight"] = torch.randn(2, before[name].shape[1])
        saved[f"{key}.lora_B.weight"] = torch.randn(before[name].shape[0], 2)
    (tmp_path / "adapter").mkdir()
    save_file(saved, tmp_path / "adapter" / ADAPTER)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["w1", "w2", "w3"])
    (tmp_path / "adapter" / "adapter_config.json").write_text(config.to_json())
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    assert set(report.merged) == set(targets)
    theirs = peft.PeftModel.from_pretrained(
        transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    result = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "files").eval()
    torch.testing.assert_close(logits(result), logits(theirs), atol=1e-3, rtol=1e-3)


def test_experts_that_are_not_all_there(tmp_path: Path) -> None:
    plain("Mixtral").save_pretrained(tmp_path / "base")
    adapted("Mixtral").save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(tensors, tmp_path / "base" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.experts'.*2 parameters, and 1 of the base's"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parameter_and_one_of_its_experts_cannot_both_be_replaced(tmp_path: Path) -> None:
    plain("Mixtral").save_pretrained(tmp_path / "base")
    model = adapted("Mixtral", target_parameters=None, modules_to_save=["mlp"])
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "other").mkdir()
    name = "model.layers.0.block_sparse_moe.experts.0.w1"
    shape = load_file(tmp_path / "base" / WEIGHTS)[f"{name}.weight"].shape
    parts = {"lora_A.weight": torch.ones(2, shape[1]), "lora_B.weight": torch.ones(shape[0], 2)}
    save_file({f"base_model.model.{name}.{key}": value for key, value in parts.items()}, tmp_path / "other" / ADAPTER)
    (tmp_path / "other" / "adapter_config.json").write_text(LoraConfig(r=2, target_modules=["w1"]).to_json())
    with pytest.raises(MergeError, match=f"'{name}.weight', and adapters replace both"):
        merge_checkpoint(tmp_path / "base", [tmp_path / "adapter", tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the table against transformers' ----


def test_the_stacks_are_those_of_transformers() -> None:
    """Each model type whose experts transformers stacks: the parameter is found, with the name and the parts of its rule.

    One renames the module around them too, and all its other layers, which is no rule of ours: that merge is refused.
    """
    from transformers import conversion_mapping, core_model_loading

    conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    mapping: Any = conversion_mapping._checkpoint_conversion_mapping_cache
    checked = 0
    for kind, transforms in mapping.items():
        renamings = [each for each in transforms if not getattr(each, "operations", None)]
        for rule in transforms:
            operations = [type(each).__name__ for each in getattr(rule, "operations", None) or ()]
            if operations not in (["MergeModulelist", "Concatenate"], ["MergeModulelist"]):
                continue
            layers = [
                pattern.replace("\\", "").rpartition("*.")[2].removesuffix(".weight")
                for pattern in rule.source_patterns
            ]
            before = rule.source_patterns[0].replace("\\", "").partition(".*.")[0].strip(".")
            files = {
                f"model.layers.0.{before}.{index}.{layer}.weight": Entry("F32", (4, 6))
                for index in range(2)
                for layer in layers
            }
            if "fc2" in layers[0]:
                files.update({name.replace("fc2", "fc3"): entry for name, entry in files.items()})
            target = rule.target_patterns[0].replace("\\", "").strip(".")
            first = f"model.layers.0.{before}.0.{layers[0]}.weight"
            renamed = core_model_loading.rename_source_key(first, renamings, [rule])[0]
            assert renamed.endswith(target), (kind, renamed)
            fused = fused_experts(files)
            found = [name for name in (renamed, *other_names(renamed)) if name in fused]
            if kind == "mistral_large4_text":
                assert not found
                continue
            assert len(found) == 1, (kind, renamed, list(fused))
            pieces = fused[found[0]].pieces
            assert fused[found[0]].entry.shape == (2, 4 * len(layers), 6)
            rows = {piece.name.split(".")[-2]: piece.rows for piece in pieces}
            assert rows == {layer: (4 * i, 4 * i + 4) for i, layer in enumerate(layers)}
            checked += 1
    assert checked > 40


# ---- other renames ----


def test_names_of_other_versions() -> None:
    for memory, files in (
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("model.vision_tower.encoder.layers.0.fc1.weight", "vision_tower.encoder.layers.0.fc1.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("bert.encoder.layer.0.output.LayerNorm.weight", "bert.encoder.layer.0.output.LayerNorm.gamma"),
        ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    ):
        assert files in other_names(memory) and memory in other_names(files)
    assert other_names("transformer.h.0.attn.c_attn.weight") == []


def test_a_model_for_text_and_images(tmp_path: Path) -> None:
    """Files that transformers 4 made, an adapter of transformers 5: text, images and head are renamed in three ways."""

    def llava() -> Any:
        torch.manual_seed(0)
        text = {**SIZES, "model_type": "llama", "vocab_size": 64}
        vision = {
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
        }  # fmt: skip
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
        return transformers.LlavaForConditionalGeneration(config).eval()

    model = lora_transform(llava(), LoraConfig(r=2, target_modules=["q_proj", "lm_head", "linear_1"])).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    llava().save_pretrained(tmp_path / "base")
    names = list(load_file(tmp_path / "base" / WEIGHTS))
    assert any(name.startswith("language_model.model.") for name in names) and "language_model.lm_head.weight" in names
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    export_merged(model, tmp_path / "live")
    assert (tmp_path / "files" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()


def test_a_head_beside_a_base_without_prefix(tmp_path: Path) -> None:
    """The files are those of the model without a head, whose names lack `model.`; the head has a name of its own."""
    model = lora_transform(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "num_experts_per_tok": None})),
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    )
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    state = {n.removeprefix("model."): p.detach().clone() for n, p in model.state_dict().items() if "lora_" not in n}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / WEIGHTS)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    assert set(report.merged) == {"lm_head.weight", *(f"layers.{i}.self_attn.q_proj.weight" for i in range(2))}
