"""`plan`: which sites get a branch, and what branch, as plain data.

The one source for the transform, `explain` and merging from files. It reads names and shapes; it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from fxlora._passes import (
    KINDS,
    BranchSpec,
    CallSite,
    Decision,
    Layer,
    Rules,
    SavedModule,
    check_targets,
    did_you_mean,
    has_factors,
    is_inserted,
    layer_of,
    lookup,
    minimal_targets,
    multiplied,
    parameter_at,
    parameter_layer,
    select,
    select_parameters,
    summarise,
    unused,
)
from fxlora.compound import CAPTURED_LAYER, TRANSPOSED, compound_of, is_compound, layers_of, weights_of
from fxlora.config import LoraConfig
from fxlora.errors import ConfigError, NoTargetError
from fxlora.host.biases import trained_biases
from fxlora.host.saved_modules import saved_modules, with_task_heads
from fxlora.initialisers import frozen_parts
from fxlora.logs import log
from fxlora.tying import User, tied_targets, tied_to, token_branches

_DEFAULTS: tuple[tuple[str, str], ...] = (
    ("t5 mt5", "q v"),
    ("gpt2 gpt_bigcode", "c_attn"),
    ("bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel", "query_key_value"),
    ("bert roberta xlm-roberta electra layoutlm", "query value"),
    ("bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm", "q_proj v_proj"),
    ("gemma gemma2 gemma3_text qwen2 qwen3", "q_proj v_proj"),
    ("phi", "q_proj v_proj fc1 fc2"),
    ("deberta-v2", "query_proj value_proj"),
    ("deberta", "in_proj"),
    ("mpt", "Wqkv"),
    ("codegen", "qkv_proj"),
    ("blip-2", "q v q_proj v_proj"),
    ("nemotron_h", "q_proj k_proj v_proj o_proj"),
    ("btlm", "c_proj c_attn"),
    ("rwkv", "key value receptance output"),
    ("rwkv7", "r_proj k_proj v_proj o_proj key value"),
)
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{model: [*targets.split()] for models, targets in _DEFAULTS for model in models.split()},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
"""Targets for `target_modules=None`, by transformers model type: the defaults of peft 0.21."""

MANY_TARGETS = 20
"""From how many targets on only the shortest endings of their names are written, as in peft."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer or bare parameter that can have a branch: its qualified name, kind and sizes."""

    name: str
    layer: Layer
    is_parameter: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The branches of one adapter, with the decision on every name that was looked at.

    Attributes:
        adapter: the adapter's name.
        config: the configuration with its targets resolved: what is saved.
        branches: in the order in which their factors are drawn.
        decisions: one for each module name.
        saved: the modules that are trained whole, as copies.
        biases: names of the base's biases that are trained.
    """

    adapter: str
    config: LoraConfig
    branches: tuple[BranchSpec, ...]
    decisions: tuple[Decision, ...] = ()
    saved: tuple[SavedModule, ...] = ()
    biases: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Number of entries of all factors."""
        return sum(branch.num_parameters for branch in self.branches)


def candidates(model: nn.Module, sites: Iterable[CallSite] = ()) -> list[Candidate]:
    """All layers of `model` that can have a branch, in `named_modules` order, then bare parameters.

    Args:
        model: the model; may be on the meta device.
        sites: call sites of a whole-graph capture, which add functional uses to what the module tree shows.
    """
    found: dict[str, Candidate] = {}
    for name, module in model.named_modules():
        layer = original_layer(module) if name and not is_inserted(name) else None
        if layer is not None:
            found[name] = Candidate(name, layer)
    for site in sites:
        if site.name not in found and not is_inserted(site.name):
            found[site.name] = Candidate(site.name, site.layer, site.weight == site.name)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(found.values(), key=lambda each: order.get(each.name, len(order)))


def original_layer(module: nn.Module) -> Layer | None:
    """What layer a module is, or was before a whole graph was captured; None if it is none."""
    return getattr(module, CAPTURED_LAYER, None) or layer_of(module)


