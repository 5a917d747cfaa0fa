"""What saved adapters change in a base checkpoint, told from names and shapes alone.

`merge_checkpoint` calls this before it writes anything. An adapter's layer is found by its name; its kind follows from
the names and shapes of its factors. Where that leaves two readings (a square weight may be stored either way round) the
merge is refused: a model knows, and `export_merged` asks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from fxlora._passes import (
    EMBEDDING_A,
    EMBEDDING_B,
    FACTOR_A,
    FACTOR_B,
    KINDS,
    BranchSpec,
    Layer,
    MergeError,
    PassError,
    conv_layer,
    deltas,
    did_you_mean,
    lookup,
    parameter_layer,
    part_shapes,
    shaped_layer,
)
from fxlora.checkpoint import grouped, rounding
from fxlora.checkpoint.adapter import (
    BASE_LAYER,
    KEYS,
    adapter_file,
    base_name_of,
    check_keys,
    check_shape,
    keys_without_prefix,
    load_factor,
    refuse_base_weight,
    repeats,
    split_key,
)
from fxlora.checkpoint.safetensors_io import Entry, TensorFile, open_tensors
from fxlora.compound import ATTENTION_WEIGHTS, OUT_PROJ
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError, ConfigError
from fxlora.initialisers import changes_base
from fxlora.plan import configured_scaling

Entries = Mapping[str, Entry]
Load = Callable[[str], Tensor]
"""A tensor of the base by its name."""

_EXPORT = "Load the model and use export_merged"


# ---- changes ----


@dataclass(frozen=True, slots=True)
class Summand:
    """What one branch adds to one tensor.

    Attributes:
        spec: of the branch; its site is the weight's name in the base.
        parts: the branch's tensors.
        of: `"weight"`, or `"bias"` for what a branch's own bias adds to the layer's.
        factor: the adapter's weight in the merge.
    """

    spec: BranchSpec
    parts: dict[str, Tensor]
    of: str
    factor: float

    def delta(self, base: Tensor) -> Tensor:
        """float64, of the base's shape."""
        return deltas(self.spec, base, self.parts)[self.of] * self.factor


@dataclass(slots=True)
class Change:
    """All that happens to one tensor of the base: another value in its place, and what is added to it."""

    value: Tensor | None = None
    replaced_by: Path | None = None
    summands: list[Summand] = field(default_factory=list[Summand])

    def apply(self, base: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The new tensor, rounded once, in `dtype` or the base's own.

        Raises:
            MergeError: when a finite entry would become NaN or infinite.
        """
        start, dtype = base if self.value is None else self.value, dtype or base.dtype
        if not self.summands:
            return rounding.convert(start, dtype)
        return rounding.fold_into(start, (each.delta(start) for each in self.summands), dtype)


def find_changes(adapters: Iterable[SavedAdapter], entries: Entries, load: Load) -> dict[str, Change]:
    """What adapters change, by the tensor's name in the base.

    Args:
        adapters: in the order in which they are summed.
        entries: all tensors of the base.
        load: reads one of them.

    Raises:
        CheckpointError: when a tensor is not found, or found under several names, or a shape does not fit.
        MergeError: when names and shapes leave more than one reading, or a tensor cannot hold the change.
        ConfigError: when the adapter's weight in the merge is not 1 and it replaces tensors.
    """
    changes: dict[str, Change] = {}
    for adapter in adapters:
        names = _Names(adapter, entries)
        for summand, name in _summands(adapter, names):
            changes.setdefault(name, Change()).summands.append(summand)
        for name, value in _replacements(adapter, names, load):
            _replace(changes.setdefault(name, Change()), name, value, adapter)
    for name, change in changes.items():
        if change.replaced_by is not None and any(each.of == "weight" for each in change.summands):
            raise MergeError(
                f"'{name}' is replaced by {change.replaced_by} (modules_to_save) and changed by another adapter too; merge "
                "one of them only"
            )
    return changes


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


# ---- reading ----


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A saved adapter in memory.

    Attributes:
        directory: where it is.
        config: its configuration.
        weight: its factor in the merge.
        branches: by the layer's name in the file, the parts.
        base: tensors of the base that it brings, by their names in the file.
        keys: in the file, by names without the prefix.
    """

    directory: Path
    config: LoraConfig
    weight: float
    branches: dict[str, dict[str, Tensor]]
    base: dict[str, Tensor]
    keys: dict[str, str]

    @property
    def file(self) -> Path:
        """The file with the tensors."""
        return adapter_file(self.directory)

    def key(self, branch: str, part: str) -> str:
        """The key of a part in the file."""
        return self.keys[f"{branch}.{KEYS.get(part, part)}".lstrip(".")]


def read_saved(directory: Path, weight: float) -> SavedAdapter:
    """Read a saved adapter.

    Raises:
        CheckpointError: when a file is missing or broken, a tensor is not finite, or the adapter is for a changed base.
        NotImplementedError: for a configuration that is not supported yet.
    """
    config = LoraConfig.from_pretrained(directory)
    try:
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG_NAME}: {error}") from error
    if changes_base(config.init_lora_weights):
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: init_lora_weights={config.init_lora_weights!r} changed the base that the factors "
            "are for. Convert the adapter (save_pretrained(…, path_initial_model_for_weight_conversion=…)), or load the "
            "model and use export_merged"
        )
    branches: dict[str, dict[str, Tensor]] = {}
    base: dict[str, Tensor] = {}
    with open_tensors(adapter_file(directory)) as file:
        keys = keys_without_prefix(file)
        for name, key in keys.items():
            found = split_key(name)
            if found is None:
                base[name] = _load_base(file, key)
            else:
                branches.setdefault(found[0], {})[found[1]] = load_factor(file, key)
    return SavedAdapter(directory, config, weight, branches, base, keys)


