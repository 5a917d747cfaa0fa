"""Portable adapters: scales folded into B, one rank, one alpha, so that all readers compute the same.

Readers differ in how they find the scale of a branch: one alpha for all or patterns, the configured rank or the tensor's,
alpha / r or alpha / sqrt(r). Here every branch's B is multiplied by its scale, and all branches get one rank R by rows
and columns of zeros. With alpha = R every rule gives exactly 1. What cannot be said in plain LoRA is refused.

The price: a B in half precision is rounded once more (none if the scale is a power of two; `dtype="float32"` makes it
small), and branches of smaller rank than R grow to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxlora._passes import round_once
from fxlora.checkpoint.adapter import WEIGHTS_NAME, adapter_file, load_factor
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.contents import Contents, FileBranch, read_contents
from fxlora.checkpoint.layout import copy_companions
from fxlora.checkpoint.manifest import write_manifest
from fxlora.checkpoint.readers.base import LIVE, MERGE, PLAIN, REPEATED, WITH_PEFT
from fxlora.checkpoint.readers.features import FEATURES
from fxlora.checkpoint.readers.report import AdapterReport, check_adapter
from fxlora.checkpoint.safetensors_io import open_tensors, save_tensors
from fxlora.config import CONFIG_NAME
from fxlora.errors import CheckpointError, ConfigError
from fxlora.host.files import BASE_LAYER
from fxlora.rendering import Rendered, json_data

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_WITHOUT_BASE_WEIGHTS = (
    "leave them out if they are the base's own (drop_base_weights=True, --drop-base-weights; save_embedding_layers=False when "
    "saving); if not, put them into the base first"
)

_UNPORTABLE: dict[str, tuple[str, str]] = {
    "dora": ("DoRA's norms depend on the base's weights", MERGE),
    "lora_bias": ("plain LoRA has no biases", MERGE),
    "bias": ("trained biases are no part of plain LoRA", MERGE),
    "modules_to_save": ("modules that are saved whole are no part of plain LoRA", MERGE),
    "trainable_tokens": ("rows of tokens are no part of plain LoRA", LIVE),
    "layer_replication": ("repeated layers are no part of plain LoRA", REPEATED),
    "base_init": ("its factors are for a changed base", PLAIN),
    "alora": ("plain LoRA is active on all tokens", "serve it with a reader that knows it (peft, llama.cpp)"),
    "variants": ("plain LoRA is W + s B A and no more", WITH_PEFT),
    "call_sites": ("no other program has single calls", "run it here, or train it for all calls"),
    "unknown_fields": ("what they do is not known here", "remove them if the adapter does not depend on them"),
    "base_weights": ("weights of the base are no part of plain LoRA", _WITHOUT_BASE_WEIGHTS),
}
"""Features that have no portable form: why, and what to do."""


@dataclass(frozen=True, slots=True)
class PortableReport(Rendered):
    """What `make_portable` did.

    Attributes:
        out: the new adapter's directory.
        branches: number of adapted layers.
        rank: the rank that all have now.
        folded: how many had a scale other than 1.
        padded: how many had a smaller rank.
        largest_rounding: of an entry of B, relative to the exact product; 0 if nothing was rounded.
        rounded_at: the key of that entry's tensor, None if nothing was rounded.
        bytes_before: size of the tensors of the old file, without what was left out.
        bytes_after: size of the tensors of the new one.
        dropped: keys that were left out.
        readers: what every reader makes of the new adapter.
    """

    out: str
    branches: int
    rank: int
    folded: int
    padded: int
    largest_rounding: float
    rounded_at: str | None
    bytes_before: int
    bytes_after: int
    dropped: tuple[str, ...]
    readers: AdapterReport

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return json_data({**asdict(self), "readers": self.readers.to_dict()})

    def __str__(self) -> str:
        """A few sentences, and the readers that still do not read it as peft does."""
        at = f" (at '{self.rounded_at}')" if self.rounded_at else ""
        lines = [
            f"{self.out}: {self.branches} layers of rank {self.rank}, scale 1 for every reader",
            f"  scales folded into B: {self.folded}; largest relative rounding of an entry {self.largest_rounding:.1e}{at}",
            f"  filled up with zeros: {self.padded}; {self.bytes_before:,} bytes of tensors before, {self.bytes_after:,} now",
        ]
        if self.dropped:
            lines.append(f"  left out: {', '.join(self.dropped)}")
        levels = [(name, [each.level for each in self.readers.of(name)]) for name in self.readers.readers]
        bad = [name for name, found in levels if any(level != "note" for level in found)]
        lines.append(f"  not read as it should be by: {', '.join(bad)} (see fxlora check --for)" if bad else "")
        return "\n".join(line for line in lines if line)


@dataclass
class Folded:
    """A portable adapter in memory, and what was done to it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    folded: int = 0
    padded: int = 0
    largest_rounding: float = 0.0
    rounded_at: str | None = None

    def to_json(self) -> str:
        """The text of `adapter_config.json`."""
        return json.dumps(self.config, indent=2, sort_keys=True) + "\n"


