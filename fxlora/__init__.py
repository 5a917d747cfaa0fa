"""fxlora: LoRA as a compiler pass for PyTorch."""

from __future__ import annotations

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
    "ConfigError",
    "Explanation",
    "ExtractReport",
    "FilesReport",
    "FxloraError",
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
    "OutputEffect",
    "PassError",
    "PatternError",
    "Plan",
    "PortableReport",
    "RankReport",
    "RoundingReport",
    "VerifyError",
    "adapter_parameters",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "check_adapter",
    "check_files",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
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


_GRAPHS = (
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
)
"""Names that need networkx."""


def __getattr__(name: str) -> object:
    """Names that only those import who use them."""
    if name in ("FilesReport", "check_files"):
        from fxlora.checkpoint import integrity

        return getattr(integrity, name)
    if name in _GRAPHS:
        from fxlora.inspect import graphs

        return getattr(graphs, name)
    if name in __all__:
        from fxlora import algebra, training

        return getattr(algebra if name in algebra.__all__ else training, name)
    raise AttributeError(f"module 'fxlora' has no attribute '{name}'")