def plan(
    model: nn.Module, config: LoraConfig, *, adapter_name: str = "default", sites: Sequence[CallSite] = ()
) -> Plan:
    """Decide on every module of `model` and describe the branch of each chosen one.

    Args:
        model: the model; may be on the meta device. Not changed.
        config: checked first.
        adapter_name: the adapter's name.
        sites: call sites of a whole-graph capture, if there is one.

    Raises:
        ConfigError: for a field that cannot work.
        NotImplementedError: for a field that is not supported yet.
        NoTargetError: when a target matches nothing, or matches a module that is no linear layer.
    """
    config.validate()
    config = with_task_heads(config)
    _check_not_a_layer(model, config)
    config = _resolve_targets(model, config)
    layers = candidates(model, sites)
    by_name = {each.name: each for each in layers}
    names = [name for name, _ in model.named_modules() if not is_inserted(name)]
    chosen: list[Candidate] = []
    decisions: list[Decision] = []
    if config.target_modules:
        rules = _rules(config)
        decisions = select(names, rules)
        _check(decisions, rules, [each.name for each in layers], strict=config.strict_targets)
        matched = [decision for decision in decisions if decision.matched]
        chosen = [candidate for decision in matched for candidate in _supported(model, decision, by_name)]
    chosen = list({each.name: each for each in chosen}.values())  # out_proj may be named beside its attention
    chosen += _target_parameters(model, config, by_name, {each.name for each in chosen})
    _report_unused(decisions, config, [compound_of(model, each.name) or each.name for each in chosen])
    unknown = [name for name in config.call_sites or {} if not any(_calls(each.name, config) for each in chosen)]
    if unknown:
        names = [each.name for each in chosen]
        raise NoTargetError(
            f"call_sites: no target is called '{unknown[0]}'.{did_you_mean(unknown[0], names)} The targets are: "
            f"{summarise(names)}."
        )
    transposed = any(each.layer.kind == "linear" and each.layer.transposed for each in chosen)
    config = config.replace(fan_in_fan_out=transposed)
    named = [(each.name, each.layer) for each in layers if not each.is_parameter]
    tokens = token_branches(model, config, adapter_name, named, sites, {each.name for each in chosen})
    tied = tied_targets(model, config, [each.name for each in chosen], named, any(spec.tied_to for spec in tokens))
    specs = [_spec(model, each, adapter_name, config) for each in _without_tied(layers, chosen, tied)]
    for source, rest in tied.items():
        own = [Candidate(user.name, user.layer) for user in rest]
        specs += [tied_to(_spec(model, each, adapter_name, config), source) for each in own]
    branches = (*specs, *tokens)
    saved = saved_modules(model, config, adapter_name, [spec.site for spec in branches])
    biases = trained_biases(model, config, branches, saved)
    if not (branches or saved or biases):
        raise NoTargetError(
            "`target_modules` is empty and nothing else is named, so that nothing would be trained. The model's layers "
            f"are: {summarise([each.name for each in layers])}; name some in `target_modules` or their weights in "
            "`target_parameters`"
        )
    return Plan(adapter_name, config, branches, tuple(decisions), saved, biases)


def target_rules(model: nn.Module, config: LoraConfig) -> Rules | None:
    """The rules by which `plan` chooses modules; None where it chooses parameters alone.

    Raises:
        NoTargetError: when `target_modules` stands for nothing in this model.
    """
    resolved = _resolve_targets(model, with_task_heads(config))
    return _rules(resolved) if resolved.target_modules else None


def _without_tied(layers: list[Candidate], chosen: list[Candidate], tied: dict[str, list[User]]) -> list[Candidate]:
    """The targets without those that share the factors of another layer, and with these other layers."""
    if not tied:
        return chosen
    rest = {user.name for others in tied.values() for user in others}
    names = {*tied, *(each.name for each in chosen if each.name not in rest)}
    kept = [each for each in layers if each.name in names]
    return [*kept, *(each for each in chosen if each.is_parameter and each not in kept)]


def _check_not_a_layer(model: nn.Module, config: LoraConfig) -> None:
    """Refuse to look for modules in a model that is one layer."""
    if config.target_parameters and not config.target_modules:
        return
    if original_layer(model) is not None and next(model.children(), None) is None:
        raise NoTargetError(
            f"the model is itself a {type(model).__name__}, and target_modules names layers inside a model; use "
            "target_modules=[] with target_parameters=['weight'], or put the layer into an nn.Sequential"
        )


