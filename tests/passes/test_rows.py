"""The arithmetic of rows: layouts, repeated and flattened rows, gates, dropout and the switch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.rows import (
    FIRST,
    Layout,
    RowDropout,
    RowsError,
    Selection,
    Switch,
    by_rows,
    from_rows,
    gated,
    row_index,
    stack_parts,
    stacked_lookup,
    stacked_product,
)

GATES = torch.tensor([1.0, 1.0, 1.0])
ROWS = torch.tensor([2, 0, 3, 1])  # 3 is none


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """`x (R, T, n)` with its rows where the layout says."""
    kind, dim = layout
    if kind == "dim":
        return x.movedim(0, dim)
    return (x if kind == "outer" else x.movedim(0, 1)).flatten(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from([("dim", 0), ("dim", 1), ("outer", 0), ("inner", 0)]),
    length=st.integers(1, 5),
    width=st.integers(1, 4),
    seed=st.integers(0, 10),
)
def test_each_row_has_its_own_product(layout: Layout, length: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, length, width, generator=generator, dtype=torch.float64)
    A = torch.randn(3, 2, width, generator=generator, dtype=torch.float64)
    B = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor([0.5, 2.0, -1.0])
    expected = torch.stack(
        [x[row] @ A[k].T @ B[k] * scale[k] if k < 3 else x.new_zeros(length, 5) for row, k in enumerate(ROWS.tolist())]
    )
    found = stacked_product(laid_out(x, layout), A, B, scale, Selection(GATES, ROWS), layout)
    assert torch.allclose(found, laid_out(expected, layout), atol=1e-12)
    own = [s if k == 0 else torch.zeros_like(s) for s, k in zip(expected, ROWS.tolist(), strict=True)]
    gate = gated(laid_out(expected, layout), Selection(GATES[:1], ROWS), layout)
    assert torch.equal(gate, laid_out(torch.stack(own), layout))


@settings(max_examples=30, deadline=None)
@given(gates=st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=3, max_size=3))
def test_gates_add_up(gates: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (3, 2, 3), (3, 2, 5)))
    scale = torch.tensor([0.5, 2.0, -1.0])
    expected = sum((g * s * x @ a.T @ b for g, s, a, b in zip(gates, scale, A, B, strict=True)), torch.zeros(4, 5))
    assert torch.allclose(stacked_product(x, A, B, scale, Selection(torch.tensor(gates)), FIRST), expected, atol=1e-12)


def test_repeated_and_flattened_rows() -> None:
    select = Selection(GATES, ROWS, copies=2, lengths=(7, 5))
    twice = [2, 2, 0, 0, 3, 3, 1, 1]
    for shape, expected in (
        ((4, 9, 3), ROWS.tolist()),
        ((8, 9, 3), twice),
        ((8, 3), twice),
        ((40, 3), twice),
        ((28, 3), ROWS.tolist()),
        ((1, 3), twice),
    ):
        assert row_index(select, torch.zeros(shape), FIRST).tolist() == expected, shape
    for shape in ((12, 3), (5, 3), (40, 2, 3), (16, 3)):
        with pytest.raises(RowsError, match="rows are not those of the batch"):
            row_index(select, torch.zeros(shape), FIRST)
    with pytest.raises(RowsError):
        row_index(select, torch.zeros(4, 3), ("unknown", 0))


def test_one_row_stands_for_all() -> None:
    """Positions are looked up once for the whole batch, and differ between its rows then."""
    x = torch.randn(1, 5, 3)
    A, B = torch.randn(3, 2, 3), torch.randn(3, 2, 6)
    found = stacked_product(x, A, B, torch.ones(3), Selection(GATES, ROWS), FIRST)
    whole = stacked_product(x.expand(4, 5, 3), A, B, torch.ones(3), Selection(GATES, ROWS), FIRST)
    assert found.shape == (4, 5, 6) and torch.equal(found, whole)


def test_there_and_back() -> None:
    x = torch.randn(6, 4, 3)
    for layout in (("dim", 1), ("outer", 0), ("inner", 0)):
        own = x if layout[0] == "dim" else x.flatten(0, 1)
        front, index = by_rows(own, Selection(GATES, ROWS), layout)  # pyright: ignore[reportArgumentType]
        assert front.shape == (4, 6, 3) and index.tolist() == ROWS.tolist()
        assert torch.equal(from_rows(front, own, layout), own)  # pyright: ignore[reportArgumentType]


def test_the_padding_row_of_an_embedding_is_not_trained() -> None:
    A = torch.randn(3, 2, 6, requires_grad=True)
    ids = torch.tensor([[1, 2], [0, 2], [3, 4], [2, 5]])
    for select in (Selection(GATES, ROWS), Selection(GATES)):
        out = stacked_lookup(ids, A, torch.randn(3, 2, 4), torch.ones(3), select, FIRST, 2)
        (gradient,) = torch.autograd.grad(out.sum(), A)
        assert float(gradient[:, :, 2].abs().max()) == 0 and float(gradient[2, :, 1].abs().max()) > 0


def test_ranks_are_padded() -> None:
    for role, parts in (("A", (torch.ones(2, 3), torch.ones(4, 3))), ("B", (torch.ones(3, 2), torch.ones(3, 4)))):
        stack = stack_parts(None, role, None, torch.float64, *parts)  # pyright: ignore[reportArgumentType]
        assert stack.shape == (2, 4, 3) and stack.sum(-1).tolist() == [[3, 3, 0, 0], [3, 3, 3, 3]]
        assert stack.dtype == torch.float64


def test_stacks_are_kept_until_a_part_changes() -> None:
    parts, kept = (torch.ones(2, 3), torch.zeros(2, 3)), {}
    select = Selection(GATES, ROWS, kept=kept)
    once = stack_parts(select, "A", None, None, *parts)
    first = stack_parts(select, "A", None, None, *parts)  # of a single call nothing is kept
    assert first is not once and torch.equal(first, once)
    assert stack_parts(select, "A", None, None, *parts) is first and len(kept) == 1
    parts[1].add_(1)
    assert stack_parts(select, "A", None, None, *parts).tolist() == torch.ones(2, 2, 3).tolist()
    assert stack_parts(select, "A", None, torch.float64, *parts).dtype == torch.float64
    other = (parts[0], torch.full((2, 3), 5.0))
    assert stack_parts(select, "A", None, None, *other)[1].tolist() == other[1].tolist()


def test_dropout_has_each_rows_probability() -> None:
    drop = RowDropout((0.25, 0.0, 0.75)).train()
    torch.manual_seed(0)
    x = torch.ones(4, 20_000)
    y = drop(x, Selection(GATES, ROWS))
    assert [round(float((row == 0).float().mean()), 2) for row in y] == [0.75, 0.25, 0.0, 0.0]
    assert torch.allclose(y.mean(1), torch.ones(4), atol=0.05)
    assert drop.eval()(x, Selection(GATES, ROWS)) is x
    everything = RowDropout((1.0,)).train()(x, Selection(GATES[:1], torch.tensor([0, 1, 0, 1])))
    assert everything.isfinite().all() and everything.sum(1).tolist() == [0, 20_000, 0, 20_000]


def test_the_switch() -> None:
    switch = Switch(("a", "b", "c"), [("a", "b", "c"), ("c",), ("b", "c")], in_place=True)
    gates = switch.gates
    switch.open({"c": 1.0, "a": 0.5})
    assert switch(("a", "b", "c")).gates.tolist() == [0.5, 0, 1] and switch(("b", "c")).gates.tolist() == [0, 1]
    assert switch.gates is gates and not switch.state_dict()
    switch.choose(["b", "none", "c", "a"], "none", copies=3)
    assert (switch(("c",)).copies, switch(("c",)).lengths, switch(("c",)).kept) == (3, (), None)
    with torch.no_grad():
        assert switch(("c",)).kept is switch.choice.kept
    assert [switch(key).rows.tolist() for key in (("a", "b", "c"), ("c",), ("b", "c"))] == [
        [1, 3, 2, 0], [1, 1, 0, 1], [0, 2, 1, 2],
    ]  # fmt: skip
    assert switch(("c",)).gates.tolist() == [0]
    with switch.only("b", 2):
        assert switch(("b", "c")).gates.tolist() == [1, 0] and switch.choice.names == ("b", "b")
    assert switch.choice.names == ("b", "none", "c", "a")
    switch.to(torch.bfloat16)
    assert switch.gates.dtype == torch.float32
    other = copy.deepcopy(switch)
    switch.close()
    with pytest.raises(RowsError, match="with model.adapter_rows"):
        switch(("c",))
    assert other(("c",)).rows.tolist() == [1, 1, 0, 1]
