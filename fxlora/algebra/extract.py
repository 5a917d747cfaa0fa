"""`extract_adapter`: a difference of weights as a LoRA adapter, with the error of each layer.

The difference of each target is approximated by the best matrix of a given rank. Everything that differs outside of the
targets is reported by name: the adapter does not hold it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlora._passes import KINDS, BranchSpec, base_weight, part_path, part_shapes
from fxlora.algebra.derive import common_rank
from fxlora.algebra.lowrank import SVD, SiteRank, check_rank_choice, section, table, total
from fxlora.algebra.weights import CheckpointWeights, ModelWeights, Weights, entry_of
from fxlora.checkpoint import grouped
from fxlora.checkpoint.adapter import FACTOR_DTYPES, WEIGHTS_NAME, base_name, repeats
from fxlora.checkpoint.adapter_writing import tensors_in_files
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.layout import INDEX_FILE, WEIGHTS_FILE
from fxlora.checkpoint.manifest import write_manifest
from fxlora.checkpoint.safetensors_io import save_tensors
from fxlora.compound import compound_of
from fxlora.config import ADAPTER_DTYPES, CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError, ConfigError
from fxlora.host.skeleton import Guessed
from fxlora.plan import Plan, plan
from fxlora.rendering import Rendered, Section, json_data

Source = str | Path | nn.Module


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor outside of the targets that differs, and how."""

    name: str
    how: str


@dataclass(frozen=True, slots=True)
class ExtractReport(Rendered):
    """What `extract_adapter` did.

    Attributes:
        out_dir: the new adapter.
        sites: rank and error of each target; `norm` is that of the whole difference.
        saved: tensors that the adapter holds as they are (`modules_to_save`).
        differing: all other tensors that differ: the adapter does not hold these differences.
        tensors: number of tensors that were compared.
        seconds: time that it took.
    """

    out_dir: Path
    sites: tuple[SiteRank, ...]
    saved: tuple[str, ...]
    differing: tuple[Difference, ...]
    tensors: int
    seconds: float

    @property
    def total(self) -> SiteRank:
        """All targets as one."""
        return total(self.sites)

    def __str__(self) -> str:
        return "\n".join([table(self.sites), *self._lines()])

    def _lines(self) -> list[str]:
        lines = [
            f"wrote an adapter for {len(self.sites)} of {self.tensors} tensors to {self.out_dir} in {self.seconds:.2f} s",
        ]
        if self.differing:
            lines.append(f"not in the adapter: tensors that differ outside of the targets ({len(self.differing)})")
            lines += [f"  {each.name} {each.how}" for each in self.differing]
        return lines

    def sections(self) -> list[Section]:
        """The table, and what is not in the adapter."""
        return [section(self.sites, lines=tuple(self._lines()))]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        figures = {
            "out_dir": self.out_dir,
            "sites": [site.to_dict() for site in self.sites],
            "total": self.total.to_dict(),
            "saved": self.saved,
            "differing": [asdict(each) for each in self.differing],
            "tensors": self.tensors,
            "seconds": self.seconds,
        }
        return json_data(figures)


