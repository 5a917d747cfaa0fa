"""peft, as a reader of files that this library wrote. Seen in its source and by running it beside ours (docs/parity.md)."""

from __future__ import annotations

from fxlora.checkpoint.readers.base import ALONE, HERE, NEWER, Reader, Rule

PEFT = Reader(
    "peft",
    "peft",
    "peft 0.21.2",
    (
        Rule(
            "attention",
            "wrong",
            "adds the update of an attention's output projection twice.",
            "run it here, or merge it into the base (export_merged)",
            "src/peft/tuners/lora/layer.py, MultiheadAttention",
        ),
        Rule(
            "grouped_dora",
            "wrong",
            "takes DoRA's norms of a matrix other than the layer's weight.",
            "run it here, or merge it into the base (export_merged)",
            "src/peft/tuners/lora/layer.py and dora.py, _ConvNd",
        ),
        Rule(
            "call_sites",
            "wrong",
            "leaves the field out with a warning, and adapts every call of the layer.",
            HERE,
            "src/peft/config.py, from_peft_type",
        ),
        Rule(
            "unknown_fields",
            "ignored",
            "leaves fields out that it does not know, with a warning.",
            "load it with the peft that wrote it, or " + NEWER,
            "src/peft/config.py, from_peft_type",
        ),
        Rule(
            "resized",
            "fails",
            "refuses factors for another vocabulary than the model's.",
            "resize the model's embeddings first (resize_token_embeddings), then load",
            "src/peft/utils/save_and_load.py, set_peft_model_state_dict",
        ),
        Rule(
            "base_weights",
            "note",
            "puts these weights into the base without asking.",
            "save with save_embedding_layers=False if they are the base's own",
            "src/peft/utils/save_and_load.py, set_peft_model_state_dict",
        ),
        Rule(
            "compact_conv",
            "note",
            "refuses the compact factors in which this library keeps convolutions with more than 16 groups; if the "
            "layer is no such convolution, it reads them.",
            "leave such layers out of the targets, or merge them into the base (export_merged)",
            "src/peft/tuners/lora/layer.py, _ConvNd.update_layer",
        ),
        Rule(
            "several_adapters",
            "note",
            "reads the one in the directory itself; those below it need a call of load_adapter each.",
            ALONE,
            "src/peft/peft_model.py, from_pretrained",
        ),
    ),
)
