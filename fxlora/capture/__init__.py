"""The three ways of capturing a model, and the choice among them."""

from __future__ import annotations

from typing import Literal, get_args

from fxlora._passes import did_you_mean
from fxlora.errors import CaptureError

Capture = Literal["auto", "symbolic", "export", "modules"]


def check_capture(name: str) -> None:
    """Refuse an unknown capture.

    Raises:
        CaptureError: with the names that there are.
    """
    known = get_args(Capture)
    if name not in known:
        raise CaptureError(
            f"unknown capture {name!r}; there is {', '.join(map(repr, known))}.{did_you_mean(str(name), known)}"
        )