def extract_adapter(
    base: Source,
    tuned: Source,
    output: str | Path,
    *,
    r: int | None = None,
    max_error: float | None = None,
    target_modules: Sequence[str] | str | None = None,
    target_parameters: Sequence[str] | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    ensure_weight_tying: bool = False,
    task_type: str | None = None,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ExtractReport:
    """Write the LoRA adapter that is nearest to the difference of two sets of weights, `tuned - base`.

    Both are safetensors files or checkpoint directories, which are read tensor by tensor, or both are models in memory.
    Decompositions are made in float64, of one weight after another.

    Args:
        base: what the adapter is for.
        tuned: the same model with other weights.
        output: directory of the new adapter, in peft's format; put in place as one.
        r: rank of the adapter; a layer that is smaller has the rank of its shape.
        max_error: choose for each layer the smallest rank whose relative error (Frobenius norm) is at most this; `r` is
            a limit then.
        target_modules: as in `LoraConfig`; None for a transformers model's default. The same holds for
            `target_parameters`, `exclude_modules`, `ensure_weight_tying` (for targets that share one weight) and
            `task_type`.
        target_parameters: see there.
        exclude_modules: see there.
        modules_to_save: modules that the adapter shall hold whole, as they are in `tuned`.
        ensure_weight_tying: see there.
        task_type: see there.
        model: tells what layers the tensors of files belong to, by its own names; may be on the meta device. If None,
            the transformers model of the base's `config.json`, else names and shapes tell: then embeddings, weights
            stored `(in, out)` (`Conv1D`) and grouped convolutions look like linear layers and plain convolutions.
        dtype: of the factors.
        device: where decompositions are made.

    Returns:
        Rank and error of each target, measured on the factors as written, and all other differences.

    Raises:
        ConfigError: for a rank, an error or a dtype that cannot be used.
        NoTargetError: when a target matches nothing.
        CheckpointError: when a file is missing or broken; when a target's weight is missing, quantized or not finite, or
            has another shape in the two. Nothing is written in any of these cases.

    >>> import tempfile
    >>> base, tuned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
    >>> change = torch.randn(6, 2) @ torch.randn(2, 8)
    >>> _ = tuned.load_state_dict({"0.weight": base[0].weight + change, "0.bias": base[0].bias + 1})
    >>> report = extract_adapter(base, tuned, tempfile.mkdtemp(), r=2, target_modules=["0"])
    >>> report.total.relative_error < 1e-5, [each.name for each in report.differing]
    (True, ['0.bias'])
    """
    began = time.perf_counter()
    check_rank_choice(r, max_error)
    if str(dtype).removeprefix("torch.") not in ADAPTER_DTYPES:
        raise ConfigError(f"`dtype` should be one of {', '.join(ADAPTER_DTYPES)}, not {dtype}")
    config = LoraConfig(
        r=r or 1,
        target_modules=_names(target_modules),
        target_parameters=list(target_parameters) if target_parameters else None,
        exclude_modules=_names(exclude_modules),
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        ensure_weight_tying=ensure_weight_tying,
        task_type=task_type,
    )
    before, after, layers = _sources(base, tuned, model)
    planned = _planned(layers, config)
    _check(layers, planned, before, after)
    choice = _Choice(r, max_error, dtype, torch.device(device))
    own = [spec for spec in planned.branches if not spec.tied_to]
    found = {spec.site: _approximated(layers, spec, before, after, choice) for spec in own}
    finished = _with_ranks(layers, planned, {site: each.figures.rank for site, each in found.items()})
    copies = {f"{saved.path}.{name}": f"{saved.module}.{name}" for saved in finished.saved for name in saved.tensors}
    tensors = _factors(finished.branches, found)
    tensors.update({path: after.load(name) for path, name in copies.items()})
    differing = _differing({*copies.values(), *_targets(layers, finished)}, before, after)
    _write(Path(output), layers, finished, tensors, base)
    count = len(before.entries.keys() | after.entries.keys())
    figures = tuple(each.figures for each in found.values())
    return ExtractReport(Path(output), figures, tuple(copies.values()), differing, count, time.perf_counter() - began)


def _names(names: Sequence[str] | str | None) -> list[str] | str | None:
    return names if names is None or isinstance(names, str) else list(names)


def _sources(base: Source, tuned: Source, model: nn.Module | None) -> tuple[Weights, Weights, nn.Module]:
    """Both sets of weights, and the model whose layers they are."""
    if isinstance(base, nn.Module) and isinstance(tuned, nn.Module):
        return ModelWeights.read(base, "the base model"), ModelWeights.read(tuned, "the tuned model"), base
    if isinstance(base, nn.Module) or isinstance(tuned, nn.Module):
        raise ConfigError("`base` and `tuned` should both be models, or both be paths of checkpoints")
    before, after = CheckpointWeights.read(Path(base)), CheckpointWeights.read(Path(tuned))
    return before, after, before.model() if model is None else model


def _planned(layers: nn.Module, config: LoraConfig) -> Plan:
    if isinstance(layers, Guessed) and str(config.target_modules).lower() == "all-linear":
        raise ConfigError(
            "target_modules='all-linear' cannot be told from names and shapes: an embedding looks like a linear layer. Name "
            "the targets, or pass `model`"
        )
    planned = plan(layers, config)
    owners: dict[int, str] = {}
    for spec in planned.branches:
        other = owners.setdefault(id(base_weight(layers, spec.site)[1]), spec.site)
        if other != spec.site and not spec.tied_to:
            raise ConfigError(
                f"'{other}' and '{spec.site}' share one weight: pass ensure_weight_tying=True, so that they share its change "
                "too, or name one of them in target_modules"
            )
    return planned


def _targets(layers: nn.Module, planned: Plan) -> set[str]:
    """Names of the targets' weights, also those that further targets share."""
    return {base_weight(layers, spec.site)[0] for spec in planned.branches}


def _check(layers: nn.Module, planned: Plan, before: Weights, after: Weights) -> None:
    """Refuse targets of which the weights have no difference."""
    for spec in [spec for spec in planned.branches if not spec.tied_to]:
        name, weight = base_weight(layers, spec.site)
        for weights in (before, after):
            entry = entry_of(weights, name)
            if entry.shape != tuple(weight.shape):
                raise CheckpointError(
                    f"{weights.where}: '{name}' has shape {entry.shape}, and the base model's has {tuple(weight.shape)}; "
                    "leave the layer out of the targets, or compare weights of one model"
                )
            if entry.dtype not in FACTOR_DTYPES:
                raise CheckpointError(
                    f"{weights.where}: '{name}' is {entry.dtype}, which has no plain difference; dequantize it first, or "
                    "leave the layer out of the targets"
                )
    for saved in planned.saved:
        for name in saved.tensors:
            entry_of(after, f"{saved.module}.{name}")


# ---- one layer ----


@dataclass(frozen=True, slots=True)
class _Choice:
    """How to approximate: see `extract_adapter`."""

    r: int | None
    max_error: float | None
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Approximation:
    """A and B as matrices, and what they lose."""

    A: Tensor
    B: Tensor
    figures: SiteRank


def _approximated(
    layers: nn.Module, spec: BranchSpec, before: Weights, after: Weights, choice: _Choice
) -> _Approximation:
    name = base_weight(layers, spec.site)[0]
    old, new = (weights.load(name).to(choice.device).double() for weights in (before, after))
    change = KINDS[spec.kind].as_matrices(spec.layer, "weight", new - old)
    if not bool(change.isfinite().all()):
        raise CheckpointError(
            f"'{name}' has NaN or infinite entries in {before.where} or {after.where}: one of them is broken"
        )
    svd = SVD.of(change)
    most = svd.S.shape[-1]
    r = min(choice.r or most, most, most if choice.max_error is None else svd.rank_for(choice.max_error))
    A, B = (factor.to(choice.dtype).contiguous() for factor in svd.factors(r))
    norm, error = float(change.norm()), float((change - B.double() @ A.double()).norm())
    return _Approximation(A.cpu(), B.cpu(), SiteRank(spec.site, r, most, norm, error))


def _factors(branches: Iterable[BranchSpec], found: dict[str, _Approximation]) -> dict[str, Tensor]:
    """The factors by the paths that they would have in a model. Weights of one compound module are padded to one rank."""
    tensors: dict[str, Tensor] = {}
    own: dict[str, dict[str, Tensor]] = {}
    for spec in branches:
        kind = KINDS[spec.kind]
        if not spec.tied_to:
            A, B, missing = found[spec.site].A, found[spec.site].B, spec.r - found[spec.site].figures.rank
            whole_a = torch.cat([A, A.new_zeros(*A.shape[:-2], missing, A.shape[-1])], -2)
            whole_b = torch.cat([B, B.new_zeros(*B.shape[:-1], missing)], -1)
            values = (kind.from_matrices(spec.layer, "A", whole_a), kind.from_matrices(spec.layer, "B", whole_b))
            own[spec.site] = dict(zip(kind.factor_names, values, strict=True))
        parts = own[spec.tied_to or spec.site]
        tensors.update({f"{spec.owner}.{part_path(part, spec.adapter)}": parts[part] for part in part_shapes(spec)})
    return tensors


def _with_ranks(layers: nn.Module, planned: Plan, ranks: dict[str, int]) -> Plan:
    """The plan with the rank of each site, scaling 1."""
    by_pattern: dict[str, int] = {}
    for spec in planned.branches:
        pattern = compound_of(layers, spec.site) or spec.site
        by_pattern[pattern] = max(ranks[spec.tied_to or spec.site], by_pattern.get(pattern, 1))
    common = common_rank(by_pattern.values())
    patterns = {f"^{re.escape(name)}": rank for name, rank in by_pattern.items() if rank != common}
    config = planned.config.replace(r=common, lora_alpha=common, rank_pattern=patterns, alpha_pattern=dict(patterns))
    branches = tuple(
        replace(spec, r=by_pattern[compound_of(layers, spec.site) or spec.site], scaling=1.0)
        for spec in planned.branches
    )
    return replace(planned, config=config, branches=branches)


# ---- everything else ----


def _differing(held: set[str], before: Weights, after: Weights) -> tuple[Difference, ...]:
    """What differs beside what the adapter holds, sorted by name."""
    old, new = before.entries, after.entries
    found: list[Difference] = []
    for name in sorted((old.keys() | new.keys()) - held):
        if name not in old or name not in new:
            how = f"is in {(before if name in old else after).where} only"
        elif old[name].shape != new[name].shape:
            how = f"has the shapes {old[name].shape} and {new[name].shape}"
        else:
            how = _compared(before.load(name), after.load(name))
        found += [Difference(name, how)] if how else []
    return tuple(found)


def _compared(old: Tensor, new: Tensor) -> str:
    """How two tensors of one shape differ; empty if their values are the same."""
    new = new.to(old.device)
    if repeats(new, old) and repeats(old, new):
        return ""
    if not (old.is_floating_point() and new.is_floating_point()):
        return f"has other values ({old.dtype} and {new.dtype})"
    largest = float((new.double() - old.double()).abs().max())
    return f"differs by up to {largest:.4g}" if largest != 0 else ""


def _write(output: Path, layers: nn.Module, planned: Plan, tensors: dict[str, Tensor], base: Source) -> None:
    if any((output / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE)):
        raise CheckpointError(f"'{output}' holds a model's weights; write the adapter into another directory")
    name = base_name(layers) if isinstance(base, nn.Module) else str(base) if Path(base).is_dir() else None
    cls = type(layers)
    mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    known = planned.config.task_type is None and cls is not Guessed
    config = planned.config.replace(
        inference_mode=True, base_model_name_or_path=name, auto_mapping=mapping if known else None
    )
    contents = tensors_in_files(layers, planned, tensors)
    with staged(output, keep=lambda _: True) as staging:
        save_tensors(staging / WEIGHTS_NAME, contents)
        (staging / CONFIG_NAME).write_text(grouped.in_files(config, planned.branches).to_json(), encoding="utf-8")
        write_manifest(staging)
