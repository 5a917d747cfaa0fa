"""Weights that a model ties when it loads a checkpoint: which they are, and what a merge makes of them.

Files hold a tied weight once, under the name of the input embeddings, or under each of its names. What the configuration
and the names say is all that is asked; the names of the ends are those of transformers' models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from fxlora.checkpoint.safetensors_io import Entry

_LM_HEAD = "lm_head.weight"

_ENDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"language_model\.model\.embed_tokens\.weight", (f"language_model.{_LM_HEAD}",)),
    (r"(?:.*\.)?(?:embed_tokens|wte|tok_embeddings)\.weight", (_LM_HEAD,)),
    (r"(?:transformer\.)?word_embeddings\.weight", (_LM_HEAD,)),
    (r"(?:gpt_neox\.)?embed_in\.weight", ("embed_out.weight",)),
    (r"(model\.)?shared\.weight", (_LM_HEAD, r"\1encoder.embed_tokens.weight", r"\1decoder.embed_tokens.weight")),
    (r"(?:bert|ernie|nezha)\.embeddings\.word_embeddings\.weight", ("cls.predictions.decoder.weight",)),
    (r"(?:roberta|xlm_roberta|camembert)\.embeddings\.word_embeddings\.weight", ("lm_head.decoder.weight",)),
    (r"albert\.embeddings\.word_embeddings\.weight", ("predictions.decoder.weight",)),
    (r"distilbert\.embeddings\.word_embeddings\.weight", ("vocab_projector.weight",)),
    (r"mobilebert\.embeddings\.word_embeddings\.weight", ("cls.predictions.decoder.weight",)),
)
"""(the input embeddings, the other ends of their weight)."""

_OTHER_HEADS = {"whisper": "proj_out.weight"}
"""By `model_type`, the head where it is called otherwise."""

_WITH_HEAD = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM", "PreTraining", "DoubleHeadsModel")
"""Ends of the names of classes that have an output layer."""


@dataclass(frozen=True, slots=True)
class Family:
    """A tied weight.

    Attributes:
        embedding: the name of the input embeddings in the files.
        others: the other ends, of which files may have none.
        stored: those of all ends that the files have.
        said: whether the configuration says that they are one weight.
    """

    embedding: str
    others: tuple[str, ...]
    stored: tuple[str, ...]
    said: bool

    @property
    def ends(self) -> tuple[str, ...]:
        """All names."""
        return self.embedding, *self.others


def find_families(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> list[Family]:
    """The weights that are tied when a checkpoint is loaded, or that may be.

    A configuration that says `tie_word_embeddings: false` has none. One that says nothing ties what the files lack. A model
    without an output layer has nothing to tie, whatever it says.

    Args:
        entries: the tensors of the checkpoint.
        config: its `config.json`, empty if there is none.
    """
    flags = set(_flags(config))
    if flags and True not in flags:
        return []
    found: list[Family] = []
    for name, entry in entries.items():
        others = _other_ends(name, config) if len(entry.shape) == 2 else ()
        if not others:
            continue
        stored = tuple(each for each in (name, *others) if each in entries)
        absent = len(stored) < len(others) + 1
        if absent and len(stored) == 1 and not has_head(config, otherwise=bool(flags)):
            continue
        if any(entries[each].shape != entry.shape for each in stored):
            continue
        found.append(Family(name, others, stored, said=bool(flags)))
    nested = {end for family in found for end in family.others}
    return [family for family in found if family.embedding not in nested]


def says_untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that says that output and input embeddings are two, also in the configurations of parts."""

    def changed(values: Mapping[str, Any], top: bool) -> dict[str, Any]:
        result = {
            key: changed(cast("dict[str, Any]", value), False) if isinstance(value, dict) else value
            for key, value in values.items()
        }
        if top or "tie_word_embeddings" in values:
            result["tie_word_embeddings"] = False
        return result

    result = changed(config, True)
    if isinstance(result.get("text_config"), dict):
        result["text_config"]["tie_word_embeddings"] = False
    return result


def has_head(config: Mapping[str, Any], *, otherwise: bool) -> bool:
    """Whether the model has an output layer, by its class; `otherwise` if the configuration does not say that."""
    names: Any = config.get("architectures")
    return any(isinstance(name, str) and name.endswith(_WITH_HEAD) for name in names) if names else otherwise


def _flags(config: Mapping[str, Any]) -> Iterator[bool]:
    """What a configuration says of tying, at the top and of its text model."""
    for part in (config, config.get("text_config"), config.get("decoder")):
        if isinstance(part, Mapping):
            flag = cast("Mapping[str, Any]", part).get("tie_word_embeddings")
            if isinstance(flag, bool):
                yield flag


def _other_ends(name: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    head = _OTHER_HEADS.get(str(config.get("model_type")), _LM_HEAD)
    for pattern, others in _ENDS:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return tuple(match.expand(other).replace(_LM_HEAD, head) for other in others)
    return ()
