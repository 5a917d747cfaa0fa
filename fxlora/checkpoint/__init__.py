"""Files: adapters in peft's layout, merged checkpoints, and the atomic writing of both."""

from __future__ import annotations

from fxlora.checkpoint.adapter import read_adapter, save_adapters
from fxlora.checkpoint.merged import MergeReport, export_merged, merge_checkpoint

__all__ = ["MergeReport", "export_merged", "merge_checkpoint", "read_adapter", "save_adapters"]
