"""Which adapters act on which rows of a batch: `Selection`, the leaf `Switch` that gives it to graphs, and its arithmetic.

A graph that holds several adapters at once reads the selection at run time, so that another choice is another value and
not another graph. A *slot* is a place in the stack of a site's factors: `A (S, r, in)`, `B (S, r, out)`, `scale (S,)`.
With gates every row has `Σ gateₖ scaleₖ Bₖ Aₖ`; with rows each row of the batch has its own slot, and its factors are
gathered for two batched products (the operation of Punica, arXiv:2310.18547, in plain PyTorch).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.errors import FxloraError

Layout = tuple[Literal["dim", "outer", "inner", "unknown"], int]
"""Where the rows of the batch lie in a tensor: in a dimension of their own; outermost, or innermost, in a dimension that
also holds something else, such as flattened tokens; or not known. And which dimension."""

FIRST: Layout = ("dim", 0)
LAYOUT = "rows"
"""Key of a node's metadata for its layout, where a capture knows it."""


class RowsError(FxloraError, ValueError):
    """An input whose rows cannot be told apart, where each row has an adapter of its own."""


class KeptStack(NamedTuple):
    """A stack, with the tensors that it was made of and their versions, by which a change of values shows."""

    parts: tuple[Tensor, ...]
    versions: tuple[int, ...]
    value: Tensor

    def is_of(self, parts: tuple[Tensor, ...], versions: tuple[int, ...], dtype: torch.dtype | None) -> bool:
        """Whether it is what these tensors give now."""
        same = all(one is other for one, other in zip(self.parts, parts, strict=True))
        return same and self.versions == versions and dtype in (None, self.value.dtype)


class Selection(NamedTuple):
    """What is chosen among the slots of one site.

    Attributes:
        gates: float32 `(S,)`, how much of each slot all rows use.
        rows: int64 `(R,)`, the slot of each row of the batch, `S` for none; None if `gates` holds for all.
        copies: how many rows in sequence one row has become, by beam search or several returned sequences.
        lengths: numbers of tokens that a row may have, where tokens are flattened into rows.
        kept: stacks that were made before and hold as long as this choice; None if none are kept. The first call of a
            site keeps nothing.
    """

    gates: Tensor
    rows: Tensor | None = None
    copies: int = 1
    lengths: tuple[int, ...] = ()
    kept: dict[object, KeptStack | None] | None = None


@dataclass
class Choice:
    """What is chosen now, for the whole model.

    Attributes:
        count: number of rows; 0 if gates hold for all. Compiled code reads this, and not the names.
        names: the adapter of each row.
        rows: the slots of the rows, by the adapters that a site has.
        copies: see `Selection`.
        lengths: see `Selection`.
        kept: see `Selection`.
    """

    count: int = 0
    names: tuple[str, ...] = ()
    rows: dict[tuple[str, ...], Tensor] = field(default_factory=dict[tuple[str, ...], Tensor])
    copies: int = 1
    lengths: tuple[int, ...] = ()
    kept: dict[object, KeptStack | None] = field(default_factory=lambda: dict[object, KeptStack | None]())


