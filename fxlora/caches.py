"""Where files are kept that only save time."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """Give the user's cache directory: `$XDG_CACHE_HOME`, or `~/.cache` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
