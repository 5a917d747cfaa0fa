"""The file that keeps what `fxlora.ops.autotune` measured on a device, for later processes.

One file for each device and set of versions, replaced as a whole, so that any number of processes may write. It only saves
time: a file that cannot be read, or is another's, is written anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from fxlora.caches import user_cache_dir

log = logging.getLogger("fxlora")

Times = dict[str, float]
"""Microseconds of each implementation, by its name."""

_FORMAT = 1


def cache_directory() -> Path:
    """`$FXLORA_CACHE_DIR`; else `fxlora` in the user's cache directory."""
    own = os.environ.get("FXLORA_CACHE_DIR")
    return Path(own) if own else user_cache_dir() / "fxlora"


def file_of(device: str) -> Path:
    """Where the measurements of a device are kept."""
    text = json.dumps(_header(device), sort_keys=True)
    return cache_directory() / f"autotune-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def read(device: str) -> dict[str, Times]:
    """What is known of a device, by the text of a case; nothing, with a warning, where the file is no such file."""
    path = file_of(device)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read, and is written anew: %s", path, error)
        return {}
    try:
        return _checked(json.loads(text), device)
    except (ValueError, RecursionError) as error:
        log.warning("%s is no file of measurements for this device, and is written anew: %s", path, error)
        return {}


def add(device: str, measured: Mapping[str, Times]) -> None:
    """Write measurements beside those that the file has by now; a warning where that fails."""
    path = file_of(device)
    page = {**_header(device), "measured": {**read(device), **measured}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(page, indent=1, sort_keys=True) + "\n")
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        log.warning("measurements are not kept: %s cannot be written: %s", path, error)


def _header(device: str) -> dict[str, Any]:
    """What measurements hold for."""
    from fxlora import __version__

    return {"format": _FORMAT, "device": device, "fxlora": __version__, "torch": torch.__version__, "triton": _triton()}


def _triton() -> str:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _checked(page: object, device: str) -> dict[str, Times]:
    fields = cast("dict[str, Any]", page if isinstance(page, dict) else {})
    for name, value in _header(device).items():
        if fields.get(name) != value:
            raise ValueError(f"its {name} is {fields.get(name)!r}, and not {value!r}")
    measured = fields.get("measured")
    if not isinstance(measured, dict) or not all(
        _are_times(each) for each in cast("dict[str, Any]", measured).values()
    ):
        raise ValueError("its measurements are no times")
    return cast("dict[str, Times]", measured)


def _are_times(value: object) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    times = cast("dict[str, object]", value).values()
    return all(
        type(time) in (int, float) and math.isfinite(cast(float, time)) and cast(float, time) > 0 for time in times
    )
