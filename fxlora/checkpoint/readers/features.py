"""What an adapter can have that not every reader understands. Each feature says where in the files it is.

Knows nothing of readers. A new feature is one function and one line of `FEATURES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fxlora._passes import BIAS_B, MAGNITUDE, TOKENS
from fxlora.checkpoint.contents import Contents, FileBranch
from fxlora.compound import OUT_PROJ
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError
from fxlora.host.files import BASE_LAYER
from fxlora.initialisers import changes_base

Places = tuple[str, ...]
"""Fields of the configuration, keys of the file, or names of files; empty if the feature is absent."""


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that an adapter has or has not.

    Attributes:
        title: what people call it.
        found: where it is.
        kind_of: the feature that it is a special case of: whoever cannot read that one cannot read this one.
    """

    title: str
    found: Callable[[Contents], Places]
    kind_of: str = ""


def _keys(branches: list[FileBranch]) -> Places:
    return tuple(branch.name for branch in branches)


def _field(contents: Contents, *names: str) -> Places:
    return tuple(name for name in names if contents.config.get(name))


def any_adapter(contents: Contents) -> Places:
    """Every adapter."""
    return (CONFIG_NAME,)


def rslora(contents: Contents) -> Places:
    """Scaling alpha / sqrt(r), where that is not alpha / r."""
    uses = contents.config.get("use_rslora") and any(r != 1 for b in contents.branches for r, _ in contents.settings(b))
    return ("use_rslora",) if uses else ()


def other_alphas(contents: Contents) -> Places:
    """Layers whose alpha is not the configuration's own."""
    alpha = contents.config.get("lora_alpha", 8)
    return _keys([b for b in contents.branches if any(each != alpha for _, each in contents.settings(b))])


def other_ranks(contents: Contents) -> Places:
    """Layers whose rank is not the configuration's own."""
    r = contents.config.get("r", 8)
    return _keys([b for b in contents.branches if any(each != r for each, _ in contents.settings(b))])


def dora(contents: Contents) -> Places:
    """DoRA's magnitudes."""
    return (*_field(contents, "use_dora"), *contents.parts.get(MAGNITUDE, ())[:1])


def lora_bias(contents: Contents) -> Places:
    """Biases of branches."""
    return (*_field(contents, "lora_bias"), *contents.parts.get(BIAS_B, ()))


def biases(contents: Contents) -> Places:
    """Trained biases of the base."""
    field = () if contents.config.get("bias", "none") == "none" else ("bias",)
    return (*field, *contents.biases)


def whole_modules(contents: Contents) -> Places:
    """Modules that are saved whole."""
    return (*_field(contents, "modules_to_save"), *contents.whole)


def base_weights(contents: Contents) -> Places:
    """Weights of the base of layers that have a branch."""
    return contents.base


def embeddings(contents: Contents) -> Places:
    """Branches of embeddings."""
    return _keys([b for b in contents.branches if b.is_embedding])


def lm_head(contents: Contents) -> Places:
    """A branch of the output embedding."""
    return _keys([b for b in contents.branches if b.leaf == "lm_head"])


def trainable_tokens(contents: Contents) -> Places:
    """Trained rows of embeddings."""
    return (*_field(contents, "trainable_token_indices"), *contents.parts.get(TOKENS, ()))


def parameters(contents: Contents) -> Places:
    """Branches of bare parameters, such as experts in three dimensions."""
    return _field(contents, "target_parameters")


def replication(contents: Contents) -> Places:
    """Layers that the model repeats."""
    return _field(contents, "layer_replication")


def convolutions(contents: Contents) -> Places:
    """Branches of convolutions."""
    return _keys([b for b in contents.branches if b.is_conv])


def grouped_dora(contents: Contents) -> Places:
    """DoRA on convolutions with groups."""
    return _keys([b for b in contents.branches if b.groups > 1]) if dora(contents) else ()


def maybe_compact(contents: Contents) -> Places:
    """Convolutions that look depthwise: one input channel for many outputs."""
    return _keys([b for b in contents.branches if b.is_conv and b.shape_A[1] == 1 and b.shape_B[0] > 1])


