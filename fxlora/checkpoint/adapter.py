"""Adapters on disk: how peft's two files are named, and reading them strictly. Writing: `fxlora.checkpoint.adapter_writing`.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors`, whose keys are
`base_model.model.<layer>.lora_A.weight` and `….lora_B.weight`; the adapter's name is not part of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fxlora._passes import (
    BIAS_B,
    CROSS_GROUPS,
    EMBEDDING_A,
    EMBEDDING_B,
    FACTOR_A,
    FACTOR_B,
    KINDS,
    MAGNITUDE,
    TOKENS,
    BranchSpec,
    base_weight,
    did_you_mean,
    has_factors,
    parameter_at,
    part_shapes,
    shared_parts,
)
from fxlora.checkpoint import grouped
from fxlora.checkpoint.embeddings import TOKEN_WRAPPER
from fxlora.checkpoint.misfits import Misfits, Wanted
from fxlora.checkpoint.safetensors_io import Entry, TensorFile, open_tensors
from fxlora.compound import ATTENTION_WEIGHTS, OUT_PROJ, compound_of
from fxlora.errors import CheckpointError, ConfigError
from fxlora.factors import Drawn, Factors, draw, place
from fxlora.files import inside
from fxlora.host.files import BASE_LAYER, ORIGINAL, Extra, copies_in_files, extras, tensor_at
from fxlora.initialisers import changes_base
from fxlora.model import LoraModel
from fxlora.naming import LoadResult
from fxlora.plan import Plan, configured_scaling

log = logging.getLogger("fxlora")

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
"""What peft's wrappers put before each key."""

KEYS = {FACTOR_A: f"{FACTOR_A}.weight", FACTOR_B: f"{FACTOR_B}.weight", TOKENS: f"token_adapter.{TOKENS}"}
"""Keys of parts whose names in files are others than their own."""

PARTS = (FACTOR_A, FACTOR_B, BIAS_B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, TOKENS)
"""The parts that files can have."""

FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Stored:
    """A part of a branch as files have it: its name there, and whether it is transposed."""

    part: str
    name: str
    transposed: bool = False

    def turned(self, tensor: Tensor) -> Tensor:
        """From memory to the file's layout, or back."""
        return tensor.detach().t().contiguous() if self.transposed else tensor


def stored_parts(spec: BranchSpec) -> list[Stored]:
    """What files hold of a branch. Of rows that a layer shares, and of a second use of one layer, they hold nothing."""
    if spec.tied_to and (not has_factors(spec) or spec.tied_to == spec.site):
        return []
    names = {EMBEDDING_B: FACTOR_A, EMBEDDING_A: FACTOR_B} if spec.kind == "tied" else {}
    return [Stored(part, names.get(part, part), part in names) for part in part_shapes(spec)]


def names_in_files(model: nn.Module, plan: Plan) -> dict[str, str]:
    """By site, the name under which files keep its factors.

    A layer has its own name. A bare parameter has its module's; of several in one module peft wraps the first ones more
    deeply, one `base_layer` for each that follows. The output projection of an attention that is a target itself is
    inside of its wrapper.
    """
    names: dict[str, str] = {}
    in_module: dict[str, list[str]] = {}
    sites = {spec.site for spec in plan.branches}
    for spec in plan.branches:
        attention = compound_of(model, spec.site)
        inside = attention is not None and any(f"{attention}.{name}" in sites for name in ATTENTION_WEIGHTS)
        if spec.is_parameter:
            in_module.setdefault(spec.site.rpartition(".")[0], []).append(spec.site)
        elif inside and attention is not None:
            names[spec.site] = ".".join(part for part in (attention, BASE_LAYER, OUT_PROJ) if part)
        else:
            names[spec.site] = spec.site
    for module, parameters in in_module.items():
        registered = list(model.get_submodule(module)._parameters)
        parameters.sort(key=lambda site: registered.index(site.rpartition(".")[2]))
        for depth, site in enumerate(reversed(parameters)):
            names[site] = ".".join(part for part in (module, *[BASE_LAYER] * depth) if part)
    return names


def key_of(name: str, part: str) -> str:
    """The key of a part in a file: `.weight` follows the name of a matrix that peft keeps in a module."""
    return KEY_PREFIX + ".".join(piece for piece in (name, KEYS.get(part, part)) if piece)


