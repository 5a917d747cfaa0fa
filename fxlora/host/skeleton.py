"""Models without values, from what files say: of a `config.json`, or of the names and shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fxlora.checkpoint.leftovers import settle
from fxlora.errors import CheckpointError


def skeleton(directory: Path) -> nn.Module:
    """The transformers model of a directory's `config.json`, on the meta device.

    Raises:
        CheckpointError: when there is no `config.json`.
    """
    import transformers

    settle(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is no Hugging Face model directory: it has no config.json")
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        return cast(nn.Module, cls(config) if cls is not None else transformers.AutoModel.from_config(config))


class Guessed(nn.Module):
    """A module of which only the names inside are known."""


def guessed(shapes: Mapping[str, tuple[int, ...]]) -> Guessed:
    """A model on the meta device that has tensors of these names and shapes.

    A `weight` of two dimensions is an `nn.Linear`'s, one of three to five a convolution's with one group; anything else is
    a bare parameter.
    """
    root = Guessed()
    layers = {name.removesuffix(".weight"): _layer(shape) for name, shape in shapes.items() if name.endswith(".weight")}
    for name, layer in layers.items():
        if layer is not None:
            owner, _, leaf = name.rpartition(".")
            _owner(root, owner).add_module(leaf, layer)
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        if layers.get(owner) is None:
            value = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            _owner(root, owner).register_parameter(leaf, value)
    return root


def _layer(shape: tuple[int, ...]) -> nn.Module | None:
    convolution: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}.get(len(shape))
    if 0 in shape or (len(shape) != 2 and convolution is None):
        return None
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=False, device="meta")
    return cast(nn.Module, convolution(shape[1], shape[0], shape[2:], bias=False, device="meta"))


def _owner(root: nn.Module, path: str) -> nn.Module:
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, Guessed())
        module = cast(nn.Module, module._modules[part])
    return module
