"""What commands share: kinds of arguments, the options of a configuration, and the model that a directory describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class _Path(click.Path):
    """A path that exists, or does again once a replacement of it that was interrupted is completed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.path.exists(value):
            from fxlora.checkpoint.leftovers import settle

            settle(value)
        return super().convert(value, param, ctx)


DIRECTORY = _Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DTYPES = {
    **{name: name for name in ("bfloat16", "float16", "float32", "float64")},
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
}
"""Names of dtypes on the command line, and torch's."""
CHECKPOINT = _Path(exists=True, path_type=Path)


def config_options(command: Any) -> Any:
    """The options of a LoRA configuration: what `config_of` takes."""
    options = (
        click.option("--config", "config_path", type=DIRECTORY, help="A saved adapter, whose configuration is taken."),
        click.option("--targets", help="Names of the target modules, with commas between; or a regular expression."),
        click.option("-r", "--rank", type=int, default=8, show_default=True),
        click.option("--alpha", type=float, default=8, show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


def config_of(config_path: Path | None, targets: str | None, rank: int, alpha: float) -> Any:
    """The configuration that options give."""
    from fxlora import LoraConfig

    if config_path is not None:
        return LoraConfig.from_pretrained(config_path)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets_of(targets))


def targets_of(text: str | None) -> list[str] | str | None:
    """Names with commas between as a list; a regular expression, or `all-linear`, as it is."""
    if text is None or text == "all-linear" or set(text) & set("*[](|\\+?^$"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def skeleton_of(path: Path) -> Any:
    """The model of a Hugging Face directory on the meta device."""
    from fxlora.host.skeleton import skeleton

    return skeleton(path)
