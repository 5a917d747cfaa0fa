"""Arithmetic of whole adapters: weighted sums, rank reduction, and adapters made of a difference of weights.

`combine` and `reduce` make an adapter of adapters that a model has; `extract` makes one of two sets of weights. All know
layers through their kinds only, as matrices (`Kind.as_matrices`).
"""

from __future__ import annotations

from fxlora.algebra.combine import COMBINATIONS, Combination
from fxlora.algebra.extract import ExtractReport, extract_adapter
from fxlora.algebra.lowrank import SiteRank
from fxlora.algebra.reduce import RankReport

__all__ = ["COMBINATIONS", "Combination", "ExtractReport", "RankReport", "SiteRank", "extract_adapter"]