def _load_base(file: TensorFile, key: str) -> Tensor:
    dtype = file.entries[key].torch_dtype
    return load_factor(file, key) if dtype is not None and dtype.is_floating_point else file.load(key).clone()


# ---- names ----


class _Names:
    """Names of the base for those of one adapter: equal, or with one prefix more or less, the same for all."""

    def __init__(self, adapter: SavedAdapter, entries: Entries) -> None:
        self.entries = entries
        self._adapter = adapter
        self._prefixes: dict[tuple[str, str], tuple[str, str]] = {}

    def find(self, name: str, candidates: Sequence[str]) -> tuple[str, str]:
        """(name looked for, name in the base) of the first candidate that the base has.

        Raises:
            CheckpointError: when there is none, more than one, or one with another prefix than names before.
        """
        wanted, found = self._find(name, candidates)
        common = min(len(wanted), len(found))
        self._prefixes.setdefault((wanted[:-common], found[:-common]), (name, found))
        if len(self._prefixes) > 1:
            (a, in_a), (b, in_b) = self._prefixes.values()
            raise CheckpointError(
                f"{self._adapter.file}: '{a}' would be '{in_a}' in the base and '{b}' would be '{in_b}': names differ in "
                "more than a common prefix; the adapter is for another model"
            )
        return wanted, found

    def _find(self, name: str, candidates: Sequence[str]) -> tuple[str, str]:
        for wanted in candidates:
            if wanted in self.entries:
                return wanted, wanted
        for wanted in candidates:
            found = [
                each
                for each in self.entries
                if each.endswith(f".{wanted}") or ("." in each and wanted.endswith(f".{each}"))
            ]
            if len(found) == 1:
                return wanted, found[0]
            if found:
                raise CheckpointError(
                    f"{self._adapter.file}: '{name}' may be any of {', '.join(map(repr, sorted(found)[:3]))} in the base; "
                    "rename the adapter's keys to the base's names"
                )
        raise CheckpointError(
            f"{self._adapter.file}: the base has no '{candidates[-1]}'.{did_you_mean(candidates[-1], self.entries)} The "
            "adapter is for another model, or the tensor is tied to another one, or named otherwise in memory than in "
            f"the files. {_EXPORT} if the adapter fits the model"
        )


@dataclass(frozen=True, slots=True)
class _Site:
    """One branch of an adapter and the weight that it is for.

    Attributes:
        branch: the branch's name in the file.
        pattern: the name that the configuration's patterns see.
        weight: the weight's name in the base.
        is_parameter: whether it is a bare parameter, and not the weight of a layer.
    """

    branch: str
    pattern: str
    weight: str
    is_parameter: bool = False


