"""Look inside: what a configuration would do (`explain`), and what a graph looks like (`draw`)."""

from __future__ import annotations

from fxlora.inspect.explain import Explanation, explain

__all__ = ["Explanation", "explain"]
