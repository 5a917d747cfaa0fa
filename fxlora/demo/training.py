"""The demo's training loop and evaluation: ordinary PyTorch, for any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def train(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    steps: int,
    lr: float = 2e-3,
    warmup: int = 4,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train the parameters that require gradients with AdamW, a linear warm-up and a linear decay.

    Args:
        model: called as `model(input_ids=…, labels=…)`; must return an output with `loss`.
        batches: token ids, each (batch, length), int64.
        steps: number of batches in all, which the decay ends at.
        lr: the highest learning rate.
        warmup: steps until the learning rate is `lr`.
        on_step: called with the step's number from 1 and its loss.

    Returns:
        The loss of each step, in nats.
    """
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    for step, batch in enumerate(batches, 1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(step, losses[-1])
    model.eval()
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, blocks: Tensor, batch_size: int = 8) -> float:
    """The mean loss per token in nats, in evaluation mode.

    Args:
        model: as for `train`.
        blocks: token ids, (n, length), int64.
        batch_size: blocks at a time.
    """
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in blocks.split(batch_size)]
    return sum(losses) / len(blocks)
