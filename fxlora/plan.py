"""`plan`: which sites get a branch, and what branch, as plain data.

The one source for the transform, `explain` and merging from files. It reads names and shapes; it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from fxlora._passes import (
    CONTAINERS,
    PARAMETERS,
    BranchSpec,
    CallSite,
    Decision,
    Rules,
    check_targets,
    did_you_mean,
    linear_shape,
    lookup,
    select,
    summarise,
    unused,
)
from fxlora.config import LoraConfig
from fxlora.errors import ConfigError, NoTargetError
from fxlora.logs import log

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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer or bare parameter that can have a branch: its qualified name, kind and sizes."""

    name: str
    kind: str
    in_features: int
    out_features: int
    transposed: bool = False
    is_parameter: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The branches of one adapter, with the decision on every name that was looked at.

    Attributes:
        adapter: the adapter's name.
        config: the configuration with its targets resolved: what is saved.
        branches: in the order in which their factors are drawn.
        decisions: one for each module name.
    """

    adapter: str
    config: LoraConfig
    branches: tuple[BranchSpec, ...]
    decisions: tuple[Decision, ...] = ()

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
        shape = linear_shape(module) if not _is_ours(name) else None
        if name and shape is not None:
            found[name] = Candidate(name, "linear", shape.in_features, shape.out_features, shape.transposed)
    for site in sites:
        if site.name not in found:
            found[site.name] = Candidate(
                site.name, site.kind, site.in_features, site.out_features, site.transposed, site.weight == site.name
            )
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(found.values(), key=lambda each: order.get(each.name, len(order)))


def _is_ours(name: str) -> bool:
    return any(part in CONTAINERS or part == PARAMETERS for part in name.split("."))


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
    config = _resolve_targets(model, config)
    layers = candidates(model, sites)
    by_name = {each.name: each for each in layers if not each.is_parameter}
    names = [name for name, _ in model.named_modules() if not _is_ours(name)]
    chosen: list[Candidate] = []
    decisions: list[Decision] = []
    if config.target_modules:
        rules = _rules(config)
        decisions = select(names, rules)
        _check(decisions, rules, list(by_name), strict=config.strict_targets)
        matched = [decision for decision in decisions if decision.matched]
        chosen = [_supported(model, decision, by_name) for decision in matched]
    chosen += _target_parameters(model, config, layers)
    _report_unused(decisions, config, [each.name for each in chosen])
    transposed = any(each.transposed for each in chosen)
    config = config.replace(fan_in_fan_out=transposed)
    return Plan(adapter_name, config, tuple(_spec(each, adapter_name, config) for each in chosen), tuple(decisions))


def _resolve_targets(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """`"all-linear"` and None become lists of names."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = _output_layer(model, config)
        names = [name for name, module in model.named_modules() if linear_shape(module) and module is not head]
        names = [name for name in names if name and not _is_ours(name)]
        if not names:
            raise NoTargetError("target_modules='all-linear', but the model has no linear layer")
        every = [name for name, _ in model.named_modules() if not _is_ours(name)]
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
    for each in unused(decisions, _rules(config), **keys, targets=chosen):
        if not each.is_error:
            log.warning("%s", each.message)
        elif config.strict_targets:
            raise NoTargetError(each.message)


def _supported(model: nn.Module, decision: Decision, by_name: dict[str, Candidate]) -> Candidate:
    module = model.get_submodule(decision.name)
    if parametrize.is_parametrized(module) or (linear_shape(module) and "weight" not in module._parameters):
        raise NoTargetError(
            f"'{decision.name}' is parametrized: its weight is computed at each call, so that no update can be folded "
            "into it. Call torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) on it first, or "
            "exclude it"
        )
    if decision.name in by_name:
        return by_name[decision.name]
    inside = [name for name in by_name if name.startswith(decision.name + ".")]
    hint = f" The linear layers inside it are: {summarise(inside)}." if inside else ""
    raise NoTargetError(
        f"target '{decision.rule}' matches '{decision.name}', a {type(module).__name__}, which is not a supported layer "
        f"(supported: nn.Linear, transformers' Conv1D).{hint or did_you_mean(decision.name, by_name)}"
    )


def _target_parameters(model: nn.Module, config: LoraConfig, layers: list[Candidate]) -> list[Candidate]:
    """Bare parameters by exact name or dotted suffix, sorted, as far as a graph uses them as a linear's weight."""
    chosen: list[Candidate] = []
    bare = {each.name: each for each in layers if each.is_parameter}
    existing = [name for name, _ in model.named_parameters() if not _is_ours(name)]
    for target in config.target_parameters or ():
        names = [name for name in existing if name == target or name.endswith(f".{target}")]
        if not names:
            raise NoTargetError(
                f"target_parameters: no parameter is called '{target}'.{did_you_mean(target, existing)}"
            )
        for name in names:
            if name not in bare:
                raise NoTargetError(
                    f"target_parameters: '{name}' is not seen as the weight of a functional linear. What works now is "
                    "a two-dimensional parameter that `torch.nn.functional.linear` or a matrix product reads, in a "
                    "whole-graph capture (capture='symbolic' or 'export'); a layer's own weight is a matter for "
                    "target_modules"
                )
            if bare[name].transposed:
                raise NoTargetError(
                    f"target_parameters: '{name}' is multiplied untransposed (`x @ W`), which is not supported yet for "
                    "bare parameters; store it (out, in) and use `torch.nn.functional.linear`"
                )
            chosen.append(bare[name])
    return sorted({each.name: each for each in chosen}.values(), key=lambda each: each.name)


def configured_scaling(config: LoraConfig, site: str, r: int) -> float:
    """The factor that a configuration puts on a branch of rank `r` at a site."""
    return config.scaling(r, lookup(config.alpha_pattern, site, config.lora_alpha))


def exact_targets(wanted: list[str], names: list[str]) -> list[str] | str:
    """`target_modules` that match these qualified names and no other.

    A list of the names will do, unless one of them ends another name too: then a regular expression.
    """
    found = {decision.name for decision in select(names, Rules(tuple(wanted))) if decision.matched}
    return wanted if found == set(wanted) else "|".join(re.escape(name) for name in wanted)


def _spec(layer: Candidate, adapter: str, config: LoraConfig) -> BranchSpec:
    r = lookup(config.rank_pattern, layer.name, config.r)
    if layer.is_parameter and config.lora_dropout:
        raise ConfigError(f"`lora_dropout` cannot be used with target_parameters ('{layer.name}'); set it to 0")
    return BranchSpec(
        site=layer.name,
        adapter=adapter,
        kind=layer.kind,
        in_features=layer.in_features,
        out_features=layer.out_features,
        transposed=layer.transposed,
        r=r,
        scaling=configured_scaling(config, layer.name, r),
        dropout=config.lora_dropout,
        init=config.init_lora_weights,
        is_parameter=layer.is_parameter,
    )
