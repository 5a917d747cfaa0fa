"""What saved adapters change in a base checkpoint: replaced values, and updates to add.

`merge_checkpoint` asks this before it writes anything. The kind of a layer follows from the names and shapes of its
factors; `fxlora.checkpoint.matching` finds its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fxlora._passes import (
    EMBEDDING_A,
    FACTOR_A,
    KINDS,
    TOKEN_IDS_OPTION,
    TOKENS,
    TOKENS_AT,
    BranchSpec,
    Fold,
    Layer,
    MergeError,
    PassError,
    Read,
    Shape3,
    Update,
    bias_fold,
    conv_layer,
    has_factors,
    lookup,
    parameter_layer,
    part_shapes,
    shape_in_storage,
    shaped_layer,
    token_ids,
    weight_fold,
)
from fxlora.checkpoint import grouped, rounding
from fxlora.checkpoint.adapter import (
    KEYS,
    base_name_of,
    base_weight_error,
    check_keys,
    check_shape,
    repeats,
    split_key,
)
from fxlora.checkpoint.base_view import BaseView
from fxlora.checkpoint.matching import EXPORT, Entries, Names, Site, find_weights, unwrapped
from fxlora.checkpoint.saved import SavedAdapter
from fxlora.config import CONFIG_NAME
from fxlora.errors import CheckpointError, ConfigError
from fxlora.plan import configured_scaling


@dataclass(slots=True)
class Change:
    """All that happens to one tensor of the base: another value in its place, and what is added to it.

    Attributes:
        value: what takes the tensor's place.
        replaced_by: the adapter that brings it.
        updates: branches of this weight, each site being the weight's name in the base.
        biases: branches whose own biases are added to this bias of their layer.
    """

    value: Tensor | None = None
    replaced_by: Path | None = None
    updates: list[Update] = field(default_factory=list[Update])
    biases: list[Update] = field(default_factory=list[Update])

    @property
    def folds(self) -> bool:
        """Whether something is added to the tensor, or to the value in its place."""
        return bool(self.updates or self.biases)

    def storage(self, shape: tuple[int, ...]) -> Shape3:
        """How `fold` sees a tensor of this shape."""
        return (1, math.prod(shape), 1) if self.biases else shape_in_storage(self.updates[0].spec, shape)

    def fold(self, shape: tuple[int, ...], dtype: torch.dtype, read: Read, out_dtype: torch.dtype | None) -> Fold:
        """What is added, prepared for the tensor's rows as `shape_in_storage` counts them.

        Args:
            shape: of the tensor.
            dtype: of the tensor, or of the value in its place.
            read: gives rows of it, as in `passes.branches.updates`; variants need them all beforehand.
            out_dtype: of the result; the tensor's own if None.

        Raises:
            MergeError: when the tensor cannot hold an update, or a replaced row is not finite.
        """
        if self.biases:
            return bias_fold(self.biases, math.prod(shape), dtype, out_dtype=out_dtype)
        return weight_fold(self.updates, shape, dtype, read, out_dtype=out_dtype)


def find_changes(adapters: Iterable[SavedAdapter], base: BaseView) -> dict[str, Change]:
    """What adapters change, by the tensor's name in the base, as models see it.

    Args:
        adapters: in the order in which they are summed.
        base: the base.

    Raises:
        CheckpointError: when a tensor is not found, or found under several names, or a shape does not fit.
        MergeError: when names and shapes leave more than one reading, or a tensor cannot hold the change.
        ConfigError: when the adapter's weight in the merge is not 1 and it replaces tensors.
    """
    changes: dict[str, Change] = {}
    for adapter in adapters:
        names = Names(adapter, base)
        for update, weight, bias in _updates(adapter, names):
            changes.setdefault(weight, Change()).updates.append(update)
            if bias is not None:
                changes.setdefault(bias, Change()).biases.append(update)
        for name, value in _replacements(adapter, names, base):
            _replace(changes.setdefault(name, Change()), name, value, adapter)
        adapter.warn_of_skipped()
    for name, change in changes.items():
        if change.replaced_by is not None and change.updates:
            raise MergeError(
                f"'{name}' is replaced by {change.replaced_by} (modules_to_save) and changed by another adapter too; merge "
                "one of them only"
            )
        _check_rows(name, change)
    return changes


def _check_rows(name: str, change: Change) -> None:
    """Refuse two adapters that train the same rows, unless to the same values."""
    rows: dict[int, tuple[Tensor, str]] = {}
    for update in change.updates:
        if has_factors(update.spec):
            continue
        for index, row in zip(token_ids(update.spec.options), update.parts[TOKENS], strict=True):
            other, adapter = rows.setdefault(index, (row, update.spec.adapter))
            if not torch.equal(other, row):
                raise MergeError(
                    f"row {index} of '{name}' is trained by {adapter} and by {update.spec.adapter} (trainable_token_indices); "
                    "merge one of them only"
                )


def _replace(change: Change, name: str, value: Tensor, adapter: SavedAdapter) -> None:
    if adapter.weight != 1:
        raise ConfigError(
            f"`weights` has {adapter.weight} for {adapter.directory}, which replaces '{name}' (modules_to_save or bias); "
            "only 1 has a meaning there"
        )
    if change.value is not None and not repeats(value, change.value):
        raise MergeError(
            f"'{name}' is replaced by {change.replaced_by} and by {adapter.directory}; merge one of them only"
        )
    change.value, change.replaced_by = value, adapter.directory


# ---- branches ----


def _updates(adapter: SavedAdapter, names: Names) -> Iterator[tuple[Update, str, str | None]]:
    """Each branch with the name of its weight, and that of the bias to which it adds."""
    found_sites = list(find_weights(adapter, names))
    sites = [site for site in found_sites if TOKENS not in adapter.branches[site.branch]]
    layers = _layers(adapter, sites, names)
    specs = {site.branch: _spec(adapter, site, layer, names.entries) for site, layer in zip(sites, layers, strict=True)}
    rows = [site for site in found_sites if TOKENS in adapter.branches[site.branch]]
    specs.update({site.branch: _row_spec(adapter, site, names.entries[site.weight].shape) for site in rows})
    expected = {f"{b}.{KEYS.get(p, p)}".lstrip("."): s for b, s in specs.items() for p in part_shapes(s)}
    skipped = set(adapter.skipped)
    found = {name: key for name, key in adapter.keys.items() if split_key(name) is not None and key not in skipped}
    if not adapter.strict:
        adapter.skipped.extend(key for name, key in found.items() if name not in expected)
        found = {name: key for name, key in found.items() if name in expected}
    check_keys(adapter.file, found, expected, specs)
    for branch, spec in specs.items():
        for part, shape in part_shapes(spec).items():
            needed, found_shape = grouped.shape_in_file(spec, part, shape), adapter.branches[branch][part].shape
            check_shape(adapter.file, adapter.key(branch, part), tuple(found_shape), needed, spec)
        try:
            if has_factors(spec):
                KINDS[spec.kind].update(spec.layer)
        except PassError as error:
            raise MergeError(f"'{spec.site}': {error}; nothing was written") from error
        bias = _bias_of(spec.site, names.entries) if spec.bias else None
        yield Update(spec, _Parts(adapter, branch, spec), adapter.weight), spec.site, bias


@dataclass(frozen=True, slots=True)
class _Parts(Mapping[str, Tensor]):
    """The tensors of a branch, each read when it is asked for: those of all branches together may be large."""

    adapter: SavedAdapter
    branch: str
    spec: BranchSpec

    def __getitem__(self, part: str) -> Tensor:
        return grouped.from_file(self.spec, part, self.adapter.load(self.branch, part))

    def __iter__(self) -> Iterator[str]:
        return iter(part_shapes(self.spec))

    def __len__(self) -> int:
        return len(part_shapes(self.spec))


def _bias_of(weight: str, entries: Entries) -> str:
    name = f"{weight.rpartition('.')[0]}.bias".lstrip(".")
    if name not in entries:
        raise MergeError(
            f"'{weight}': the adapter has a bias (lora_bias) and the base has no '{name}' that could take it; run the "
            "adapter unmerged"
        )
    return name


def _row_spec(adapter: SavedAdapter, site: Site, shape: tuple[int, ...]) -> BranchSpec:
    """Rows of a weight that are trained in its place (`trainable_token_indices`)."""
    where, wanted = f"{adapter.file}: '{adapter.key(site.branch, TOKENS)}'", adapter.config.trainable_token_indices
    if adapter.weight != 1:
        raise ConfigError(
            f"`weights` has {adapter.weight} for {adapter.directory}, which replaces rows of '{site.weight}' "
            "(trainable_token_indices); only 1 has a meaning there"
        )
    if isinstance(wanted, dict):
        wanted = next(
            (ids for name, ids in wanted.items() if site.pattern == name or site.pattern.endswith(f".{name}")), None
        )
    if not wanted:
        raise CheckpointError(
            f"{where} has trained rows, and trainable_token_indices in {CONFIG_NAME} does not say which of '{site.pattern}'; "
            "save the adapter again"
        )
    ids = tuple(wanted)
    if len(shape) != 2 or len(set(ids)) < len(ids) or not all(0 <= index < shape[0] for index in ids):
        raise CheckpointError(
            f"{where}: trainable_token_indices in {CONFIG_NAME} should be different rows of '{site.weight}', which has shape "
            f"{shape}; the adapter is for another model"
        )
    return BranchSpec(
        site.weight, str(adapter.directory), "embedding", *shape, False, 0, 1.0,
        options=((TOKEN_IDS_OPTION, ids),), variant=TOKENS_AT["embedding"],
    )  # fmt: skip


def _spec(adapter: SavedAdapter, site: Site, layer: Layer, entries: Entries) -> BranchSpec:
    config, kind = adapter.config, KINDS[layer.kind]
    r = lookup(config.rank_pattern, site.pattern, config.r)
    spec = BranchSpec(
        site.weight, str(adapter.directory), layer.kind, layer.in_features, layer.out_features, layer.transposed, r,
        configured_scaling(config, site.pattern, r), options=layer.options, is_parameter=site.is_parameter,
        form=layer.form, variant="dora" if config.use_dora else "",
        bias=config.lora_bias and kind.can_have_bias and not site.is_parameter,
    )  # fmt: skip
    shape = entries[site.weight].shape
    if kind.weight_shape(layer) != shape:
        a, b = adapter.factors(site.branch)
        raise CheckpointError(
            f"{adapter.file}: '{site.branch}' has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, and "
            f"'{site.weight}' has shape {shape}; the adapter is for another model"
        )
    A = adapter.branches[site.branch].get(FACTOR_A)
    if A is None or grouped.groups_of(spec) == 1 or A.shape[0] != r:
        return spec
    spec = grouped.fitted(
        spec, adapter.load(site.branch, FACTOR_A), f"{adapter.file}: '{adapter.key(site.branch, FACTOR_A)}'"
    )
    if not grouped.is_compact(spec):
        return spec
    config = grouped.in_memory(config, [replace(spec, site=site.pattern)])
    return replace(spec, scaling=configured_scaling(config, site.pattern, spec.r))


def _layers(adapter: SavedAdapter, sites: Sequence[Site], names: Names) -> list[Layer]:
    """What each weight is; where a matrix is square, whether it is transposed follows from the others.

    A file has one flag for all linear layers (fan_in_fan_out), which in a model with both layouts is that of whichever
    came last. Experts have none, but those of one module are alike.
    """
    readings = [
        _readings(adapter, site, names.entries[site.weight].shape, site.weight in names.fused) for site in sites
    ]
    result: list[Layer] = []
    for site, layers in zip(sites, readings, strict=True):
        if len(layers) == 1:
            result.append(layers[0])
            continue
        group = _group(site, layers[0])
        others = zip(sites, readings, strict=True)
        certain = {each[0].transposed for other, each in others if len(each) == 1 and _group(other, each[0]) == group}
        flag = adapter.config.fan_in_fan_out if not site.is_parameter else next(iter(certain), None)
        if flag is None or not certain <= {flag}:
            why = (
                f"fan_in_fan_out is {flag} in {adapter.directory / CONFIG_NAME}, but other layers say otherwise"
                if not site.is_parameter
                else "is_transposed of the experts is not in files"
            )
            raise MergeError(
                f"'{site.weight}' is square, and whether it is stored (in, out) cannot be told: {why}. {EXPORT}"
            )
        result.append(next(layer for layer in layers if layer.transposed == flag))
    return result


def _group(site: Site, layer: Layer) -> tuple[str, ...]:
    """Weights that are stored alike have one group: all linear layers, the experts of one module."""
    module = site.weight.rpartition(".")[0] if site.is_parameter else ""
    return layer.kind, module, *(name for name, _ in layer.options)


def _readings(adapter: SavedAdapter, site: Site, shape: tuple[int, ...], fused: bool) -> list[Layer]:
    """All layers that a weight of this shape can be for such factors; the plainest one if none fits.

    Experts that files have one by one (`fused`) are stacked as they are, `(E, out, in)`.
    """
    parts = adapter.branches[site.branch]
    A, B = adapter.factors(site.branch)
    if EMBEDDING_A in parts:
        return [Layer("embedding", A.shape[1], B.shape[0])]
    if A.dim() > 2:
        return [conv_layer(shape if len(shape) == A.dim() else tuple(A.shape), A.shape[1])]
    if site.is_parameter:
        found = [parameter_layer(shape), parameter_layer(shape, transposed_experts=True)][
            : 1 if fused else len(shape) - 1
        ]
        layers = [layer for layer in found if layer is not None]
    elif len(shape) > 2:
        layers = [shaped_layer(shape)]
    else:
        layers = [Layer("linear", *sizes, flipped) for sizes, flipped in _linear_sizes(shape)]
    fitting = [layer for layer in layers if (layer.in_features, layer.out_features) == (A.shape[1], B.shape[0])]
    return fitting or layers[:1] or [Layer("linear", A.shape[1], B.shape[0])]


def _linear_sizes(shape: tuple[int, ...]) -> list[tuple[tuple[int, int], bool]]:
    """((in, out), transposed) of a matrix stored either way round; none of another shape."""
    return [((shape[1], shape[0]), False), ((shape[0], shape[1]), True)] if len(shape) == 2 else []


# ---- tensors of the base in an adapter ----


def _replacements(adapter: SavedAdapter, names: Names, base: BaseView) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the base's tensors that an adapter replaces: saved modules and trained biases.

    Raises:
        CheckpointError: for a tensor that is neither of these and differs from the base's, or does not fit the base's.
    """
    for name_in_file, value in adapter.base.items():
        key, name = adapter.keys[name_in_file], base_name_of(name_in_file)
        if not adapter.strict and names.lacks(name, [name]):
            adapter.skipped.append(key)
            continue
        _, found = names.find(name, [name])
        entry = names.entries[found]
        if not _is_trained(adapter, name):
            if repeats(value, base.load(found)):
                continue
            raise base_weight_error(adapter.file, key)
        is_float = value.dtype in rounding.PLAIN_DTYPES and entry.torch_dtype in rounding.PLAIN_DTYPES
        if tuple(value.shape) != entry.shape or not (is_float or value.dtype == entry.torch_dtype):
            raise CheckpointError(
                f"{adapter.file}: '{key}' is {value.dtype} of shape {tuple(value.shape)}, and the base's '{found}' is "
                f"{entry.dtype} of shape {entry.shape}; the adapter is for another model"
            )
        yield found, value


def _is_trained(adapter: SavedAdapter, name: str) -> bool:
    """Whether the configuration says that a tensor of the base was trained with the adapter."""
    owner, _, leaf = name.rpartition(".")
    config = adapter.config
    if any(module.endswith(saved) for saved in config.modules_to_save or () if saved for module in _around(owner)):
        return True
    if leaf != "bias":
        return False
    return config.bias == "all" or (config.bias == "lora_only" and owner in {unwrapped(b)[0] for b in adapter.branches})


def _around(module: str) -> list[str]:
    """A module's name, and those of the modules that it is in."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