def attention(contents: Contents) -> Places:
    """`nn.MultiheadAttention` as a target, which has its output projection inside of its wrapper."""
    return _keys([b for b in contents.branches if f".{b.name}".endswith(f".{BASE_LAYER}.{OUT_PROJ}")])


def base_init(contents: Contents) -> Places:
    """An initialisation that changed the base."""
    return ("init_lora_weights",) if changes_base(contents.config.get("init_lora_weights", True)) else ()


def alora(contents: Contents) -> Places:
    """A branch that is active from certain tokens on."""
    return _field(contents, "alora_invocation_tokens")


def variants(contents: Contents) -> Places:
    """Uses of the factors other than W + s B A, and groups of them."""
    names = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config")
    return tuple(name for name in names if contents.config.get(name) not in (None, False))


def call_sites(contents: Contents) -> Places:
    """Single calls of a layer that is called several times: a field of this library's."""
    return _field(contents, "call_sites")


def regex_targets(contents: Contents) -> Places:
    """Targets as a regular expression."""
    targets = contents.config.get("target_modules")
    return ("target_modules",) if isinstance(targets, str) and targets != "all-linear" else ()


def no_targets(contents: Contents) -> Places:
    """No targets in the configuration."""
    return () if contents.config.get("target_modules") is not None else ("target_modules",)


def high_rank(contents: Contents) -> Places:
    """A rank above 16."""
    return ranks_above(contents, 16)


def ranks_above(contents: Contents, limit: int) -> Places:
    """Layers with a rank above a limit."""
    return _keys([b for b in contents.branches if any(r > limit for r, _ in contents.settings(b))])


def wide_factors(contents: Contents) -> Places:
    """Factors in float32 or float64."""
    keys = [key for b in contents.branches for key in (b.A, b.B)]
    return tuple(key for key in keys if contents.entries[key].dtype in ("F32", "F64"))


def fan_in_fan_out(contents: Contents) -> Places:
    """Layers that store their weight as (in, out), such as GPT-2's."""
    return _field(contents, "fan_in_fan_out")


def several_adapters(contents: Contents) -> Places:
    """Further adapters in directories below."""
    return tuple(name for name in contents.files if (contents.directory / name / CONFIG_NAME).is_file())


def unknown_fields(contents: Contents) -> Places:
    """Fields that the version of the format written here does not have."""
    known = {each.name for each in fields(LoraConfig)}
    return tuple(name for name, value in contents.config.items() if name not in known and value)


def resized(contents: Contents) -> Places:
    """Branches of embeddings for another vocabulary than the base's, if the base is known."""
    size = _of_base(contents, "vocab_size")
    input_sizes = {b.name: b.shape_A[1] for b in contents.branches if b.leaf == "embed_tokens" and b.is_embedding}
    output_sizes = {b.name: b.shape_B[0] for b in contents.branches if b.leaf == "lm_head"}
    return tuple(name for name, rows in {**input_sizes, **output_sizes}.items() if size is not None and rows != size)


def tied_head(contents: Contents) -> Places:
    """A branch of an output embedding that is the input embedding, if the base is known."""
    return lm_head(contents) if _of_base(contents, "tie_word_embeddings") else ()


def tied_embedding(contents: Contents) -> Places:
    """A branch of an input embedding that is the output embedding too, if the base is known."""
    return embeddings(contents) if _of_base(contents, "tie_word_embeddings") else ()


