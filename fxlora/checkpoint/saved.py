"""A saved adapter as `merge_checkpoint` needs it: without a model, with all that its file holds.

Factors are checked once and stay in the file: each is read again when its weight's turn comes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fxlora._passes import EMBEDDING_A, EMBEDDING_B, FACTOR_A, FACTOR_B, SAVED, TOKENS
from fxlora.checkpoint.adapter import (
    KEYS,
    adapter_file,
    check_factor_dtype,
    check_finite,
    keys_without_prefix,
    load_factor,
    split_key,
)
from fxlora.checkpoint.buffers import bytes_of
from fxlora.checkpoint.file_ranges import Files, Stamp, check_stamp, stamp_of
from fxlora.checkpoint.misfits import listed
from fxlora.checkpoint.safetensors_io import Header, TensorFile, open_tensors
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError
from fxlora.host.files import ORIGINAL
from fxlora.host.saved_modules import TASK_HEADS
from fxlora.initialisers import changes_base

log = logging.getLogger("fxlora")


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A saved adapter.

    Attributes:
        directory: where it is.
        header: of its file.
        stamp: of its file.
        config: its configuration.
        weight: its factor in the merge.
        branches: by the layer's name in the file, the parts, on the meta device: see `load`.
        base: tensors of the base that it brings, by their names in the file.
        keys: in the file, by names without the prefix.
        strict: whether to refuse keys that mean nothing to the base.
        skipped: the keys that were left out, as they are found.
    """

    directory: Path
    header: Header
    stamp: Stamp
    config: LoraConfig
    weight: float
    branches: dict[str, dict[str, Tensor]]
    base: dict[str, Tensor]
    keys: dict[str, str]
    strict: bool = True
    skipped: list[str] = field(default_factory=list[str])

    @property
    def file(self) -> Path:
        """The file with the tensors."""
        return self.header.path

    def load(self, branch: str, part: str) -> Tensor:
        """A part from the file, in memory of its own.

        Raises:
            CheckpointError: when the file cannot be read, is another one by now, or the part is not finite.
        """
        return _load(self.header, self.stamp, self.key(branch, part))

    def factors(self, branch: str) -> tuple[Tensor, Tensor]:
        """A and B of a branch, of whatever kind, on the meta device.

        Raises:
            CheckpointError: when one is missing, or is no matrix.
        """
        parts = self.branches[branch]
        pair = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in parts or EMBEDDING_B in parts else (FACTOR_A, FACTOR_B)
        for part in pair:
            if part not in parts:
                raise CheckpointError(f"{self.file}: '{branch}' has no {part}; save the adapter again")
            if parts[part].dim() < 2:
                raise CheckpointError(
                    f"{self.file}: '{self.key(branch, part)}' has shape {tuple(parts[part].shape)}, and a factor has two "
                    "dimensions or more; save the adapter again"
                )
        return parts[pair[0]], parts[pair[1]]

    def skip_branch(self, branch: str) -> None:
        """Leave out a branch that the base has no weight for.

        Raises:
            CheckpointError: when one of its factors is missing: the file is broken.
        """
        if TOKENS not in self.branches[branch]:
            self.factors(branch)
        self.skipped.extend(self.key(branch, part) for part in self.branches[branch])

    def warn_of_skipped(self) -> None:
        """Say once what was left out, if anything was.

        Raises:
            CheckpointError: when that is the whole file.
        """
        if self.skipped and len(self.skipped) == len(self.keys):
            raise CheckpointError(
                f"{self.file}: none of its tensors is for this base, so that there is nothing to merge; the adapter is for "
                "another model"
            )
        if self.skipped:
            names = listed(sorted(self.skipped))
            log.warning("%s: %s not used, as no target of this base and configuration has it", self.file, names)

    def key(self, branch: str, part: str) -> str:
        """The key of a part in the file."""
        return self.keys[f"{branch}.{KEYS.get(part, part)}".lstrip(".")]


def read_saved(directory: Path, weight: float, *, strict: bool = True) -> SavedAdapter:
    """Read a saved adapter.

    Args:
        directory: where it is.
        weight: its factor in the merge.
        strict: whether keys that mean nothing to the base are to be refused; if not, they are left out with a warning.

    Raises:
        CheckpointError: when a file is missing or broken, a tensor is not finite, or the adapter is for a changed base.
        NotImplementedError: for a configuration that is not supported yet.
    """
    config = LoraConfig.read(directory)
    if changes_base(config.init_lora_weights):
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: init_lora_weights={config.init_lora_weights!r} changed the base that the factors "
            "are for. Convert the adapter (save_pretrained(…, path_initial_model_for_weight_conversion=…)), or load the "
            "model and use export_merged"
        )
    if config.call_sites:
        raise NotImplementedError(
            f"{directory / CONFIG_NAME}: `call_sites` gives some calls of a layer an update, and others none, which one weight "
            "cannot hold: such an adapter is never merged, in files or in memory. Run it unmerged"
        )
    branches: dict[str, dict[str, Tensor]] = {}
    base: dict[str, Tensor] = {}
    with open_tensors(adapter_file(directory)) as file:
        keys = keys_without_prefix(file)
        header, stamp = file.header, stamp_of(file.path)
        for name, key in keys.items():
            found = split_key(name)
            if found is None and config.modules_to_save and not {ORIGINAL, SAVED}.isdisjoint(name.split(".")):
                continue  # peft's second copies of what is saved whole
            if found is None:
                base[name] = _load_base(file, key)
            else:
                factor = _load(header, stamp, key)
                branches.setdefault(found[0], {})[found[1]] = torch.empty_like(factor, device="meta")
        _check_complete(file.path, config, base)
        if config.trainable_token_indices and not any(TOKENS in parts for parts in branches.values()):
            raise CheckpointError(
                f"{file.path}: trainable_token_indices trains rows of an embedding, and the file has none; save the adapter "
                "again"
            )
    return SavedAdapter(directory, header, stamp, config, weight, branches, base, keys, strict)


def _load(header: Header, stamp: Stamp, key: str) -> Tensor:
    """A factor, read without a map of the file, whose pages would count as memory."""
    entry, data = header.entries[key], header.offsets[key]
    check_factor_dtype(header.path, key, entry)
    result = torch.empty(entry.shape, dtype=entry.torch_dtype)
    with Files() as files:
        files.read_into(header.path, data.start, bytes_of(result))
    check_stamp(header.path, stamp)
    check_finite(header.path, key, result)
    return result


def _check_complete(path: Path, config: LoraConfig, base: dict[str, Tensor]) -> None:
    """Refuse a file without the tensors that its configuration trains beside the factors."""
    if config.bias != "none" and not any(f".{name}".endswith(".bias") for name in base):
        raise CheckpointError(
            f"{path}: bias={config.bias!r} trains biases, and the file has none; save the adapter again"
        )
    optional = {head for heads in TASK_HEADS.values() for head in heads}
    for each in config.modules_to_save or ():
        if each not in optional and not any(f"{each}." in name for name in base):
            raise CheckpointError(
                f"{path}: modules_to_save names '{each}', and the file has nothing of it; save the adapter again"
            )


def _load_base(file: TensorFile, key: str) -> Tensor:
    dtype = file.entries[key].torch_dtype
    return load_factor(file, key) if dtype is not None and dtype.is_floating_point else file.load(key).clone()
