"""vLLM. Seen in its source, and by running its `PEFTHelper` and `LoRAModel` on small adapters."""

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
from fxlora.checkpoint.readers.features import base_weights, ranks_above, whole_modules

_HELPER = "vllm/lora/peft_helper.py"
_MODEL = "vllm/lora/lora_model.py"
_UTILS = "vllm/lora/utils.py"
_CLASSIFIERS = ("score", "classifier")
_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
LARGEST_RANK = 512
"""`MaxLoRARanks` of vllm/config/lora.py."""


def _heads(contents: Contents) -> tuple[str, ...]:
    """Modules that are saved whole, if they are a classifier only."""
    names = contents.names("modules_to_save")
    return whole_modules(contents) if names and all(name in _CLASSIFIERS for name in names) else ()


def _other_modules(contents: Contents) -> tuple[str, ...]:
    return () if _heads(contents) else whole_modules(contents)


def _embedding_weights(contents: Contents) -> tuple[str, ...]:
    return tuple(key for key in base_weights(contents) if key.endswith(_SKIPPED))


def _other_weights(contents: Contents) -> tuple[str, ...]:
    return tuple(key for key in base_weights(contents) if not key.endswith(_SKIPPED))


def _too_high(contents: Contents) -> tuple[str, ...]:
    return ranks_above(contents, LARGEST_RANK)


def _high(contents: Contents) -> tuple[str, ...]:
    return () if _too_high(contents) else ranks_above(contents, 16)


def _absent_targets(contents: Contents) -> tuple[str, ...]:
    return () if "target_modules" in contents.config else ("target_modules",)


VLLM = Reader(
    "vllm",
    "vLLM",
    "vLLM 0.33.0",
    (
        Rule("dora", "fails", "refuses DoRA.", MERGE, f"{_HELPER}, _validate_features"),
        Rule("lora_bias", "fails", "refuses biases of branches.", MERGE, f"{_HELPER}, _validate_features"),
        Rule("bias", "fails", "refuses adapters that train biases.", MERGE, f"{_HELPER}, validate_legal"),
        Rule(
            "modules_to_save",
            "fails",
            "refuses modules that are saved whole, other than one head called 'score' or 'classifier'.",
            MERGE,
            f"{_HELPER}, _validate_features",
            _other_modules,
        ),
        Rule(
            "modules_to_save",
            "note",
            "takes one head called 'score' or 'classifier', for pooling models, from 0.31 on; older versions refuse it.",
            "serve with vLLM 0.31 or newer, or merge it",
            f"{_HELPER}, _validate_features",
            _heads,
        ),
        Rule(
            "base_init",
            "fails",
            "refuses an adapter whose initialisation changed the base; before 0.32 it put it on the unchanged base.",
            PLAIN,
            f"{_HELPER}, _init_is_supported",
        ),
        Rule("alora", "fails", "refuses activated LoRA.", "serve it with llama.cpp or peft", _HELPER),
        Rule("layer_replication", "fails", "refuses repeated layers.", REPEATED, _HELPER),
        Rule("variants", "fails", "refuses these variants, or their tensors.", WITH_PEFT, f"{_HELPER}, {_UTILS}"),
        Rule(
            "trainable_tokens",
            "fails",
            "stops at the rows of trained tokens, which are no key that it knows.",
            LIVE,
            f"{_UTILS}, parse_fine_tuned_lora_name",
        ),
        Rule(
            "base_weights",
            "fails",
            "stops at weights of the base, other than embed_tokens' and lm_head's.",
            "save with save_embedding_layers=False",
            f"{_UTILS}, parse_fine_tuned_lora_name",
            _other_weights,
        ),
        Rule(
            "base_weights",
            "note",
            "skips the base's embedding weights in the file. That is right only if they are the base's own.",
            "save with save_embedding_layers=False if they are; else serve the base that has them",
            f"{_UTILS}, is_base_embedding_weights",
            _embedding_weights,
        ),
        Rule(
            "resized",
            "fails",
            "refuses an embedding for another vocabulary than the served model's.",
            "serve a base with the resized embeddings",
            f"{_MODEL}, from_lora_tensors",
        ),
        Rule(
            "experts",
            "fails",
            "refuses experts in three dimensions for models whose experts it keeps in two, unless the server is started "
            "with --enable-mixed-moe-lora-format and the request says is_3d_lora_weight.",
            "start the server so, or " + MERGE,
            "vllm/lora/model_manager.py, _validate_moe_lora_format",
        ),
        Rule(
            "conv",
            "fails",
            "adapts linear layers and embeddings only, and refuses other names.",
            MERGE,
            f"{_MODEL}, check_unexpected_modules",
        ),
        Rule(
            "attention",
            "ignored",
            "has no such module, and does not check names with 'base_layer'.",
            MERGE,
            f"{_MODEL}, check_unexpected_modules",
        ),
        Rule(
            "call_sites",
            "wrong",
            "does not read the field, and adapts every call of the layer.",
            HERE,
            f"{_HELPER}, from_dict",
        ),
        Rule(
            "unknown_fields",
            "ignored",
            "does not read fields that it does not know.",
            NEWER,
            f"{_HELPER}, from_dict",
        ),
        Rule(
            "no_targets",
            "fails",
            "asks for the field target_modules.",
            "save the adapter again with it",
            f"{_HELPER}, from_dict",
            _absent_targets,
        ),
        Rule(
            "high_rank",
            "fails",
            f"has no setting for ranks above {LARGEST_RANK}.",
            MERGE,
            "vllm/config/lora.py, MaxLoRARanks",
            _too_high,
        ),
        Rule(
            "high_rank",
            "note",
            "refuses ranks above 16 unless it is started with a larger --max-lora-rank.",
            "start the server with --max-lora-rank of the adapter's rank or the next that it has",
            f"{_HELPER}, validate_legal",
            _high,
        ),
        Rule(
            "rank_pattern",
            "note",
            "reads ranks of single layers from 0.32 on; older versions scale them wrongly, without a word.",
            PORTABLE,
            f"{_HELPER}, get_rank_and_scaling",
        ),
        Rule(
            "alpha_pattern",
            "note",
            "reads alphas of single layers from 0.32 on; older versions scale them wrongly, without a word.",
            PORTABLE,
            f"{_HELPER}, get_rank_and_scaling",
        ),
        Rule(
            "embeddings",
            "note",
            "adapts embeddings of those models whose classes list them in embedding_modules, and refuses others.",
            "try it with the model that is served",
            f"{_UTILS}, get_supported_lora_modules",
        ),
        Rule(
            "lm_head",
            "note",
            "adapts the head of those models whose classes list it in embedding_modules, and refuses others.",
            "try it with the model that is served",
            f"{_UTILS}, get_supported_lora_modules",
        ),
        Rule(
            "dtype",
            "note",
            "rounds the factors to the served model's dtype before it multiplies by the scale.",
            "expect the differences of that dtype",
            f"{_MODEL}, from_lora_tensors",
        ),
        Rule(
            "several_adapters",
            "note",
            "reads the one in the directory itself.",
            ALONE,
            f"{_MODEL}, from_local_checkpoint",
        ),
    ),
)