def make_portable(
    adapter: str | Path, out: str | Path, *, dtype: str | None = None, drop_base_weights: bool = False
) -> PortableReport:
    """Write a saved adapter so that every reader that knows plain LoRA computes the same. From files to files.

    Args:
        adapter: directory of a saved adapter.
        out: the new adapter's directory; an adapter that is there is replaced as one. Other files of the old one, such as a
            tokenizer, are copied.
        dtype: of B, such as `"float32"`; its own if None.
        drop_base_weights: leave out weights of the base that the file has (peft writes those of targeted embeddings).

    Raises:
        CheckpointError: for an adapter that plain LoRA cannot express, says why and what to do; for a broken one; when an
            entry of B becomes too large for its dtype; when `out` cannot be written. Nothing is changed then.
        ConfigError: for an unknown dtype, or if `out` is the adapter itself.

    Example:
        >>> import fxlora, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> config = fxlora.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_rslora=True)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     fxlora.lora_transform(model, config).save_pretrained(f"{directory}/adapter")
        ...     report = fxlora.make_portable(f"{directory}/adapter", f"{directory}/portable")
        >>> report.rank, report.folded
        (4, 1)
    """
    source, target = Path(adapter), Path(out)
    if source.resolve() == target.resolve():
        raise ConfigError(f"'{out}' is the adapter itself, which would be lost; choose another directory")
    contents = read_contents(source)
    with open_tensors(adapter_file(source)) as file:
        result = fold_scales(
            contents, lambda key: load_factor(file, key), dtype=dtype, drop_base_weights=drop_base_weights
        )
    with staged(target, keep=lambda _: True) as staging:
        copy_companions(source, staging, target)
        save_tensors(staging / WEIGHTS_NAME, result.tensors)
        (staging / CONFIG_NAME).write_text(result.to_json(), encoding="utf-8")
        write_manifest(staging)
    keys = [key for branch in contents.branches for key in (branch.A, branch.B)]
    return PortableReport(
        out=str(out),
        branches=len(contents.branches),
        rank=result.config["r"],
        folded=result.folded,
        padded=result.padded,
        largest_rounding=result.largest_rounding,
        rounded_at=result.rounded_at,
        bytes_before=sum(contents.entries[key].nbytes for key in keys),
        bytes_after=sum(tensor.numel() * tensor.element_size() for tensor in result.tensors.values()),
        dropped=contents.base,
        readers=check_adapter(target),
    )