class Switch(nn.Module):
    """Gives graphs the selection. One object for a whole model, registered at every site.

    `gates` is a buffer: compiled and exported graphs read it, and a switch is a copy into it. Not in the state dict.

    Args:
        order: names of the adapters, in the order of the slots.
        keys: which of them the sites have, each in this order.
        device: where the model is.
        in_place: whether the buffer stays the same tensor also where gradients are computed, whose backward pass may need
            the old values.
    """

    gates: Tensor

    def __init__(
        self,
        order: Sequence[str],
        keys: Iterable[tuple[str, ...]],
        device: torch.device | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        super().__init__()
        self._order = tuple(order)
        self._in_place = in_place
        self._keys = tuple(dict.fromkeys(keys))
        self.choice = Choice()
        self._closed = False
        place = None if device is not None and device.type == "meta" else device
        self.register_buffer("gates", torch.zeros(len(self._order), device=place), persistent=False)
        for number, key in enumerate(self._keys):
            if key != self._order:
                index = torch.tensor([self._order.index(name) for name in key], device=place)
                self.register_buffer(f"index_{number}", index, persistent=False)

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of the slots."""
        return self._order

    def open(self, weights: dict[str, float]) -> None:
        """Let all rows use these adapters, each times its weight: a copy into the buffer that graphs read."""
        values = [float(weights.get(name, 0.0)) for name in self._order]
        if torch.is_grad_enabled() and not self._in_place:
            self.gates = torch.empty_like(self.gates)
        self.gates.copy_(torch.tensor(values, device=self.gates.device))
        self.choice, self._closed = Choice(), False

    def choose(self, names: Sequence[str], base: str, copies: int = 1) -> None:
        """Let each row use one adapter, or none where its name is `base`. If all are the same, gates are set too.

        Args:
            names: of the adapter of each row.
            base: the name that stands for none.
            copies: see `Selection`.
        """
        self.open({names[0]: 1.0} if len(set(names)) == 1 and names[0] != base else {})
        rows = {
            key: torch.tensor(
                [key.index(name) if name in key else len(key) for name in names], device=self.gates.device
            )
            for key in self._keys
        }
        self.choice = Choice(len(names), tuple(names), rows, copies)

    @contextmanager
    def only(self, name: str, count: int) -> Generator[None]:
        """Within this context these rows, so many, all use one adapter: for a part of the batch that is run alone."""
        choice, gates = self.choice, self.gates
        self.gates = torch.tensor([float(each == name) for each in self._order], device=gates.device)
        self.choice = Choice(count, (name,) * count)
        try:
            yield
        finally:
            self.choice, self.gates = choice, gates

    def close(self) -> None:
        """Let nothing use the graph until something is chosen: what runs then would compute with a choice that is gone."""
        self.choice, self._closed = Choice(), True

    def forward(self, names: tuple[str, ...]) -> Selection:
        """The selection among the slots of a site, which has these adapters in this order.

        Raises:
            RowsError: after `close`.
        """
        if self._closed:
            raise RowsError(
                "this pass runs after the call with adapter_names has ended. If gradient checkpointing runs the model "
                "again, put the forward and the backward pass into 'with model.adapter_rows(names):'; to call a part of "
                "the model alone, call set_adapter first"
            )
        choice = self.choice
        if choice.rows and names:
            keeps = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
            kept = choice.kept if keeps else None
            return Selection(self._gates(names), choice.rows[names], choice.copies, choice.lengths, kept)
        return Selection(self._gates(names))

    def _gates(self, names: tuple[str, ...]) -> Tensor:
        if names == self._order or not names:
            return self.gates
        return self.gates.index_select(0, getattr(self, f"index_{self._keys.index(names)}"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        gates = self.gates.clone()
        super()._apply(fn, recurse)
        if self.gates.dtype != torch.float32:
            self.gates = gates.to(self.gates.device)
        return self

    def extra_repr(self) -> str:
        """The names of the slots, for `print(model)`."""
        return ", ".join(self._order)


class RowDropout(nn.Module):
    """Dropout with a probability for each row, that of the row's adapter. In evaluation its input.

    Attributes:
        probabilities: one for each slot of the site.
    """

    def __init__(self, probabilities: Sequence[float]) -> None:
        super().__init__()
        self.probabilities = tuple(probabilities)

    def forward(self, x: Tensor, select: Selection, layout: Layout = FIRST) -> Tensor:
        """`x` with dropped entries, scaled so that its expectation stays."""
        if not self.training:
            return x
        drop = torch.tensor((*self.probabilities, 0.0), device=x.device)
        if select.rows is None:
            chosen = (select.gates != 0).to(drop)  # one adapter or none: see `Switch.choose`
            keep = 1 - (drop[:-1] * chosen).sum().expand(x.shape)
        else:
            keep = _spread((1 - drop)[row_index(select, x, layout)], x, layout).expand(x.shape)
        kept = torch.bernoulli(keep).to(x.dtype)
        return x * kept / torch.where(keep > 0, keep, 1).to(x.dtype)


# ---- rows of a tensor ----


def layout_of(node: fx.Node) -> Layout:
    """The layout of a node's value: as a capture has noted it, else the convention that the batch is in front."""
    return node.meta.get(LAYOUT, FIRST)


def row_index(select: Selection, x: Tensor, layout: Layout) -> Tensor:
    """The slot of each row of `x`: `(R,)`, or `(R · copies,)` where rows were repeated.

    Raises:
        RowsError: when the size of `x` fits neither.
    """
    assert select.rows is not None
    kind, dim = layout
    rows, size = select.rows.to(x.device), x.shape[dim]
    repeated = rows.repeat_interleave(select.copies) if select.copies > 1 else rows
    if kind != "unknown":
        if size == rows.shape[0]:
            return rows
        if size in (1, repeated.shape[0]) or (kind != "dim" and size % repeated.shape[0] == 0):
            return repeated
        if layout == FIRST and x.dim() <= 2:  # flattened tokens; experts' inputs look so too, but have other sizes
            for each in (repeated, rows):
                if any(size == each.shape[0] * length for length in select.lengths):
                    return each
    raise RowsError(
        f"adapter_names has {rows.shape[0]} names{f' for {repeated.shape[0]} rows' if select.copies > 1 else ''}, but "
        f"here the input is {tuple(x.shape)}, whose rows are not those of the batch"
    )


def by_rows(x: Tensor, select: Selection, layout: Layout) -> tuple[Tensor, Tensor]:
    """`x` with the rows of the batch in front, all else but the last dimension flattened; and the slot of each row.

    Returns:
        `(R, n, features)` and `(R,)`.
    """
    index = row_index(select, x, layout)
    if layout == FIRST and x.dim() == 3 and x.shape[0] == index.shape[0]:
        return x, index
    kind, dim = layout
    front = x.movedim(dim, 0)
    if front.shape[0] == 1:
        front = front.expand(index.shape[0], *front.shape[1:])
    if kind == "inner":
        front = front.unflatten(0, (-1, index.shape[0])).movedim(1, 0)
    return front.reshape(index.shape[0], -1, x.shape[-1]), index


def from_rows(y: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """What `by_rows` did to `x`, undone for a result `(R, n, features)`."""
    kind, dim = layout
    shape = [*x.movedim(dim, 0).shape[:-1], y.shape[-1]]
    if kind == "inner":
        y = y.movedim(0, 1)
    elif shape[0] == 1:
        shape[0] = y.shape[0]
    return y.reshape(shape).movedim(0, dim)


def _spread(value: Tensor, y: Tensor, layout: Layout) -> Tensor:
    """One value for each row of the batch, shaped to multiply a tensor `y` of the layout."""
    value = _as_often(value, y, layout)
    return value.view(-1, *[1] * (y.dim() - 1)).movedim(0, layout[1])


def _as_often(values: Tensor, y: Tensor, layout: Layout) -> Tensor:
    """`values (R, …)` repeated to the size of the dimension that holds the rows of `y`."""
    kind, dim = layout
    times = y.shape[dim] // values.shape[0]
    if times <= 1:
        return values
    return values.repeat(times, *[1] * (values.dim() - 1)) if kind == "inner" else values.repeat_interleave(times, 0)


# ---- what graphs call ----


Role = Literal["A", "B", "other"]
View = tuple[str, tuple[object, ...]]


def stack_parts(
    select: Selection | None, role: Role, view: View | None, dtype: torch.dtype | None, *parts: Tensor
) -> Tensor:
    """Tensors of several branches as one.

    Args:
        select: the selection. Without gradients a stack that is used again is kept as long as this holds; if None, never.
        role: `A`: matrices `(rᵢ, n)`; `B`: `(n, rᵢ)`; other: tensors of one shape.
        view: a method that makes the parts such matrices, and its arguments.
        dtype: of the result; the parts' own if None.
        parts: one for each slot.

    Returns:
        `(S, r, n)` with the largest rank, zero where a rank is below it; for others `(S, …)`.
    """
    if select is None or select.kept is None:
        return _stack(role, view, dtype, parts)
    key = (id(parts[0]), role)
    if key not in select.kept:  # for a call alone, keeping all stacks would only take memory
        select.kept[key] = None
        return _stack(role, view, dtype, parts)
    versions = tuple(0 if part.is_inference() else part._version for part in parts)
    kept = select.kept[key]
    if kept is None or not kept.is_of(parts, versions, dtype):
        kept = KeptStack(parts, versions, _stack(role, view, dtype, parts).contiguous())
        select.kept[key] = kept
    return kept.value


def _stack(role: Role, view: View | None, dtype: torch.dtype | None, parts: Sequence[Tensor]) -> Tensor:
    if view is not None:
        parts = [getattr(part, view[0])(*view[1]) for part in parts]
    ranks = [part.shape[1 if role == "B" else 0] for part in parts] if role != "other" else []
    if len(set(ranks)) > 1:  # zeros cost a copy of each part
        missing = [max(ranks) - rank for rank in ranks]
        parts = [F.pad(p, (0, m) if role == "B" else (0, 0, 0, m)) for p, m in zip(parts, missing, strict=True)]
    stack = torch.stack(list(parts))
    stack = stack if dtype is None else stack.to(dtype)
    return stack.mT if role == "B" else stack


def per_rank(select: Selection, scale: Tensor, A: Tensor) -> Tensor:
    """`gateₖ · scaleₖ` for each row of the stacked factors: `(S · r,)`."""
    return (select.gates.to(A.device) * scale).to(A.dtype).repeat_interleave(A.shape[1])


def row_scale(scale: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each row's slot, 0 for a row without one: `(R, 1, 1)`."""
    return F.pad(scale, (0, 1)).to(dtype).index_select(0, index).view(-1, 1, 1)


def any_slot(index: Tensor, slots: int) -> Tensor:
    """The slot of each row, and for a row without one, whose scale is 0, any."""
    return index.clamp(max=slots - 1)


def gather(stack: Tensor, slot: Tensor) -> Tensor:
    """The matrix of each row's slot, `(R, …)`; copied as it lies in memory, which is faster for transposed ones."""
    return stack.index_select(0, slot) if stack.is_contiguous() else stack.mT.index_select(0, slot).mT


def stacked_product(x: Tensor, A: Tensor, B: Tensor, scale: Tensor, select: Selection, layout: Layout) -> Tensor:
    """The scaled branches of a linear layer: two products for the whole batch.

    Args:
        x: `(…, in)`.
        A: `(S, r, in)`.
        B: `(S, r, out)`.
        scale: float32 `(S,)`.
        select: the selection.
        layout: of the rows in `x`.

    Returns:
        `(…, out)`.
    """
    if select.rows is None:
        a = F.linear(x, A.flatten(0, 1)) * per_rank(select, scale, A)
        return torch.matmul(a, B.flatten(0, 1))
    front, index = by_rows(x, select, layout)
    slot = any_slot(index, A.shape[0])
    a = torch.bmm(front, gather(A, slot).mT)
    y = torch.bmm(a * row_scale(scale, index, a.dtype), gather(B, slot))
    return y if front is x else from_rows(y, x, layout)


def stacked_lookup(
    x: Tensor, A: Tensor, B: Tensor, scale: Tensor, select: Selection, layout: Layout, padding_idx: int | None
) -> Tensor:
    """The scaled branches of an embedding.

    Args:
        x: indices, any shape.
        A: `(S, r, V)`.
        B: `(S, r, D)`.
        scale: float32 `(S,)`.
        select: the selection.
        layout: of the rows in `x`.
        padding_idx: the index whose column of A gets no gradient, as in the layer.

    Returns:
        `(*x.shape, D)`.
    """
    ids = x.unsqueeze(-1)
    if select.rows is None:
        a = F.embedding(x, A.flatten(0, 1).t(), padding_idx) * per_rank(select, scale, A)
        return torch.matmul(a, B.flatten(0, 1))
    front, index = by_rows(ids, select, layout)
    slot = any_slot(index, A.shape[0])
    a = A[slot[:, None], :, front[..., 0]]
    if padding_idx is not None:
        a = torch.where(front == padding_idx, a.detach(), a)
    y = torch.bmm(a * row_scale(scale, index, a.dtype), gather(B, slot))
    return from_rows(y, ids, layout)


def masked_ranks(a: Tensor, scale: Tensor, A: Tensor, select: Selection, layout: Layout, channels: int) -> Tensor:
    """The inner activations of all slots, scaled, those of other rows' slots set to zero.

    Args:
        a: `(R, S · r, *positions)`, or without R.
        scale: float32 `(S,)`.
        A: `(S, r, …)`.
        select: the selection.
        layout: of the rows in `a`; its dimension is the first.
        channels: which dimension of `a` has the ranks, from the end.
    """
    shape = [1] * (-1 - channels)
    if select.rows is None:
        return a * per_rank(select, scale, A).view(-1, *shape)
    if a.dim() != 2 + len(shape):
        raise RowsError(f"an inner output of shape {tuple(a.shape)} has no rows of a batch")
    chosen = F.one_hot(row_index(select, a, layout), A.shape[0] + 1)[:, :-1]
    weights = _as_often((chosen * scale).to(a.dtype).repeat_interleave(A.shape[1], 1), a, layout)
    return a * weights.view(*weights.shape, *shape)


def gated(s: Tensor, select: Selection, layout: Layout) -> Tensor:
    """The result of one adapter's branch, for the rows that use it; zero for the others. The site has this one slot."""
    if select.rows is None:
        return s * select.gates[0].to(s.device, s.dtype)
    chosen = _spread(row_index(select, s, layout) == 0, s, layout)
    return torch.where(chosen, s, 0)


def gated_weight(s: Tensor, select: Selection) -> Tensor:
    """The change of a weight, which is one for the whole batch: that of the gates, also where rows have adapters."""
    return s * select.gates[0].to(s.device, s.dtype)


def channel_values(values: Tensor, y: Tensor, select: Selection, layout: Layout, channels: int) -> Tensor:
    """Of vectors `(S, out)` the one of each row's slot, or the sum of the gated ones, shaped to multiply the output `y`."""
    positions = [1] * (-1 - channels)
    if select.rows is None:
        return (select.gates.to(values) @ values).view(-1, *positions)
    chosen = _as_often(F.pad(values, (0, 0, 0, 1))[row_index(select, y, layout)], y, layout)
    middle = y.dim() - 2 - len(positions)
    if middle < 0:
        raise RowsError(f"an output of shape {tuple(y.shape)} has no rows of a batch")
    shaped = chosen.view(chosen.shape[0], *[1] * middle, chosen.shape[1], *positions)
    return shaped.movedim(0, layout[1])


def add_channels(s: Tensor, values: Tensor, scale: Tensor, select: Selection, layout: Layout, channels: int) -> Tensor:
    """The branch's own bias, scaled, added to its result: `values (S, out)`."""
    return s + channel_values(values * scale[:, None].to(values.dtype), s, select, layout, channels).to(s.dtype)
