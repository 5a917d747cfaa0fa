"""Adapters that are made of others: what can be, the plan of the result, and all of it that is not a matrix of low rank.

Used by `combine` and `reduce`, which make the factors. Never changes a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fxlora._passes import (
    BIAS_B,
    CROSS_GROUPS,
    KINDS,
    TOKENS,
    BranchSpec,
    base_weight,
    deltas,
    factors,
    has_factors,
    is_inserted,
    plain_delta,
    resolve,
    token_ids,
)
from fxlora.compound import compound_of, weights_of
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError
from fxlora.factors import Factors, draw
from fxlora.host.saved_modules import running_copies
from fxlora.initialisers import changes_base
from fxlora.plan import Plan, exact_targets

if TYPE_CHECKING:
    from fxlora.model import LoraModel


@dataclass(frozen=True, slots=True)
class Summand:
    """One adapter's branch in a weighted sum at one site."""

    weight: float
    spec: BranchSpec


Summands = dict[str, list[Summand]]
"""By site, in the order of the adapters. Sites that share another's factors are not among them."""


def summands(model: LoraModel, adapters: Mapping[str, float]) -> Summands:
    """The branches with factors of some adapters, with the adapters' weights.

    Raises:
        AdapterError: when an adapter holds something that has no weighted sum, or two differ in how they act at a site.
    """
    plans = [model._lora.adapters[name] for name in adapters]
    running_copies(plans)
    for plan in plans:
        _check_plan(plan)
    found: Summands = {}
    for plan in plans:
        for spec in plan.branches:
            if base_weight(model, spec.site)[1].is_meta:
                raise AdapterError(f"'{spec.site}' is on the meta device and has no values; load real weights first")
            if has_factors(spec) and not spec.tied_to:
                found.setdefault(spec.site, []).append(Summand(adapters[plan.adapter], spec))
    for site, parts in found.items():
        _check_alike(site, [part.spec for part in parts])
    _check_tied_alike(plans)
    return found


def _check_plan(plan: Plan) -> None:
    if plan.config.bias != "none":
        raise AdapterError(
            f"adapter '{plan.adapter}' trains biases of the base (bias='{plan.config.bias}'), of which there is no sum: a "
            "model has one set of them. Train it with bias='none' or lora_bias=True to combine it"
        )
    if changes_base(plan.config.init_lora_weights):
        raise AdapterError(
            f"adapter '{plan.adapter}' started with init_lora_weights={plan.config.init_lora_weights!r}, which changed the "
            "base weights that its factors are for. Save it with save_pretrained(…, convert_to_plain=True), load that "
            "into the original base, and combine it there"
        )


def _check_alike(site: str, specs: Sequence[BranchSpec]) -> None:
    """Branches of one site must be of one form, since the result has one."""
    forms = {(s.kind, s.transposed, s.calls, bool(s.option(CROSS_GROUPS)), s.is_parameter): s.adapter for s in specs}
    if len(forms) > 1:
        (kind, _, calls, across, _), (kind2, _, calls2, across2, _) = list(forms)[:2]
        what = (
            "are at different calls of it (call_sites)"
            if calls != calls2
            else "differ in whether they mix its groups"
            if across != across2
            else f"adapt it as '{kind}' and as '{kind2}'"
        )
        first, second = list(forms.values())[:2]
        raise AdapterError(f"'{site}': adapters '{first}' and '{second}' {what}, and have no common form for a sum")


def _check_tied_alike(plans: Iterable[Plan]) -> None:
    """A layer that shares an embedding's factors must share those of all adapters, or would get what is not its own."""
    sites = {plan.adapter: {s.site for s in plan.branches if not s.tied_to} for plan in plans}
    tied: dict[tuple[str, str], set[str]] = {}
    for spec in (spec for plan in plans for spec in plan.branches):
        if spec.tied_to and has_factors(spec):
            tied.setdefault((spec.site, spec.tied_to), set()).add(spec.adapter)
    for (site, source), adapters in tied.items():
        for adapter, own in sites.items():
            if adapter not in adapters and (source in own or site in own):
                raise AdapterError(
                    f"'{site}' shares the factors of '{source}' in adapter '{min(adapters)}' (ensure_weight_tying), and not "
                    f"in '{adapter}': the sum cannot be shared. Train both with or both without ensure_weight_tying"
                )


# ---- the plan ----


