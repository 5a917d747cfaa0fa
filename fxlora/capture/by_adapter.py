"""A module whose rows cannot have different adapters at once is run once for each adapter of the batch, on its rows.

That is so where adapters are in a weight (an attention, a recurrent layer, experts), or replace a whole module
(`modules_to_save`). No row is computed twice. `modules` capture only: a graph has no module to call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from fxlora._passes import FIRST, SAVED, SWITCH, RowsError, Selection, Switch, row_index
from fxlora.serving import BASE

Forward = Callable[..., Any]

MASKS = ("attn_mask", "src_mask", "mask")
"""Inputs of an attention that all rows share, or that have a matrix for each head of each row."""

SHARED = ("cache_position", "position_ids")
"""Inputs that count tokens, and not rows."""


def once_for_each_adapter(forward: Forward) -> Forward:
    """A forward that splits its inputs by the adapters of their rows, and joins the outputs again."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        switch = next(iter(cast(nn.ModuleDict, self._modules[SWITCH]).values()))
        assert isinstance(switch, Switch)
        names = switch.choice.names
        distinct = list(dict.fromkeys(names))
        if not names:
            switch(())  # says so if nothing is chosen any more
            return forward(self, *args, **kwargs)
        if len(distinct) == 1:
            return _run(self, forward, distinct[0], args, kwargs)
        rows = _names_of_rows(self, switch, args, kwargs)
        outputs: list[Any] = []
        places = [[place for place, name in enumerate(rows) if name == each] for each in distinct]
        for each, place in zip(distinct, places, strict=True):
            parts = _take(self, forward, args, kwargs, place, len(rows))
            with switch.only(each, len(place)):
                outputs.append(_run(self, forward, each, *parts))
        return _join(self, outputs, places, len(rows))

    return run


def _run(module: nn.Module, forward: Forward, adapter: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    copies = module._modules.get(SAVED)
    if copies is not None and adapter != BASE and adapter in copies._modules:
        return cast(nn.Module, copies._modules[adapter])(*args, **kwargs)
    return forward(module, *args, **kwargs)


def _names_of_rows(module: nn.Module, switch: Switch, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The adapter of each row of the module's input."""
    names, choice = switch.choice.names, switch.choice
    main = next((value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, PackedSequence))), None)
    if not isinstance(main, Tensor):
        raise RowsError(f"a {type(module).__name__} gets no tensor here whose rows could have adapters of their own")
    for value in pytree.tree_leaves((args, kwargs)):
        if not isinstance(value, (Tensor, bool, int, float, str, torch.dtype, type(None))):
            raise RowsError(
                f"a {type(module).__name__} gets a {type(value).__name__} here, which may keep the rows of the whole batch "
                "(a cache does): it cannot be run once for each adapter"
            )
    first = main.movedim(_time_first(module, main), 0)
    count = torch.arange(len(names))
    index = row_index(Selection(count, count, choice.copies, choice.lengths), first, FIRST)
    times = first.shape[0] // index.shape[0]
    return tuple(names[place] for place in index.tolist() for _ in range(times))


def _time_first(module: nn.Module, value: Tensor) -> int:
    """The dimension of the rows in a module's main input and output: 1 where a sequence comes first."""
    attention = getattr(module, "self_attn", module)
    batch_second = isinstance(attention, (nn.MultiheadAttention, nn.RNNBase)) and not attention.batch_first
    if batch_second and value.dim() < 3:
        raise RowsError(f"an input of shape {tuple(value.shape)} has no rows of a batch")
    return int(batch_second)


def _dim(module: nn.Module, name: str, value: Tensor, count: int) -> int | None:
    """The dimension that holds the rows of one of a module's inputs or outputs; None if all rows share it."""
    if (name in MASKS and value.dim() < 3) or name in SHARED:
        return None
    if name in ("hx", "output1") and isinstance(module, nn.RNNBase):
        dim = 1
    elif name in (*MASKS, "key_padding_mask", "src_key_padding_mask", "output1"):
        dim = 0
    else:
        dim = _time_first(module, value) if value.dim() > 2 else 0
    size = value.shape[dim] if value.dim() > dim else 0
    heads = name in MASKS or name == "output1"
    return dim if size == count or (heads and size and size % count == 0) else None


def _take(
    module: nn.Module, forward: Forward, args: Sequence[Any], kwargs: dict[str, Any], place: list[int], count: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The rows of all inputs at some places."""
    parameters = list(inspect.signature(forward).parameters)[1:]
    named = [*zip(parameters, args, strict=False), *kwargs.items()]

    def take(name: str, value: Any) -> Any:
        dim = _dim(module, name, value, count) if isinstance(value, Tensor) else None
        return value if dim is None else value.index_select(dim, _index(place, value.shape[dim] // count, value.device))

    taken = [pytree.tree_map(functools.partial(take, name), value) for name, value in named]
    return tuple(taken[: len(args)]), dict(zip(kwargs, taken[len(args) :], strict=True))


def _index(place: list[int], times: int, device: torch.device) -> Tensor:
    """Positions of rows in a dimension that holds each row so many times in sequence."""
    return torch.tensor([row * times + each for row in place for each in range(times)], device=device)


def _join(module: nn.Module, outputs: list[Any], places: list[list[int]], count: int) -> Any:
    """The outputs of all groups of rows, each row where it came from."""
    flat = [pytree.tree_flatten(output) for output in outputs]
    order = [row for place in places for row in place]
    back = sorted(range(count), key=order.__getitem__)

    def join(number: int, values: list[Any]) -> Any:
        if not all(isinstance(value, Tensor) for value in values):
            return values[0]
        dim = _dim(module, f"output{min(number, 1)}", values[0], len(places[0]))
        if dim is None:
            raise RowsError(f"an output of shape {tuple(values[0].shape)} has no rows of the batch")
        times = values[0].shape[dim] // len(places[0])
        return torch.cat(values, dim).index_select(dim, _index(back, times, values[0].device))

    leaves = [join(number, list(values)) for number, values in enumerate(zip(*(each for each, _ in flat), strict=True))]
    return pytree.tree_unflatten(leaves, flat[0][1])
