"""Trainable tokens: some rows of a weight `(V, D)` are replaced by rows that are trained, `W'[ids] = rows`.

A branch has no factors: its one part holds the rows themselves. They start as the base weight's, so that a fresh
adapter changes nothing. A lookup adds `rows[j] - y` wherever its index is one of the ids; a product `x Wᵀ` adds
`x (rows - W[ids])ᵀ` to the outputs of these ids, and only there. Neither makes a tensor of the weight's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.branches.base import Branch, BranchSpec
from passes.branches.embedding import EMBED_SCALE, scale_like
from passes.callsite import CallSite, Options
from passes.errors import MergeError
from passes.leaves import TOKENS
from passes.nodes import BranchBuilder

TOKEN_IDS = "token_ids"
"""The option that holds the ids, in the order of the rows."""


class Rows(Protocol):
    """How rows that replace those of a weight act at one kind of call site."""

    def build(self, add: BranchBuilder, site: CallSite, branch: Branch) -> fx.Node:
        """Add the branch's nodes and return what `join` adds to the base's output."""
        ...

    def join(self, add: BranchBuilder, total: fx.Node, s: fx.Node, adapter: str) -> fx.Node:
        """Add the branch's result `s` to the base's output, or to the sum with other branches."""
        ...


@dataclass(frozen=True)
class Lookup:
    """The rows at an embedding."""

    def build(self, add: BranchBuilder, site: CallSite, branch: Branch) -> fx.Node:
        """Positions of the indices among the ids, then the change of each output."""
        assert site.x is not None
        values, ids = dict(site.layer.options), token_ids(branch.options)
        padding = values.get("padding_idx")
        positions = add.call("positions", token_positions, site.x, add.token_ids())
        scale: list[fx.Node] = []
        if EMBED_SCALE in values:
            scale = [add.base(".".join(part for part in (site.name, EMBED_SCALE) if part), EMBED_SCALE)]
        never_trained = ids.index(padding) if padding in ids else None
        return add.call("rows", changed_rows, positions, site.node, add.part(TOKENS, "tokens"), never_trained, *scale)

    def join(self, add: BranchBuilder, total: fx.Node, s: fx.Node, adapter: str) -> fx.Node:
        """A plain sum."""
        return add.call("y", torch.add, total, s)


@dataclass(frozen=True)
class Logits:
    """The rows at a linear layer, whose outputs belong to the rows of its weight: a model's head."""

    def build(self, add: BranchBuilder, site: CallSite, branch: Branch) -> fx.Node:
        """The change of the outputs that belong to the ids, `(…, n)`."""
        assert site.x is not None
        weight = add.base(site.weight, "weight")
        return add.call("logits", changed_logits, site.x, add.part(TOKENS, "tokens"), weight, add.token_ids())

    def join(self, add: BranchBuilder, total: fx.Node, s: fx.Node, adapter: str) -> fx.Node:
        """The result goes to the outputs of the ids; the others are not touched."""
        return add.call("y", add_at_ids, total, s, add.token_ids(adapter))


ROWS: dict[str, Rows] = {"tokens": Lookup(), "token_logits": Logits()}
"""By the name that a branch has for its `variant`."""

TOKENS_AT = {"embedding": "tokens", "linear": "token_logits"}
"""Which of them is for which layer kind."""


def token_ids(options: Options) -> tuple[int, ...]:
    """The ids of a branch's rows, from its options."""
    return dict(options)[TOKEN_IDS]


def row_shape(spec: BranchSpec) -> tuple[int, int]:
    """`(n, D)`."""
    ids = token_ids(spec.options)
    return len(ids), spec.out_features if spec.variant == "tokens" else spec.in_features


def current_rows(spec: BranchSpec, weight: Tensor) -> Tensor:
    """The base weight's own rows, `(n, D)`, copied."""
    return weight.detach()[_index(spec, weight)]


def replaced(
    spec: BranchSpec, weight: Tensor, rows: Tensor, rounding: Callable[[Tensor, torch.dtype], Tensor]
) -> Tensor:
    """A copy of the weight with the branch's rows in it, each entry rounded once to the weight's dtype.

    Args:
        spec: the branch.
        weight: `(V, D)`.
        rows: `(n, D)`, float64.
        rounding: rounds float64 to a dtype.

    Raises:
        MergeError: when a row has NaN or infinite entries.
    """
    values = rounding(rows, weight.dtype).to(weight.device)
    if not bool(values.isfinite().all()):
        raise MergeError("the merged weight would have NaN or infinite entries")
    return weight.detach().index_copy(0, _index(spec, weight), values)


def row_change(spec: BranchSpec, weight: Tensor, rows: Tensor) -> Tensor:
    """`rows - W[ids]` at the ids and zero elsewhere: float64, `(V, D)`."""
    index, wide = _index(spec, weight), weight.detach().double()
    return torch.zeros_like(wide).index_copy(0, index, rows.double().to(wide.device) - wide[index])


def _index(spec: BranchSpec, weight: Tensor) -> Tensor:
    return torch.tensor(token_ids(spec.options), dtype=torch.int64, device=weight.device)


# ---- what graphs call; `table` is `TokenIds`' ----


def token_positions(x: Tensor, table: Tensor) -> Tensor:
    """For each index the position of its row, -1 if it has none: int64, of the shape of `x`."""
    ids, rows = table[0].contiguous(), table[1]
    x = x.to(ids.dtype)
    place = torch.searchsorted(ids, x).clamp(max=ids.shape[0] - 1)
    return torch.where(ids[place] == x, rows[place], -1)


def changed_rows(positions: Tensor, y: Tensor, rows: Tensor, never_trained: int | None, scale: Any = None) -> Tensor:
    """`rows[positions] - y` where there is a row, else zero; in float32 or wider, so that the sum with `y` is the row.

    Args:
        positions: of the rows, -1 for none.
        y: the base's output, `(*positions.shape, D)`.
        rows: `(n, D)`.
        never_trained: position of the row that gets no gradient, since the layer has it for padding.
        scale: the layer's `embed_scale`, if it has one.
    """
    found = F.embedding(positions.clamp(min=0), rows, never_trained).to(y.dtype)
    if scale is not None:
        found = scale_like(found, scale)
    wide = torch.promote_types(y.dtype, torch.float32)
    return torch.where((positions >= 0).unsqueeze(-1), found.to(wide) - y.to(wide), 0)


def changed_logits(x: Tensor, rows: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """`x (rows - W[ids])ᵀ` in the order of the sorted ids, `(…, n)`."""
    change = rows.index_select(0, table[1]).to(weight.dtype) - weight.index_select(0, table[0])
    return F.linear(x, change.to(x.dtype))


def add_at_ids(total: Tensor, s: Tensor, table: Tensor) -> Tensor:
    """`total` with `s` added to the outputs of the ids."""
    return total.index_add(-1, table[0], s.to(total.dtype))
