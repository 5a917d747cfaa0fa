"""Files: adapters in peft's layout, merged checkpoints, and the atomic writing of both."""

from __future__ import annotations

from fxlora.checkpoint.adapter import read_adapter
from fxlora.checkpoint.adapter_writing import save_adapters
from fxlora.checkpoint.merge_files import merge_checkpoint
from fxlora.checkpoint.merge_report import MergeReport
from fxlora.checkpoint.merged import export_merged

__all__ = ["MergeReport", "export_merged", "merge_checkpoint", "read_adapter", "save_adapters"]
