"""`layer_replication` in files: a checkpoint whose layers are those of the base in a new order, some of them several times.

The names are those that `fxlora.host.replication` gives to the modules of a live model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fxlora._passes import MergeError
from fxlora.errors import CheckpointError

_LAYER = re.compile(r"((?:model\.)*(?:bert\.)?(?:layers|encoder\.layer|h)\.)(\d+)(\..*)")
"""Where a live model's layers are looked for; in files a prefix may be missing."""

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EACH = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists of a configuration with an item for each layer."""
_INDICES = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers")
"""Lists of a configuration with numbers of layers, which would be other ones."""

T = TypeVar("T")
Ranges = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Replication:
    """New layers of a checkpoint.

    Attributes:
        prefix: what the names of layers have before their number.
        order: for each new layer, the one of the base that it is.
        count: how many the base has.
    """

    prefix: str
    order: tuple[int, ...]
    count: int

    def renamed(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """The new checkpoint's tensors by name, from the base's."""
        copies: dict[int, list[int]] = {}
        for position, index in enumerate(self.order):
            copies.setdefault(index, []).append(position)
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            match = _LAYER.fullmatch(name)
            if match is None or match[1] != self.prefix:
                result[name] = tensor
                continue
            result.update({f"{self.prefix}{position}{match[3]}": tensor for position in copies.get(int(match[2]), ())})
        return result

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A `config.json` for the new layers.

        Raises:
            MergeError: when it says of layers, by their numbers, what would be said of others then.
        """
        result = dict(config)
        for name in _INDICES:
            if config.get(name):
                raise MergeError(
                    f"layer_replication: '{name}' in config.json names layers by number, and the numbers would change; merge "
                    "the adapter into a model in memory"
                )
        for name in _COUNTS:
            if config.get(name) == self.count:
                result[name] = len(self.order)
        for name in _EACH:
            values: Any = config.get(name)
            if isinstance(values, list) and len(values) == self.count:  # pyright: ignore[reportUnknownArgumentType]
                result[name] = [values[index] for index in self.order]
        return result


def find_replication(names: Iterable[str], ranges: Ranges, where: str) -> Replication:
    """What ranges of layers make of a checkpoint.

    Args:
        names: of its tensors.
        ranges: (first, one after the last) of each range, in the new order.
        where: the adapter, for messages.

    Raises:
        MergeError: when the layers are not found, or there are several lists of them.
        CheckpointError: for a range beyond the layers.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is not None:
            found.setdefault(match[1], set()).add(int(match[2]))
    if len(found) != 1:
        raise MergeError(
            f"{where}: layer_replication needs one list of layers, at 'layers', 'encoder.layer' or 'h', and the base has "
            f"{len(found) or 'none'}; load the model and use export_merged"
        )
    (prefix, indices), *_ = found.items()
    count = max(indices) + 1
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise CheckpointError(
                f"{where}: layer_replication has [{start}, {end}], which is no range of the base's {count} layers; the adapter "
                "is for another model"
            )
    return Replication(prefix, tuple(index for start, end in ranges for index in range(start, end)), count)
