"""Look inside: what a configuration would do, what a merge would lose, and what a graph looks like."""

from __future__ import annotations

from fxlora.inspect.explain import Explanation, explain
from fxlora.inspect.rounding import rounding_report

__all__ = ["Explanation", "explain", "rounding_report"]