def base_name(model: nn.Module) -> str | None:
    """Where a transformers model came from: a directory or a name on the hub; None if it does not say."""
    for owner, attribute in ((getattr(model, "config", None), "_name_or_path"), (model, "name_or_path")):
        name = getattr(owner, attribute, None)
        if isinstance(name, str) and name:
            return name
    return None


def split_key(key: str) -> tuple[str, str] | None:
    """(name, part) of a key without its prefix: the inverse of how keys are made; None if it ends with no part."""
    for part in PARTS:
        ending = KEYS.get(part, part)
        if f".{key}".endswith(f".{ending}"):
            return key[: -len(ending)].rstrip("."), part
    return None


@dataclass(frozen=True, slots=True)
class Reading:
    """How an adapter's file is read.

    Attributes:
        key_mapping: regular expressions and replacements for keys without `base_model.model.`; of several that match a
            key the first is used.
        load_base_weights: whether to take base weights that the file has, in place of comparing them.
        strict: whether to refuse unknown, missing and misshapen tensors, in place of going on without them.
        ignore_mismatched_sizes: whether to go on without misshapen tensors in any case.
    """

    key_mapping: tuple[tuple[str, str], ...] = ()
    load_base_weights: bool = False
    strict: bool = True
    ignore_mismatched_sizes: bool = False

    @classmethod
    def of(
        cls,
        key_mapping: Mapping[str, str] | None = None,
        *,
        load_base_weights: bool = False,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
    ) -> Reading:
        """Check the arguments of a call.

        Raises:
            ConfigError: for a pattern that is no regular expression, or a replacement that does not fit it.
        """
        pairs = tuple((key_mapping or {}).items())
        for pattern, replacement in pairs:
            try:
                re.compile(f"(?:{pattern})|").sub(replacement, "")
            except (re.error, TypeError) as error:
                raise ConfigError(f"key_mapping: {pattern!r} and {replacement!r} cannot be used ({error})") from error
        return cls(pairs, load_base_weights, strict, ignore_mismatched_sizes)

    @property
    def drops_misshapen(self) -> bool:
        """Whether a tensor of another shape is left out."""
        return not self.strict or self.ignore_mismatched_sizes

    def mapped(self, key: str) -> str:
        """A key without its prefix as the mapping has it."""
        for pattern, replacement in self.key_mapping:
            changed, count = re.subn(pattern, replacement, key)
            if count:
                return changed
        return key


AS_IT_IS = Reading()
"""Strictly, without a mapping of keys, and no base weight is taken."""


