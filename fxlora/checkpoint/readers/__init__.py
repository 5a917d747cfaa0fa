"""Other programs that load adapter files, and what each would get wrong. One file for each."""

from __future__ import annotations

from fxlora.checkpoint.readers.base import Finding, Level, Reader, Rule
from fxlora.checkpoint.readers.features import FEATURES, Feature
from fxlora.checkpoint.readers.registry import READERS
from fxlora.checkpoint.readers.report import AdapterReport, check_adapter

__all__ = ["FEATURES", "READERS", "AdapterReport", "Feature", "Finding", "Level", "Reader", "Rule", "check_adapter"]
