"""Low-rank updates added to a weight: the exact sum, rounded once, block by block.

A weight is seen as `(groups, rows, columns)` in the order in which it is stored, and what is added as `scale · left right`
for each group. Every entry of the result is the correctly rounded value of the exact sum, so that block sizes, threads
and the order of summands cannot change a bit. Knows nothing of layers, graphs or files.

How an entry is rounded: a float32 product (for results of 16 bits) and then a float64 one give an interval that holds
the exact value, with Higham's bound for sums of products ("Accuracy and Stability of Numerical Algorithms", 3.5).
Rounding is monotone, so where both of its ends round alike, that is the answer. What is left, mostly exact ties, is
summed without error by `passes.exact`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.errors import MergeError
from passes.exact import round_once, rounded_sums

HALF_DTYPES = (torch.bfloat16, torch.float16)
_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_TINY = {torch.float32: 2.0**-120, torch.float64: 2.0**-1000}
"""More than what products that underflow can lose."""
_BLOCK = 1 << 20
"""Entries that are folded at a time where the caller does not care."""
_EXACT_ROWS = 1 << 15
"""Sums that are made without error at a time."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """`scale · left right` for each group of a weight.

    Attributes:
        left: `(groups, rows, q)`, floating point, finite.
        right: `(groups, q, columns)`, likewise.
        scale: finite.
    """

    left: Tensor
    right: Tensor
    scale: float


@dataclass(slots=True)
class Loss:
    """What rounding took of an update, over the entries folded so far: sums of squares, and largest magnitudes.

    Attributes:
        update: of the exact update.
        lost: of the difference between what was written and the exact sum.
        weight: of the original weight.
        largest: the largest magnitude of an entry of the update.
        entries: how many entries were counted.
        unchanged: how many of them have the value that they had, though the update is not zero.
    """

    update: float = 0.0
    lost: float = 0.0
    weight: float = 0.0
    largest: float = 0.0
    entries: int = 0
    unchanged: int = 0

    def add(self, weight: Tensor, value: Tensor, written: Tensor) -> None:
        """Count a block.

        Args:
            weight: before, in any floating dtype.
            value: the sum, in float32 or wider.
            written: the rounded result.
        """
        before, after = weight.to(value.dtype), written.to(value.dtype)
        update = value - before
        self.update += float(update.double().square().sum())
        self.lost += float((after - value).double().square().sum())
        self.weight += float(before.double().square().sum())
        self.largest = max(self.largest, float(update.abs().max())) if update.numel() else self.largest
        self.entries += update.numel()
        self.unchanged += int(((after == before) & (update != 0)).sum())


class Fold:
    """What is added to one weight, prepared for folding any of its rows. May be used by several threads at once.

    Args:
        shape: `(groups, rows, columns)` of the weight.
        summands: what is added; the result does not depend on their order.
        dtype: of the weight: float64, float32, bfloat16 or float16.
        out_dtype: of the result; the weight's own if None.
        row_scale: `(groups, rows, 1)`, `(groups, 1, columns)` or one that broadcasts to the weight, float64: the weight
            is multiplied by it first. Sums are then rounded once from their float64 value, which is not the exact one.
        dense: `(groups, rows, columns)`, float64, added too; likewise.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        summands: Sequence[LowRank],
        dtype: torch.dtype,
        out_dtype: torch.dtype | None = None,
        *,
        row_scale: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> None:
        groups, rows, columns = shape
        for each in summands:
            assert each.left.shape[:2] == (groups, rows) and each.right.shape[::2] == (groups, columns)
        self.shape, self.dtype, self.out_dtype = shape, dtype, out_dtype or dtype
        self._row_scale, self._dense = row_scale, dense
        device = summands[0].left.device if summands else torch.device("cpu")
        empty = torch.empty(groups, 0, 0, dtype=torch.float64, device=device)
        self._left = torch.cat(
            [s.left.detach().double() for s in summands] or [empty.reshape(groups, 0, 0).expand(groups, rows, 0)], 2
        )
        self._right = torch.cat([s.right.detach().double() for s in summands] or [empty.expand(groups, 0, columns)], 1)
        scales = [torch.full((s.left.shape[2],), s.scale, dtype=torch.float64) for s in summands]
        self._scale = torch.cat(scales or [torch.empty(0, dtype=torch.float64)]).to(device)
        self._scaled = self._left * self._scale
        largest = self._right.abs().amax(2, keepdim=True) if columns else self._right.sum(2, keepdim=True)
        self._bound = (self._scaled.abs() @ largest) * (1 + 2.0**-40)  # (groups, rows, 1)
        self._by_float32 = (
            self.out_dtype in HALF_DTYPES and dtype != torch.float64 and device.type == "cpu" and self._plain
        )
        self._narrow = (self._scaled.float(), self._right.float()) if self._by_float32 else None
        self._scratch = threading.local()

    @property
    def _plain(self) -> bool:
        return self._row_scale is None and self._dense is None

    def __call__(self, weight: Tensor, loss: Loss | None = None) -> Tensor:
        """The whole weight, `(groups, rows, columns)`, folded.

        Raises:
            MergeError: when a finite entry would become NaN or infinite.
        """
        result = torch.empty(self.shape, dtype=self.out_dtype, device=weight.device)
        step = max(1, _BLOCK // max(1, self.shape[2]))
        for group in range(self.shape[0]):
            for start in range(0, self.shape[1], step):
                part = slice(start, start + step)
                self.into(result[group, part], weight[group, part], group, start, loss)
        return result

    def into(self, out: Tensor, weight: Tensor, group: int, start: int, loss: Loss | None = None) -> None:
        """Fold some rows of one group.

        Args:
            out: receives the result: `(n, columns)`, of `out_dtype`, contiguous.
            weight: the rows from `start` on, `(n, columns)`, of `dtype`.
            group: which group.
            start: the first row.
            loss: counts what rounding takes of the update, which costs about as much as the fold.

        Raises:
            MergeError: when a finite entry would become NaN or infinite.
        """
        if not out.numel():
            return
        block = _Block(self, weight, group, slice(start, start + weight.shape[0]))
        if not self._plain:
            value = block.wide_value()
            zero = (value == 0) & (weight == 0)
            out.copy_(torch.where(zero, weight.to(self.out_dtype), round_once(value, self.out_dtype)))
        else:
            value = block.round_into(out)
        if loss is not None:
            loss.add(weight, block.wide_value() if value is None else value, out)
        if block.may_overflow and not bool((out.isfinite() | ~weight.isfinite()).all()):
            raise MergeError("the merged weight would have NaN or infinite entries")


class _Block:
    """Some rows of one group while they are folded."""

    def __init__(self, fold: Fold, weight: Tensor, group: int, rows: slice) -> None:
        self._fold, self._weight, self._group, self._rows = fold, weight, group, rows
        self._bound = fold._bound[group, rows]
        self._size = weight.abs().amax(1, keepdim=True).double()
        top = torch.finfo(fold.out_dtype).max * 0.99
        self.may_overflow = not fold._plain or not bool((self._size + self._bound < top).all())

    def wide_value(self) -> Tensor:
        """The sum in float64."""
        fold, weight = self._fold, self._weight.double()
        if fold._row_scale is not None:
            scale = fold._row_scale[self._group]
            weight = weight * (scale[self._rows] if scale.shape[0] > 1 else scale)
        value = torch.addmm(weight, fold._scaled[self._group, self._rows], fold._right[self._group])
        return value if fold._dense is None else value + fold._dense[self._group, self._rows]

    def round_into(self, out: Tensor) -> Tensor | None:
        """Write the rounded sums; returns their value, not exact, if it was needed for the whole block."""
        fold, weight = self._fold, self._weight
        if not bool(self._bound.any()):
            out.copy_(weight)
            return None
        if fold.out_dtype == torch.float64:
            undecided = torch.ones_like(weight, dtype=torch.bool)
            value = None
        elif fold._narrow is not None and torch.get_float32_matmul_precision() == "highest":
            left, right = fold._narrow
            value = torch.addmm(weight.float(), left[self._group, self._rows], right[self._group])
            undecided = self._decide(value, out)
        else:
            value = self.wide_value()
            undecided = self._decide(value, out)
        self._keep(out, undecided)
        if bool(undecided.any()):
            self._finish(out, *undecided.nonzero(as_tuple=True))
        return value

    def _decide(self, value: Tensor, out: Tensor) -> Tensor:
        """Round the block to `out`; returns where that may be wrong."""
        error = self._error(value.dtype, self._size, self._bound)
        lower = _rounded(value - error, out.dtype)
        out.copy_(_rounded(value + error, out.dtype))
        return _bits(lower) != _bits(out)

    def _error(self, dtype: torch.dtype, size: Tensor, bound: Tensor) -> Tensor:
        """How far a value that was computed in a dtype, and is moved by this once more, may be from the exact one."""
        terms = self._fold._scale.shape[0] + 8
        relative = terms * _UNIT[dtype] * (1 + 2.0**-10)
        return (relative * (size + bound) + _TINY[dtype]).to(dtype) * (1 + 4 * _UNIT[dtype])

    def _keep(self, out: Tensor, undecided: Tensor) -> None:
        """Rows that get no update and entries that are not finite keep their bits."""
        rows = (self._bound == 0).squeeze(1)
        if bool(rows.any()):
            out[rows] = self._weight[rows].to(out.dtype)
            undecided[rows] = False
        if not bool(self._size.isfinite().all()):
            broken = ~self._weight.isfinite()
            out[broken] = self._weight[broken].to(out.dtype)
            undecided &= ~broken

    def _finish(self, out: Tensor, i: Tensor, j: Tensor) -> None:
        """Decide single entries: in float64, and without error where that is not enough."""
        fold, rows = self._fold, self._rows.start + i
        left, right = fold._scaled[self._group], fold._right[self._group].t()
        weight = self._weight[i, j]
        if fold.out_dtype != torch.float64:
            wide = weight.double()
            value = wide + (left[rows] * right[j]).sum(1)
            error = self._error(torch.float64, wide.abs()[:, None], self._bound[i]).squeeze(1)
            lower, upper = _rounded(value - error, out.dtype), _rounded(value + error, out.dtype)
            out[i, j] = upper
            rest = (_bits(lower) != _bits(upper)).nonzero().squeeze(1)
            i, j, rows, weight = i[rest], j[rest], rows[rest], weight[rest]
        for part in torch.arange(len(i), device=i.device).split(_EXACT_ROWS):
            left_rows, right_rows = fold._left[self._group, rows[part]], right[j[part]]
            out[i[part], j[part]] = rounded_sums(weight[part], left_rows, right_rows, fold._scale, out.dtype)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return round_once(value, dtype) if value.dtype == torch.float64 else value.to(dtype)


def _bits(value: Tensor) -> Tensor:
    return value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize])