def read_drawn(directory: Path, model: nn.Module, plan: Plan, reading: Reading = AS_IT_IS) -> tuple[Drawn, LoadResult]:
    """The factors of a saved adapter, and the base weights that its initialisation makes anew, as peft does.

    Layers of which the file has not all parts, where that is allowed, are drawn as for a fresh adapter.

    Returns:
        What the adapter starts from, and what of the file did not fit.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    factors, taken, misfits = _read(directory, model, plan, reading)
    changes = changes_base(plan.config.init_lora_weights)
    drawn = Drawn({})
    if changes or misfits.fresh:
        drawn = draw(model, plan, model._lora.originals if isinstance(model, LoraModel) else None)
    factors.update((site, parts) for site, parts in drawn.factors.items() if site in misfits.fresh)
    misfits.warn(directory / WEIGHTS_NAME)
    return Drawn(factors, drawn.base if changes else {}, taken), misfits.result


def fit_plan(directory: Path, model: nn.Module, plan: Plan, reading: Reading = AS_IT_IS) -> Plan:
    """A plan that was made from a saved adapter's configuration, as its tensors ask for: see `fxlora.checkpoint.grouped`.

    Raises:
        CheckpointError: when the file is missing or corrupt, or holds a grouped convolution that cannot be run.
    """
    if all(grouped.groups_of(spec) == 1 for spec in plan.branches):
        return plan
    names = names_in_files(model, plan)
    with open_tensors(adapter_file(directory)) as file:
        keys = keys_without_prefix(file, reading)
        branches = tuple(_fitted(file, keys, names[spec.site], spec, reading) for spec in plan.branches)
    config = grouped.in_memory(plan.config, branches)
    branches = tuple(
        replace(spec, scaling=configured_scaling(config, spec.site, spec.r)) if grouped.is_compact(spec) else spec
        for spec in branches
    )
    return replace(plan, branches=branches, config=config)


def _fitted(file: TensorFile, keys: Mapping[str, str], name: str, spec: BranchSpec, reading: Reading) -> BranchSpec:
    if grouped.groups_of(spec) == 1:
        return spec
    across = replace(spec, options=tuple(sorted((*spec.options, (CROSS_GROUPS, True)))))
    key = keys.get(key_of(name, FACTOR_A).removeprefix(KEY_PREFIX))
    if key is not None and file.entries[key].shape == part_shapes(spec)[FACTOR_A]:
        return spec
    if key is None or file.entries[key].shape != part_shapes(across)[FACTOR_A]:
        return spec if reading.drops_misshapen else across  # which says best what is wrong
    return grouped.fitted(spec, load_factor(file, key), f"{file.path}: '{key}'")


def read_adapter(directory: Path, model: nn.Module, plan: Plan) -> Factors:
    """Read the factors of a saved adapter, exactly those that a plan asks for.

    Args:
        directory: with `adapter_model.safetensors`.
        model: the model that they are for; gives devices and dtypes.
        plan: the branches, planned from the adapter's own configuration and fitted by `fit_plan`.

    Returns:
        By site, the parts of each branch.

    Raises:
        CheckpointError: when the file is missing, pickled or corrupt; when a key is unknown or missing; when a tensor
            has another shape than planned, is not floating point, or has NaN or infinite entries; when the file has
            base weights other than the model's; when the model is on the meta device.
    """
    return _read(directory, model, plan, AS_IT_IS)[0]


def _read(
    directory: Path, model: nn.Module, plan: Plan, reading: Reading
) -> tuple[Factors, dict[str, Tensor], Misfits]:
    """The factors of a file, the base weights in it by path that are to be taken, and what does not fit."""
    weights = {spec.site: _real_weight(model, spec.site) for spec in plan.branches}
    names = names_in_files(model, plan)
    with open_tensors(adapter_file(directory)) as file:
        keys = keys_without_prefix(file, reading)
        expected = {
            key_of(names[spec.site], each.name).removeprefix(KEY_PREFIX): spec
            for spec in plan.branches
            for each in stored_parts(spec)
        }
        others = {extra.key: extra for extra in extras(plan)}
        known = {*expected, *others, *copies_in_files(plan)}
        base = {name: path for name in keys if name not in known and (path := _base_path(model, name)) is not None}
        if reading.strict:
            rest = {name: key for name, key in keys.items() if name in expected or name not in {*known, *base}}
            by_name = {names[spec.site]: spec for spec in plan.branches}
            check_keys(file.path, rest, expected, by_name, instead=_START_FRESH)
            _check_extras(file.path, keys, others)
        unknown = [key for name, key in keys.items() if name not in {*known, *base}]
        lenient = reading.drops_misshapen
        misfits = _misfits(file, keys, plan, names, model, unknown) if lenient else Misfits.none()
        factors: Factors = {}
        for spec in plan.branches:
            if spec.site in misfits.fresh:
                continue
            factors.setdefault(spec.site, {})
            for stored in stored_parts(spec):
                key = keys[key_of(names[spec.site], stored.name).removeprefix(KEY_PREFIX)]
                wanted = _shape_in_file(spec, stored)
                check_shape(file.path, key, file.entries[key].shape, wanted, spec, instead=_DROP)
                tensor = grouped.from_file(spec, stored.part, stored.turned(load_factor(file, key)))
                # An empty slice is placed, to learn the dtype: a trained factor must not go through the base's.
                like = place(tensor[:0], weights[spec.site], plan.config)
                factors[spec.site][stored.part] = tensor.to(like)
            if spec.tied_to:
                _check_tied(file.path, spec, factors)
        for extra in others.values():
            if extra.owner not in misfits.fresh:
                value = _load_extra(file, keys[extra.key], extra.like, tensor_at(model, extra.like))
                factors.setdefault(extra.owner, {})[extra.name] = value
        return factors, _base_weights(file, {keys[name]: path for name, path in base.items()}, model, reading), misfits


def _misfits(
    file: TensorFile,
    keys: Mapping[str, str],
    plan: Plan,
    names: Mapping[str, str],
    model: nn.Module,
    unknown: list[str],
) -> Misfits:
    """What of a file is to be left out, or is not there.

    Raises:
        CheckpointError: when that is everything.
    """
    wanted = [
        Wanted(key_of(names[spec.site], each.name).removeprefix(KEY_PREFIX), spec.site, _shape_in_file(spec, each))
        for spec in plan.branches
        for each in stored_parts(spec)
    ]
    wanted += [
        Wanted(extra.key, extra.owner, tuple(tensor_at(model, extra.like).shape)) for extra in extras(plan)
    ]  # fmt: skip
    misfits = Misfits.of(
        wanted,
        keys,
        {key: entry.shape for key, entry in file.entries.items()},
        unknown=unknown,
        tied={spec.site: spec.tied_to for spec in plan.branches if spec.tied_to},
        prefix=KEY_PREFIX,
    )
    misfits.check_some(file.path, wanted)
    return misfits


def _shape_in_file(spec: BranchSpec, stored: Stored) -> tuple[int, ...]:
    shape = grouped.shape_in_file(spec, stored.part, part_shapes(spec)[stored.part])
    return shape[::-1] if stored.transposed else shape


def _base_path(model: nn.Module, name: str) -> str | None:
    """Where the model has the base weight that a name in a file means; None if it means none."""
    path = base_name_of(name)
    try:
        return None if split_key(name) is not None or parameter_at(model, path) is None else path
    except AttributeError:
        return None


def _base_weights(file: TensorFile, found: Mapping[str, str], model: nn.Module, reading: Reading) -> dict[str, Tensor]:
    """The base weights of a file that differ from the model's, by path, if they are to be taken.

    Args:
        file: the file.
        found: paths in the model by keys.
        model: the model.
        reading: whether to take them.

    Raises:
        CheckpointError: for one that differs and is not to be taken, or cannot be.
    """
    taken: dict[str, Tensor] = {}
    by_parameter: dict[int, str] = {}
    merged = model._lora.originals if isinstance(model, LoraModel) else {}
    for key, path in found.items():
        parameter = parameter_at(model, path)
        assert parameter is not None
        first = by_parameter.setdefault(id(parameter), key)
        if reading.load_base_weights and not torch.equal(file.load(first), file.load(key)):
            raise CheckpointError(f"{file.path}: '{first}' and '{key}' are tied in this model and differ in the file")
        if repeats(file.load(key), merged.get(path, parameter)):
            continue
        if not reading.load_base_weights:
            raise base_weight_error(file.path, key)
        if file.entries[key].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{file.path}: '{key}' has shape {file.entries[key].shape}, and '{path}' in the model "
                f"{tuple(parameter.shape)}; if the vocabulary was resized, resize it first (resize_token_embeddings), then "
                "transform the model and load"
            )
        taken[path] = load_factor(file, key).to(parameter)
    return taken


def _check_tied(path: Path, spec: BranchSpec, factors: Factors) -> None:
    own, source = factors[spec.site], factors[spec.tied_to]
    if not all(torch.equal(own[part], source[part]) for part in shared_parts(spec) if part in own):
        raise CheckpointError(
            f"{path}: the factors of '{spec.site}' are not those of '{spec.tied_to}', and ensure_weight_tying makes them one; "
            "train the adapter again, or set ensure_weight_tying to false in its configuration to run it as it is"
        )


def _check_extras(path: Path, keys: Mapping[str, str], wanted: Mapping[str, Extra]) -> None:
    missing = [name for name in wanted if name not in keys]
    if missing:
        raise CheckpointError(
            f"{path} lacks '{KEY_PREFIX}{missing[0]}'{_more(missing)}: the configuration (modules_to_save, bias) says that it "
            f"is trained. Load the adapter into the model it was trained for, save it again, or {_START_FRESH}"
        )


def _load_extra(file: TensorFile, key: str, path: str, like: Tensor) -> Tensor:
    """A tensor of a module that is saved whole, or a bias, in the model's dtype."""
    if like.is_meta:
        raise CheckpointError(_ON_META.format(path))
    entry = file.entries[key]
    if entry.shape != tuple(like.shape):
        raise CheckpointError(
            f"{file.path}: '{key}' has shape {entry.shape}, and '{path}' in the model {tuple(like.shape)}; the adapter "
            f"is for another model. To go on without such tensors, {_DROP}"
        )
    if like.is_floating_point():
        return load_factor(file, key).to(like)
    tensor = file.load(key).clone()
    if tensor.dtype != like.dtype:
        raise CheckpointError(f"{file.path}: '{key}' is {entry.dtype}, and '{path}' in the model {like.dtype}")
    return tensor.to(like)


