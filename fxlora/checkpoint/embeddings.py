"""Which embedding weights of the base go into an adapter's files: peft's `save_embedding_layers`.

They are written where an embedding is itself a target, and where the vocabulary was resized, since the base that the
adapter is loaded into would have other rows. Knows names and keys, and reads no weights.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

from fxlora._passes import has_factors, is_inserted
from fxlora.config import LoraConfig
from fxlora.host.files import BASE_LAYER

if TYPE_CHECKING:
    from fxlora.model import LoraModel
    from fxlora.plan import Plan

log = logging.getLogger("fxlora")

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""Names of embeddings that peft looks for among the targets."""

TOKEN_WRAPPER = f"token_adapter.{BASE_LAYER}"
"""What peft's wrapper of an embedding with trainable rows calls the embedding."""


def saved_embeddings(
    model: LoraModel, plan: Plan, config: LoraConfig, wanted: bool | Literal["auto"]
) -> dict[str, str]:
    """The embeddings that an adapter's files hold: paths in the model by keys without `base_model.model.`.

    Modules that the adapter trains whole are left out: their copies are in the files anyway.

    Args:
        model: the transformed model.
        plan: the adapter's plan.
        config: its configuration as files have it, which says where the base comes from.
        wanted: `"auto"` for peft's rule: where an embedding is among the targets by its name and no trainable tokens are
            used, or the base's directory has another size of vocabulary.
    """
    targeted = _targeted(model, plan)
    if wanted == "auto":
        wanted = _automatic(model, config, targeted=targeted and plan.config.trainable_token_indices is None)
    if not wanted:
        return {}
    names = _embeddings(model)
    if not names:
        log.warning("save_embedding_layers: the model is none of transformers, and its embeddings are not known")
    with_factors = {spec.site for spec in plan.branches if has_factors(spec)}
    with_rows = {spec.site for spec in plan.branches if not has_factors(spec)}
    whole = {saved.module for saved in plan.saved}
    found: dict[str, str] = {}
    for name in names:
        if name in whole or (targeted and name not in with_factors):
            continue
        wrapper = BASE_LAYER if name in with_factors else TOKEN_WRAPPER if name in with_rows else ""
        for tensor in model.get_submodule(name)._parameters:
            if model.get_submodule(name)._parameters[tensor] is not None:
                found[".".join(part for part in (name, wrapper, tensor) if part)] = f"{name}.{tensor}"
    return found


def resized(model: nn.Module, config: LoraConfig) -> bool:
    """Whether the base's own directory has another size of vocabulary than the model."""
    return _automatic(model, config, targeted=False)


def _targeted(model: nn.Module, plan: Plan) -> bool:
    """Whether the targets name an embedding, as peft finds out: literally in a list, by matching in an expression.

    One that shares the factors of another layer is no longer named in peft's configuration.
    """
    targets = plan.config.target_modules
    tied = {spec.site.rpartition(".")[2] for spec in plan.branches if spec.tied_to}
    if isinstance(targets, str):
        names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in EMBEDDING_NAMES]
        return any(re.fullmatch(targets, name) for name in names)
    return any(name in (targets or ()) and name not in tied for name in EMBEDDING_NAMES)


def _automatic(model: nn.Module, config: LoraConfig, *, targeted: bool) -> bool:
    if targeted:
        log.info("save_embedding_layers: embeddings are targets, and the base's weights of them are written too")
        return True
    now = getattr(getattr(model, "config", None), "vocab_size", None)
    before = _vocabulary(config.base_model_name_or_path)
    if not now or before is None or now == before:
        return False
    log.warning(
        "save_embedding_layers: the vocabulary has %d entries, and %d in '%s'; the embeddings are written too",
        now,
        before,
        config.base_model_name_or_path,
    )
    return True


def _vocabulary(directory: str | None) -> int | None:
    """The size of the vocabulary that a base's own directory says; nothing is looked up on a hub."""
    path = Path(directory or "") / "config.json"
    if not directory or not os.path.isfile(path):
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = cast("dict[str, Any]", values).get("vocab_size") if isinstance(values, dict) else None
    return size if isinstance(size, int) else None


def _embeddings(model: LoraModel) -> list[str]:
    """Names of the input and output embeddings of a transformers model, captured as a graph or not."""
    names = [name for name, _ in model.named_modules() if name and not is_inserted(name)]
    getters = [getattr(model, getter, None) for getter in ("get_input_embeddings", "get_output_embeddings")]
    if all(getters):
        modules = [cast(Any, getter)() for getter in getters]
        return [name for name in names if any(model.get_submodule(name) is module for module in modules)]
    if hasattr(model, "config"):  # a graph has not the model's methods
        return [name for name in names if name.rpartition(".")[2] in EMBEDDING_NAMES]
    return []
