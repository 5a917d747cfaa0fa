"""The operators under `torch.vmap`: tokens of all samples in one call where only x differs, else a call for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[list[Tensor], list[int | None]]]


def by_sample(operator: Callable[..., list[Tensor]]) -> Rule:
    """A rule that calls an operator for each sample."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int | None]]:
        samples = [operator(*_sample(list(args), list(in_dims), index)) for index in range(info.batch_size)]
        outputs = [torch.stack(each) for each in zip(*samples, strict=True)]
        return outputs, [0] * len(outputs)

    return rule


def by_rows(operator: Callable[..., list[Tensor]], seed: int | None = None) -> Rule:
    """A rule for operators that compute each token of their first argument alone.

    Args:
        operator: its last output does not depend on x; those that are matrices have a row for each token.
        seed: the position of dropout's seed, with which samples differ in nothing but x have the same mask; None if there is none.
    """
    apart = by_sample(operator)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int | None]]:
        x, rest = args[0], list(in_dims[1:])
        if (seed is not None and args[seed] is not None) or in_dims[0] is None or not _all_none(rest):
            return apart(info, in_dims, *args)
        x = x.movedim(in_dims[0], 0)
        *outputs, last = operator(x, *args[1:])
        lead = x.shape[:-1]
        shaped = [each if each.shape[:-1] == lead else each.unflatten(0, (lead[0], -1)) for each in outputs]
        return [*shaped, last], [*([0] * len(shaped)), None]

    return rule


def _all_none(dims: Any) -> bool:
    return all(_all_none(each) for each in dims) if isinstance(dims, (list, tuple)) else dims is None


def _sample(value: Any, dims: Any, index: int) -> Any:
    if isinstance(dims, (list, tuple)):
        return [_sample(each, dim, index) for each, dim in zip(value, dims, strict=True)]
    return value if dims is None else value.select(dims, index)
