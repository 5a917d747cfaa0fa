"""Checks of what the model consists of: adapters, branches, merges, ties, modes. Nothing is run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from torch import fx, nn

from fxlora._passes import (
    DROPOUT,
    FORM_CONTAINERS,
    BranchSpec,
    Instance,
    MergeError,
    Region,
    VerifyError,
    base_weight,
    changes,
    containers,
    foldable,
    has_factors,
    part_path,
    part_shapes,
    shared_weights,
)
from fxlora.inspect.doctor.patient import Patient
from fxlora.inspect.doctor.report import Finding


def structure(patient: Patient) -> Iterator[Finding]:
    """Everything about the structure."""
    adapters = patient.lora._lora.adapters
    if not adapters:
        yield Finding(
            "error",
            "no-adapter",
            "the transformed model has no adapter left",
            "all of them were deleted, so that nothing of LoRA runs",
            "give it one with add_adapter and set_adapter, or take unload() for the plain model",
        )
        return
    for name, plan in adapters.items():
        if not (plan.branches or plan.saved or plan.biases):
            yield Finding(
                "error",
                "no-branches",
                f"adapter '{name}' has no branch, no trained copy and no bias",
                "its targets matched nothing that this model has",
                "look at fxlora.explain(model, config) for the names, and add the adapter again",
                (name,),
            )
    broken = [*_missing(patient), *_orphans(patient)]
    yield from broken or _verified(patient)
    if not broken:
        yield from _stale(patient)
        yield from _shared(patient)
    yield from _inactive(patient)
    yield from _dropout(patient)


def _missing(patient: Patient) -> Iterator[Finding]:
    places: list[str] = []
    for spec in patient.branches():
        wanted = {f"{spec.owner}.{part_path(part, spec.adapter)}" for part in part_shapes(spec)}
        places += sorted(wanted - patient.parts(spec).keys())
    if places:
        yield Finding(
            "error",
            "missing-parameter",
            "branches lack parameters that their adapter's plan has",
            "a layer was replaced or a parameter deleted after the transform",
            "change the model first, then transform it; or add the adapter again",
            tuple(places),
        )


def _orphans(patient: Patient) -> Iterator[Finding]:
    known: dict[str, set[str]] = {}
    for spec in patient.branches():
        known.setdefault(spec.owner, set()).add(spec.adapter)
    ours = containers() - set(FORM_CONTAINERS)
    places: list[str] = []
    for name, module in patient.lora.named_modules():
        owner, _, leaf = name.rpartition(".")
        if leaf in ours and isinstance(module, nn.ModuleDict):
            places += [f"{name}.{adapter}" for adapter in module if adapter not in known.get(owner, ())]
    if places:
        yield Finding(
            "error",
            "orphan-branch",
            "the model holds parts of branches that belong to no adapter",
            "no graph runs them and no file holds them: they were added or left behind by hand",
            "delete these modules, and add adapters with add_adapter or load_adapter only",
            tuple(places),
        )


def _verified(patient: Patient) -> Iterator[Finding]:
    try:
        patient.lora.verify()
    except VerifyError as error:
        named = re.match(r"'([^']*)'", str(error))
        yield Finding(
            "error",
            "broken-graph",
            str(error),
            "what runs is not what the adapters' plans say: a layer, a factor, a scale or a graph was changed by hand",
            "change scales with set_scale and adapters with the model's methods; transform again after changing layers",
            (named[1],) if named else (),
        )


def _stale(patient: Patient) -> Iterator[Finding]:
    state = patient.lora._lora
    specs = [spec for name in state.merged for spec in state.adapters[name].branches]
    places: list[str] = []
    for site, branches in foldable(specs).items():
        try:
            for change in changes(patient.lora, site, branches, state.originals):
                if change.path in state.originals and not bool((change.fold() == change.parameter).all()):
                    places.append(change.path)
        except MergeError:
            places.append(base_weight(patient.lora, site)[0])
    if places:
        yield Finding(
            "error",
            "stale-merge",
            "merged weights are not the originals with the adapters folded in",
            "the base weights, or the adapters, were changed after merge_adapter; unmerge_adapter would lose the change",
            "call unmerge_adapter, load or change the weights again, and merge last",
            tuple(places),
        )


def _shared(patient: Patient) -> Iterator[Finding]:
    by_adapter: dict[str, list[BranchSpec]] = {}
    for spec in patient.branches():
        if has_factors(spec) and not spec.calls:  # who chooses calls knows that the others go without
            by_adapter.setdefault(spec.adapter, []).append(spec)
    modules = Region(fx.Graph(), (Instance("", patient.lora),))  # of which there is no graph of the whole
    regions = [modules] if patient.lora.capture == "modules" else patient.lora.regions()
    found: dict[str, str] = {}
    for region, specs in itertools.product(regions, by_adapter.values()):
        for site, sharing in shared_weights(region, specs):
            found[site] = min(sharing.parameters or sharing.uses)
    if found:
        site, other = next(iter(found.items()))
        yield Finding(
            "warning",
            "tied-weight",
            f"a target's weight is used elsewhere too: that of '{site}' also by '{other}'",
            "the branch changes one of both only; a merge into the shared weight would change both, and is refused",
            "leave the layer out of the targets, train both with ensure_weight_tying=True, or merge with tied='untie'",
            tuple(found),
        )


def _inactive(patient: Patient) -> Iterator[Finding]:
    state = patient.lora._lora
    if not state.enabled:
        yield Finding(
            "warning",
            "adapters-disabled",
            "all adapters are switched off",
            "the model computes what the base does, and no adapter gets a gradient",
            "leave disable_adapter(), or call enable_adapter_layers()",
            tuple(state.active),
        )
    elif not state.active:
        yield Finding(
            "warning",
            "no-active-adapter",
            "no adapter is active",
            "the model computes what the base does, and no adapter gets a gradient",
            "choose one with set_adapter",
            tuple(state.adapters),
        )


def _dropout(patient: Patient) -> Iterator[Finding]:
    places: list[str] = []
    for name, module in patient.lora.named_modules():
        owner, _, leaf = name.rpartition(".")
        if leaf == DROPOUT and isinstance(module, nn.ModuleDict):
            training = patient.lora.get_submodule(owner).training
            places += [f"{name}.{adapter}" for adapter, each in module.items() if each.training and not training]
    if places:
        yield Finding(
            "warning",
            "dropout-in-evaluation",
            "LoRA's dropout is active in layers that are in evaluation mode",
            "the outputs are random, and differ from those of the merged model",
            "call model.eval() on the whole model",
            tuple(places),
        )
