"""fxlora: LoRA as a compiler pass for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fxlora.checkpoint import MergeReport, export_merged, merge_checkpoint
from fxlora.checkpoint.portable import PortableReport, make_portable
from fxlora.checkpoint.readers import AdapterReport, check_adapter
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
from fxlora.inspect import Explanation, explain, rounding_report
from fxlora.logs import setup as _setup_logs
from fxlora.model import LoraModel
from fxlora.plan import Plan, plan
from fxlora.rounding import LayerRounding, OutputEffect, RoundingReport
from fxlora.scaling import rescale_adapter_scale
from fxlora.status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from fxlora.transform import lora_transform

if TYPE_CHECKING:
    from fxlora.algebra import ExtractReport, RankReport, extract_adapter
    from fxlora.checkpoint.integrity import FilesReport, check_files
    from fxlora.inspect.doctor import DoctorReport, doctor
    from fxlora.inspect.compare import Comparison, compare
    from fxlora.inspect.diff import GraphDiff, diff
    from fxlora.inspect.trace import PassTrace, bisect_passes
    from fxlora.training import (
        adapter_parameters,
        cast_adapter_dtype,
        cast_mixed_precision_params,
        create_lorafa_optimizer,
        create_loraplus_optimizer,
        enable_input_require_grads,
        parameter_groups,
        prepare_model_for_kbit_training,
    )

_setup_logs()

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterReport",
    "CaptureError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "DoctorReport",
    "Explanation",
    "ExtractReport",
    "FilesReport",
    "FxloraError",
    "GraphDiff",
    "LayerRounding",
    "LayerStatus",
    "LoraConfig",
    "LoraModel",
    "MergeError",
    "MergeReport",
    "ModelStatus",
    "NoTargetError",
    "OutputEffect",
    "PassError",
    "PassTrace",
    "PatternError",
    "Plan",
    "PortableReport",
    "RankReport",
    "RoundingReport",
    "VerifyError",
    "adapter_parameters",
    "bisect_passes",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "check_adapter",
    "check_files",
    "compare",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "doctor",
    "diff",
    "enable_input_require_grads",
    "explain",
    "export_merged",
    "extract_adapter",
    "get_layer_status",
    "get_model_status",
    "hotswap_adapter",
    "lora_transform",
    "make_portable",
    "merge_checkpoint",
    "parameter_groups",
    "plan",
    "prepare_model_for_kbit_training",
    "rescale_adapter_scale",
    "rounding_report",
]


_LOOKING = {
    "Comparison": "compare",
    "GraphDiff": "diff",
    "PassTrace": "trace",
    "bisect_passes": "trace",
    "compare": "compare",
    "diff": "diff",
}
"""Names of `fxlora.inspect`, and the modules that have them."""


def __getattr__(name: str) -> object:
    """Names that only those import who use them."""
    if name in ("FilesReport", "check_files"):
        from fxlora.checkpoint import integrity

        return getattr(integrity, name)
    if name in ("DoctorReport", "doctor"):
        from fxlora.inspect import doctor

        return getattr(doctor, name)
    if name in _LOOKING:
        return getattr(importlib.import_module(f"fxlora.inspect.{_LOOKING[name]}"), name)
    if name in __all__:
        from fxlora import algebra, training

        return getattr(algebra if name in algebra.__all__ else training, name)
    raise AttributeError(f"module 'fxlora' has no attribute '{name}'")
