"""Sums of tensors of one shape that first drop some of their entries: task arithmetic, TIES, DARE.

Functions of tensors alone. `combine` applies them to factors, or to whole updates. Operations, their order and the draws
from torch's generator are those of peft 0.21, so that one seed gives one result in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MajoritySign = Literal["total", "frequency"]
MAJORITY_SIGNS: tuple[MajoritySign, ...] = ("total", "frequency")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What happens to tensors before and while they are summed.

    Attributes:
        prune: which entries are dropped: the smallest ones, random ones (the rest is scaled up), or none.
        elect: whether each entry is summed over those tensors only whose sign is the majority's (TIES,
            arXiv:2306.01708, section 3), and divided by their number.
    """

    prune: Literal["", "magnitude", "random"] = ""
    elect: bool = False


def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    recipe: Recipe,
    density: float = 1.0,
    majority_sign: MajoritySign = "total",
) -> Tensor:
    """The weighted sum of tensors by a recipe.

    Signs are elected before the weights are applied, so that a negative weight changes no election.

    Args:
        tensors: of one shape, floating point.
        weights: one for each; applied in float32, or in the tensors' dtype if that is wider.
        recipe: what is dropped.
        density: the share of entries that pruning keeps, in (0, 1].
        majority_sign: elect by the sum of the entries (`total`), or by the number of signs (`frequency`).

    Returns:
        A tensor of that shape, in float32 or wider.
    """
    stack = torch.stack([_pruned(tensor, recipe.prune, density) for tensor in tensors])
    wide = torch.promote_types(stack.dtype, torch.float32)
    factors = torch.tensor(list(weights), dtype=wide, device=stack.device)
    weighted = stack * factors.view(-1, *[1] * (stack.dim() - 1))
    if not recipe.elect:
        return weighted.sum(0)
    chosen = _of_majority(stack, majority_sign)
    return (weighted * chosen).sum(0) / chosen.sum(0).clamp(min=1)


def _pruned(tensor: Tensor, prune: str, density: float) -> Tensor:
    if not prune or density >= 1:
        return tensor
    return _without_small(tensor, density) if prune == "magnitude" else _without_random(tensor, density)


def _without_small(tensor: Tensor, density: float) -> Tensor:
    """The `int(density · n)` entries of largest magnitude, and zeros."""
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    mask = torch.zeros_like(flat).index_fill(0, kept, 1)
    return tensor * mask.reshape(tensor.shape)


def _without_random(tensor: Tensor, density: float) -> Tensor:
    """Each entry with probability `density`, divided by it, else zero: DARE, arXiv:2311.03099, section 3."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _of_majority(stack: Tensor, majority_sign: MajoritySign) -> Tensor:
    """For each entry of each tensor whether its sign is that of the majority; positive where there is none."""
    signs = stack.sign()
    votes = stack if majority_sign == "total" else signs
    return signs == torch.where(votes.sum(0) >= 0, 1, -1)
