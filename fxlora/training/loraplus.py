"""LoRA+ (arXiv:2402.12354): B learns faster than A, by a fixed ratio."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxlora.errors import AdapterError, ConfigError
from fxlora.training.parameters import lora_model, owned_by

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")
"""Optimizers of bitsandbytes whose state of embeddings stays at 32 bits, as in peft."""


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer of any class with the learning rates of LoRA+ (arXiv:2402.12354, section 4).

    The groups are peft's, in its order, and some may be empty:

    1. A, rows of tokens and trained copies: `lr`.
    2. Factors of embedding layers: `loraplus_lr_embedding`.
    3. B, and whatever has one dimension: `lr * loraplus_lr_ratio`.
    4. Of the latter, biases and what belongs to an `nn.LayerNorm`: the same, without weight decay.

    Args:
        model: a transformed model, also inside of a wrapper or compiled. Only what requires gradients is trained.
        optimizer_cls: any class that takes parameter groups, `lr` and `weight_decay`.
        lr: learning rate of A.
        loraplus_lr_ratio: by how much B's is larger; at least 1 in the paper.
        loraplus_weight_decay: weight decay of the groups that have one.
        loraplus_lr_embedding: learning rate of the factors of embedding layers.
        kwargs: further arguments of the class.

    Raises:
        AdapterError: for a model without adapters, or when nothing requires gradients.
        ConfigError: for a ratio that is not positive and finite.

    Example:
        >>> import torch
        >>> from fxlora import LoraConfig, create_loraplus_optimizer, lora_transform
        >>> model = lora_transform(torch.nn.Sequential(torch.nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(1, 0.0001), (0, 1e-06), (1, 0.0016), (0, 0.0016)]
    """
    if not (loraplus_lr_ratio > 0 and math.isfinite(loraplus_lr_ratio)):
        raise ConfigError(f"loraplus_lr_ratio must be a positive number, not {loraplus_lr_ratio!r}; the paper has 16")
    rates = {
        "A": lr,
        "embedding": loraplus_lr_embedding,
        "B": lr * loraplus_lr_ratio,
        "B_no_decay": lr * loraplus_lr_ratio,
    }
    groups = _grouped(model)
    optimizer = optimizer_cls(
        [
            {"params": groups[name], "weight_decay": 0.0 if name == "B_no_decay" else loraplus_weight_decay, "lr": rate}
            for name, rate in rates.items()
        ],
        lr=lr,
        **kwargs,
    )
    if getattr(optimizer_cls, "__name__", "") in _EIGHT_BIT:
        _keep_embeddings_wide(model)
    return optimizer


def _grouped(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    owned = {id(each.parameter): each for each in owned_by(lora_model(model))}
    undecayed = _in_layer_norms(model)
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B_no_decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = owned.get(id(parameter))
        role = own.role if own else ""
        if own and own.spec and own.spec.kind == "embedding" and role in ("A", "B"):
            group = "embedding"
        elif role == "B" or parameter.ndim == 1:
            group = "B_no_decay" if "bias" in name or id(parameter) in undecayed else "B"
        else:
            group = "A"
        groups[group].append(parameter)
    if not any(groups.values()):
        raise AdapterError(
            "there is nothing to train: no parameter requires gradients; set_adapter makes an adapter train"
        )
    return groups


def _in_layer_norms(model: nn.Module) -> set[int]:
    return {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}


def _keep_embeddings_wide(model: nn.Module) -> None:
    manager = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
