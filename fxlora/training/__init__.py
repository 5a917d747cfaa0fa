"""Helpers around training: optimizers for LoRA, parameter groups, gradients through checkpoints, dtypes."""

from __future__ import annotations

from fxlora.host.input_grads import InputGrads, enable_input_require_grads
from fxlora.training.lorafa import LoraFA, create_lorafa_optimizer
from fxlora.training.loraplus import create_loraplus_optimizer
from fxlora.training.parameters import AdapterParameter, Role, adapter_parameters, parameter_groups
from fxlora.training.precision import (
    cast_adapter_dtype,
    cast_mixed_precision_params,
    prepare_model_for_kbit_training,
)

__all__ = [
    "AdapterParameter",
    "InputGrads",
    "LoraFA",
    "Role",
    "adapter_parameters",
    "cast_adapter_dtype",
    "cast_mixed_precision_params",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "enable_input_require_grads",
    "parameter_groups",
    "prepare_model_for_kbit_training",
]
