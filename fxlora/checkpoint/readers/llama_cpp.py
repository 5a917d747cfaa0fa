"""llama.cpp: its converter of adapters to GGUF and its loader. Seen in their source, and by running the converter."""

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
from fxlora.checkpoint.readers.features import embeddings, fan_in_fan_out, lm_head, whole_modules

_CONVERTER = "convert_lora_to_gguf.py"
_LOADER = "src/llama-adapter.cpp"
_SCALE = "src/llama-adapter.h, get_scale"


def _norms(contents: Contents) -> tuple[str, ...]:
    """Norms that are saved whole, if nothing else is."""
    norms = [key for key in contents.whole if "_layernorm" in key or ".norm" in key]
    return whole_modules(contents) if norms and len(norms) == len(contents.whole) else ()


def _other_modules(contents: Contents) -> tuple[str, ...]:
    return () if _norms(contents) else whole_modules(contents)


def _square(contents: Contents) -> tuple[str, ...]:
    """Layers whose transposed update has the same shape."""
    square = [b.name for b in contents.branches if not b.is_embedding and b.shape_A[-1] == b.shape_B[0]]
    return tuple(square) if fan_in_fan_out(contents) else ()


def _oblong(contents: Contents) -> tuple[str, ...]:
    oblong = [b.name for b in contents.branches if not b.is_embedding and b.shape_A[-1] != b.shape_B[0]]
    return tuple(oblong) if fan_in_fan_out(contents) else ()


def _head_of_unknown_base(contents: Contents) -> tuple[str, ...]:
    return lm_head(contents) if contents.base_config is None else ()


def _embedding_of_unknown_base(contents: Contents) -> tuple[str, ...]:
    return embeddings(contents) if contents.base_config is None else ()


LLAMA_CPP = Reader(
    "llama.cpp",
    "llama.cpp",
    "llama.cpp of llama-cpp-python 0.3.36",
    (
        Rule("rslora", "wrong", "scales by alpha / r all the same.", PORTABLE, _SCALE),
        Rule(
            "alpha_pattern",
            "wrong",
            "has one alpha for all layers, and takes lora_alpha.",
            PORTABLE,
            f"{_CONVERTER}, set_gguf_parameters",
        ),
        Rule("dora", "fails", "stops at DoRA's magnitudes.", MERGE, f"{_CONVERTER}, get_tensors"),
        Rule("lora_bias", "fails", "stops at biases of branches.", MERGE, f"{_CONVERTER}, get_tensors"),
        Rule("bias", "fails", "stops at biases.", MERGE, f"{_CONVERTER}, get_tensors"),
        Rule(
            "modules_to_save",
            "fails",
            "stops at modules that are saved whole, other than norms.",
            MERGE,
            f"{_CONVERTER}, get_tensors",
            _other_modules,
        ),
        Rule(
            "modules_to_save",
            "ignored",
            "writes norms into the GGUF file, and skips them when it loads it.",
            MERGE,
            f"{_LOADER}, llama_adapter_lora_init_impl",
            _norms,
        ),
        Rule(
            "base_weights",
            "note",
            "skips weights of the base in the file. That is right only if they are the base's own.",
            "save with save_embedding_layers=False if they are; else convert the base that has them",
            f"{_CONVERTER}, get_tensors",
        ),
        Rule("base_init", "wrong", "puts the factors on the unchanged base.", PLAIN, _CONVERTER),
        Rule(
            "variants",
            "fails",
            "does not read these fields, and stops at the shapes or names of their tensors.",
            WITH_PEFT,
            f"{_CONVERTER}, get_tensors; {_LOADER}",
        ),
        Rule(
            "tied_head",
            "fails",
            "has no tensor of its own for a head that is tied to the embedding: it refuses it, at the latest when it loads the "
            "GGUF file.",
            "leave lm_head out of the targets, or untie and merge (export_merged)",
            f"{_CONVERTER}, modify_tensors; {_LOADER}",
        ),
        Rule(
            "tied_embedding",
            "fails",
            "applies the update of an embedding also where its weight is the head's, and stops there, since it has another "
            "layout.",
            "leave the embedding out of the targets, or untie and merge (export_merged)",
            "src/llama-graph.cpp, build_lora_mm; src/models/llama.cpp",
        ),
        Rule(
            "lm_head",
            "note",
            "refuses a head that is tied to the embedding. Whether it is was not seen: the base is not here.",
            "check again with the base's directory (--base DIR)",
            f"{_CONVERTER}, modify_tensors; {_LOADER}",
            _head_of_unknown_base,
        ),
        Rule(
            "embeddings",
            "note",
            "stops at an embedding that the head is tied to. Whether it is was not seen: the base is not here.",
            "check again with the base's directory (--base DIR)",
            "src/llama-graph.cpp, build_lora_mm",
            _embedding_of_unknown_base,
        ),
        Rule(
            "resized",
            "fails",
            "refuses an embedding for another vocabulary than the model's.",
            "convert a base with the resized embeddings",
            f"{_LOADER}, llama_adapter_lora_init_impl",
        ),
        Rule("trainable_tokens", "fails", "stops at the rows of trained tokens.", LIVE, f"{_CONVERTER}, get_tensors"),
        Rule(
            "experts",
            "fails",
            "has no tensor of the name that peft's files have for experts.",
            MERGE,
            f"{_CONVERTER}, modify_tensors",
        ),
        Rule(
            "layer_replication",
            "fails",
            "finds no such layers in the model.",
            REPEATED,
            f"{_CONVERTER}, modify_tensors",
        ),
        Rule("conv", "fails", "converts matrices only.", MERGE, f"{_CONVERTER}, modify_tensors"),
        Rule("attention", "fails", "has no tensor of such a name.", MERGE, f"{_CONVERTER}, modify_tensors"),
        Rule(
            "call_sites",
            "wrong",
            "does not read the field, and adapts every call of the layer.",
            HERE,
            _CONVERTER,
        ),
        Rule("unknown_fields", "ignored", "does not read fields that it does not know.", NEWER, _CONVERTER),
        Rule(
            "fan_in_fan_out",
            "wrong",
            "transposes the update of layers that store (in, out), as if it were stored so too; where both sizes are "
            "equal nothing stops it.",
            MERGE,
            "conversion/gpt2.py, modify_tensors",
            _square,
        ),
        Rule(
            "fan_in_fan_out",
            "fails",
            "transposes the update of layers that store (in, out), as if it were stored so too, and refuses its shape "
            "when it loads the GGUF file.",
            MERGE,
            f"conversion/gpt2.py, modify_tensors; {_LOADER}",
            _oblong,
        ),
        Rule(
            "no_base_name",
            "note",
            "needs the base's configuration, and does not find it by the adapter.",
            "pass it to the converter (--base DIR)",
            _CONVERTER,
        ),
        Rule("several_adapters", "note", "reads the one in the directory itself.", ALONE, _CONVERTER),
    ),
)
