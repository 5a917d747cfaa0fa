"""`layer_replication`: a model's layers in a new order, some of them several times, with shared weights (arXiv:2312.15166).

Each copy shares its parameters with the layer that it comes from but is a module of its own, and so has LoRA of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxlora.errors import ConfigError


@dataclass
class Replication:
    """What a replication changed, so that it can be undone.

    Attributes:
        owner: path of the module that has the list of layers.
        name: of the list in it.
        layers: the list that the model had.
        config: the model's configuration, None if it has none.
        values: what fields of it were.
    """

    owner: str
    name: str
    layers: nn.ModuleList
    config: Any = None
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def undo(self, model: nn.Module) -> None:
        """Give the model its layers back."""
        model.get_submodule(self.owner)._modules[self.name] = self.layers
        for name, value in self.values.items():
            setattr(self.config, name, value)


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Replication:
    """Rebuild the model's list of layers from ranges of it: `[[0, 4], [2, 5]]` makes 0, 1, 2, 3, 2, 3, 4.

    Args:
        model: changed in place: its layers, their `layer_idx`, and `num_hidden_layers` of its configuration.
        ranges: (first, one after the last) of each range.

    Returns:
        What undoes it.

    Raises:
        ConfigError: for a model whose layers are not found, or a range beyond them. Nothing is changed then.
    """
    path, name, layers = _find_layers(model)
    _check_ranges(ranges, len(layers))
    order = [index for start, end in ranges for index in range(start, end)]
    clones = nn.ModuleList(_clone(layers[index], position) for position, index in enumerate(order))
    clones.train(layers.training)
    before = Replication(path, name, layers, _config_of(model, path))
    if hasattr(before.config, "num_hidden_layers"):
        before.values["num_hidden_layers"] = before.config.num_hidden_layers
        before.config.num_hidden_layers = len(order)
        kinds: Any = getattr(before.config, "layer_types", None)
        if isinstance(kinds, list) and len(kinds) == len(layers):  # pyright: ignore[reportUnknownArgumentType]
            before.values["layer_types"] = kinds  # caches are made by it
            before.config.layer_types = [kinds[index] for index in order]
    model.get_submodule(path)._modules[name] = clones
    return before


def _config_of(model: nn.Module, path: str) -> Any:
    """The configuration of a module, or of the nearest one around it."""
    while path and not hasattr(model.get_submodule(path), "config"):
        path = path.rpartition(".")[0]
    return getattr(model.get_submodule(path), "config", None)


def _find_layers(model: nn.Module) -> tuple[str, str, nn.ModuleList]:
    """(path of the owner, name, list) of the layers, where peft looks for them."""
    path: list[str] = []
    owner: Any = model
    while isinstance(getattr(owner, "model", None), nn.Module):
        path.append("model")
        owner = owner.model
    if isinstance(getattr(owner, "bert", None), nn.Module):
        path.append("bert")
        owner = owner.bert
    for places in (("layers",), ("encoder", "layer"), ("h",)):
        holder: Any = owner
        for place in places[:-1]:
            holder = getattr(holder, place, None)
        layers = getattr(holder, places[-1], None)
        if isinstance(layers, nn.ModuleList):
            return ".".join((*path, *places[:-1])), places[-1], layers
    raise ConfigError(
        f"`layer_replication`: {type(model).__name__} has no list of layers at 'layers', 'encoder.layer' or 'h' (as Llama, "
        "Bert and Falcon have); replicate its layers before the transform"
    )


def _check_ranges(ranges: Sequence[Sequence[int]], count: int) -> None:
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise ConfigError(
                f"`layer_replication`: [{start}, {end}] is no range of the model's {count} layers; it needs "
                f"0 <= start < end <= {count}"
            )


def _clone(layer: nn.Module, position: int) -> nn.Module:
    """A copy that shares parameters and configurations; buffers are its own, as in peft."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in layer.parameters()}
    for module in layer.modules():
        if hasattr(getattr(module, "config", None), "to_dict"):
            memo[id(module.config)] = module.config
    clone = copy.deepcopy(layer, memo)
    for module in clone.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", position)  # noqa: B010 (not a name that nn.Module declares)
    return clone
