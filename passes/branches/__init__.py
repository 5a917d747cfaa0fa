"""Layer kinds: for each, the shapes of its factors, their initial values, the branch in a graph, and the fold.

A kind is pure tensor functions. Adding one is a file here and a line in `KINDS`.
"""

from __future__ import annotations

from passes.branches.base import BranchSpec, Kind
from passes.branches.linear import Linear

KINDS: dict[str, Kind] = {"linear": Linear()}

__all__ = ["KINDS", "BranchSpec", "Kind"]
