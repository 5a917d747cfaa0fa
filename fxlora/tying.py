"""Layers that share one weight: trainable tokens, which all of them follow, and LoRA that is tied between them.

Two layers are tied if they have the same parameter, whatever a model's configuration says. Called by `plan` only; it
knows nothing of graphs beyond their call sites.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fxlora._passes import (
    TOKEN_IDS_OPTION,
    TOKENS_AT,
    BranchSpec,
    CallSite,
    Layer,
    Region,
    did_you_mean,
    has_factors,
    lookup,
    parameter_at,
    summarise,
    uses_beside_sites,
    weight_path,
)
from fxlora.config import LoraConfig
from fxlora.errors import CaptureError, ConfigError, NoTargetError

log = logging.getLogger("fxlora")

INPUT_EMBEDDINGS = "embed_tokens"
"""What peft takes for the input embeddings of a model that does not tell them."""


@dataclass(frozen=True, slots=True)
class User:
    """A layer that uses a weight: its name, and what it does with the weight."""

    name: str
    layer: Layer


def users(model: nn.Module, site: str, layers: Iterable[tuple[str, Layer]], sites: Iterable[CallSite]) -> list[User]:
    """All layers with the weight of `site`, embeddings first, each in the order of the model.

    Args:
        model: the model.
        site: name of a layer.
        layers: the layers of the model, by name.
        sites: call sites of a whole-graph capture, which also show uses by functions.
    """
    weight = parameter_at(model, weight_path(model, site))
    named = [(name, layer, weight_path(model, name)) for name, layer in layers]
    named += [(each.name, each.layer, each.weight) for each in sites]
    found: dict[tuple[str, str], User] = {}
    for name, layer, path in named:
        if _is(model, path, weight):
            found.setdefault((name, layer.kind), User(name, layer))
    return sorted(found.values(), key=lambda user: user.layer.kind != "embedding")


def _is(model: nn.Module, path: str, weight: nn.Parameter | None) -> bool:
    return weight is not None and parameter_at(model, path) is weight


# ---- trainable tokens ----


def token_branches(
    model: nn.Module,
    config: LoraConfig,
    adapter: str,
    layers: Sequence[tuple[str, Layer]],
    sites: Sequence[CallSite],
    adapted: set[str],
) -> list[BranchSpec]:
    """The branches of `trainable_token_indices`: of each named layer, then of those that share an embedding's weight.

    Args:
        model: the model.
        config: the adapter's configuration.
        adapter: its name.
        layers: the layers of the model, by name.
        sites: call sites of a whole-graph capture.
        adapted: names of the layers that have factors of this adapter.

    Raises:
        NoTargetError: when a name matches no embedding or linear layer.
        ConfigError: when ids cannot be used, or a layer is adapted in another way too.
    """
    wanted = _wanted(model, config, layers)
    branches: list[BranchSpec] = []
    for name, (target, ids) in wanted.items():
        layer = dict(layers)[name]
        _check_layer(name, layer, config, adapted)
        _check_ids(ids, target, layer.in_features if layer.kind == "embedding" else layer.out_features)
        family = users(model, name, layers, sites)
        owner = next((user.name for user in family if user.name in wanted), name)
        if owner != name and wanted[owner][1] == ids:
            continue  # follows the owner
        others = [user for user in family if user.name in wanted and wanted[user.name][1] != ids]
        if others and config.ensure_weight_tying:
            raise ConfigError(
                f"trainable_token_indices: '{name}' and '{others[0].name}' share one weight and have different ids, which "
                "ensure_weight_tying rules out; give both the same ids, or set ensure_weight_tying=False"
            )
        branches.append(_token_branch(User(name, layer), adapter, ids))
        if layer.kind == "embedding" and not others:
            rest = [user for user in family if (user.name, user.layer.kind) != (name, layer.kind)]
            branches += [_token_branch(user, adapter, ids, name) for user in rest]
    return branches


def _wanted(
    model: nn.Module, config: LoraConfig, layers: Sequence[tuple[str, Layer]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By layer, in the order of the model: what named it, and its ids."""
    indices = config.trainable_token_indices
    if indices is None:
        return {}
    targets: Mapping[str, list[int]] = indices if isinstance(indices, dict) else {_input_embeddings(model): indices}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for target, ids in targets.items():
        names = [name for name, _ in layers if name == target or name.endswith(f".{target}")]
        if not names:
            embeddings = [name for name, layer in layers if layer.kind == "embedding"]
            raise NoTargetError(
                f"trainable_token_indices: no layer is called '{target}'.{did_you_mean(target, embeddings)} Name the "
                f"embedding: {{'name': [ids]}}. The model's embeddings are: {summarise(embeddings) or 'none'}"
            )
        found.update({name: (target, tuple(ids)) for name in names})
    return {name: found[name] for name, _ in layers if name in found}


def _input_embeddings(model: nn.Module) -> str:
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    try:
        module = get_input_embeddings() if get_input_embeddings is not None else None
    except NotImplementedError:
        module = None
    return next((name for name, each in model.named_modules() if each is module), INPUT_EMBEDDINGS)