def adapter_file(directory: Path) -> Path:
    """The weights file of a saved adapter.

    Raises:
        CheckpointError: when there is none, or a link leads out of the directory; says so if the adapter is pickled.
    """
    path = directory / WEIGHTS_NAME
    if path.exists() or path.is_symlink():
        return inside(directory, WEIGHTS_NAME)
    if (directory / PICKLED_NAME).exists():
        raise CheckpointError(
            f"{directory / PICKLED_NAME} is a pickle, which can run code when it is read, and is refused; load it where "
            f"you trust it and save its tensors with safetensors as {WEIGHTS_NAME}"
        )
    raise CheckpointError(f"{path} does not exist: '{directory}' holds no adapter weights")


def keys_without_prefix(file: TensorFile, reading: Reading = AS_IT_IS) -> dict[str, str]:
    """Keys of an adapter file by what is left of them without `base_model.model.`, mapped as asked for.

    Raises:
        CheckpointError: when two keys mean the same, such as one with and one without the prefix.
    """
    keys: dict[str, str] = {}
    for key in file.entries:
        other = keys.setdefault(reading.mapped(key.removeprefix(KEY_PREFIX)), key)
        if other != key:
            raise CheckpointError(f"{file.path}: '{other}' and '{key}' mean the same tensor; remove one of them")
    return keys


