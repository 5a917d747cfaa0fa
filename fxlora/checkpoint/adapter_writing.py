"""Writes adapters: peft's two files, put in place as one. How they are named and read: `fxlora.checkpoint.adapter`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fxlora._passes import (
    FACTOR_A,
    FACTOR_B,
    did_you_mean,
    part_path,
    part_shapes,
)
from fxlora.checkpoint import grouped
from fxlora.checkpoint.adapter import (
    KEY_PREFIX,
    WEIGHTS_NAME,
    base_name,
    key_of,
    names_in_files,
    read_adapter,
    stored_parts,
)
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.embeddings import resized, saved_embeddings
from fxlora.checkpoint.manifest import write_manifest
from fxlora.checkpoint.safetensors_io import Entry, check_plain, save_tensors
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError
from fxlora.factors import Factors
from fxlora.host.files import extras, tensor_at
from fxlora.initialisers import plain_alpha, to_plain
from fxlora.model import LoraModel
from fxlora.plan import Plan, configured_scaling

log = logging.getLogger("fxlora")


def save_adapters(
    model: LoraModel,
    directory: Path,
    names: Iterable[str],
    state_dict: Mapping[str, Tensor] | None = None,
    initial: Mapping[str, Factors] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    portable: bool = False,
) -> None:
    """Write adapters as peft does: "default" into the directory itself, any other into a directory of its name there.

    All files of a call are put in place as one. Whatever else the directory holds stays.

    Args:
        model: the transformed model.
        directory: created if need be.
        names: of adapters that the model has.
        state_dict: where to take the factors from, by the model's parameter names, with or without the prefixes of
            torch.compile and DDP; the model itself if None.
        initial: the factors that adapters started from, by adapter, for those whose initialisation changed the base:
            they are written as plain LoRA of twice the rank, for the original base.
        save_embedding_layers: whether to write the base's embeddings too; see `fxlora.checkpoint.embeddings`.
        portable: whether to fold the scales into B; see `fxlora.checkpoint.portable`.

    Raises:
        CheckpointError: when a tensor is missing or has no data, an adapter has no portable form, or the directory cannot
            be written. Nothing is changed then.
    """
    contents = {name: _contents(model, model._lora.adapters[name], state_dict) for name in names}
    for name, factors in (initial or {}).items():
        contents[name] = _as_plain(model, model._lora.adapters[name], contents[name], factors)
    for name, (config, tensors) in contents.items():
        wanted = resized(model, config) if portable and save_embedding_layers == "auto" else save_embedding_layers
        for key, path in saved_embeddings(model, model._lora.adapters[name], config, wanted).items():
            tensor = _base_tensor(model, path) if state_dict is None else _find(state_dict, path)
            check_plain(tensor, f"'{path}'")
            tensors.setdefault(KEY_PREFIX + key, tensor)
    texts = {name: config.to_json() for name, (config, _) in contents.items()}
    if portable:
        folded = {name: _portable(model, model._lora.adapters[name], *each) for name, each in contents.items()}
        texts = {name: text for name, (text, _) in folded.items()}
        contents = {name: (contents[name][0], tensors) for name, (_, tensors) in folded.items()}
    with staged(directory, keep=lambda _: True) as staging:
        for name, (_, tensors) in contents.items():
            to = staging if name == "default" else staging / name
            to.mkdir(exist_ok=True)
            save_tensors(to / WEIGHTS_NAME, tensors)
            (to / CONFIG_NAME).write_text(texts[name], encoding="utf-8")
        # an adapter in the directory itself last: its manifest leaves out directories that have one
        for name in sorted(contents, key="default".__eq__):
            write_manifest(staging if name == "default" else staging / name)


def _portable(
    model: nn.Module, plan: Plan, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """The text of the configuration and the tensors of an adapter's portable form."""
    from fxlora.checkpoint.contents import contents_of
    from fxlora.checkpoint.portable import fold_scales

    compact = [spec.site for spec in plan.branches if grouped.is_compact(spec) and not grouped.is_expanded(spec)]
    if compact:
        raise CheckpointError(
            f"'{compact[0]}' has more than {grouped.MOST_GROUPS} groups, and only fxlora reads its factors; leave such layers out "
            "of the targets, or export a merged model (export_merged)"
        )
    names = names_in_files(model, plan)
    known = {
        names[spec.site]: (spec.r, configured_scaling(config, spec.site, spec.r))
        for spec in plan.branches
        if spec.is_parameter
    }
    entries = {key: Entry.of(tensor) for key, tensor in tensors.items()}
    contents = contents_of(Path(f"adapter '{plan.adapter}'"), config.to_dict(), entries)
    result = fold_scales(contents, tensors.__getitem__, known=known)
    return result.to_json(), result.tensors


def _base_tensor(model: LoraModel, path: str) -> Tensor:
    """A tensor of the base as it is without merged adapters."""
    return model._lora.originals.get(path, tensor_at(model, path))


