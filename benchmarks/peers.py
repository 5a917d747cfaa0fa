"""Other libraries' fast LoRA, each at its best documented setting; none is needed to run the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PEERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
