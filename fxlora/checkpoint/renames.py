"""Names that a tensor may have in files, for the name that it has in memory, and the other way round.

Transformers renames some weights when it loads them, differently from version to version: an adapter has the names of
the model in memory that it was trained on, and the base those of its files. The table is our own; a test compares it
with transformers' where that is installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

TEXT_MODEL = (
    *("model.language_model.model.", "model.language_model.", "language_model.model.", "model.text_model."),
    *("text_model.model.", "language_model.", "model."),
)
"""Where the text model of a model for text and more is; a longer name before those that it begins with."""

HEAD = ("language_model.lm_head.", "text_model.lm_head.", "lm_head.", "embed_out.")

TOWERS = (
    *("visual", "vision_tower", "vision_model", "audio_tower", "image_tower", "video_tower", "encoder", "projector"),
    *("multi_modal_projector", "vision_embed_tokens", "vqmodel"),
)
"""Parts beside the text model, which are in `model.` or not."""

_MIXTURES = ("mlp", "block_sparse_moe", "ffn", "feed_forward", "moe")
"""What the module around experts and their router is called."""

_MIXTURE = re.compile(rf"\.({'|'.join(_MIXTURES)})\.(?=(experts?|gate|router|shared_experts?)\.)")

_LEAVES = (
    ("LayerNorm.weight", "LayerNorm.gamma"),
    ("LayerNorm.bias", "LayerNorm.beta"),
    (".mlp.router.weight", ".block_sparse_moe.gate.weight"),
    (".mlp.experts.gate_up_proj", ".mlp.experts.fc1.weight"),
    (".mlp.experts.down_proj", ".mlp.experts.fc2.weight"),
    (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
    (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
)
"""(in memory, in files): ends of names."""


def other_names(name: str) -> list[str]:
    """Names that mean the same tensor, without the name itself, in a fixed order."""
    return _closure(name, (_prefixes, _mixtures, _leaves))


def other_ends(name: str) -> list[str]:
    """Those of them that begin alike."""
    return _closure(name, (_mixtures, _leaves))


def _closure(name: str, rules: tuple[Callable[[str], Iterator[str]], ...]) -> list[str]:
    names = [name]
    for rule in rules:
        names = list(dict.fromkeys(other for each in names for other in (each, *rule(each))))
    return names[1:]


def _prefixes(name: str) -> Iterator[str]:
    for tower in TOWERS:
        if name.startswith(f"model.{tower}."):
            yield name.removeprefix("model.")
            return
        if name.startswith(f"{tower}."):
            yield f"model.{name}"
            return
    for family in (HEAD, TEXT_MODEL):
        found = next((each for each in family if name.startswith(each)), None)
        if found is not None:
            yield from (each + name.removeprefix(found) for each in family if each != found)
            return


def _mixtures(name: str) -> Iterator[str]:
    match = _MIXTURE.search(name)
    if match is not None:
        yield from (f"{name[: match.start()]}.{each}.{name[match.end() :]}" for each in _MIXTURES if each != match[1])


def _leaves(name: str) -> Iterator[str]:
    for pair in _LEAVES:
        for end, other in (pair, pair[::-1]):
            if name.endswith(end):
                yield name.removesuffix(end) + other