def _sites(adapter: SavedAdapter, names: _Names) -> Iterator[_Site]:
    """The weight of each branch. Branches of several parameters of a module are nested in the file."""
    modules: dict[str, dict[int, str]] = {}
    for branch in adapter.branches:
        module, depth = _unwrapped(branch)
        other = modules.setdefault(module, {}).setdefault(depth, branch)
        if other != branch:
            raise CheckpointError(f"{adapter.file}: '{other}' and '{branch}' mean the same layer; remove one of them")
    for module, branches in modules.items():
        parameters = list(_parameters(adapter.config, module))
        layer, *compound = (f"{module}.{leaf}".lstrip(".") for leaf in ("weight", *_COMPOUND_FIRST))
        wanted, found = names.find(module, [*(each for each, _ in parameters), *compound, layer])
        owner = found.rpartition(".")[0]
        if any(name == wanted for name, _ in parameters):
            leaves = [each for _, each in parameters if f"{owner}.{each}".lstrip(".") in names.entries]
            yield from _nested(adapter, module, owner, branches, leaves, names.entries, registered=False)
        elif wanted != layer:
            leaves = _compound_weights(owner, names.entries)
            yield from _nested(adapter, module, owner, branches, leaves, names.entries, registered=True)
        else:
            if list(branches) != [0]:
                raise CheckpointError(
                    f"{adapter.file}: '{branches[max(branches)]}' is nested as for parameters of one module, and "
                    f"{CONFIG_NAME} names none of '{module}' in target_parameters"
                )
            yield _Site(branches[0], _pattern(module, owner, names.entries), found)


def _unwrapped(branch: str) -> tuple[str, int]:
    """(name of the module, how deep the branch is nested in wrappers of it)."""
    parts = branch.split(".")
    depth = next((i for i, part in enumerate(reversed(parts)) if part != BASE_LAYER), len(parts))
    return ".".join(part for part in parts if part != BASE_LAYER), depth


def _parameters(config: LoraConfig, module: str) -> Iterator[tuple[str, str]]:
    """(full name, own name) of the parameters of a module that are targets."""
    seen: set[str] = set()
    for target in config.target_parameters or ():
        leaf = target.rpartition(".")[2]
        name = f"{module}.{leaf}".lstrip(".")
        if leaf not in seen and (name == target or name.endswith(f".{target}")):
            seen.add(leaf)
            yield name, leaf


_COMPOUND_FIRST = (*ATTENTION_WEIGHTS[:2], "weight_ih_l0", "weight_ih")
"""One weight that any compound module has: see `fxlora.compound`."""

_RECURRENT = re.compile(r"weight_(ih|hh|hr)(?:_l(\d+)(_reverse)?)?")


def _compound_weights(owner: str, entries: Entries) -> list[str]:
    """Own names of the weights of a compound module, in the order in which torch registers them."""
    found = [name for name in ATTENTION_WEIGHTS if f"{owner}.{name}".lstrip(".") in entries]
    if found:
        return found
    order: dict[str, tuple[int, bool, int]] = {}
    for name in entries:
        module, _, leaf = name.rpartition(".")
        match = _RECURRENT.fullmatch(leaf)
        if module == owner and match:
            order[leaf] = (int(match[2] or 0), bool(match[3]), ("ih", "hh", "hr").index(match[1]))
    return sorted(order, key=order.__getitem__)


def _pattern(module: str, owner: str, entries: Entries) -> str:
    """The name that patterns see: an attention's for its output projection."""
    attention, _, leaf = owner.rpartition(".")
    if leaf == OUT_PROJ and any(f"{attention}.{name}".lstrip(".") in entries for name in ATTENTION_WEIGHTS):
        return module.rpartition(".")[0]
    return module