def _contents(
    model: LoraModel, plan: Plan, state_dict: Mapping[str, Tensor] | None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors by key of one adapter's files."""
    return _config(model, grouped.in_files(plan.config, plan.branches)), tensors_in_files(model, plan, state_dict)


def tensors_in_files(model: nn.Module, plan: Plan, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What the files of an adapter hold, by key.

    Args:
        model: the model that the plan is for.
        plan: the adapter.
        state_dict: where to take the tensors from, by the model's parameter names; the model itself if None.

    Raises:
        CheckpointError: when a tensor is missing, has no data, or not the planned shape.
    """
    tensors: dict[str, Tensor] = {}
    names = names_in_files(model, plan)
    for spec in plan.branches:
        for stored in stored_parts(spec):
            shape = part_shapes(spec)[stored.part]
            path = f"{spec.owner}.{part_path(stored.part, spec.adapter)}"
            tensor = model.get_parameter(path) if state_dict is None else _find(state_dict, path)
            check_plain(tensor, f"'{path}'")
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"'{path}' has shape {tuple(tensor.shape)}, and the adapter's configuration says {shape}; is it a "
                    "shard? Gather the whole tensors and pass them as state_dict"
                )
            if not bool(tensor.isfinite().all()):
                log.warning("saving adapter '%s': '%s' has NaN or infinite entries", plan.adapter, path)
            tensors[key_of(names[spec.site], stored.name)] = stored.turned(grouped.to_file(spec, stored.part, tensor))
        if grouped.is_compact(spec) and not grouped.is_expanded(spec):
            log.warning(
                "'%s' has %d groups: its factors are written in a compact form that peft cannot read, since peft's would be "
                "%d times as large",
                spec.site,
                grouped.groups_of(spec),
                grouped.groups_of(spec) ** 2,
            )
        elif spec.variant and grouped.is_compact(spec):
            log.warning(
                "'%s' is a grouped convolution with DoRA: peft opens the file, and computes other norms than those of the "
                "layer's weight, so that its output differs",
                spec.site,
            )
    for extra in extras(plan):
        tensor = tensor_at(model, extra.path) if state_dict is None else _find(state_dict, extra.path)
        check_plain(tensor, f"'{extra.path}'")
        tensors[KEY_PREFIX + extra.key] = tensor
    return tensors


def entries_in_files(model: LoraModel, plan: Plan) -> dict[str, Entry]:
    """What the header of an adapter's file says, by key; the model may be on the meta device."""
    names = names_in_files(model, plan)
    entries: dict[str, Entry] = {}
    for spec in plan.branches:
        for stored in stored_parts(spec):
            shape = grouped.shape_in_file(spec, stored.part, part_shapes(spec)[stored.part])
            factor = model.get_parameter(f"{spec.owner}.{part_path(stored.part, spec.adapter)}")
            like = torch.empty(shape[::-1] if stored.transposed else shape, dtype=factor.dtype, device="meta")
            entries[key_of(names[spec.site], stored.name)] = Entry.of(like)
    paths = {extra.key: extra.path for extra in extras(plan)}
    paths.update(saved_embeddings(model, plan, _config(model, plan.config), "auto"))
    return {**entries, **{KEY_PREFIX + key: Entry.of(tensor_at(model, path)) for key, path in paths.items()}}


def _as_plain(
    model: nn.Module, plan: Plan, contents: tuple[LoraConfig, dict[str, Tensor]], initial: Factors
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The files of an adapter that changed the base, converted to one for the original base: see `to_plain`."""
    config, tensors = contents
    names = names_in_files(model, plan)
    for spec in plan.branches:
        if spec.variant or spec.bias or spec.kind != "linear":
            raise CheckpointError(
                f"'{spec.site}': only plain branches of linear layers are converted; save the adapter without conversion"
            )
        keys = [key_of(names[spec.site], part) for part in (FACTOR_A, FACTOR_B)]
        first = [
            initial[spec.site][part].to(tensors[key]) for part, key in zip((FACTOR_A, FACTOR_B), keys, strict=True)
        ]
        for key, tensor in zip(keys, to_plain(*(tensors[key] for key in keys), *first), strict=True):
            tensors[key] = tensor
    return config.replace(
        init_lora_weights=True,
        r=2 * config.r,
        rank_pattern={name: 2 * r for name, r in config.rank_pattern.items()},
        lora_alpha=plain_alpha(config.lora_alpha, config.use_rslora),
        alpha_pattern={name: plain_alpha(alpha, config.use_rslora) for name, alpha in config.alpha_pattern.items()},
    ), tensors


def initial_factors(model: nn.Module, plan: Plan, directory: Path | None) -> Factors:
    """The factors that an adapter started from: those that are remembered, or those that were saved before training.

    Raises:
        CheckpointError: when the initialisation did not change the base, or a saved adapter does not fit.
    """
    assert isinstance(model, LoraModel)
    changed = model._lora.changed_base.get(plan.adapter)
    if directory is not None:
        return read_adapter(directory, model, plan)
    if changed is None:
        raise CheckpointError(
            f"adapter '{plan.adapter}' did not change the base when it was initialised, and needs no conversion"
        )
    return changed.initial


def _find(state_dict: Mapping[str, Tensor], path: str) -> Tensor:
    """A parameter in a state dict that may have been taken from a wrapped model."""
    for prefix in ("", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."):
        if prefix + path in state_dict:
            return state_dict[prefix + path]
    raise CheckpointError(f"state_dict has no '{path}'.{did_you_mean(path, state_dict)}")


def _config(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """What `adapter_config.json` says: as peft, which adds how to load the base."""
    assert isinstance(model, LoraModel)
    config = config.replace(inference_mode=True)
    if config.task_type is None:
        name, module = model._lora.base_class
        config = config.replace(auto_mapping={"base_model_class": name, "parent_library": module})
    if config.base_model_name_or_path is None:
        config = config.replace(base_model_name_or_path=base_name(model))
    return config