def derived_plan(model: LoraModel, sources: Sequence[Plan], name: str, r: int, ranks: Mapping[str, int]) -> Plan:
    """The plan of an adapter with all targets of others, scaling 1 and plain factors.

    Args:
        model: the transformed model.
        sources: the others; what has no sum (dropout, task type) is as in the first.
        name: the new adapter's name.
        r: the rank that its configuration shall have.
        ranks: of each site; those that are not `r` become patterns. Weights of one compound module have one rank.

    Raises:
        AdapterError: when no configuration names exactly these targets.
    """
    specs = [spec for plan in sources for spec in plan.branches]
    by_pattern: dict[str, int] = {}
    for site, rank in ranks.items():
        pattern = compound_of(model, site) or site
        by_pattern[pattern] = max(rank, by_pattern.get(pattern, 1))
    patterns = {f"^{re.escape(pattern)}": rank for pattern, rank in by_pattern.items() if rank != r}
    first, copies = sources[0].config, running_copies(sources)
    config = first.replace(
        r=r,
        lora_alpha=r,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        use_rslora=False,
        use_dora=False,
        lora_bias=any(spec.bias for spec in specs),
        lora_dropout=0.0 if any(spec.is_parameter for spec in specs) else first.lora_dropout,
        init_lora_weights=first.init_lora_weights if first.init_lora_weights in (False, "gaussian") else True,
        ensure_weight_tying=any(plan.config.ensure_weight_tying for plan in sources),
        trainable_token_indices=_tokens(sources),
        call_sites={spec.site: list(spec.calls) for spec in specs if spec.calls} or None,
        modules_to_save=[saved.module for saved in copies] or None,
    )
    wanted = {(spec.site, spec.kind, spec.tied_to) for spec in specs}
    for targets in _targets(model, sources, specs):
        plan = model._plan(config.replace(**targets), name)
        if {(spec.site, spec.kind, spec.tied_to) for spec in plan.branches} == wanted:
            break
    else:
        raise AdapterError(f"no configuration has exactly the targets of {', '.join(repr(p.adapter) for p in sources)}")
    across = {spec.site: spec.options for spec in specs if spec.option(CROSS_GROUPS)}
    branches = tuple(replace(spec, options=across.get(spec.site, spec.options)) for spec in plan.branches)
    return replace(plan, branches=branches, saved=tuple(replace(saved, adapter=name) for saved in copies))


