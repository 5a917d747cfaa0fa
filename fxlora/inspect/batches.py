"""A batch of the form that a Hugging Face model takes, from tokens: the command line knows no other inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def batch_for(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What the model is called with.

    Args:
        model: whose configuration tells what it takes.
        tokens: token numbers `(rows, length)`; also for the decoder, of a model that has one. A vision model gets as many
            random images as there are rows, which the tokens' first number seeds.

    Returns:
        Keyword arguments, on the tokens' device.
    """
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        return {"pixel_values": _images(config, len(tokens), tokens)}
    batch = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens
    return batch


def _images(config: Any, rows: int, tokens: Tensor) -> Tensor:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (rows, getattr(config, "num_channels", 3), height, width)
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    if tokens.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(int(tokens.flatten()[0]))
    return torch.randn(shape, generator=generator).to(tokens.device, dtype)
