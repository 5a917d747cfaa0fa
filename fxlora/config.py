"""`LoraConfig`: peft's fields under peft's names, with the JSON of `adapter_config.json`.

Fields that this version does not act on are kept, so that a file survives a round trip, and refused by `validate`
as soon as they have any value but their default: nothing is ever ignored silently.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch

from fxlora._passes import BranchDtype, did_you_mean, first_fault
from fxlora.errors import CheckpointError, ConfigError, shown
from fxlora.files import MAX_CONFIG, inside, read_object
from fxlora.initialisers import check_init

log = logging.getLogger("fxlora")

CONFIG_NAME = "adapter_config.json"
PEFT_FORMAT = "0.21.2"
"""The peft version whose file format is written."""

RUNTIME_FIELDS = ("branch_dtype", "autocast_adapter_dtype", "adapter_dtype", "strict_targets", "runtime_config")
"""They say how to run, not what the adapter is, and are never written to files. All but the last are our own."""

ADAPTER_DTYPES = ("float64", "float32", "float16", "bfloat16")

_NAME_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "target_parameters")

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class LoraConfig:
    """What LoRA to apply, and where. Names, defaults and meaning are peft's (`peft.LoraConfig`).

    Attributes:
        r: rank of the factors.
        target_modules: names (a module is a target if its qualified name is one of them or ends with `.` and one of
            them), a regular expression for whole names, `"all-linear"`, or None for the default of a known
            transformers model type.
        exclude_modules: names or a regular expression to leave out.
        lora_alpha: numerator of the scaling `alpha / r`.
        lora_dropout: probability of dropping an element of a branch's input in training.
        use_rslora: scaling `alpha / sqrt(r)` (arXiv:2312.03732).
        init_lora_weights: True (A Kaiming-uniform, B zero), `"gaussian"` (A ~ N(0, 1/r²), B zero) or False (both
            random).
        rank_pattern: ranks of particular modules, by name suffix or regular expression; likewise `alpha_pattern`.
        layers_to_transform: indices of the layers to adapt, counted in `layers_pattern`.
        target_parameters: names of bare parameters to adapt where a graph uses them as a linear's weight.
        trainable_token_indices: ids of tokens whose rows in the input embeddings are trained, or ids by the name of an
            embedding or head. Layers that share the embedding's weight follow.
        ensure_weight_tying: where an embedding that is a target shares its weight with a head, both have the same
            factors, so that they stay tied and can be merged.
        bias: also train biases of the base: `"all"`, or of the targeted layers (`"lora_only"`). For one adapter at most.
        modules_to_save: ends of names of modules to train whole; each adapter has its own copies of them. A classifier's
            `task_type` adds its head.
        layer_replication: ranges of layers, `[[0, 4], [2, 5]]`, to make the model of; repeated ones share weights.
        inference_mode: whether the adapter is loaded frozen.
        branch_dtype: `"base"` casts the factors to the activation's dtype, `"adapter"` the activation to the factors'
            (peft's arithmetic). Not written to files.
        autocast_adapter_dtype: keep float32 factors on a float16 or bfloat16 base. Not written to files.
        adapter_dtype: dtype of the factors, by its name; None for the rule of `autocast_adapter_dtype`. Not written to
            files.
        call_sites: by name suffix of a layer that is called several times, which of its calls get a branch, counted from
            0 in the order of the graph. Whole-graph captures only; no other reader of the files knows it.
        runtime_config: peft's `ephemeral_gpu_offload`, which is refused. Not written to files.
        strict_targets: a name in `target_modules` that matches nothing is an error. Not written to files.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])
    megatron_config: dict[str, Any] | None = None
    megatron_core: str = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict[str, Any])
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[list[int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False
    task_type: str | None = None
    auto_mapping: dict[str, str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    peft_type: str = "LORA"
    peft_version: str | None = None
    branch_dtype: BranchDtype = "base"
    autocast_adapter_dtype: bool = True
    adapter_dtype: str | None = None
    call_sites: dict[str, list[int]] | None = None
    strict_targets: bool = True
    runtime_config: object = None

    def __post_init__(self) -> None:
        """Lists for all collections of names, so that they can be written as JSON."""
        for name in _NAME_LISTS:
            value = getattr(self, name)
            if isinstance(value, (set, frozenset)):
                object.__setattr__(self, name, sorted(cast("set[str]", value)))
            elif isinstance(value, tuple):
                object.__setattr__(self, name, list(cast("tuple[str, ...]", value)))
        if isinstance(self.adapter_dtype, torch.dtype):
            object.__setattr__(self, "adapter_dtype", str(self.adapter_dtype).removeprefix("torch."))
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})
        if not any(_settings(self.runtime_config).values()):
            object.__setattr__(self, "runtime_config", None)

    def scaling(self, r: int, alpha: float) -> float:
        """The factor on a branch: `alpha / r`, or `alpha / sqrt(r)` with `use_rslora`."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def from_any(cls, config: object) -> Self:
        """A `LoraConfig` from itself, a mapping, the path of a saved adapter, or an object with the same fields.

        Raises:
            ConfigError: for an unknown field (with the nearest names) or something that is no configuration.
            NotImplementedError: for an object of peft's with layers of its own.
            CheckpointError: when a path holds no readable `adapter_config.json`.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, (str, Path)):
            return cls.from_pretrained(config)
        if isinstance(config, Mapping):
            return cls._from_mapping(dict(cast("Mapping[str, Any]", config)))
        if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
            if getattr(config, "_custom_modules", None):
                raise NotImplementedError(
                    "layers of _register_custom_module are not supported; what works instead: target_parameters for their "
                    "weights, or target_modules without them"
                )
            # the attributes, since to_dict() flattens nothing that we need and drops runtime fields
            names = {each.name for each in fields(cls)} | set(getattr(config, "__dataclass_fields__", ()))
            values = {name: getattr(config, name) for name in names if hasattr(config, name)}
            return cls._from_mapping({name: _plain(value) for name, value in values.items()})
        raise ConfigError(
            f"config must be a LoraConfig, a peft LoraConfig, a dict or the path of a saved adapter, not "
            f"{type(config).__name__}"
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read `adapter_config.json` of a saved adapter.

        Raises:
            CheckpointError: when the file is missing, no JSON object (`fxlora.files.read_object` has the rules), or of
                another adapter type; names the file.
        """
        from fxlora.checkpoint.leftovers import settle

        settle(directory)
        path = Path(directory) / CONFIG_NAME
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: '{directory}' is not a saved adapter")
        values = read_object(inside(path.parent, CONFIG_NAME), MAX_CONFIG)
        try:
            return cls._from_mapping(values)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """The configuration of a saved adapter, with every field checked.

        Raises:
            CheckpointError: as `from_pretrained`, and for a value that cannot work; names the file.
            NotImplementedError: for a field of peft's that this version does not apply; names the file.
        """
        config = cls.from_pretrained(directory)
        try:
            config.validate()
        except ConfigError as error:
            raise CheckpointError(f"{Path(directory) / CONFIG_NAME}: {error}") from error
        except NotImplementedError as error:
            raise NotImplementedError(f"{Path(directory) / CONFIG_NAME}: {error}") from error
        return config

    @classmethod
    def _from_mapping(cls, values: dict[str, Any]) -> Self:
        kind = values.get("peft_type")
        kind = "LORA" if kind is None else kind
        if getattr(kind, "value", kind) != "LORA":
            raise ConfigError(f"peft_type is {shown(kind)}; fxlora applies LORA only")
        values["peft_type"] = "LORA"
        known = {each.name for each in fields(cls)}
        for name in [name for name in values if name not in known]:
            value = values.pop(name)
            if value:
                raise ConfigError(
                    f"unknown field {shown(name)} ({shown(value)}).{did_you_mean(name, known)} Leave it out if the adapter does not "
                    "depend on it"
                )
            log.info("field '%s' is unknown here and switched off (%r); it is left out", name, value)
        task = values.get("task_type")
        values["task_type"] = getattr(task, "value", task)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields that belong into `adapter_config.json`, plain and sorted."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in RUNTIME_FIELDS}
        if not self.call_sites:
            del values["call_sites"]  # a field that peft does not know
        return dict(sorted(values.items()))

    def to_json(self) -> str:
        """The text of `adapter_config.json`: two spaces of indent, sorted fields, sorted name lists.

        Patterns keep their order, since the first one that matches wins.
        """
        values = self.to_dict()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], list):
                values[name] = sorted(values[name])
        values["peft_version"] = self.peft_version or PEFT_FORMAT
        return json.dumps(values, indent=2) + "\n"

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: for a value that cannot work; says which field and what would.
            NotImplementedError: for a field of peft's that this version does not apply.
        """
        _check_types(self)
        _check_numbers(self)
        _check_choices(self)
        _check_patterns(self)
        _check_tokens(self)
        _check_supported(self)


def _plain(value: object) -> object:
    """The strings of enums of peft."""
    return getattr(value, "value", value) if type(value).__name__ in ("TaskType", "PeftType") else value


def _settings(runtime_config: object) -> dict[str, Any]:
    """The settings of a `runtime_config`, which is a dict or an object of peft's."""
    if isinstance(runtime_config, Mapping):
        return dict(cast("Mapping[str, Any]", runtime_config))
    return dict(getattr(runtime_config, "__dict__", {"value": runtime_config}))


_FLAGS = (
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "use_qalora",
    "lora_bias",
    "ensure_weight_tying",
    "inference_mode",
)


_TEXTS = ("base_model_name_or_path", "revision", "peft_version", "megatron_core")

_DICTS = (
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"),
    *("use_bdlora", "arrow_config", "kasa_config", "megatron_config", "auto_mapping"),
)
"""Settings of variants; peft writes null for most that are not used."""

_PLAIN = (str, int, float, list)
"""What cannot be settings, unlike the dicts of files and the objects of peft; True switches a variant on."""

MAX_RANK = 2**20
"""More than any layer is wide: a typo or an attack, that would ask for all memory."""


def _check_types(config: LoraConfig) -> None:
    """Flags are flags (the text "no" would be true), mappings are mappings, and lists of names hold names."""
    for name in _FLAGS:
        _check_type(config, name, "True or False", isinstance(getattr(config, name), bool))
    for name in ("rank_pattern", "alpha_pattern", "call_sites"):
        value: Any = getattr(config, name)
        _check_type(config, name, "a dict of names", value is None or isinstance(value, dict))
    for name in ("modules_to_save", "target_parameters", "layers_pattern"):
        value = getattr(config, name)
        wrong = not isinstance(value, (list, str)) or isinstance(value, list) and not _all_are(str, value)
        _check_type(config, name, "a list of names", value is None or not wrong)
    for name in _TEXTS:
        _check_type(config, name, "a text", getattr(config, name) is None or isinstance(getattr(config, name), str))
    for name in _DICTS:
        value = getattr(config, name)
        _check_type(
            config, name, "an object of settings", value is None or value is True or not isinstance(value, _PLAIN)
        )
    group: object = config.qalora_group_size
    _check_type(config, "qalora_group_size", "a positive whole number", type(group) is int and group > 0)
    tokens: Any = config.alora_invocation_tokens
    fine = tokens is None or isinstance(tokens, list) and _all_are(int, cast("list[object]", tokens))
    _check_type(config, "alora_invocation_tokens", "a list of ids", fine)


def _all_are(kind: type, values: list[object]) -> bool:
    return all(type(value) is kind for value in values)


def _check_type(config: LoraConfig, name: str, wanted: str, fine: bool) -> None:
    if not fine:
        raise ConfigError(f"`{name}` should be {wanted}, not {shown(getattr(config, name))}")


def _check_numbers(config: LoraConfig) -> None:
    for name, rank in {"r": config.r, **{f"rank_pattern['{k}']": v for k, v in config.rank_pattern.items()}}.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"`{name}` should be a positive integer value but the value passed is {shown(rank)}")
        if rank > MAX_RANK:
            raise ConfigError(f"`{name}` is {shown(rank)}, and no layer is wider than {MAX_RANK}; use its rank")
    alphas = {"lora_alpha": config.lora_alpha, **{f"alpha_pattern['{k}']": v for k, v in config.alpha_pattern.items()}}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not _finite(alpha):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"`{name}` should be a finite number but the value passed is {shown(alpha)}")
        if alpha == 0:
            raise ConfigError(f"`{name}` is 0, which switches the adapter off; use a positive number")
    dropout = config.lora_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"`lora_dropout` should be a probability in [0, 1) but the value passed is {dropout!r}")