def _nested(
    adapter: SavedAdapter,
    module: str,
    owner: str,
    branches: Mapping[int, str],
    leaves: Sequence[str],
    entries: Entries,
    *,
    registered: bool,
) -> list[_Site]:
    """The parameters of one module: the one that is registered last is the outermost.

    Args:
        adapter: for messages, and for the configuration.
        module: its name in the adapter's model.
        owner: its name in the base.
        branches: by depth, the names in the file.
        leaves: own names of the parameters.
        entries: of the base.
        registered: whether `leaves` are in the order of registration, which files do not tell.

    Raises:
        CheckpointError: when the numbers differ, or no order fits the shapes.
        MergeError: when several orders fit.
    """
    if sorted(branches) != list(range(len(leaves))):
        raise CheckpointError(
            f"{adapter.file}: '{module}' has the factors of {len(branches)} parameters, and {len(leaves)} of the base's are "
            f"targets ({', '.join(leaves)}); the adapter is for another model, or its configuration is"
        )
    inwards = [branches[depth] for depth in sorted(branches, reverse=True)]

    def sites(order: Sequence[str]) -> list[_Site]:
        of_module = {leaf: module if registered else f"{module}.{leaf}".lstrip(".") for leaf in order}
        return [
            _Site(branch, of_module[leaf], f"{owner}.{leaf}".lstrip("."), is_parameter=True)
            for branch, leaf in zip(inwards, order, strict=True)
        ]

    if registered or len(leaves) == 1:
        return sites(leaves)
    orders = [sites(order) for order in permutations(leaves)]
    possible = [order for order in orders if all(_fits(adapter, site, entries) for site in order)]
    if not possible:
        shapes = ", ".join(f"{leaf} {entries[f'{owner}.{leaf}'.lstrip('.')].shape}" for leaf in leaves)
        raise CheckpointError(
            f"{adapter.file}: the factors of '{module}' fit its parameters in no order ({shapes}); the adapter is for "
            "another model, or its configuration has another rank"
        )
    if len(possible) > 1:
        raise MergeError(
            f"{adapter.file}: which factors of '{module}' are for which of {', '.join(leaves)} cannot be told from shapes, "
            f"and files do not have the parameters' order. {_EXPORT}"
        )
    return possible[0]


def _fits(adapter: SavedAdapter, site: _Site, entries: Entries) -> bool:
    parts, shape = adapter.branches[site.branch], entries[site.weight].shape
    a, b = _factors(adapter, site.branch, parts)
    rank = lookup(adapter.config.rank_pattern, site.pattern, adapter.config.r)
    rows = rank * (shape[0] if len(shape) == 3 else 1)
    sizes = [(b.shape[0], a.shape[1])]
    sizes += [(a.shape[1], b.shape[0])] if len(shape) == 3 else []
    return a.shape[0] == b.shape[1] == rows and tuple(shape[-2:]) in sizes


# ---- branches ----


def _summands(adapter: SavedAdapter, names: _Names) -> Iterator[tuple[Summand, str]]:
    """What each branch adds, with the tensor's name."""
    sites = list(_sites(adapter, names))
    layers = _layers(adapter, sites, names.entries)
    specs = {site.branch: _spec(adapter, site, layer, names.entries) for site, layer in zip(sites, layers, strict=True)}
    expected = {f"{b}.{KEYS.get(p, p)}".lstrip("."): s for b, s in specs.items() for p in part_shapes(s)}
    found = {name: key for name, key in adapter.keys.items() if split_key(name) is not None}
    check_keys(adapter.file, found, expected, specs)
    for branch, spec in specs.items():
        parts = dict(adapter.branches[branch])
        for part, shape in part_shapes(spec).items():
            needed = grouped.shape_in_file(spec, part, shape)
            check_shape(adapter.file, adapter.key(branch, part), tuple(parts[part].shape), needed, spec)
            parts[part] = grouped.from_file(spec, part, parts[part])
        try:
            KINDS[spec.kind].update(spec.layer)
        except PassError as error:
            raise MergeError(f"'{spec.site}': {error}; nothing was written") from error
        yield Summand(spec, parts, "weight", adapter.weight), spec.site
        if spec.bias:
            yield Summand(spec, parts, "bias", adapter.weight), _bias_of(spec.site, names.entries)


def _bias_of(weight: str, entries: Entries) -> str:
    name = f"{weight.rpartition('.')[0]}.bias".lstrip(".")
    if name not in entries:
        raise MergeError(
            f"'{weight}': the adapter has a bias (lora_bias) and the base has no '{name}' that could take it; run the "
            "adapter unmerged"
        )
    return name


