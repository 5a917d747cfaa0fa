"""What an adapter's files say, without a model: configuration, branches and whatever else they hold.

Reads the configuration as it is, unknown fields included, and of the weights no more than the header. Who asks:
`fxlora.checkpoint.readers` and `fxlora.checkpoint.portable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from fxlora._passes import (
    BIAS_B,
    EMBEDDING_A,
    EMBEDDING_B,
    FACTOR_A,
    FACTOR_B,
    MAGNITUDE,
    TOKENS,
    Rules,
    lookup,
    select,
)
from fxlora.checkpoint.adapter import KEY_PREFIX, adapter_file, split_key
from fxlora.checkpoint.layout import read_json
from fxlora.checkpoint.leftovers import settle
from fxlora.checkpoint.safetensors_io import Entry, open_tensors
from fxlora.compound import OUT_PROJ
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError, ConfigError
from fxlora.host.files import BASE_LAYER


@dataclass(frozen=True, slots=True)
class FileBranch:
    """The two factors of a layer in a file.

    Attributes:
        name: of the layer in the file, without `base_model.model.`.
        A: key of the first factor, and `B` of the second.
        shape_A: shape of the first factor, and `shape_B` of the second.
        is_parameter: whether it is of `target_parameters`, and its factors may be those of several experts.
    """

    name: str
    A: str
    B: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    is_parameter: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def is_embedding(self) -> bool:
        """Whether the layer is an embedding."""
        return self.A.endswith(EMBEDDING_A)

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return len(self.shape_A) > 2

    @property
    def groups(self) -> int:
        """Number of groups of a convolution in peft's form, 1 for any other layer."""
        return self.shape_A[0] // self.shape_B[1] if self.is_conv and self.shape_B[1] else 1


@dataclass(frozen=True, slots=True)
class Contents:
    """What the files of one adapter say.

    Attributes:
        directory: where they are.
        config: the fields of `adapter_config.json` as they are.
        entries: dtype and shape of each tensor by key.
        branches: in the order of the header.
        parts: keys of other parts of branches (magnitudes, biases of branches, rows of tokens), by part.
        base: keys of weights of layers that have a branch, and `biases` those of biases.
        whole: keys of tensors of modules that are saved whole, and of any other.
        files: names of the other files and directories beside.
        base_config: the base model's `config.json`, None if it is not known.
    """

    directory: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    branches: tuple[FileBranch, ...]
    parts: Mapping[str, tuple[str, ...]]
    base: tuple[str, ...]
    biases: tuple[str, ...]
    whole: tuple[str, ...]
    files: tuple[str, ...] = ()
    base_config: Mapping[str, Any] | None = None

    def names(self, field: str) -> list[str]:
        """A field that lists names; empty if it is a text or not set."""
        value = self.config.get(field)
        return [str(each) for each in cast("list[object]", value)] if isinstance(value, list) else []

    def alpha(self, branch: FileBranch) -> float:
        """What the configuration says of a layer's alpha. For a branch of `target_parameters` see `settings`."""
        return float(lookup(self.config.get("alpha_pattern") or {}, _layer(branch), self.config.get("lora_alpha", 8)))

    def rank(self, branch: FileBranch) -> int:
        """What the configuration says of a layer's rank."""
        return int(lookup(self.config.get("rank_pattern") or {}, _layer(branch), self.config.get("r", 8)))

    def settings(self, branch: FileBranch) -> set[tuple[int, float]]:
        """What rank and alpha of a branch can be.

        There is more than one answer where the file does not say which of several parameters of one module a branch is
        for, and patterns give them different numbers.
        """
        if not branch.is_parameter:
            return {(self.rank(branch), self.alpha(branch))}
        ranks, alphas = self.config.get("rank_pattern") or {}, self.config.get("alpha_pattern") or {}
        module = _without_wrappers(branch.name)
        found: set[tuple[int, float]] = set()
        for target in self.names("target_parameters"):
            owner, _, leaf = target.rpartition(".")
            if not owner or f".{module}".endswith(f".{owner}"):
                path = f"{module}.{leaf}".lstrip(".")
                found.add(
                    (
                        int(lookup(ranks, path, self.config.get("r", 8))),
                        float(lookup(alphas, path, self.config.get("lora_alpha", 8))),
                    )
                )
        return found or {(self.rank(branch), self.alpha(branch))}