def _targets(model: LoraModel, sources: Sequence[Plan], specs: Sequence[BranchSpec]) -> Iterator[dict[str, Any]]:
    """Ways to name the targets: as the sources do, if these can be joined; then each by its own name."""
    configs = [plan.config for plan in sources]
    parameters = list(dict.fromkeys(name for config in configs for name in config.target_parameters or ()))
    rest = [(c.exclude_modules, c.layers_to_transform, c.layers_pattern) for c in configs]
    kinds = {type(config.target_modules) for config in configs}
    if all(each == rest[0] for each in rest) and len(kinds) == 1:
        names = [config.target_modules for config in configs]
        joined: list[str] | str
        if kinds == {str}:
            texts = list(dict.fromkeys(cast("list[str]", names)))
            joined = texts[0] if len(texts) == 1 else "|".join(f"({text})" for text in texts)
        else:
            joined = list(dict.fromkeys(name for each in names for name in each or ()))
        yield {"target_modules": joined, "target_parameters": parameters or None}
    tokens = {spec.site for spec in specs if not has_factors(spec)}
    own = [spec for spec in specs if has_factors(spec)]
    chosen = list(dict.fromkeys(_target(model, spec, own) for spec in own if spec.site not in tokens))
    bare = {spec.site for spec in own if spec.is_parameter}
    modules = [name for name in chosen if name not in bare]
    every = [path for path, _ in model.named_modules() if not is_inserted(path)]
    yield {
        "target_modules": exact_targets(modules, every) if modules else [],
        "target_parameters": [name for name in chosen if name in bare] or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _target(model: LoraModel, spec: BranchSpec, specs: Sequence[BranchSpec]) -> str:
    """What names a branch's site: itself, or the compound module if that brings all that are there."""
    module = compound_of(model, spec.site)
    if module is None:
        return spec.site
    weights = {f"{module}.{name}".lstrip(".") for name in weights_of(model.get_submodule(module))}
    return module if weights <= {each.site for each in specs} else spec.site


def _tokens(sources: Sequence[Plan]) -> list[int] | dict[str, list[int]] | None:
    """All tokens whose rows one of the sources trains."""
    given = [plan.config.trainable_token_indices for plan in sources]
    if all(each == given[0] for each in given):
        return given[0]
    found: dict[str, list[int]] = {}
    for spec in (spec for plan in sources for spec in plan.branches):
        if not has_factors(spec) and not spec.tied_to:
            ids = found.setdefault(spec.site, [])
            ids += [index for index in token_ids(spec.options) if index not in ids]
    return found


# ---- the tensors ----


def start(model: LoraModel, plan: Plan) -> Factors:
    """Fresh factors of a derived plan: peft draws them first, and what has no value of its own keeps them."""
    return draw(model, plan).factors


def read(model: LoraModel, spec: BranchSpec) -> tuple[Tensor, Tensor]:
    """A and B of a branch as they are stored."""
    parts = factors(model, spec)
    A, B = (parts[name] for name in KINDS[spec.kind].factor_names)
    return A, B


def matrices(model: LoraModel, spec: BranchSpec) -> tuple[Tensor, Tensor]:
    """A `(…, q, columns)` and B `(…, rows, q)` of a branch, in their dtype."""
    kind = KINDS[spec.kind]
    A, B = read(model, spec)
    return kind.as_matrices(spec.layer, "A", A), kind.as_matrices(spec.layer, "B", B)


def update(model: LoraModel, spec: BranchSpec) -> Tensor:
    """What a branch adds to its layer's weight, in the weight's layout and the factors' dtype, float32 at least.

    That of a variant (DoRA) is what it makes of the original weight, in float64. A grouped convolution whose branch mixes
    the groups has the weight of one without groups.
    """
    kind, parts = KINDS[spec.kind], factors(model, spec)
    if spec.variant:
        path, weight = base_weight(model, spec.site)
        return deltas(spec, model._lora.originals.get(path, weight), parts)["weight"]
    wide = {name: part.to(torch.promote_types(part.dtype, torch.float32)) for name, part in parts.items()}
    if not spec.option(CROSS_GROUPS):
        return plain_delta(kind, spec, wide)
    A, B = (kind.as_matrices(spec.layer, part, wide[name]) for part, name in zip("AB", kind.factor_names, strict=True))  # pyright: ignore[reportArgumentType]
    return kind.from_matrices(spec.layer, "weight", B @ A) * spec.scaling


def put(fresh: Factors, spec: BranchSpec, A: Tensor, B: Tensor, dtype: torch.dtype) -> None:
    """Put matrices in the places of a branch's factors. Those of a lower rank than the branch are completed.

    Directions that are left are those of the fresh adapter, and their product is zero: they change nothing, and can be
    trained.

    Args:
        fresh: the drawn factors, changed here.
        spec: the branch.
        A: `(…, q, columns)`.
        B: `(…, rows, q)`.
        dtype: of the factors.
    """
    kind, layer, parts = KINDS[spec.kind], spec.layer, fresh[spec.site]
    name_a, name_b = kind.factor_names
    own_a, own_b = kind.as_matrices(layer, "A", parts[name_a]), kind.as_matrices(layer, "B", parts[name_b])
    q = A.shape[-2]
    rest_a, rest_b = own_a[..., q:, :].to(A), own_b[..., q:].to(B)
    rest_b = torch.zeros_like(rest_b) if bool(rest_a.any()) else rest_b
    whole_a, whole_b = torch.cat([A, rest_a], -2), torch.cat([B, rest_b], -1)
    parts[name_a] = kind.from_matrices(layer, "A", whole_a).to(dtype).contiguous()
    parts[name_b] = kind.from_matrices(layer, "B", whole_b).to(dtype).contiguous()


def add_the_rest(model: LoraModel, plan: Plan, adapters: Mapping[str, float], fresh: Factors) -> None:
    """What is no factor: sums of biases of branches and of changes of rows, and the copies of modules as they are.

    `b = Σ w s b` and `rows = W[ids] + Σ w (rows - W[ids])`, in float64.
    """
    sources = [model._lora.adapters[name] for name in adapters]
    for spec in plan.branches:
        same = [
            s
            for p in sources
            for s in p.branches
            if (s.site, s.kind, s.tied_to) == (spec.site, spec.kind, spec.tied_to)
        ]
        if spec.bias:
            parts = [(adapters[s.adapter] * s.scaling, factors(model, s)[BIAS_B]) for s in same if s.bias]
            total = torch.stack([weight * bias.double() for weight, bias in parts]).sum(0) if parts else None
            like = fresh[spec.site][BIAS_B]
            fresh[spec.site][BIAS_B] = torch.zeros_like(like) if total is None else total.to(parts[0][1].dtype)
        elif not has_factors(spec) and not spec.tied_to:
            fresh[spec.site][TOKENS] = _rows(model, spec, same, adapters)
    for saved in running_copies(sources):
        copied = model.get_submodule(saved.path)
        fresh[saved.module] = {each: cast(Tensor, resolve(copied, each)).detach() for each in saved.tensors}


def _rows(model: LoraModel, spec: BranchSpec, same: Sequence[BranchSpec], adapters: Mapping[str, float]) -> Tensor:
    ids = token_ids(spec.options)
    path, weight = base_weight(model, spec.site)
    rows = model._lora.originals.get(path, weight.detach())[list(ids)].double()
    total, dtype = rows.clone(), rows.dtype
    for source in same:
        own, trained = token_ids(source.options), factors(model, source)[TOKENS]
        places, dtype = [ids.index(index) for index in own], trained.dtype
        total[places] += adapters[source.adapter] * (trained.double() - rows[places])
    return total.to(dtype)


def common_rank(ranks: Iterable[int]) -> int:
    """The most frequent rank, the larger one of two that are equally so."""
    counts = Counter(ranks)
    return max(counts, key=lambda rank: (counts[rank], rank))


def largest_rank(config: LoraConfig) -> int:
    """The largest rank that a configuration names, as peft counts it."""
    return max(config.r, *config.rank_pattern.values(), 1)