def _spec(adapter: SavedAdapter, site: _Site, layer: Layer, entries: Entries) -> BranchSpec:
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
        a, b = _factors(adapter, site.branch, adapter.branches[site.branch])
        raise CheckpointError(
            f"{adapter.file}: '{site.branch}' has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, and "
            f"'{site.weight}' has shape {shape}; the adapter is for another model"
        )
    A = adapter.branches[site.branch].get(FACTOR_A)
    if A is None or grouped.groups_of(spec) == 1 or A.shape[0] != r:
        return spec
    spec = grouped.fitted(spec, A, f"{adapter.file}: '{adapter.key(site.branch, FACTOR_A)}'")
    if not grouped.is_compact(spec):
        return spec
    config = grouped.in_memory(config, [replace(spec, site=site.pattern)])
    return replace(spec, scaling=configured_scaling(config, site.pattern, spec.r))


def _factors(adapter: SavedAdapter, branch: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of a branch, of whatever kind."""
    pair = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in parts or EMBEDDING_B in parts else (FACTOR_A, FACTOR_B)
    for part in pair:
        if part not in parts:
            raise CheckpointError(f"{adapter.file}: '{branch}' has no {part}; save the adapter again")
    return parts[pair[0]], parts[pair[1]]


def _layers(adapter: SavedAdapter, sites: Sequence[_Site], entries: Entries) -> list[Layer]:
    """What each weight is; where a matrix is square, whether it is transposed follows from the others.

    A file has one flag for all linear layers (fan_in_fan_out), which in a model with both layouts is that of whichever
    came last. Experts have none, but those of one module are alike.
    """
    readings = [_readings(adapter, site, entries[site.weight].shape) for site in sites]
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
                f"'{site.weight}' is square, and whether it is stored (in, out) cannot be told: {why}. {_EXPORT}"
            )
        result.append(next(layer for layer in layers if layer.transposed == flag))
    return result


def _group(site: _Site, layer: Layer) -> tuple[str, str]:
    """Weights that are stored alike have one group."""
    return layer.kind, site.weight.rpartition(".")[0] if site.is_parameter else ""


def _readings(adapter: SavedAdapter, site: _Site, shape: tuple[int, ...]) -> list[Layer]:
    """All layers that a weight of this shape can be for such factors; the plainest one if none fits."""
    parts = adapter.branches[site.branch]
    A, B = _factors(adapter, site.branch, parts)
    if EMBEDDING_A in parts:
        return [Layer("embedding", A.shape[1], B.shape[0])]
    if A.dim() > 2:
        return [conv_layer(shape if len(shape) == A.dim() else tuple(A.shape), A.shape[1])]
    if site.is_parameter:
        found = [parameter_layer(shape), parameter_layer(shape, transposed_experts=True)][: len(shape) - 1]
        layers = [layer for layer in found if layer is not None]
    elif len(shape) > 2:
        layers = [shaped_layer(shape)]
    else:
        layers = (
            [Layer("linear", shape[1], shape[0]), Layer("linear", shape[0], shape[1], True)] if len(shape) == 2 else []
        )
    fitting = [layer for layer in layers if (layer.in_features, layer.out_features) == (A.shape[1], B.shape[0])]
    return fitting or layers[:1] or [Layer("linear", A.shape[1], B.shape[0])]


# ---- tensors of the base in an adapter ----


def _replacements(adapter: SavedAdapter, names: _Names, load: Load) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the base's tensors that an adapter replaces: saved modules and trained biases.

    Raises:
        CheckpointError: for a tensor that is neither of these and differs from the base's, or does not fit the base's.
    """
    for name_in_file, value in adapter.base.items():
        key, name = adapter.keys[name_in_file], base_name_of(name_in_file)
        _, found = names.find(name, [name])
        entry = names.entries[found]
        if not _is_trained(adapter, name):
            if repeats(value, load(found)):
                continue
            raise refuse_base_weight(adapter.file, key)
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
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", owner) for saved in config.modules_to_save or ()):
        return True
    if leaf != "bias":
        return False
    return config.bias == "all" or (
        config.bias == "lora_only" and owner in {_unwrapped(b)[0] for b in adapter.branches}
    )