def _finite(number: float) -> bool:
    """Whether a number is one as a float too: JSON has whole numbers of any size."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _check_choices(config: LoraConfig) -> None:
    choices: dict[str, tuple[object, ...]] = {
        "bias": ("none", "all", "lora_only"),
        "branch_dtype": ("base", "adapter"),
        "adapter_dtype": (None, *ADAPTER_DTYPES),
        "task_type": (None, *TASK_TYPES),
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ConfigError(f"`{name}` should be one of {', '.join(map(repr, allowed))}, not {shown(value)}")
    if config.use_dora and config.lora_bias:
        raise ConfigError(
            "`use_dora` cannot be combined with `lora_bias`: a bias has no magnitude; set one of them to False"
        )
    if config.lora_bias and config.init_lora_weights not in (True, False):
        raise ConfigError(
            f"`lora_bias` needs init_lora_weights=True or False, not {config.init_lora_weights!r}; leave one of them out"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError("`layers_pattern` needs `layers_to_transform`, the indices of the layers to adapt")
    if isinstance(config.target_modules, str) and (config.layers_to_transform is not None or config.layers_pattern):
        raise ConfigError("`layers_to_transform` and `layers_pattern` need a list of `target_modules`, not a string")
    indices: Any = config.layers_to_transform
    for index in indices if isinstance(indices, list) else [] if indices is None else [indices]:  # pyright: ignore[reportUnknownVariableType]
        if type(index) is not int or index < 0:  # pyright: ignore[reportUnknownArgumentType]
            raise ConfigError(f"`layers_to_transform` should be numbers of layers, from 0, not {shown(indices)}")
    for name, calls in (config.call_sites or {}).items():
        if not isinstance(calls, list) or not calls or not all(isinstance(call, int) and call >= 0 for call in calls):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"`call_sites['{name}']` should be a list of numbers of calls, from 0, not {shown(calls)}"
            )
    if isinstance(config.modules_to_save, str):
        raise ConfigError(
            f"`modules_to_save` should be a list of names, not the string {shown(config.modules_to_save)}"
        )
    _check_ranges(config.layer_replication)
    if isinstance(config.target_parameters, str):
        raise ConfigError("`target_parameters` should be a list of names; regular expressions are not supported there")


def _check_tokens(config: LoraConfig) -> None:
    value: Any = config.trainable_token_indices
    lists = (
        list(cast("dict[str, Any]", value).values()) if isinstance(value, dict) else [] if value is None else [value]
    )
    if not all(isinstance(each, list) for each in lists):
        raise ConfigError(
            f"`trainable_token_indices` should be a list of ids, or a dict of such lists by layer, not {shown(value)}"
        )
    for index in (index for each in lists for index in each):
        if type(index) is not int or index < 0:
            raise ConfigError(f"`trainable_token_indices`: {shown(index)} is no token; ids are integers from 0 on")


def _check_ranges(ranges: object) -> None:
    """`layer_replication` is None or a list of pairs of numbers."""
    pairs = ranges if isinstance(ranges, (list, tuple)) else [ranges]
    fine = all(isinstance(pair, (list, tuple)) and [type(i) for i in pair] == [int, int] for pair in pairs)  # pyright: ignore[reportUnknownVariableType]
    if ranges is not None and not (pairs and fine):
        raise ConfigError(f"`layer_replication` should be a list of pairs (start, end) of numbers, not {shown(ranges)}")


def _check_patterns(config: LoraConfig) -> None:
    """Names are strings, and regular expressions can be compiled."""
    expressions = {f"a key of `{name}`": list(getattr(config, name)) for name in ("rank_pattern", "alpha_pattern")}
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            expressions[f"`{name}`"] = [value]
        elif value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):  # pyright: ignore[reportUnknownVariableType]
            raise ConfigError(f"`{name}` should be a list of names or a string, not {shown(value)}")
    for where, patterns in expressions.items():
        found = next(((each, "it is no text") for each in patterns if not isinstance(each, str)), None)
        found = found or first_fault(patterns)
        if found is not None:
            raise ConfigError(f"{where} is no regular expression: {shown(found[0])} ({found[1]})")


_LATER: dict[str, str] = {
    "loftq_config": "plain LoRA",
    "eva_config": "the default initialisation",
    "corda_config": "the default initialisation",
    "lora_ga_config": "the default initialisation",
    "velora_config": "plain LoRA",
    "alora_invocation_tokens": "plain LoRA",
    "use_qalora": "plain LoRA",
    "monteclora_config": "plain LoRA",
    "use_bdlora": "plain LoRA",
    "arrow_config": "plain LoRA",
    "kasa_config": "plain LoRA",
    "megatron_config": "plain LoRA",
}
"""Fields that are not applied yet, each with what works instead."""


def _check_supported(config: LoraConfig) -> None:
    for r in (config.r, *config.rank_pattern.values()):
        check_init(config.init_lora_weights, r)
    defaults = LoraConfig()
    for name, instead in _LATER.items():
        if getattr(config, name) not in (None, False, getattr(defaults, name)):  # an empty dict switches a variant on
            raise NotImplementedError(f"`{name}` is not supported yet; what works now: {instead} (leave `{name}` out)")
    if config.runtime_config is not None:
        raise NotImplementedError(
            f"`runtime_config` is not supported yet ({_settings(config.runtime_config)}); what works now: the whole "
            "computation where the base is (leave `runtime_config` out)"
        )
