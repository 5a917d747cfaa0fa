"""The errors that users meet. Those of graph rewriting are defined in `passes.errors`; all have one base."""

from __future__ import annotations

from fxlora._passes import FxloraError, MergeError, NoTargetError, PassError, PatternError, VerifyError


class ConfigError(FxloraError, ValueError):
    """A field of the configuration has a value that cannot work."""


class AdapterError(FxloraError, ValueError):
    """An adapter's name is unknown, taken or not usable, or its state does not allow the call."""


class CaptureError(FxloraError, ValueError):
    """A capture cannot hold this model; says why and which capture can."""


class GraphError(FxloraError, ValueError):
    """A name is not in a graph, or what was asked of the graph does not fit it."""


class CheckpointError(FxloraError, ValueError):
    """A file or directory cannot be read or written; names file, key and remedy."""


def shown(value: object, most: int = 200) -> str:
    """A value for a message, cut where it gets long: what a stranger wrote into a file may be a megabyte."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "FxloraError",
    "GraphError",
    "MergeError",
    "NoTargetError",
    "PassError",
    "PatternError",
    "VerifyError",
    "shown",
]
