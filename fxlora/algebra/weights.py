"""Two ways to read a set of weights, one tensor at a time: a checkpoint on disk, and a model in memory.

`extract` compares two of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from fxlora._passes import did_you_mean
from fxlora.checkpoint.layout import read_json, read_shards
from fxlora.checkpoint.safetensors_io import Entry, check_plain, open_tensors
from fxlora.errors import CheckpointError
from fxlora.host.skeleton import guessed, skeleton
from fxlora.logs import log
from fxlora.model import LoraModel


class Weights(Protocol):
    """Named tensors of which one is in memory at a time."""

    @property
    def where(self) -> str:
        """What to call them in messages."""
        ...

    @property
    def entries(self) -> dict[str, Entry]:
        """Dtype and shape of each."""
        ...

    def load(self, name: str) -> Tensor:
        """One of them."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """The tensors of files.

    Attributes:
        path: the file or directory.
        entries: dtype and shape of each tensor.
        files: where each of them is.
    """

    path: Path
    entries: dict[str, Entry] = field(repr=False)
    files: dict[str, Path] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> CheckpointWeights:
        """A safetensors file, or a directory with `model.safetensors` or shards and their index. Reads the headers.

        Raises:
            CheckpointError: when a file is missing or broken.
        """
        if path.is_dir():
            shards = {path / name: entries for name, entries in read_shards(path)[0].items()}
        else:
            with open_tensors(path) as file:
                shards = {path: file.entries}
        return cls(
            path,
            {name: entry for entries in shards.values() for name, entry in entries.items()},
            {name: shard for shard, entries in shards.items() for name in entries},
        )

    @property
    def where(self) -> str:
        """The path."""
        return f"'{self.path}'"

    def load(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        with open_tensors(self.files[name]) as file:
            return file.load(name).clone()

    def model(self) -> nn.Module:
        """A model without values that has the layers: of the `config.json` of transformers beside them, or guessed."""
        config = self.path / "config.json"
        if config.is_file() and read_json(config).get("architectures"):
            try:
                return skeleton(self.path)
            except ImportError:
                log.warning("transformers is not installed, which could read %s: layers are told from shapes", config)
        return guessed({name: entry.shape for name, entry in self.entries.items()})


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """The tensors of a model's state dict.

    Attributes:
        where: what to call the model.
        tensors: by name.
    """

    where: str
    tensors: dict[str, Tensor] = field(repr=False)

    @classmethod
    def read(cls, model: nn.Module, where: str) -> ModelWeights:
        """Of a model.

        Raises:
            CheckpointError: when they have no data, or are not what the model computes with.
        """
        if isinstance(model, LoraModel):
            raise CheckpointError(
                f"{where} has LoRA adapters, which its weights do not hold; pass the result of merge_and_unload(), or the "
                "checkpoint that export_merged writes"
            )
        tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        for name, tensor in tensors.items():
            check_plain(tensor, f"{where}: '{name}'")
        return cls(where, tensors)

    @property
    def entries(self) -> dict[str, Entry]:
        """Dtype and shape of each."""
        return {name: Entry.of(tensor) for name, tensor in self.tensors.items()}

    def load(self, name: str) -> Tensor:
        """A tensor, not copied."""
        return self.tensors[name].detach()


def entry_of(weights: Weights, name: str) -> Entry:
    """What is known of a tensor.

    Raises:
        CheckpointError: when there is none of that name.
    """
    entries = weights.entries
    if name not in entries:
        raise CheckpointError(
            f"{weights.where} has no '{name}'.{did_you_mean(name, entries)} The weight may be tied to another one, or be "
            "named otherwise in memory than in files: leave the layer out, pass a `model` that has the files' names, or "
            "pass two models in memory"
        )
    return entries[name]