def _check_layer(name: str, layer: Layer, config: LoraConfig, adapted: set[str]) -> None:
    where, options = f"trainable_token_indices: '{name}'", dict(layer.options)
    if layer.kind not in TOKENS_AT or layer.transposed or layer.form != "output":
        raise NoTargetError(
            f"{where} is no embedding or linear layer whose rows can be replaced ({layer.kind}"
            f"{' with a forward of its own' if layer.form != 'output' else ''}); train the whole layer instead"
        )
    unsupported = [option for option in ("max_norm", "scale_grad_by_freq") if options.get(option)]
    if unsupported:
        raise ConfigError(f"{where} has {unsupported[0]}, which rows that are trained apart cannot have; switch it off")
    if name in adapted:
        raise ConfigError(
            f"{where} has LoRA of the same adapter too (target_modules), which changes the rows that the tokens replace; "
            "name it in one of the two"
        )
    if any(name == each or name.endswith(f".{each}") for each in config.modules_to_save or ()):
        raise ConfigError(f"{where} is trained fully already (modules_to_save); name it in one of the two")


def _check_ids(ids: tuple[int, ...], target: str, size: int) -> None:
    where = f"trainable_token_indices of '{target}'"
    if not ids:
        raise ConfigError(f"{where} is empty; name at least one token, or leave it out")
    for index in ids:
        if index >= size:
            raise ConfigError(f"{where}: {index} is no token; ids are integers from 0 to {size - 1}")
    if len(set(ids)) < len(ids):
        twice = next(index for index in ids if ids.count(index) > 1)
        raise ConfigError(f"{where}: {twice} is there twice; a token has one row")


def _token_branch(user: User, adapter: str, ids: tuple[int, ...], tied_to: str = "") -> BranchSpec:
    name, layer = user.name, user.layer
    if layer.kind not in TOKENS_AT or layer.transposed or layer.form != "output":
        raise NoTargetError(
            f"trainable_token_indices: '{name}' shares the weight of '{tied_to}' and cannot follow it ({layer.kind}); untie "
            "the two"
        )
    return BranchSpec(
        site=name,
        adapter=adapter,
        kind=layer.kind,
        in_features=layer.in_features,
        out_features=layer.out_features,
        transposed=False,
        r=0,
        scaling=1.0,
        options=(*layer.options, (TOKEN_IDS_OPTION, ids)),
        variant=TOKENS_AT[layer.kind],
        tied_to=tied_to,
    )


def check_tokens_in_graph(region: Region, branches: Iterable[BranchSpec], sites: Iterable[CallSite]) -> None:
    """Refuse trainable tokens of a weight that a whole graph reads otherwise than by lookups and linear layers.

    Raises:
        CaptureError: naming that use, which the trained rows would miss.
    """
    elsewhere, calls = uses_beside_sites(region), {site.node.name for site in sites}
    for spec in branches:
        weight = parameter_at(region.module, weight_path(region.module, spec.site))
        others = set[str]() if has_factors(spec) else elsewhere.get(id(weight), set()) - calls
        if others:
            raise CaptureError(
                f"trainable_token_indices: the graph uses the weight of '{spec.site}' also in '{min(others)}', which the "
                "trained rows would miss; call the layer there, or capture='modules' if that use does not matter"
            )


# ---- tied LoRA ----

NOT_ENSURED = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` is not set to "
    "True. '%s' shares its weight with '%s': the adapter cannot be merged. See https://github.com/huggingface/peft/issues/2777"
)


def tied_targets(
    model: nn.Module, config: LoraConfig, names: Sequence[str], layers: Sequence[tuple[str, Layer]], tokens: bool
) -> dict[str, list[User]]:
    """Which targets to tie: by embedding, the other layers that share its weight, if any of them is a target.

    Args:
        model: the model.
        config: the adapter's configuration; without `ensure_weight_tying` nothing is tied, and a warning says so.
        names: the targets.
        layers: the layers of the model, by name.
        tokens: whether trainable tokens are tied already.
    """
    kinds = dict(layers)
    tied: dict[str, list[User]] = {}
    for name, layer in layers:
        if layer.kind == "embedding" and all(name != user.name for rest in tied.values() for user in rest):
            rest = [user for user in users(model, name, layers, ()) if user.name != name]
            tied.update({name: rest} if rest else {})
    chosen = {name: rest for name, rest in tied.items() if not {name, *(u.name for u in rest)}.isdisjoint(names)}
    if not config.ensure_weight_tying:
        for name, rest in chosen.items():
            log.warning(NOT_ENSURED, name, rest[0].name)
        return {}
    if not chosen and not tokens:
        log.warning(
            "You have requested `ensure_weight_tying`, but no tied modules %s",
            "are added in either `modules_to_save` or `target_modules`" if tied else "were found in the model",
        )
    for name, rest in chosen.items():
        for user in (User(name, kinds[name]), *rest):
            _check_tied(user, name, config)
    return chosen


def _check_tied(user: User, source: str, config: LoraConfig) -> None:
    where = f"ensure_weight_tying: '{user.name}'"
    if user.layer.kind not in ("embedding", "linear") or user.layer.transposed or user.layer.form != "output":
        raise ConfigError(f"{where} shares the weight of '{source}' and cannot share its factors ({user.layer.kind})")
    ranks = [lookup(config.rank_pattern, name, config.r) for name in (user.name, source)]
    if ranks[0] != ranks[1]:
        raise ConfigError(f"{where} shares the factors of '{source}' and has another rank in `rank_pattern`: {ranks}")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ConfigError(
            f"{where} shares the factors of '{source}', which init_lora_weights={config.init_lora_weights!r} would draw "
            "for each; use True, False or 'gaussian'"
        )


def tied_to(spec: BranchSpec, source: str) -> BranchSpec:
    """The branch of a layer that shares an embedding's factors, from the one that it would have of its own."""
    kind = "tied" if spec.kind == "linear" else spec.kind
    return replace(spec, kind=kind, tied_to=source)