def new_tokens(contents: Contents) -> Places:
    """Tokens beside the adapter that the base's vocabulary does not have."""
    name = "added_tokens.json"
    if name not in contents.files:
        return ()
    try:
        tokens: Any = json.loads((contents.directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{contents.directory / name} is not valid JSON: {error}") from error
    size = _of_base(contents, "vocab_size")
    ids = list(tokens.values()) if isinstance(tokens, dict) else []
    return (name,) if any(isinstance(each, int) and (size is None or each >= size) for each in ids) else ()


def no_base_name(contents: Contents) -> Places:
    """A configuration that does not say what base the adapter is for."""
    return () if contents.config.get("base_model_name_or_path") else ("base_model_name_or_path",)


def lone_projections(contents: Contents) -> Places:
    """Projections that servers run as one, and that are adapted without the one that the others are found by."""
    names = {b.name for b in contents.branches if not b.is_parameter}
    found: list[str] = []
    for name in sorted(names):
        owner, _, leaf = name.rpartition(".")
        needs = {"q_proj": ["v_proj"], "k_proj": ["q_proj"], "v_proj": ["q_proj"], "up_proj": ["gate_proj"]}.get(
            leaf, []
        )
        if any(f"{owner}.{other}" not in names for other in needs):
            found.append(name)
    return tuple(found)


def _of_base(contents: Contents, field: str) -> Any:
    """A field of the base's configuration, also of its text part; None if it is not known."""
    base: Mapping[str, Any] = contents.base_config or {}
    return base.get(field, (base.get("text_config") or {}).get(field))


FEATURES: dict[str, Feature] = {
    "layout": Feature("any adapter in peft's layout", any_adapter),
    "rslora": Feature("rsLoRA (`use_rslora`)", rslora),
    "alpha_pattern": Feature("`alpha_pattern`", other_alphas),
    "rank_pattern": Feature("`rank_pattern`", other_ranks),
    "dora": Feature("DoRA (`use_dora`)", dora),
    "lora_bias": Feature("`lora_bias`", lora_bias),
    "bias": Feature("`bias` other than `none`", biases),
    "modules_to_save": Feature("`modules_to_save`", whole_modules),
    "base_weights": Feature("weights of the base inside", base_weights),
    "base_init": Feature("PiSSA, OLoRA and others that change the base", base_init),
    "embeddings": Feature("embedding as a target", embeddings),
    "lm_head": Feature("`lm_head` as a target", lm_head),
    "tied_head": Feature("`lm_head` as a target, tied to the embedding", tied_head, "lm_head"),
    "tied_embedding": Feature("embedding as a target, tied to the head", tied_embedding, "embeddings"),
    "resized": Feature("embeddings of another vocabulary than the base's", resized, "embeddings"),
    "trainable_tokens": Feature("`trainable_token_indices`", trainable_tokens),
    "experts": Feature("`target_parameters`, such as experts", parameters),
    "layer_replication": Feature("`layer_replication`", replication),
    "conv": Feature("convolution as a target", convolutions),
    "grouped_dora": Feature("convolution with groups and DoRA", grouped_dora, "conv"),
    "compact_conv": Feature("convolution with more than 16 groups", maybe_compact, "conv"),
    "attention": Feature("`nn.MultiheadAttention` as a target", attention),
    "alora": Feature("activated LoRA (`alora_invocation_tokens`)", alora),
    "variants": Feature("QALoRA, BD-LoRA, KaSA, MonteCLoRA, Arrow", variants),
    "call_sites": Feature("`call_sites` (fxlora's own)", call_sites),
    "unknown_fields": Feature("fields of a newer peft", unknown_fields),
    "regex_targets": Feature("`target_modules` as a regular expression", regex_targets),
    "no_targets": Feature("no `target_modules`", no_targets),
    "lone_projections": Feature("q without v, k or v without q, up without gate", lone_projections),
    "module_names": Feature("names outside of what a reader knows", lambda _: ()),
    "high_rank": Feature("rank above 16", high_rank),
    "dtype": Feature("factors in float32 or float64", wide_factors),
    "fan_in_fan_out": Feature("`fan_in_fan_out` (GPT-2's layers)", fan_in_fan_out),
    "several_adapters": Feature("several adapters in one directory", several_adapters),
    "new_tokens": Feature("`added_tokens.json` with new tokens", new_tokens),
    "no_base_name": Feature("no `base_model_name_or_path`", no_base_name),
}
"""By their short names, in the order of the documentation's table."""