def _resolve_targets(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """`"all-linear"` and None become lists of names."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = _output_layer(model, config)
        names = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
        names = [name for name in names if name and not is_inserted(name)]
        if not names:
            raise NoTargetError(
                "target_modules='all-linear', but the model has no linear layer; name other layers in target_modules, or "
                "weights in target_parameters"
            )
        every = [name for name, _ in model.named_modules() if not is_inserted(name)]
        return config.replace(target_modules=exact_targets(names, every))
    if targets is None and not config.target_parameters:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in DEFAULT_TARGETS:
            layers = [each.name for each in candidates(model)]
            raise NoTargetError(
                f"Please specify `target_modules` or `target_parameters`: there is no default for "
                f"{f'model type {model_type!r}' if model_type else type(model).__name__}. "
                f"The model's linear layers are: {summarise(layers)}; 'all-linear' takes all but the output layer."
            )
        return config.replace(target_modules=DEFAULT_TARGETS[model_type])
    return config


def _is_linear(module: nn.Module) -> bool:
    layer = original_layer(module)
    return layer is not None and layer.kind == "linear"


def _output_layer(model: nn.Module, config: LoraConfig) -> nn.Module | None:
    """The layer that `"all-linear"` leaves out: a language model's head, or a classifier for SEQ_CLS."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is None:
        return None
    head = get_output_embeddings()
    if head is None and config.task_type == "SEQ_CLS":
        head = getattr(model, "score", getattr(model, "classifier", None))
    return cast("nn.Module | None", head)


def _rules(config: LoraConfig) -> Rules:
    return Rules(
        target_modules=_names(config.target_modules),
        exclude_modules=_names(config.exclude_modules),
        modules_to_save=tuple(config.modules_to_save or ()),
        layers_to_transform=_indices(config.layers_to_transform),
        layers_pattern=_tuple(config.layers_pattern),
    )


def _names(value: list[str] | str | None) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def _tuple(value: list[str] | str | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())


def _indices(value: list[int] | int | None) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value or ())


def _check(decisions: Sequence[Decision], rules: Rules, available: list[str], *, strict: bool) -> None:
    if strict or not any(decision.matched for decision in decisions):
        check_targets(decisions, rules, available)


def _report_unused(decisions: Sequence[Decision], config: LoraConfig, chosen: list[str]) -> None:
    """Entries that match nothing: refused where something would not be trained, else a warning."""
    keys = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    rules = replace(_rules(config), modules_to_save=())  # of a task's heads one may be missing: see saved_modules
    for each in unused(decisions, rules, **keys, targets=chosen):
        if not each.is_error:
            log.warning("%s", each.message)
        elif config.strict_targets:
            raise NoTargetError(each.message)


def _supported(model: nn.Module, decision: Decision, by_name: dict[str, Candidate]) -> list[Candidate]:
    """The layers that a matched module stands for."""
    module = model.get_submodule(decision.name)
    if parametrize.is_parametrized(module) or (original_layer(module) and "weight" not in module._parameters):
        raise NoTargetError(
            f"'{decision.name}' is parametrized: its weight is computed at each call, so that no update can be folded "
            "into it. Call torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) on it first, or "
            "exclude it"
        )
    if is_compound(module):
        weights = [f"{decision.name}.{name}" for name in weights_of(module)]
        return [
            *(_parameter(model, name, by_name) for name in weights),
            *(by_name[f"{decision.name}.{name}"] for name in layers_of(module)),
        ]
    if decision.name in by_name:
        return [by_name[decision.name]]
    inside = [name for name in by_name if name.startswith(decision.name + ".")]
    hint = f" The layers inside it are: {summarise(inside)}." if inside else ""
    raise NoTargetError(
        f"target '{decision.rule}' matches '{decision.name}', a {type(module).__name__}, which is not a supported layer "
        "(supported: nn.Linear, nn.Embedding, nn.Conv1d to nn.ConvTranspose3d, nn.Bilinear, nn.MultiheadAttention, "
        "recurrent layers and cells, transformers' Conv1D; target_parameters takes any other matrix, and modules_to_save trains "
        "any module whole)."
        f"{hint or did_you_mean(decision.name, by_name)}"
    )


def _parameter(model: nn.Module, name: str, by_name: dict[str, Candidate]) -> Candidate:
    """A bare parameter as a candidate: as a graph uses it, or else by its shape."""
    seen = by_name.get(name)
    if seen is not None and seen.layer.kind == "linear" and not seen.layer.transposed:
        return seen
    parameter = parameter_at(model, name)
    assert parameter is not None
    owner = model.get_submodule(name.rpartition(".")[0])
    transposed = bool(getattr(owner, TRANSPOSED, False))
    layer = parameter_layer(tuple(parameter.shape), transposed_experts=transposed)
    if layer is None:
        raise NoTargetError(
            f"target_parameters: '{name}' has the shape {tuple(parameter.shape)}; a parameter needs two dimensions, or "
            "three: a matrix for each expert. modules_to_save trains a whole module"
        )
    if seen is not None and seen.layer.kind == "parameter":
        layer = multiplied(layer, seen.layer)
    return Candidate(name, layer, is_parameter=True)


