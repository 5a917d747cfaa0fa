"""ONNX Runtime, whose `.onnx_adapter` files Olive makes (`olive convert-adapters`).

Seen in their source, and by running ONNX Runtime on a small graph with an adapter that has a tensor too many.
"""

from __future__ import annotations

from fxlora.checkpoint.adapter import KEY_PREFIX
from fxlora.checkpoint.contents import Contents
from fxlora.checkpoint.readers.base import ALONE, HERE, LIVE, NEWER, PLAIN, PORTABLE, REPEATED, WITH_PEFT, Reader, Rule

_CONVERTER = "olive/cli/convert_adapters.py"
_EXTRACTION = "olive/passes/onnx/extract_adapters.py"
_UNKNOWN = "stops at a tensor that is no input of the exported model (Invalid input name)"
_MERGED = "merge it into the model and export that"


def _outside(contents: Contents) -> tuple[str, ...]:
    """Layers whose names keep peft's prefix."""
    return tuple(b.name for b in contents.branches if not b.A.startswith(f"{KEY_PREFIX}model.") and b.leaf != "lm_head")


ONNXRUNTIME = Reader(
    "onnxruntime",
    "ONNX Runtime",
    "Olive 0.13.0, ONNX Runtime 1.32.0",
    (
        Rule("alpha_pattern", "wrong", "gets all layers scaled by lora_alpha / r.", PORTABLE, _CONVERTER),
        Rule("rank_pattern", "wrong", "gets all layers scaled by lora_alpha / r.", PORTABLE, _CONVERTER),
        Rule("dora", "fails", "gets no file: Olive refuses DoRA.", _MERGED, _CONVERTER),
        Rule("lora_bias", "fails", f"{_UNKNOWN}: biases of branches.", _MERGED, _EXTRACTION),
        Rule("bias", "fails", f"{_UNKNOWN}: biases.", _MERGED, _CONVERTER),
        Rule("modules_to_save", "fails", f"{_UNKNOWN}: modules that are saved whole.", _MERGED, _CONVERTER),
        Rule(
            "base_weights",
            "fails",
            f"{_UNKNOWN}: weights of the base.",
            "save with save_embedding_layers=False",
            _CONVERTER,
        ),
        Rule("base_init", "wrong", "puts the factors on the unchanged base.", PLAIN, _CONVERTER),
        Rule(
            "alora",
            "wrong",
            "has the branches active on all tokens.",
            "serve it with llama.cpp or peft",
            _CONVERTER,
        ),
        Rule("variants", "fails", f"{_UNKNOWN}, or at its shape.", WITH_PEFT, _CONVERTER),
        Rule(
            "embeddings",
            "fails",
            f"{_UNKNOWN}: factors of embeddings, which stay constants of the exported model. They would not be scaled "
            "either.",
            "leave embeddings out of the targets, or " + _MERGED,
            f"{_CONVERTER}; {_EXTRACTION}",
        ),
        Rule(
            "lm_head",
            "fails",
            f"{_UNKNOWN}: lm_head keeps peft's prefix in its name.",
            "leave lm_head out of the targets, or " + _MERGED,
            _CONVERTER,
        ),
        Rule("trainable_tokens", "fails", f"{_UNKNOWN}: rows of tokens.", LIVE, _CONVERTER),
        Rule("experts", "fails", f"{_UNKNOWN}: experts are exported without LoRA inputs.", _MERGED, _EXTRACTION),
        Rule("layer_replication", "fails", f"{_UNKNOWN}: repeated layers.", REPEATED, _CONVERTER),
        Rule(
            "conv",
            "fails",
            "has LoRA inputs for matrices only.",
            _MERGED,
            f"{_EXTRACTION}; olive/passes/onnx/common.py",
        ),
        Rule("attention", "fails", f"{_UNKNOWN}: parts of attentions.", _MERGED, _EXTRACTION),
        Rule(
            "module_names",
            "fails",
            f"{_UNKNOWN}: names that are not of a module called 'model' keep peft's prefix.",
            _MERGED,
            _CONVERTER,
            _outside,
        ),
        Rule("call_sites", "wrong", "adapts every call of the layer.", HERE, _CONVERTER),
        Rule("unknown_fields", "ignored", "gets them left out by peft, which Olive reads with.", NEWER, _CONVERTER),
        Rule("several_adapters", "note", "gets the one in the directory itself.", ALONE, _CONVERTER),
    ),
)
