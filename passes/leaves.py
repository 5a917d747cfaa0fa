"""The leaf modules that a rewritten graph calls or reads: factors, their containers, the scale, norms of base weights.

They know nothing of graphs. `fxlora` creates them; the `insert` pass refers to them by their paths. A branch's tensors
are its *parts*, named as in adapter files: `lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, ….
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

FACTOR_A = "lora_A"
FACTOR_B = "lora_B"
BIAS_B = "lora_B.bias"
EMBEDDING_A = "lora_embedding_A"
EMBEDDING_B = "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "trainable_tokens_delta"
DROPOUT = "lora_dropout"
SCALING = "lora_scaling"
WEIGHT_NORM = "lora_weight_norm"
TOKEN_IDS = "lora_token_ids"
BASE_OUTPUT = "lora_base_output"
SWITCH = "lora_switch"
ROW_DROPOUT = "lora_row_dropout"
SLOTS = "lora_slots"
FORM_CONTAINERS = (SWITCH, ROW_DROPOUT, SLOTS)
"""Of the containers below those that belong to a form of the graphs, and to no adapter alone."""
SAVED = "modules_to_save"
"""Name of the container, in a module of `modules_to_save`, of its trained copies by adapter."""
PARAMETERS = "lora_parameters"
"""Name of the holder, in a module, of the factors of its bare parameters."""
CONTAINERS = (
    *(FACTOR_A, FACTOR_B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, TOKENS),
    *(DROPOUT, SCALING, WEIGHT_NORM, BASE_OUTPUT, TOKEN_IDS),
    *FORM_CONTAINERS,
)
"""Names under which a site's adapters keep what is known here: `<site>.<container>.<adapter>`.

Kinds may have other names for their factors: see `passes.branches.containers`.
"""


def part_path(part: str, adapter: str) -> str:
    """Where a part of an adapter is registered in its owner: `lora_B.bias` is at `lora_B.<adapter>.bias`."""
    container, _, leaf = part.partition(".")
    return f"{container}.{adapter}.{leaf or 'weight'}"


class Factor(nn.Module):
    """One low-rank factor: a module that only holds tensors, so that nothing mistakes it for a linear layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def extra_repr(self) -> str:
        """Shape and dtype, for `print(model)`."""
        return f"{tuple(self.weight.shape)}, {self.weight.dtype}"


class Scaling(nn.Module):
    """The scale of a branch: a Python float as the truth, and a 0-dim buffer that graphs read.

    The buffer is float64 in a float64 model, which would lose half of its digits otherwise, and float32 in any other.
    A Python constant in a graph would cause a recompile at each change, and a buffer alone would lose bits in
    `model.to(torch.bfloat16)`: so the buffer is made anew from the float after every such conversion. It is not part
    of the state dict.
    """

    scale: Tensor

    def __init__(self, value: float, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._value = float(value)
        # Not on meta: a state dict that is loaded later does not bring this buffer, and a 0-dim tensor on the CPU
        # multiplies with any device.
        place = None if device is not None and device.type == "meta" else device
        self.register_buffer("scale", self._make(place, dtype), persistent=False)

    @property
    def value(self) -> float:
        """The scale."""
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        self._value = float(value)
        self.scale.fill_(self._value)  # in place: compiled graphs keep the buffer

    def forward(self) -> Tensor:
        """The scale as a 0-dim tensor."""
        return self.scale

    def _make(self, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self._value, dtype=_wide(dtype), device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.scale.dtype
        super()._apply(fn, recurse)
        if self.scale.is_meta or self.scale.dtype != before:
            self.scale = self._make(self.scale.device, self.scale.dtype)
        else:
            self.scale.fill_(self._value)  # a conversion rounds, and to_empty leaves garbage
        return self

    def extra_repr(self) -> str:
        """The scale, for `print(model)`."""
        return f"{self._value:g}"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class WeightNorm(nn.Module):
    """The squared norms of a base weight's rows, computed once: `(rows,)`, float32 or wider, not in the state dict."""

    squared: Tensor

    def __init__(self, squared: Tensor) -> None:
        super().__init__()
        self.register_buffer("squared", squared, persistent=False)

    def forward(self) -> Tensor:
        """The squared norms."""
        return self.squared


class TokenIds(nn.Module):
    """Which rows of a weight a branch replaces: int64 `(2, n)`, the sorted ids above the positions of their rows.

    Not part of the state dict. Made anew after a conversion, since `to_empty` leaves garbage.
    """

    table: Tensor

    def __init__(self, ids: tuple[int, ...], device: torch.device | None = None) -> None:
        super().__init__()
        self._ids = ids
        place = None if device is not None and device.type == "meta" else device
        self.register_buffer("table", self._make(place), persistent=False)

    def forward(self) -> Tensor:
        """The table."""
        return self.table

    def _make(self, device: torch.device | None) -> Tensor:
        order = sorted(range(len(self._ids)), key=self._ids.__getitem__)
        return torch.tensor([[self._ids[place] for place in order], order], dtype=torch.int64, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if not self.table.is_meta:
            self.table.copy_(self._make(self.table.device))
        return self

    def extra_repr(self) -> str:
        """The number of ids, for `print(model)`."""
        return f"{len(self._ids)} ids"
