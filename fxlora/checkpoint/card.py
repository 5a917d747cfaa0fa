"""The model card of an adapter: the head of `README.md` that model hubs read, with peft's fields.

Only the fields that concern the adapter are written; all else in an existing file stays as it is.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fxlora.checkpoint.adapter import base_name
from fxlora.config import PEFT_FORMAT
from fxlora.errors import CheckpointError

if TYPE_CHECKING:
    from fxlora.model import LoraModel

CARD = "README.md"
_FENCE = "---"
_TASK = "pipeline_tag"
_VERSIONS = "### Framework versions"


def update_card(model: LoraModel, directory: Path) -> None:
    """Write `README.md` into a directory, or bring an existing one up to date.

    The file is replaced at one stroke.

    Args:
        model: the transformed model.
        directory: created if need be.

    Raises:
        CheckpointError: when it cannot be read or written.
    """
    path = directory / CARD
    staging = directory / f".{CARD}.fxlora-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        old = path.read_text(encoding="utf-8") if path.exists() else "# Adapter\n"
        staging.write_text(updated(old, fields(model)), encoding="utf-8")
        os.replace(staging, path)
    except (OSError, UnicodeDecodeError) as error:
        with suppress(OSError):
            staging.unlink()
        raise CheckpointError(f"'{path}' cannot be written: {error}") from error


def fields(model: LoraModel) -> dict[str, Any]:
    """What the card says of the active adapter, or of the first: peft's fields, so that hubs take it for peft's."""
    plans = model._lora.adapters
    config = plans[model._lora.active[0] if model._lora.active else next(iter(plans))].config if plans else None
    base = (config.base_model_name_or_path if config else None) or base_name(model)
    tags = ["lora", *(["transformers"] if hasattr(model, "config") else [])]
    values: dict[str, Any] = {"library_name": "peft"}
    if base:
        values["base_model"] = base
        tags.append(f"base_model:adapter:{base}")
    values["tags"] = sorted({*tags, *(getattr(model, "model_tags", None) or ())})
    if config is not None and config.task_type == "CAUSAL_LM":
        values[_TASK] = "text-generation"
    return values


def updated(text: str, values: dict[str, Any]) -> str:
    """A card with fields in its head, a block of YAML between two lines of dashes, and the version in its body.

    Args:
        text: the card as it is.
        values: texts and lists of texts by field.
    """
    head, body = _parts(text)
    kept: list[str] = []
    task: list[str] = []  # one that someone chose stays
    name = ""
    for line in head:
        if line and not line[0].isspace() and not line.startswith(("-", "#")):
            name = line.partition(":")[0]
        if name not in values:
            kept.append(line)
        elif name == _TASK:
            task.append(line)
    for name, value in values.items():
        if name == _TASK and task:
            kept += task
        elif isinstance(value, list):
            kept += [f"{name}:", *(f"- {json.dumps(each)}" for each in cast("list[str]", value))]
        else:
            kept.append(f"{name}: {json.dumps(value)}")  # JSON's strings are YAML's
    version = f"- PEFT {PEFT_FORMAT}"
    if version not in body:
        at = body.index(_VERSIONS) + 2 if _VERSIONS in body else len(body)
        body[at:at] = [version] if _VERSIONS in body else [*([""] if body and body[-1] else []), _VERSIONS, "", version]
    return "\n".join([_FENCE, *kept, _FENCE, *body]) + "\n"


def _parts(text: str) -> tuple[list[str], list[str]]:
    """The lines of the head, without its fences, and those of the body."""
    lines = text.splitlines()
    if lines[:1] == [_FENCE] and _FENCE in lines[1:]:
        end = lines.index(_FENCE, 1)
        return lines[1:end], lines[end + 1 :]
    return [], ["", *lines]
