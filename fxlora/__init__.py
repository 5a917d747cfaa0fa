"""fxlora: LoRA as a compiler pass for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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
from fxlora.logs import setup as _setup_logs
from fxlora.plan import Plan, plan

if TYPE_CHECKING:
    from fxlora.algebra import ExtractReport, RankReport, extract_adapter
    from fxlora.checkpoint.integrity import FilesReport, check_files
    from fxlora.checkpoint.merge_files import merge_checkpoint
    from fxlora.checkpoint.merge_report import MergeReport
    from fxlora.checkpoint.merged import export_merged
    from fxlora.checkpoint.portable import PortableReport, make_portable
    from fxlora.checkpoint.readers import AdapterReport, check_adapter
    from fxlora.hotswap import hotswap_adapter
    from fxlora.inspect import Explanation, explain, rounding_report
    from fxlora.inspect.code import CodeFiles, write_code
    from fxlora.inspect.compare import Comparison, compare
    from fxlora.inspect.cut import extract_subgraph
    from fxlora.inspect.diff import GraphDiff, diff
    from fxlora.inspect.doctor import DoctorReport, doctor
    from fxlora.inspect.dot import to_dot, to_svg
    from fxlora.inspect.graph_files import write_graph
    from fxlora.inspect.model_explorer import to_model_explorer
    from fxlora.inspect.networkx_graph import to_networkx
    from fxlora.inspect.plots import plot_rank_spectrum, plot_update_norms
    from fxlora.inspect.queries import GraphRegion, dominators, paths_to, region_between, sites_reachable
    from fxlora.inspect.spectra import Spectra, UpdateNorms, spectra, update_norms
    from fxlora.inspect.trace import PassTrace, bisect_passes
    from fxlora.model import LoraModel
    from fxlora.optimized import OptimizeReport, optimize
    from fxlora.rounding import LayerRounding, OutputEffect, RoundingReport
    from fxlora.scaling import rescale_adapter_scale
    from fxlora.status import LayerStatus, ModelStatus, get_layer_status, get_model_status
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
    from fxlora.transform import lora_transform

_setup_logs()

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterReport",
    "CaptureError",
    "CheckpointError",
    "CodeFiles",
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
    "Spectra",
    "UpdateNorms",
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
    "plot_rank_spectrum",
    "plot_update_norms",
    "prepare_model_for_kbit_training",
    "region_between",
    "rescale_adapter_scale",
    "rounding_report",
    "sites_reachable",
    "spectra",
    "to_dot",
    "to_model_explorer",
    "to_networkx",
    "to_svg",
    "update_norms",
    "write_code",
    "write_graph",
]


_MODULES = {
    "algebra": ("ExtractReport", "RankReport", "extract_adapter"),
    "checkpoint.integrity": ("FilesReport", "check_files"),
    "checkpoint.merge_files": ("merge_checkpoint",),
    "checkpoint.merge_report": ("MergeReport",),
    "checkpoint.merged": ("export_merged",),
    "checkpoint.portable": ("PortableReport", "make_portable"),
    "checkpoint.readers": ("AdapterReport", "check_adapter"),
    "hotswap": ("hotswap_adapter",),
    "inspect": ("Explanation", "explain", "rounding_report"),
    "inspect.code": ("CodeFiles", "write_code"),
    "inspect.compare": ("Comparison", "compare"),
    "inspect.cut": ("extract_subgraph",),
    "inspect.diff": ("GraphDiff", "diff"),
    "inspect.doctor": ("DoctorReport", "doctor"),
    "inspect.dot": ("to_dot", "to_svg"),
    "inspect.graph_files": ("write_graph",),
    "inspect.model_explorer": ("to_model_explorer",),
    "inspect.networkx_graph": ("to_networkx",),
    "inspect.queries": ("GraphRegion", "dominators", "paths_to", "region_between", "sites_reachable"),
    "inspect.plots": ("plot_rank_spectrum", "plot_update_norms"),
    "inspect.spectra": ("Spectra", "UpdateNorms", "spectra", "update_norms"),
    "inspect.trace": ("PassTrace", "bisect_passes"),
    "optimized": ("OptimizeReport", "optimize"),
    "model": ("LoraModel",),
    "rounding": ("LayerRounding", "OutputEffect", "RoundingReport"),
    "scaling": ("rescale_adapter_scale",),
    "status": ("LayerStatus", "ModelStatus", "get_layer_status", "get_model_status"),
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
    "transform": ("lora_transform",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
"""Names that only those import who use them, and where they are."""


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fxlora' has no attribute '{name}'")
    found = globals()[name] = getattr(importlib.import_module(f"fxlora.{_MODULE_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