def fold_scales(
    contents: Contents,
    load: Callable[[str], Tensor],
    *,
    dtype: str | None = None,
    drop_base_weights: bool = False,
    known: Mapping[str, tuple[int, float]] | None = None,
) -> Folded:
    """The portable form of an adapter.

    Args:
        contents: of the adapter.
        load: gives a tensor by key.
        dtype: of B; its own if None.
        drop_base_weights: leave out weights of the base.
        known: rank and scaling of branches by name, where the files do not tell them.

    Raises:
        CheckpointError: when there is none, or the files contradict each other.
        ConfigError: for an unknown dtype.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"`dtype` should be one of {', '.join(_DTYPES)}, or None for B's own, not {dtype!r}")
    refuse_unportable(contents, drop_base_weights)
    settings = {branch.name: _setting(contents, branch, known or {}) for branch in contents.branches}
    rank = _common_rank(contents, [r for r, _ in settings.values()])
    result = Folded(_config(contents, rank))
    for branch in contents.branches:
        r, scaling = settings[branch.name]
        A, B = load(branch.A).detach(), load(branch.B).detach()
        _check_rank(contents, branch, r)
        folded = _scaled(B, scaling, _DTYPES[dtype] if dtype else B.dtype, f"{contents.directory}: '{branch.B}'")
        _note_rounding(result, branch, B, scaling, folded)
        result.folded += scaling != 1
        result.padded += r != rank
        result.tensors[branch.A], result.tensors[branch.B] = _padded(branch, A, folded, r, rank)
    return result


def refuse_unportable(contents: Contents, drop_base_weights: bool = False) -> None:
    """Refuse what plain LoRA cannot express.

    Raises:
        CheckpointError: names the feature, where it is, why it cannot be, and what to do.
    """
    if not contents.branches:
        raise CheckpointError(f"{contents.directory} holds no LoRA factors, and there is nothing to make portable")
    for name, (reason, remedy) in _UNPORTABLE.items():
        places = FEATURES[name].found(contents)
        if not places or (drop_base_weights and name == "base_weights"):
            continue
        title = FEATURES[name].title.replace("`", "")
        where = places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
        raise CheckpointError(
            f"{contents.directory}: {title} ({where}) has no portable form: {reason}. What to do: {remedy}"
        )


def _setting(contents: Contents, branch: FileBranch, known: Mapping[str, tuple[int, float]]) -> tuple[int, float]:
    """Rank and scaling of a branch."""
    if branch.name in known:
        return known[branch.name]
    possible = contents.settings(branch)
    if len(possible) > 1:
        raise CheckpointError(
            f"{contents.directory}: '{branch.name}' is for one of {', '.join(contents.names('target_parameters'))}, which "
            "patterns give different ranks or alphas, and the file does not say which. Load the model and the adapter, and "
            "use save_pretrained(…, portable=True)"
        )
    ((r, alpha),) = possible
    return r, alpha / math.sqrt(r) if contents.config.get("use_rslora") else alpha / r


def _check_rank(contents: Contents, branch: FileBranch, r: int) -> None:
    """The tensors have the rank that the configuration says, or several experts of that rank."""
    rows, columns = branch.shape_A[0], branch.shape_B[1]
    fits = rows == columns and rows % r == 0 if branch.is_parameter else rows == r == columns * branch.groups
    if not fits:
        raise CheckpointError(
            f"{contents.directory}: '{branch.name}' has factors of shapes {branch.shape_A} and {branch.shape_B}, and the "
            f"configuration says rank {r}; correct r or rank_pattern in {CONFIG_NAME}"
        )


def _common_rank(contents: Contents, ranks: list[int]) -> int:
    """The smallest rank that holds all, and that the groups of every convolution divide."""
    step = math.lcm(*(branch.groups for branch in contents.branches))
    return math.ceil(max(ranks) / step) * step


def _scaled(B: Tensor, scaling: float, dtype: torch.dtype, where: str) -> Tensor:
    """B times the scale, computed in float64 and rounded once."""
    if scaling == 1 and B.dtype == dtype:
        return B
    if not bool(B.isfinite().all()):
        raise CheckpointError(
            f"{where} has NaN or infinite entries, so the adapter is broken; use an earlier checkpoint of it"
        )
    folded = round_once(B.double() * scaling, dtype)
    if not bool(folded.isfinite().all()):
        raise CheckpointError(f"{where} times its scale {scaling:g} is too large for {dtype}; use dtype='float32'")
    return folded


def _note_rounding(result: Folded, branch: FileBranch, B: Tensor, scaling: float, folded: Tensor) -> None:
    exact = B.double() * scaling
    error = torch.where(exact == 0, 0.0, (folded.double() - exact).abs() / exact.abs())
    largest = float(error.max()) if error.numel() else 0.0
    if largest > result.largest_rounding:
        result.largest_rounding, result.rounded_at = largest, branch.B


def _padded(branch: FileBranch, A: Tensor, B: Tensor, r: int, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of a larger rank that make the same update: rows of zeros in A, columns of zeros in B.

    The rank is that of each expert, and of all groups of a convolution together. Experts follow each other in A's rows,
    `(E r, in)`, and alternate in B's columns, `(out, r E)`; groups follow each other in A's rows, and share B's columns.
    """
    if r == rank:
        return A, B
    blocks = A.shape[0] // r if branch.is_parameter else branch.groups
    inner, wanted = (r, rank) if branch.is_parameter else (r // blocks, rank // blocks)
    wide_A = A.new_zeros(blocks, wanted, *A.shape[1:])
    wide_A[:, :inner] = A.reshape(blocks, inner, *A.shape[1:])
    experts = blocks if branch.is_parameter else 1
    wide_B = B.new_zeros(B.shape[0], wanted, experts, *B.shape[2:])
    wide_B[:, :inner] = B.reshape(B.shape[0], inner, experts, *B.shape[2:])
    return wide_A.flatten(0, 1), wide_B.flatten(1, 2)


def _config(contents: Contents, rank: int) -> dict[str, Any]:
    """The fields that readers need, old ones too, and no others: peft had all of these in its first releases."""
    taken = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "lora_dropout", "revision", "task_type")
    defaults = {"fan_in_fan_out": False, "lora_dropout": 0.0}
    config = {name: contents.config.get(name, defaults.get(name)) for name in taken}
    config |= {
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _targets(contents),
    }
    if any(branch.is_parameter for branch in contents.branches):
        config["target_parameters"] = contents.names("target_parameters")
    return config


def _targets(contents: Contents) -> list[str]:
    """Targets as a list of names, which every reader understands.

    A list is taken over, without names that match nothing. Where expressions or layer numbers choose, whose choice cannot
    be told without the model, the layers' whole names are listed.
    """
    names = [b.name for b in contents.branches if not b.is_parameter and f".{BASE_LAYER}." not in f".{b.name}."]
    chosen = any(contents.config.get(each) for each in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    listed = [] if chosen else contents.names("target_modules")
    kept = [target for target in listed if any(f".{name}".endswith(f".{target}") for name in names)]
    others = [name for name in names if not any(f".{name}".endswith(f".{target}") for target in kept)]
    return sorted({*kept, *others})
