"""What an adapter adds to each weight, one layer after another: from a live model, or from files.

The product `B A` of a plain branch is never made: a norm and singular values need its factors only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fxlora._passes import FOLDABLE, KINDS, BranchSpec, base_weight, deltas, has_factors
from fxlora.algebra.derive import matrices, update
from fxlora.algebra.lowrank import SVD, product_norm
from fxlora.checkpoint.adapter import adapter_file, load_factor
from fxlora.checkpoint.base_view import view_base
from fxlora.checkpoint.changes import find_changes
from fxlora.checkpoint.contents import Contents, FileBranch, read_contents
from fxlora.checkpoint.layout import read_json, read_shards
from fxlora.checkpoint.matching import unwrapped
from fxlora.checkpoint.merge_plan import read_sources
from fxlora.checkpoint.safetensors_io import open_tensors
from fxlora.checkpoint.saved import read_saved
from fxlora.config import CONFIG_NAME
from fxlora.errors import AdapterError, CheckpointError
from fxlora.initialisers import changes_base, to_plain
from fxlora.model import LoraModel

Source = nn.Module | str | Path
"""A transformed model, or the directory of a saved adapter."""


@dataclass(frozen=True, slots=True)
class LayerUpdate:
    """What an adapter adds to one weight.

    Attributes:
        site: name of the layer or parameter.
        A: `(…, q, columns)`, with the scaling in it, float64.
        B: `(…, rows, q)`.
        weight: the weight that it is added to; None if it is not at hand.
        change: the whole change, where it is more than `B A` and the weight is at hand (DoRA).
    """

    site: str
    A: Tensor
    B: Tensor
    weight: Tensor | None = None
    change: Tensor | None = None

    def singular_values(self) -> Tensor:
        """Of `s·BA`, descending, float64; for a stack of matrices the roots of the sums of their squares."""
        S = SVD.of_product(self.A, self.B).S
        return S.reshape(-1, S.shape[-1]).square().sum(0).sqrt()

    def norm(self) -> float:
        """Frobenius norm of the change."""
        return product_norm(self.A, self.B) if self.change is None else float(self.change.double().norm())

    def weight_norm(self) -> float | None:
        """Frobenius norm of the weight."""
        return None if self.weight is None else float(torch.linalg.vector_norm(self.weight, dtype=torch.float64))


def layer_updates(source: Source, adapter: str | None, base: str | Path | None) -> tuple[str, Iterator[LayerUpdate]]:
    """What to call an adapter, and its updates in the order of its branches. Values are read as they are asked for.

    Args:
        source: the model or the directory.
        adapter: a live model's adapter; the active one if None.
        base: the checkpoint that a saved adapter is for; its weights are looked at then.

    Raises:
        AdapterError: when a model has no such adapter, or no values.
        CheckpointError: when files are missing or broken.
    """
    if isinstance(source, nn.Module):
        if not isinstance(source, LoraModel):
            raise AdapterError(
                f"{type(source).__name__} is not a transformed model; give what lora_transform returned, or the directory "
                "of a saved adapter"
            )
        if base is not None:
            raise AdapterError("`base` is for the directory of an adapter: a model in memory has its weights")
        name = source.active_adapter if adapter is None else adapter
        source._check_known([name])
        return f"adapter '{name}'", _in_memory(source, name)
    if adapter is not None:
        raise AdapterError(f"`adapter` chooses one of a model's, and '{source}' is a directory: it holds one")
    path = Path(source)
    return f"adapter '{path.name}'", _in_files(path) if base is None else _on_base(path, Path(base))


# ---- in memory ----


def _in_memory(model: LoraModel, adapter: str) -> Iterator[LayerUpdate]:
    changed = model._lora.changed_base.get(adapter)
    for spec in model._lora.adapters[adapter].branches:
        if not has_factors(spec) or spec.tied_to:
            continue
        path, parameter = base_weight(model, spec.site)
        before = model._lora.originals.get(path, parameter.detach())
        first, second = matrices(model, spec)
        factors = first.double(), second.double()
        if any(tensor.is_meta for tensor in (before, *factors)):
            raise AdapterError(f"'{spec.site}' is on the meta device and has no values; load real weights first")
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise AdapterError(f"'{spec.site}': adapter '{adapter}' has NaN or infinite entries; it is broken")
        if changed is not None and not spec.variant:
            before = changed.replaced.get(path, before)
            if spec.site in changed.initial:
                factors = to_plain(factors[0], factors[1], *_matrices(spec, changed.initial[spec.site]))
        A, B = factors
        weight = before if before.dtype in FOLDABLE else None
        yield LayerUpdate(spec.site, A * spec.scaling, B, weight, update(model, spec) if spec.variant else None)


def _matrices(spec: BranchSpec, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors of a branch as matrices in float64, without the scaling."""
    kind = KINDS[spec.kind]
    A, B = (parts[name].double() for name in kind.factor_names)
    return kind.as_matrices(spec.layer, "A", A), kind.as_matrices(spec.layer, "B", B)