def base_name_of(name: str) -> str:
    """The base's name of one of its tensors in an adapter file, without what peft's wrapper of its layer adds."""
    owner, _, leaf = name.rpartition(".")
    for wrapper in (TOKEN_WRAPPER, BASE_LAYER, ORIGINAL):
        if f".{owner}".endswith(f".{wrapper}"):
            owner = owner.removesuffix(wrapper).rstrip(".")
            break
    return f"{owner}.{leaf}".lstrip(".")


def repeats(saved: Tensor, base: Tensor) -> bool:
    """Whether loading a saved base weight would leave every bit of the base's as it is."""
    if saved.shape != base.shape:
        return False
    loaded, base = saved.to(base.dtype).contiguous(), base.detach().cpu().contiguous()
    return torch.equal(loaded.view(-1).view(torch.uint8), base.view(-1).view(torch.uint8))


def base_weight_error(path: Path, key: str) -> CheckpointError:
    """The error for a saved base weight or bias that is not the base's own."""
    return CheckpointError(
        f"{path}: '{key}' is a weight of the base model and differs from this base's, which loading an adapter must not "
        "change. If the adapter was trained on top of it, put it into the base first (load it with load_base_weights=True, "
        "copy the tensor into the model, or load the base that it is from); if not, save the adapter again without it "
        "(save_pretrained(…, save_embedding_layers=False) and bias='none')"
    )


def load_factor(file: TensorFile, key: str) -> Tensor:
    """A factor as the file has it, in memory of its own, checked to be floating point and finite.

    Raises:
        CheckpointError: otherwise.
    """
    check_factor_dtype(file.path, key, file.entries[key])
    tensor = file.load(key).clone()
    check_finite(file.path, key, tensor)
    return tensor


def check_finite(path: Path, key: str, tensor: Tensor) -> None:
    """Refuse a factor with an entry that is NaN or infinite.

    Raises:
        CheckpointError: names file and key.
    """
    if not bool(tensor.isfinite().all()):
        what = "NaN" if bool(tensor.isnan().any()) else "infinite"
        raise CheckpointError(
            f"{path}: '{key}' has {what} entries, so the adapter is broken; use an earlier checkpoint of it"
        )


_ON_META = (
    "an adapter cannot be loaded into a model on the meta device ('{}' is there): load the base's real weights first, "
    "or lora_transform the meta model with a LoraConfig and load the adapter later"
)


