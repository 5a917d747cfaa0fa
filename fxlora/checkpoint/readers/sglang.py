"""SGLang. Seen in its source, and by running its `LoRAConfig` and `LoRAAdapter` on small adapters."""

from __future__ import annotations

from fxlora.checkpoint.contents import Contents
from fxlora.checkpoint.readers.base import (
    ALONE,
    HERE,
    LIVE,
    MERGE,
    NEWER,
    PLAIN,
    PORTABLE,
    REPEATED,
    WITH_PEFT,
    Reader,
    Rule,
)
from fxlora.checkpoint.readers.features import biases, lora_bias, whole_modules

_CONFIG = "python/sglang/srt/lora/lora_config.py"
_ADAPTER = "python/sglang/srt/lora/lora.py"
_MANAGER = "python/sglang/srt/lora/lora_manager.py"
_POOL = "python/sglang/srt/lora/mem_pool.py"
_UTILS = "python/sglang/srt/lora/utils.py"

_KNOWN_TEXT = """
q_proj k_proj v_proj qkv_proj qkvr o_proj wo_ud out_proj in_proj in_proj_qkvz in_proj_q in_proj_k in_proj_v in_proj_z x_proj
gate_proj up_proj gate_up_proj down_proj fc1_latent_proj fc2_latent_proj w1 w2 w3 wq_b wk weights_proj
embed_tokens vocab_emb embeddings word_embeddings lm_head output unembed_tokens
q_a_proj kv_a_proj_with_mqa fused_qkv_a_proj_with_mqa q_b_proj kv_b_proj
"""
_KNOWN = frozenset(_KNOWN_TEXT.split())
"""Last parts of names that its tables and its renaming of projections mention."""


def _in_layers(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if ".layers." in key)


def _modules_in_layers(contents: Contents) -> tuple[str, ...]:
    return _in_layers(contents.whole)


def _other_modules(contents: Contents) -> tuple[str, ...]:
    return () if _in_layers(contents.whole) else whole_modules(contents)


def _biases_of_others(contents: Contents) -> tuple[str, ...]:
    """Biases of layers that have no branch."""
    return tuple(key for key in contents.biases if ".base_layer." not in key)


def _biases_of_targets(contents: Contents) -> tuple[str, ...]:
    return () if _biases_of_others(contents) else biases(contents)


def _unknown_names(contents: Contents) -> tuple[str, ...]:
    return tuple(b.name for b in contents.branches if b.leaf not in _KNOWN and not b.is_parameter and not b.is_conv)


