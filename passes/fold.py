"""Low-rank updates added to a weight: the exact sum, rounded once, block by block.

A weight is seen as `(groups, rows, columns)` in the order in which it is stored, and what is added as `scale · left right`
for each group. Every entry of the result is the correctly rounded value of the exact sum, so that block sizes, threads
and the order of summands cannot change a bit. Knows nothing of layers, graphs or files.

How an entry is rounded: a float32 product (for results of 16 bits) and then a float64 one give an interval that holds
the exact value, with Higham's bound for sums of products ("Accuracy and Stability of Numerical Algorithms", 3.5).
Rounding is monotone, so where both of its ends round alike, that is the answer. What is left, mostly exact ties, is
summed without error by `passes.exact`. Results that are subnormal numbers are right unless the thread flushes them to zero
(`torch.set_flush_denormal`, off by default).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.errors import MergeError
from passes.exact import round_once, rounded_sums

Shape3 = tuple[int, int, int]
"""`(groups, rows, columns)` of a weight in the order in which it is stored."""

HALF_DTYPES = (torch.bfloat16, torch.float16)
_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_LARGEST = {torch.float32: 2.0**20, torch.float64: 2.0**200}
"""Of factors; with larger ones a dtype is not used."""
_TINY = {torch.float32: 2.0**-90, torch.float64: 2.0**-700}
"""More than what products of such factors lose by underflow, also where subnormal numbers are flushed to zero."""
_PRODUCT_ERRORS = 6
"""Roundings of a product beside those of the sum over k: both factors, and what it adds to those below."""
_SUM_ERRORS = 8
"""Roundings of the whole: the weight's factor, its product, the addition, two of an end of the interval; and three to
spare, since one and so many units more is a number of the dtype."""
_BLOCK = 1 << 20
"""Entries that are folded at a time where the caller does not care."""
_SAMPLE = 1 << 16
"""Entries that are looked at to estimate what rounding takes."""
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


@dataclass(frozen=True, slots=True)
class NewRows:
    """Rows that take the place of a weight's own before anything is added.

    Attributes:
        ids: `(n,)`, int64: which rows, each once; only for a weight of one group.
        values: `(n, columns)`, floating point, finite.
    """

    ids: Tensor
    values: Tensor


@dataclass(slots=True)
class Loss:
    """What rounding took of an update, over the rows counted so far: sums of squares, and largest magnitudes.

    Attributes:
        every: of how many rows of the weight one is counted.
        update: of the update.
        lost: of the difference between what was written and the sum.
        weight: of the original weight.
        largest: the largest magnitude of an entry of the update.
        entries: how many entries were counted.
        unchanged: how many of them have the value that they had, though the update is not zero.
    """

    every: int = 1
    update: float = 0.0
    lost: float = 0.0
    weight: float = 0.0
    largest: float = 0.0
    entries: int = 0
    unchanged: int = 0

    @classmethod
    def sample(cls, num_entries: int) -> Loss:
        """One that counts some rows of a weight, spread evenly: about 65,536 entries, or all if it has no more."""
        return cls(every=max(1, num_entries // _SAMPLE))

    @classmethod
    def total(cls, parts: Iterable[Loss]) -> Loss:
        """What several counted together; the last bits of the sums depend on their order."""
        result = cls()
        for part in parts:
            result = cls(
                part.every,
                result.update + part.update,
                result.lost + part.lost,
                result.weight + part.weight,
                max(result.largest, part.largest),
                result.entries + part.entries,
                result.unchanged + part.unchanged,
            )
        return result

    def add(self, weight: Tensor, value: Tensor, written: Tensor) -> None:
        """Count some rows. Entries that are not finite keep their bits and are left out.

        Args:
            weight: before, in any floating dtype.
            value: the sum, float64.
            written: the rounded result.
        """
        finite = weight.isfinite()
        before, after, value = weight[finite].double(), written[finite].double(), value[finite]
        if not before.numel():
            return
        update = value - before
        self.update += float(update.square().sum())
        self.lost += float((after - value).square().sum())
        self.weight += float(before.square().sum())
        self.largest = max(self.largest, float(update.abs().max()))
        self.entries += update.numel()
        self.unchanged += int(((after == before) & (update != 0)).sum())


class Memory:
    """Memory that is used again for each block: fresh pages cost more than the arithmetic. For one thread."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def buffer(self, use: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for one use, with whatever was there."""
        numel, nbytes = shape.numel(), shape.numel() * dtype.itemsize
        kept = self._buffers.get((use, device))
        if kept is None or kept.numel() < nbytes:
            kept = self._buffers[use, device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return kept[:nbytes].view(dtype)[:numel].view(shape)


class Fold:
    """What is added to one weight, prepared for folding any of its rows. May be used by several threads at once.

    Args:
        shape: of the weight.
        summands: what is added; the result does not depend on their order.
        dtype: of the weight: float64, float32, bfloat16 or float16.
        out_dtype: of the result; the weight's own if None.
        factor: `(groups, rows, 1)` or `(groups, 1, columns)`, float64: what the weight is multiplied by first.
        new_rows: rows that are replaced.
        dense: `(groups, rows, columns)`, float64, which is added too. Sums are then rounded once from their float64
            value, which is not the exact one.
    """

    def __init__(
        self,
        shape: Shape3,
        summands: Sequence[LowRank],
        dtype: torch.dtype,
        out_dtype: torch.dtype | None = None,
        *,
        factor: Tensor | None = None,
        new_rows: NewRows | None = None,
        dense: Tensor | None = None,
    ) -> None:
        groups, rows, columns = shape
        for each in summands:
            assert each.left.shape[:2] == (groups, rows) and each.right.shape[::2] == (groups, columns)
        self.shape, self.dtype, self.out_dtype = shape, dtype, out_dtype or dtype
        self.factor, self.dense = factor, dense
        device = summands[0].left.device if summands else None
        nothing = LowRank(
            torch.empty(groups, rows, 0, device=device), torch.empty(groups, 0, columns, device=device), 1.0
        )
        parts = summands or (nothing,)
        self.left = torch.cat([each.left.detach() for each in parts], 2).double()
        self.right = torch.cat([each.right.detach() for each in parts], 1).double()
        self.scale = torch.cat([self.left.new_full((each.left.shape[2],), each.scale) for each in parts])
        self.scaled = self.left * self.scale
        self.columns = self.right.mT.contiguous()
        longest = self.right.norm(dim=1).amax(1).view(-1, 1, 1) if columns else self.right.new_zeros(groups, 1, 1)
        self.bound = self.scaled.norm(dim=2, keepdim=True) * longest * (1 + 2.0**-40)
        """Of the sum of the magnitudes of an entry's products, by Cauchy and Schwarz: `(groups, rows, 1)`."""
        if not bool(self.bound.isfinite().all()):
            raise MergeError("the merged weight would have NaN or infinite entries")
        size = max((float(each.abs().max()) for each in (self.scaled, self.right) if each.numel()), default=0.0)
        self.only_exact = self.out_dtype == torch.float64 or size > _LARGEST[torch.float64]
        first = self.out_dtype in HALF_DTYPES and dtype != torch.float64 and self.left.device.type == "cpu"
        self.narrow = (self.scaled.float(), self.right.float()) if first and size < _LARGEST[torch.float32] else None
        self._new_rows = _RowFold.of(self, new_rows) if new_rows is not None else None

    def __call__(self, weight: Tensor, loss: Loss | None = None) -> Tensor:
        """The whole weight, `(groups, rows, columns)`, folded.

        Raises:
            MergeError: when a finite entry would become NaN or infinite.
        """
        result = torch.empty(self.shape, dtype=self.out_dtype, device=weight.device)
        step, memory = max(1, _BLOCK // max(1, self.shape[2])), Memory()
        for group in range(self.shape[0]):
            for start in range(0, self.shape[1], step):
                part = slice(start, start + step)
                self.into(result[group, part], weight[group, part], group, start, loss, memory)
        return result

    def into(
        self,
        out: Tensor,
        weight: Tensor,
        group: int,
        start: int,
        loss: Loss | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Fold some rows of one group.

        Args:
            out: receives the result: `(n, columns)`, of `out_dtype`, contiguous.
            weight: the rows from `start` on, `(n, columns)`, of `dtype`.
            group: which group.
            start: the first row.
            loss: counts what rounding takes of the update, on the rows that it wants; an entry costs more than its fold.
            memory: of the calling thread; fresh memory if None.

        Raises:
            MergeError: when a finite entry would become NaN or infinite.
        """
        if not out.numel():
            return
        block = _Block(self, weight, group, slice(start, start + weight.shape[0]), memory or Memory())
        block.round_into(out)
        if loss is not None:
            self._count(loss, weight, out, group, start)
        if block.may_overflow and not bool((out.isfinite() | ~weight.isfinite()).all()):
            raise MergeError("the merged weight would have NaN or infinite entries")
        if self._new_rows is not None:
            self._new_rows.into(out, start)

    def wide_value(self, weight: Tensor, group: int, start: int) -> Tensor:
        """The sum for the rows of one group from `start` on, in float64 and not exact."""
        return _Block(self, weight, group, slice(start, start + weight.shape[0]), Memory()).wide_value()

    def _count(self, loss: Loss, weight: Tensor, out: Tensor, group: int, start: int) -> None:
        first = -(group * self.shape[1] + start) % loss.every
        chosen, rows = slice(first, None, loss.every), slice(start + first, start + weight.shape[0], loss.every)
        if first < weight.shape[0]:
            loss.add(weight[chosen], _Block(self, weight[chosen], group, rows, Memory()).wide_value(), out[chosen])

    def of_rows(self, ids: Tensor, dtype: torch.dtype) -> Fold:
        """The same for some rows of the one group, whose values have a dtype of their own."""
        assert self.shape[0] == 1
        shape = (1, ids.shape[0], self.shape[2])
        factor, dense = (x[:, ids] if x is not None and x.shape[1] > 1 else x for x in (self.factor, self.dense))
        parts = [
            LowRank(self.left[:, ids, i : i + 1], self.right[:, i : i + 1], s)
            for i, s in enumerate(self.scale.tolist())
        ]
        return Fold(shape, parts, dtype, self.out_dtype, factor=factor, dense=dense)


@dataclass(frozen=True, slots=True)
class _RowFold:
    """Replaced rows, folded."""

    ids: Tensor
    rows: Tensor

    @classmethod
    def of(cls, fold: Fold, new: NewRows) -> _RowFold:
        if not bool(new.values.isfinite().all()):
            raise MergeError("the merged weight would have NaN or infinite entries")
        rows = fold.of_rows(new.ids, new.values.dtype)(new.values[None])
        return cls(new.ids, rows[0])

    def into(self, out: Tensor, start: int) -> None:
        here = (self.ids >= start) & (self.ids < start + out.shape[0])
        if bool(here.any()):
            out[self.ids[here] - start] = self.rows[here].to(out.device)


class _Block:
    """Some rows of one group while they are folded."""

    def __init__(self, fold: Fold, weight: Tensor, group: int, rows: slice, memory: Memory) -> None:
        self._fold, self._weight, self._group, self._rows, self._memory = fold, weight, group, rows, memory
        self._bound = fold.bound[group, rows]
        self.may_overflow = True

    def wide_value(self) -> Tensor:
        """The sum in float64, valid until the next use of the memory."""
        return self._value(torch.float64, self._fold.scaled, self._fold.right)

    def round_into(self, out: Tensor) -> None:
        """Write the rounded sums."""
        fold, weight = self._fold, self._weight
        if fold.dense is not None:
            value = self.wide_value()
            kept = ((value == 0) & (weight == 0)) | ~weight.isfinite()
            out.copy_(torch.where(kept, _rounded(weight, out.dtype), round_once(value, out.dtype)))
        elif fold.factor is None and not bool(self._bound.any()):
            out.copy_(_rounded(weight, out.dtype))
        else:
            self._finish(out, *self._keep(out, *self._first_round(out)))

    def _first_round(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Round to `out` what one product decides; returns the other entries."""
        if self._fold.only_exact:
            i, j = torch.ones_like(self._weight, dtype=torch.bool).nonzero(as_tuple=True)
            return i, j
        narrow = self._fold.narrow if _multiplies_in_float32() else None
        return self._decide(self.wide_value() if narrow is None else self._value(torch.float32, *narrow), out)

    def _value(self, dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
        value = torch.mm(left[self._group, self._rows], right[self._group], out=self._buffer("value", dtype))
        weight = self._buffer("end", dtype).copy_(self._weight)
        factor = self._fold.factor
        if factor is not None:
            weight *= (factor[self._group] if factor.shape[1] == 1 else factor[self._group, self._rows]).to(dtype)
        value += weight
        return value if self._fold.dense is None else value.add_(self._fold.dense[self._group, self._rows])

    def _decide(self, value: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Round the block to `out`; returns the entries where that may be wrong."""
        _round_into(out, value)
        lower, upper = self._ends(value.abs_(), self._bound, self._buffer("end", value.dtype))
        self.may_overflow = not bool(upper.amax() < 0.9 * torch.finfo(out.dtype).max)
        rounded = self._buffer("lower", out.dtype), self._buffer("upper", out.dtype)
        _round_into(rounded[0], lower)
        _round_into(rounded[1], upper)
        return _nonzero(_bits(rounded[0]).bitwise_xor_(_bits(rounded[1])))

    def _ends(self, size: Tensor, bound: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Magnitudes between which an exact one lies, which has its value's sign if the first of them is not negative.

        Args:
            size: of a value computed in its dtype; overwritten with the second one.
            bound: of the sum of the magnitudes of a value's products, float64; broadcasts to it.
            out: memory for the first one.
        """
        unit = _UNIT[size.dtype]
        products = unit * (1 + 2.0**-10) * (self._fold.scale.shape[0] + _PRODUCT_ERRORS) * bound + _TINY[size.dtype]
        products = products.to(size.dtype)
        lower = torch.add(-products, size, alpha=1 - _SUM_ERRORS * unit, out=out)
        return lower, torch.add(products, size, alpha=1 + _SUM_ERRORS * unit, out=size)

    def _keep(self, out: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Write those entries that keep their bits: rows without an update, and what is not finite. Returns the others."""
        if self._fold.factor is None and (same := (self._bound == 0).squeeze(1)).any():
            out[same] = _rounded(self._weight[same], out.dtype)
            others = ~same[i]
            i, j = i[others], j[others]
        if self.may_overflow and not bool((finite := self._weight.isfinite()).all()):
            out[~finite] = _rounded(self._weight[~finite], out.dtype)
            others = finite[i, j]
            i, j = i[others], j[others]
        return i, j

    def _finish(self, out: Tensor, i: Tensor, j: Tensor) -> None:
        """Decide single entries: in float64, and without error where that is not enough."""
        fold, group = self._fold, self._group
        if not fold.only_exact:
            rows, value = self._rows.start + i, self._weight[i, j].double()
            if (factor := self._factor(rows, j)) is not None:
                value *= factor
            value += (fold.scaled[group].index_select(0, rows) * fold.columns[group].index_select(0, j)).sum(1)
            nearest, lower, upper = _rounded(
                torch.stack((value, *self._ends(value.abs(), self._bound[i, 0]))), out.dtype
            )
            out[i, j] = nearest
            rest = (_bits(lower) != _bits(upper)).nonzero().squeeze(1)
            i, j = i[rest], j[rest]
        for first in range(0, len(i), _EXACT_ROWS):
            k = slice(first, first + _EXACT_ROWS)
            out[i[k], j[k]] = self._exact(i[k], j[k], out.dtype)

    def _exact(self, i: Tensor, j: Tensor, dtype: torch.dtype) -> Tensor:
        fold, group, rows = self._fold, self._group, self._rows.start + i
        start, left, right, scale = (
            self._weight[i, j].double(),
            fold.left[group, rows],
            fold.columns[group, j],
            fold.scale,
        )
        if (factor := self._factor(rows, j)) is not None:
            left, right = torch.cat([left, start[:, None]], 1), torch.cat([right, factor[:, None]], 1)
            scale, start = torch.cat([scale, scale.new_ones(1)]), torch.where(start == 0, start, 0.0)
        return rounded_sums(start, left, right, scale, dtype)

    def _factor(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        factor = self._fold.factor
        if factor is None:
            return None
        return factor[self._group, 0, columns] if factor.shape[1] == 1 else factor[self._group, rows, 0]

    def _buffer(self, use: str, dtype: torch.dtype) -> Tensor:
        return self._memory.buffer(use, self._weight.shape, dtype, self._weight.device)


def _multiplies_in_float32() -> bool:
    """Whether float32 products are what they say: they may be made of tf32 or bfloat16 ones."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by the newer names, backend by backend, which this one does not know
        return False


def _nonzero(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of what is not zero in a matrix of integers, by way of the words that hold several of them."""
    columns, width = bits.shape[1], 64 // bits.itemsize
    if bits.numel() % width:
        i, j = bits.nonzero(as_tuple=True)
        return i, j
    words = bits.view(-1, width)
    some = words.view(torch.int64).bool().view(torch.int64).flatten()  # eight truth values of one byte each
    found = some.nonzero().squeeze(1)
    which, place = words.index_select(0, found).nonzero(as_tuple=True)
    flat = found[which] * width + place
    return flat.div(columns, rounding_mode="floor"), flat % columns


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once, unlike torch's cast of float64."""
    return round_once(value, dtype) if value.dtype == torch.float64 else value.to(dtype)


def _round_into(out: Tensor, value: Tensor) -> None:
    out.copy_(_rounded(value, out.dtype) if value.dtype == torch.float64 else value)


def _bits(value: Tensor) -> Tensor:
    return value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize])