def _target_parameters(
    model: nn.Module, config: LoraConfig, by_name: dict[str, Candidate], chosen: set[str]
) -> list[Candidate]:
    """Parameters by exact name or dotted suffix, in the order in which the model has them."""
    existing = [name for name, _ in model.named_parameters() if not is_inserted(name)]
    targets = config.target_parameters or []
    missing = [target for target in targets if not select_parameters(existing, [target])]
    if missing:
        raise NoTargetError(
            f"target_parameters: no parameter is called '{missing[0]}'.{did_you_mean(missing[0], existing)} Names are "
            "exact, or ends of exact names after a dot."
        )
    names = select_parameters(existing, targets)
    for name in names:
        layer = name.rpartition(".")[0]
        if layer in chosen or name in chosen:
            raise ConfigError(
                f"target_parameters: '{name}' belongs to '{layer}', which target_modules names too; name it once"
            )
    return [_parameter(model, name, by_name) for name in names]


def configured_scaling(config: LoraConfig, site: str, r: int) -> float:
    """The factor that a configuration puts on a branch of rank `r` at a site."""
    return config.scaling(r, lookup(config.alpha_pattern, site, config.lora_alpha))


def exact_targets(wanted: list[str], names: list[str]) -> list[str] | str:
    """`target_modules` that match these qualified names and no other.

    A list of the names will do, or like in peft of their shortest endings if they are many; unless one of the names ends
    another name too: then a regular expression.
    """
    found = {decision.name for decision in select(names, Rules(tuple(wanted))) if decision.matched}
    if found != set(wanted):
        return "|".join(re.escape(name) for name in wanted)
    others = [name for name in names if name and name not in found]
    return minimal_targets(wanted, others) if len(wanted) >= MANY_TARGETS else wanted


def _spec(model: nn.Module, candidate: Candidate, adapter: str, config: LoraConfig) -> BranchSpec:
    name, layer = candidate.name, candidate.layer
    kind, attention = KINDS[layer.kind], compound_of(model, name)
    by_pattern = name if attention is None else attention
    r = lookup(config.rank_pattern, by_pattern, config.r)
    if candidate.is_parameter and attention is None and config.lora_dropout:
        raise ConfigError(f"`lora_dropout` cannot be used with target_parameters ('{name}'); set it to 0")
    if config.use_dora and (not kind.has_rows or attention is not None or candidate.is_parameter):
        raise ConfigError(
            f"`use_dora` cannot be used for '{name}' ({'part of an attention' if attention else layer.kind}); exclude it, or "
            "set use_dora=False"
        )
    if config.lora_bias and (not kind.can_have_bias or candidate.is_parameter):
        raise ConfigError(f"`lora_bias` cannot be used for '{name}' ({layer.kind}); exclude it, or set lora_bias=False")
    return BranchSpec(
        site=name,
        adapter=adapter,
        kind=layer.kind,
        in_features=layer.in_features,
        out_features=layer.out_features,
        transposed=layer.transposed,
        r=r,
        scaling=configured_scaling(config, by_pattern, r),
        dropout=config.lora_dropout if kind.float_input else 0.0,
        init=config.init_lora_weights,
        is_parameter=candidate.is_parameter,
        options=layer.options,
        form=layer.form,
        variant="dora" if config.use_dora else "",
        frozen=frozen_parts(config.init_lora_weights, layer.kind),
        bias=config.lora_bias,
        calls=_calls(name, config),
    )


def _calls(name: str, config: LoraConfig) -> tuple[int, ...]:
    """Which calls of a layer `call_sites` chooses; all if it names the layer not."""
    for suffix, calls in (config.call_sites or {}).items():
        if name == suffix or name.endswith(f".{suffix}"):
            return tuple(sorted(set(calls)))
    return ()


def by_weight(spec: BranchSpec, why: str) -> BranchSpec:
    """The same branch, added to the layer's weight and not to its output.

    Raises:
        ConfigError: when the branch needs the layer's input or output.
    """
    needs = {
        "trainable_token_indices": not has_factors(spec),
        "ensure_weight_tying": bool(spec.tied_to),
        "use_dora": bool(spec.variant),
        "lora_bias": spec.bias,
        "call_sites": bool(spec.calls),
    }
    for option, used in needs.items():
        if used:
            raise ConfigError(
                f"`{option}` cannot be used for '{spec.site}', since {why}; exclude it, or capture a whole graph"
            )
    if spec.dropout:
        log.warning("lora_dropout has no effect on '%s', since %s", spec.site, why)
    return replace(spec, form="weight", dropout=0.0)