# ---- in files ----


def _in_files(directory: Path) -> Iterator[LayerUpdate]:
    contents = read_contents(directory)
    names = [unwrapped(branch.name)[0] for branch in contents.branches]
    with open_tensors(adapter_file(directory)) as file:
        for branch, name in zip(contents.branches, names, strict=True):
            site = name if names.count(name) == 1 else branch.name
            r, scaling = _setting(contents, branch)
            A, B = (load_factor(file, key).double() for key in (branch.A, branch.B))
            yield LayerUpdate(site, *_as_matrices(contents, branch, r, A * scaling, B))


def _setting(contents: Contents, branch: FileBranch) -> tuple[int, float]:
    """Rank and scaling."""
    possible = contents.settings(branch)
    if len(possible) > 1:
        raise CheckpointError(
            f"{contents.directory}: '{branch.name}' is for one of {', '.join(contents.names('target_parameters'))}, which "
            "patterns give different ranks or alphas, and the file does not say which; name the base model's directory"
        )
    ((r, alpha),) = possible
    return r, alpha / math.sqrt(r) if contents.config.get("use_rslora") else alpha / r


def _as_matrices(contents: Contents, branch: FileBranch, r: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of one matrix, of the groups of a convolution, or of experts."""
    if branch.is_parameter and A.shape[0] == B.shape[1] and A.shape[0] % r == 0:
        experts = A.shape[0] // r
        return A.reshape(experts, r, -1), B.reshape(B.shape[0], r, experts).permute(2, 0, 1)
    groups = branch.groups
    if not branch.is_parameter and A.shape[0] == r == B.shape[1] * groups:
        rows_a, rows_b = A.flatten(1), B.flatten(1)
        return (
            (rows_a.unflatten(0, (groups, -1)), rows_b.unflatten(0, (groups, -1))) if groups > 1 else (rows_a, rows_b)
        )
    raise CheckpointError(
        f"{contents.directory}: '{branch.name}' has factors of shapes {branch.shape_A} and {branch.shape_B}, and the "
        f"configuration says rank {r}; correct r or rank_pattern in {CONFIG_NAME}"
    )


def _on_base(directory: Path, base: Path) -> Iterator[LayerUpdate]:
    adapter = read_saved(directory, 1.0)
    config = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    view = view_base(
        read_sources(base, read_shards(base)[0])[0], config, [adapter], dequantize=True, out_dtype=torch.float32
    )
    for name, change in find_changes([adapter], view).items():
        for each in change.updates:
            spec, parts = each.spec, dict(each.parts)
            if has_factors(spec):
                weight = view.load(name)
                whole = deltas(spec, weight, parts)["weight"] if spec.variant else None
                A, B = _matrices(spec, parts)
                yield LayerUpdate(name.removesuffix(".weight"), A * spec.scaling, B, weight, whole)


def features(source: Source, adapter: str | None) -> tuple[bool, bool]:
    """(whether an adapter is DoRA, whether its factors hold what its initialisation took out of the base)."""
    if isinstance(source, LoraModel):
        branches = source._lora.adapters[adapter or source.active_adapter].branches
        return any(spec.variant == "dora" for spec in branches), False
    config = read_contents(str(source)).config
    return bool(config.get("use_dora")), changes_base(config.get("init_lora_weights", True))
