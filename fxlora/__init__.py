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
    GraphError,
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
    from fxlora.inspect.compare import Comparison, compare
    from fxlora.inspect.diff import GraphDiff, diff
    from fxlora.inspect.doctor import DoctorReport, doctor
    from fxlora.inspect.graphs import (
        GraphRegion,
        dominators,
        extract_subgraph,
        paths_to,
        region_between,
        sites_reachable,
        to_dot,
        to_model_explorer,
        to_networkx,
        to_svg,
        write_graph,
    )
    from fxlora.inspect.trace import PassTrace, bisect_passes
    from fxlora.optimized import OptimizeReport, optimize
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
    "GraphError",
    "GraphRegion",
    "LayerRounding",
    "LayerStatus",
    "LoraConfig",
    "LoraModel",
    "MergeError",
    "MergeReport",
    "ModelStatus",
    "NoTargetError",
    "OptimizeReport",
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
    "diff",
    "doctor",
    "dominators",
    "enable_input_require_grads",
    "explain",
    "export_merged",
    "extract_adapter",
    "extract_subgraph",
    "get_layer_status",
    "get_model_status",
    "hotswap_adapter",
    "lora_transform",
    "make_portable",
    "merge_checkpoint",
    "optimize",
    "parameter_groups",
    "paths_to",
    "plan",
    "prepare_model_for_kbit_training",
    "region_between",
    "rescale_adapter_scale",
    "rounding_report",
    "sites_reachable",
    "to_dot",
    "to_model_explorer",
    "to_networkx",
    "to_svg",
    "write_graph",
]


_MODULES = {
    "algebra": ("ExtractReport", "RankReport", "extract_adapter"),
    "checkpoint.integrity": ("FilesReport", "check_files"),
    "inspect.compare": ("Comparison", "compare"),
    "inspect.diff": ("GraphDiff", "diff"),
    "inspect.doctor": ("DoctorReport", "doctor"),
    "inspect.graphs": (
        "GraphRegion",
        "dominators",
        "extract_subgraph",
        "paths_to",
        "region_between",
        "sites_reachable",
        "to_dot",
        "to_model_explorer",
        "to_networkx",
        "to_svg",
        "write_graph",
    ),
    "inspect.trace": ("PassTrace", "bisect_passes"),
    "optimized": ("OptimizeReport", "optimize"),
    "training": (
        "adapter_parameters",
        "cast_adapter_dtype",
        "cast_mixed_precision_params",
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "enable_input_require_grads",
        "parameter_groups",
        "prepare_model_for_kbit_training",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
"""Names that only those import who use them, and where they are."""


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"fxlora.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'fxlora' has no attribute '{name}'")