def _real_weight(model: nn.Module, site: str) -> Tensor:
    path, weight = base_weight(model, site)
    if weight.is_meta:
        raise CheckpointError(_ON_META.format(path))
    return weight


_START_FRESH = "load it with strict=False, which starts such layers as in a fresh adapter"
_DROP = "load it with ignore_mismatched_sizes=True, which starts such layers as in a fresh adapter"


def check_keys(
    path: Path,
    keys: Mapping[str, str],
    expected: Mapping[str, BranchSpec],
    by_name: Mapping[str, BranchSpec],
    *,
    instead: str = "",
) -> None:
    """Refuse unknown and missing keys.

    Args:
        path: of the file.
        keys: of the file, by names without the prefix.
        expected: branches by names of their parts.
        by_name: branches by their own names in files.
        instead: what else can be done where a key is missing.

    Raises:
        CheckpointError: names the key and says what to do.
    """
    unknown = [key for key in keys if key not in expected]
    missing = sorted(expected.keys() - keys.keys())
    if unknown:
        raise CheckpointError(
            f"{path}: '{keys[unknown[0]]}'{_more(unknown)} {_why_unknown(unknown[0], missing, expected, by_name)}. To leave "
            "such keys out, read it with strict=False"
        )
    if missing:
        reason = _why_missing(missing[0], len(by_name)) + (f". Or {instead}" if instead else "")
        raise CheckpointError(f"{path} lacks '{KEY_PREFIX}{missing[0]}'{_more(missing)}: {reason}")


_SWITCHES = {MAGNITUDE: "use_dora", BIAS_B: "lora_bias"}
"""Parts that are there if the configuration says so."""


def _why_unknown(key: str, missing: list[str], expected: Iterable[str], by_name: Mapping[str, BranchSpec]) -> str:
    name, part = split_key(key) or (key, "")
    spec = by_name.get(name)
    if spec is None and part and f".{name}.".count(f".{BASE_LAYER}."):
        return (
            "is nested as for a further parameter of one module, and the configuration has no such target. Load the adapter "
            "into the model it was trained for, or correct its target_parameters"
        )
    if spec is None or not part:
        return (
            f"belongs to no target of this model and configuration.{did_you_mean(key, missing or expected)} Load the "
            "adapter into the model it was trained for, or remove the key"
        )
    if part in _SWITCHES:
        return (
            f"is a part that {_SWITCHES[part]} adds, which adapter_config.json does not set; set it there if the adapter "
            "was trained with it, or save the adapter again"
        )
    return (
        f"is for another kind of layer: '{spec.site}' is of the kind '{spec.kind}', with the factors "
        f"{' and '.join(KINDS[spec.kind].factor_names)}. Load the adapter into the model it was trained for"
    )


def _why_missing(key: str, targets: int) -> str:
    _, part = split_key(key) or ("", "")
    if part in _SWITCHES:
        return (
            f"{_SWITCHES[part]} in adapter_config.json asks for it. Save the adapter again, or correct the configuration "
            "if it was trained without"
        )
    return (
        f"the configuration makes {targets} layers of this model targets. Load the adapter into the model it was trained "
        "for, or correct its target_modules"
    )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more keys)" if len(names) > 1 else ""


def check_shape(
    path: Path, key: str, found: tuple[int, ...], needed: tuple[int, ...], spec: BranchSpec, *, instead: str = ""
) -> None:
    """Refuse a part of another shape than its branch needs; `instead` says what else can be done.

    Raises:
        CheckpointError: names the key, both shapes and the rank.
    """
    if found != needed:
        raise CheckpointError(
            f"{path}: '{key}' has shape {found}, and '{spec.site}' with rank {spec.r} needs {needed}; the adapter is for "
            "another model, or its configuration has another rank"
            + (f". To go on without it, {instead}" if instead else "")
        )


def check_factor_dtype(path: Path, key: str, entry: Entry) -> None:
    """Refuse a factor that is not of a floating-point dtype.

    Raises:
        CheckpointError: names file, key, and the dtypes that can be.
    """
    if entry.dtype not in FACTOR_DTYPES:
        allowed = ", ".join(FACTOR_DTYPES)
        raise CheckpointError(f"{path}: '{key}' is {entry.dtype}, and a factor must be one of {allowed}; convert it")