SGLANG = Reader(
    "sglang",
    "SGLang",
    "SGLang 0.5.23",
    (
        Rule("rslora", "wrong", "scales by alpha / r all the same.", PORTABLE, f"{_ADAPTER}, LoRAAdapter"),
        Rule("alpha_pattern", "wrong", "scales all layers by lora_alpha / r.", PORTABLE, f"{_ADAPTER}, LoRAAdapter"),
        Rule(
            "rank_pattern",
            "fails",
            "stops with an error of shapes, when the adapter is first used: all layers must have the rank r.",
            PORTABLE,
            f"{_POOL}, load_lora_weight_to_buffer; {_ADAPTER}, normalize_qkv_proj",
        ),
        Rule("dora", "fails", "refuses DoRA.", MERGE, f"{_MANAGER}, validate_new_adapter"),
        Rule(
            "lora_bias",
            "ignored",
            "drops biases of branches: the matrix B, which comes later in the file, takes their place.",
            MERGE,
            f"{_POOL}, load_lora_weight_to_buffer",
            lora_bias,
        ),
        Rule(
            "bias",
            "fails",
            "stops at biases of layers without a branch.",
            MERGE,
            f"{_ADAPTER}, normalize_qkv_proj; {_UTILS}, get_target_module_name",
            _biases_of_others,
        ),
        Rule(
            "bias",
            "ignored",
            "drops biases: the matrix B, which comes later in the file, takes their place.",
            MERGE,
            f"{_POOL}, load_lora_weight_to_buffer",
            _biases_of_targets,
        ),
        Rule(
            "modules_to_save",
            "fails",
            "stops at tensors in a layer that are of no projection, when the adapter is first used.",
            MERGE,
            f"{_UTILS}, get_target_module_name",
            _modules_in_layers,
        ),
        Rule(
            "modules_to_save",
            "ignored",
            "drops modules that are saved whole, such as a head.",
            MERGE,
            f"{_ADAPTER}, _process_weight",
            _other_modules,
        ),
        Rule("base_init", "wrong", "puts the factors on the unchanged base.", PLAIN, _CONFIG),
        Rule("alora", "wrong", "has the branches active on all tokens.", "serve it with llama.cpp or peft", _CONFIG),
        Rule(
            "layer_replication", "fails", "has no such layers (IndexError).", REPEATED, f"{_ADAPTER}, _process_weight"
        ),
        Rule(
            "variants",
            "fails",
            "does not read these fields, and stops at the shapes or names of their tensors.",
            WITH_PEFT,
            f"{_POOL}, load_lora_weight_to_buffer",
        ),
        Rule(
            "trainable_tokens",
            "ignored",
            "drops the rows of trained tokens.",
            LIVE,
            f"{_ADAPTER}, _process_weight; {_POOL}",
        ),
        Rule(
            "base_weights",
            "note",
            "drops weights of the base in the file. That is right only if they are the base's own.",
            "save with save_embedding_layers=False if they are; else serve the base that has them",
            f"{_POOL}, load_lora_weight_to_buffer",
        ),
        Rule(
            "resized",
            "fails",
            "refuses an embedding for another vocabulary than the served model's.",
            "serve a base with the resized embeddings",
            f"{_POOL}, load_lora_weight_tensor",
        ),
        Rule(
            "new_tokens",
            "fails",
            "refuses adapters that bring tokens.",
            "serve a base that has the tokens, and remove the file",
            f"{_MANAGER}, validate_new_adapter",
        ),
        Rule(
            "experts",
            "fails",
            "finds no projection in the names of experts in three dimensions.",
            MERGE,
            f"{_UTILS}, get_target_module_name",
        ),
        Rule("conv", "fails", "adapts projections and embeddings only.", MERGE, f"{_UTILS}, get_default_hidden_dim"),
        Rule("attention", "fails", "has no such module.", MERGE, f"{_UTILS}, get_default_hidden_dim"),
        Rule(
            "call_sites",
            "wrong",
            "does not read the field, and adapts every call of the layer.",
            HERE,
            _CONFIG,
        ),
        Rule("unknown_fields", "ignored", "does not read fields that it does not know.", NEWER, _CONFIG),
        Rule(
            "regex_targets",
            "fails",
            "takes a list of names, or 'all-linear', and no other text.",
            PORTABLE,
            f"{_UTILS}, get_normalized_target_modules",
        ),
        Rule("no_targets", "fails", "asks for a list of names.", PORTABLE, f"{_MANAGER}, init_lora_shapes"),
        Rule(
            "lone_projections",
            "fails",
            "runs q, k and v as one, and gate and up: k may be missing, and up; q with v, or gate, may not.",
            "train q with v and up with gate, or " + MERGE,
            f"{_ADAPTER}, normalize_qkv_proj, normalize_gate_up_proj",
        ),
        Rule(
            "module_names",
            "fails",
            "knows the projections of usual decoders by name, and others only of models whose classes say their sizes.",
            "try it with the model that is served, or " + MERGE,
            f"{_UTILS}, get_default_hidden_dim",
            _unknown_names,
        ),
        Rule(
            "dtype",
            "note",
            "rounds the factors to the served model's dtype.",
            "expect the differences of that dtype",
            f"{_UTILS}, copy_weight_into_buffer",
        ),
        Rule("several_adapters", "note", "reads the one in the directory itself.", ALONE, _CONFIG),
    ),
)
