"""What branches do to a weight when they are folded, in the order in which the weight is stored: see `passes.fold`.

Works on tensors alone and reads a weight in blocks, so that weights of any size can be folded, in memory or in files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.branches.base import BranchSpec, Part
from passes.branches.registry import KINDS, VARIANTS, deltas, has_factors
from passes.branches.tokens import token_ids
from passes.fold import Fold, LowRank, NewRows, Shape3
from passes.leaves import BIAS_B, TOKENS

Read = Callable[[int, int, int], Tensor]
"""`read(group, start, stop)`: some rows of one group of the original weight, `(stop - start, columns)`."""

_CHUNK = 1 << 15
"""Entries whose squares are summed at a time: so few that torch sums them in one thread, in one order."""


@dataclass(frozen=True, slots=True)
class Update:
    """One branch that is folded.

    Attributes:
        spec: the branch.
        parts: its tensors.
        weight: the factor of its adapter in the merge.
    """

    spec: BranchSpec
    parts: Mapping[str, Tensor]
    weight: float = 1.0


def shape_in_storage(spec: BranchSpec, shape: tuple[int, ...]) -> Shape3:
    """A weight's shape as `(groups, rows, columns)`, the order of its entries unchanged."""
    view = _View.of(spec, shape)
    return (1, shape[0], math.prod(shape[1:])) if view is None else view.storage


def weight_fold(
    updates: Sequence[Update],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    read: Read,
    *,
    out_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Fold:
    """What branches add to their weight.

    Args:
        updates: of one weight; their order does not matter.
        shape: of the weight.
        dtype: of the weight.
        read: gives the original weight; only variants ask for it.
        out_dtype: of the result; the weight's own if None.
        device: where the fold is computed; where the branches are if None.

    Raises:
        PassError: when a weight cannot hold a branch.
        MergeError: when a replaced row is not finite.
    """
    updates = sorted(updates, key=lambda each: (each.spec.adapter, each.weight))
    weight = _Weight(shape, shape_in_storage(updates[0].spec, shape), dtype, read)
    summands: list[LowRank] = []
    ratios: list[tuple[Tensor, float]] = []
    rows: dict[int, Tensor] = {}
    dense: Tensor | None = None
    for update in updates:
        spec, parts = update.spec, {name: part.detach().to(device) for name, part in update.parts.items()}
        if not has_factors(spec):
            rows.update(zip(token_ids(spec.options), parts[TOKENS], strict=True))
            continue
        view = _View.of(spec, shape)
        product = _product(spec, parts, view) if view is not None and view.storage == weight.storage else None
        ratio = _ratio(spec, parts, product, view, weight) if spec.variant and view and product else None
        if view is None or product is None or (spec.variant and ratio is None):
            change = weight.change(spec, parts) * update.weight
            dense = change if dense is None else dense + change
            continue
        if ratio is not None:
            ratios.append((ratio, update.weight))
            left, right = (
                (product.left, product.right * ratio) if view.flipped else (product.left * ratio, product.right)
            )
            product = LowRank(left, right, product.scale)
        summands.append(LowRank(product.left, product.right, product.scale * update.weight))
    new_rows = NewRows(torch.tensor(list(rows), device=device), torch.stack(list(rows.values()))) if rows else None
    return Fold(weight.storage, summands, dtype, out_dtype, factor=_of_weight(ratios), new_rows=new_rows, dense=dense)


def bias_fold(
    updates: Sequence[Update],
    size: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Fold:
    """What the branches' own biases add to their layer's bias, as a weight `(1, size, 1)`."""
    biases = [each.parts[BIAS_B].detach().to(device) for each in updates]
    summands = [
        LowRank(bias.view(1, size, 1), torch.ones(1, 1, 1, device=bias.device), each.spec.scaling * each.weight)
        for bias, each in zip(biases, updates, strict=True)
    ]
    return Fold((1, size, 1), summands, dtype, out_dtype)


@dataclass(frozen=True, slots=True)
class _View:
    """How the matrices of a kind lie in its weight: the shape in storage, and whether they are transposed there."""

    storage: Shape3
    flipped: bool

    @classmethod
    def of(cls, spec: BranchSpec, shape: tuple[int, ...]) -> _View | None:
        """None if they are no view of the weight."""
        weight = torch.empty(shape, device="meta")
        matrices = KINDS[spec.kind].as_matrices(spec.layer, "weight", weight)
        if matrices is not weight and matrices._base is not weight:
            return None
        for flipped, stored in ((False, matrices), (True, matrices.mT)):
            if stored.is_contiguous():
                return cls((math.prod(stored.shape[:-2]), stored.shape[-2], stored.shape[-1]), flipped)
        return None


@dataclass(frozen=True, slots=True)
class _Weight:
    """The original weight, read as it is needed."""

    shape: tuple[int, ...]
    storage: Shape3
    dtype: torch.dtype
    read: Read

    def change(self, spec: BranchSpec, parts: dict[str, Tensor]) -> Tensor:
        """What a branch adds to the whole weight: float64, in storage."""
        groups = [self.read(group, 0, self.storage[1]) for group in range(self.storage[0])]
        return deltas(spec, torch.cat(groups).reshape(self.shape), parts)["weight"].reshape(self.storage)

    def moved(self, product: LowRank) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the weight plus a product, in float64, in blocks that do not depend on the caller."""
        fold = Fold(self.storage, [product], self.dtype)
        step = max(1, _CHUNK // self.storage[2])
        for start in range(0, self.storage[1], step):
            rows = self.read(0, start, min(start + step, self.storage[1]))
            yield start, fold.wide_value(rows.to(product.left.device), 0, start)


def _product(spec: BranchSpec, parts: dict[str, Tensor], view: _View) -> LowRank:
    """`scaling · B A` as it lies in storage."""
    kind = KINDS[spec.kind]
    kind.update(spec.layer)  # which says what a weight cannot hold
    names: tuple[tuple[Part, str], ...] = (("A", kind.factor_names[0]), ("B", kind.factor_names[1]))
    A, B = (
        matrices.reshape(-1, *matrices.shape[-2:])
        for matrices in (kind.as_matrices(spec.layer, part, parts[name]) for part, name in names)
    )
    return LowRank(A.mT, B.mT, spec.scaling) if view.flipped else LowRank(B, A, spec.scaling)


def _ratio(spec: BranchSpec, parts: dict[str, Tensor], product: LowRank, view: _View, weight: _Weight) -> Tensor | None:
    """A variant's factor on the rows of `W + s B A`: float64, `(1, rows, 1)` or `(1, 1, columns)` in storage."""
    if weight.storage[0] > 1:
        return None
    squares = torch.zeros(weight.storage[2 if view.flipped else 1], dtype=torch.float64, device=product.left.device)
    for start, value in weight.moved(product):
        if view.flipped:
            squares += value.square().sum(0)
        else:
            for part in value.split(_CHUNK // 2, dim=1):
                squares[start : start + value.shape[0]] += part.square().sum(1)
    wide = {name: part.double() for name, part in parts.items()}
    ratio = VARIANTS[spec.variant].row_ratio(wide, squares.sqrt())
    return ratio if ratio is None else ratio.view((1, 1, -1) if view.flipped else (1, -1, 1))


def _of_weight(ratios: Sequence[tuple[Tensor, float]]) -> Tensor | None:
    """The factor on the weight itself of several rescaled branches, each with its adapter's factor in the merge."""
    if not ratios:
        return None
    if len(ratios) == 1 and ratios[0][1] == 1:
        return ratios[0][0]
    return torch.stack([(ratio - 1) * weight for ratio, weight in ratios]).sum(0) + 1