def read_contents(directory: str | Path, base: str | Path | None = None) -> Contents:
    """Read what the files of a saved adapter say.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        base: directory of the base model; None for the one that the configuration names, if it is there.

    Raises:
        CheckpointError: when a file is missing or corrupt, or the adapter is of another kind than LoRA.
    """
    path = Path(directory)
    settle(path)
    if not (path / CONFIG_NAME).is_file():
        raise CheckpointError(f"{path / CONFIG_NAME} does not exist: '{directory}' is not a saved adapter")
    config = read_json(path / CONFIG_NAME)
    if config.get("peft_type") not in (None, "LORA"):
        raise CheckpointError(f"{path / CONFIG_NAME}: peft_type is {config['peft_type']!r}; only LORA is understood")
    _check_fields(path / CONFIG_NAME, config)
    with open_tensors(adapter_file(path)) as file:
        entries = file.entries
    files = tuple(sorted(each.name for each in path.iterdir()))
    return contents_of(path, config, entries, files, _base_config(config, base))


def _check_fields(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse values that cannot be understood; fields that are unknown or not supported here are left to the readers."""
    known = {each.name for each in fields(LoraConfig)}
    try:
        LoraConfig(**{name: value for name, value in config.items() if name in known}).validate()
    except NotImplementedError:
        pass
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def contents_of(
    directory: Path,
    config: Mapping[str, Any],
    entries: Mapping[str, Entry],
    files: tuple[str, ...] = (),
    base_config: Mapping[str, Any] | None = None,
) -> Contents:
    """Sort the keys of an adapter's file by what they are.

    Raises:
        CheckpointError: when a layer has one factor only.
    """
    factors: dict[str, dict[str, str]] = {}
    parts: dict[str, list[str]] = {}
    base: list[str] = []
    biases: list[str] = []
    whole: list[str] = []
    for key in entries:
        name, part = split_key(key.removeprefix(KEY_PREFIX)) or ("", "")
        if part in (FACTOR_A, FACTOR_B, EMBEDDING_A, EMBEDDING_B):
            factors.setdefault(name, {})[part] = key
        elif part in (BIAS_B, MAGNITUDE, TOKENS):
            parts.setdefault(part, []).append(key)
        elif _is_saved_whole(key, config):
            whole.append(key)
        elif key.endswith(".bias"):
            biases.append(key)
        else:
            (base if f".{BASE_LAYER}." in key else whole).append(key)
    parameters = _parameters(config, factors)
    branches = tuple(_branch(directory, name, keys, entries, name in parameters) for name, keys in factors.items())
    return Contents(
        directory,
        config,
        entries,
        branches,
        {part: tuple(keys) for part, keys in parts.items()},
        tuple(base),
        tuple(biases),
        tuple(whole),
        files,
        base_config,
    )


def _branch(
    directory: Path, name: str, keys: Mapping[str, str], entries: Mapping[str, Entry], is_parameter: bool
) -> FileBranch:
    pair = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in keys or EMBEDDING_B in keys else (FACTOR_A, FACTOR_B)
    for part in pair:
        if part not in keys or len(entries[keys[part]].shape) < 2:
            raise CheckpointError(f"{directory}: '{name}' has no matrix {part}; save the adapter again")
    A, B = (keys[part] for part in pair)
    return FileBranch(name, A, B, entries[A].shape, entries[B].shape, is_parameter)


def _is_saved_whole(key: str, config: Mapping[str, Any]) -> bool:
    saved: Any = config.get("modules_to_save") or ()
    owner = "." + key.removeprefix(KEY_PREFIX).rpartition(".")[0] + "."
    return any(f".{name}." in owner for name in saved)


def _parameters(config: Mapping[str, Any], names: Mapping[str, object]) -> set[str]:
    """The names that `target_modules` does not explain, if there are `target_parameters`."""
    targets: Any = config.get("target_modules")
    if not config.get("target_parameters"):
        return set()
    if not targets:
        return set(names)
    rules = Rules(tuple(targets) if isinstance(targets, list) else targets)
    matched = {each.name for each in select(list(names), rules) if each.matched}
    return set(names) - matched


def _layer(branch: FileBranch) -> str:
    """The name that patterns match: an attention's, for the output projection inside of its wrapper."""
    return branch.name.removesuffix(f".{BASE_LAYER}.{OUT_PROJ}")


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != BASE_LAYER)


def _base_config(config: Mapping[str, Any], base: str | Path | None) -> Mapping[str, Any] | None:
    where = base if base is not None else config.get("base_model_name_or_path")
    if not isinstance(where, (str, Path)) or not where:
        return None
    path = Path(where) / "config.json"
    if path.is_file():
        return read_json(path)
    if base is not None:
        raise CheckpointError(f"{path} does not exist; name the base model's directory")
    return None
