"""fxlora: LoRA as a compiler pass for PyTorch."""

from __future__ import annotations

from fxlora.algebra import ExtractReport, RankReport, extract_adapter
from fxlora.checkpoint import MergeReport, export_merged, merge_checkpoint
from fxlora.config import LoraConfig
from fxlora.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ConfigError,
    FxloraError,
    MergeError,
    NoTargetError,
    PassError,
    PatternError,
    VerifyError,
)
from fxlora.hotswap import hotswap_adapter
from fxlora.inspect import Explanation, explain
from fxlora.logs import setup as _setup_logs
from fxlora.model import LoraModel
from fxlora.plan import Plan, plan
from fxlora.scaling import rescale_adapter_scale
from fxlora.status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from fxlora.transform import lora_transform

_setup_logs()

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "Explanation",
    "ExtractReport",
    "FxloraError",
    "LayerStatus",
    "LoraConfig",
    "LoraModel",
    "MergeError",
    "MergeReport",
    "ModelStatus",
    "NoTargetError",
    "PassError",
    "PatternError",
    "Plan",
    "RankReport",
    "VerifyError",
    "explain",
    "export_merged",
    "extract_adapter",
    "get_layer_status",
    "get_model_status",
    "hotswap_adapter",
    "lora_transform",
    "merge_checkpoint",
    "plan",
    "rescale_adapter_scale",
]
