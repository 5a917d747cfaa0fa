"""Dtypes for training: the base in half precision or quantized, what is trained in float32.

All of it changes parameters in place, so that optimizers and tied layers keep them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fxlora.errors import AdapterError, ConfigError
from fxlora.host.input_grads import checkpoints_reentrantly, enable_input_require_grads
from fxlora.model import LoraModel
from fxlora.registered import factor_names
from fxlora.training.parameters import lora_model, owned_by

_OWN_DTYPES = frozenset(("gptq", "aqlm", "eetq", "hqq", "torchao"))
"""Methods of quantization whose parameters stay in the dtypes that they have."""

_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (*_HALF, torch.float32, torch.float64)

Model = TypeVar("Model", bound=nn.Module)


def prepare_model_for_kbit_training(
    model: Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Model:
    """Prepare a quantized transformers model for `lora_transform`, as peft's function of this name does.

    Everything is frozen. What is float16 or bfloat16 becomes float32 for stability (norms, embeddings, the head), but
    for 4-bit parameters and for methods that need their own dtypes (GPTQ, AQLM, EETQ, HQQ, torchao). A quantized model
    gets gradient checkpointing, and where that is reentrant its inputs require gradients.

    Args:
        model: not transformed yet. One that is not quantized is frozen and cast, and gets no checkpointing.
        use_gradient_checkpointing: whether a quantized model gets it.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; the model's own choice if None.
        auto_clear_cache: whether to give memory that the casts left in the allocator back to the device.

    Returns:
        The same model.

    Raises:
        AdapterError: for a transformed model, which would be frozen together with its adapters.
        ConfigError: when a quantized model has no gradient checkpointing.
    """
    if any(isinstance(module, LoraModel) for module in model.modules()):
        raise AdapterError(
            "the model has adapters already, which would be frozen too; prepare it before lora_transform"
        )
    method = _quantization_method(model)
    switch = _switch(model) if use_gradient_checkpointing and method else None
    if use_gradient_checkpointing and method and switch is None:
        raise ConfigError(
            f"{type(model).__name__} has no gradient_checkpointing_enable; pass use_gradient_checkpointing=False"
        )
    model.requires_grad_(False)
    if method not in _OWN_DTYPES:
        halves = [p for p in model.parameters() if p.dtype in _HALF and type(p).__name__ != "Params4bit"]
        _cast(halves, torch.float32)
        if auto_clear_cache:
            _clear_caches()
    if switch is not None:
        switch(*([] if gradient_checkpointing_kwargs is None else [dict(gradient_checkpointing_kwargs)]))
        if checkpoints_reentrantly(model):
            enable_input_require_grads(model)
    return model


def cast_adapter_dtype(model: nn.Module, adapter_name: str, dtype: torch.dtype = torch.float32) -> None:
    """Cast the factors of an adapter, its magnitudes and rows of tokens, and their gradients.

    Copies of `modules_to_save` and biases of the base keep the dtype of the layers that they belong to.

    Args:
        model: a transformed model, also inside of a wrapper or compiled.
        adapter_name: the adapter's name.
        dtype: float32, float64, float16 or bfloat16.

    Raises:
        AdapterError: for an unknown adapter.
        ConfigError: for another dtype.
    """
    lora = lora_model(model)
    lora._check_known([adapter_name])
    _check_dtype(dtype)
    _cast([lora.get_parameter(name) for name in factor_names([lora._lora.adapters[adapter_name]])], dtype)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model for mixed-precision training: what is frozen to `dtype`, what is trained to float32.

    What belongs to an adapter becomes float32 also where it is frozen now: another adapter may be used next. Integers
    and dtypes of one byte, as in quantized weights, stay (peft casts them).

    Args:
        model: transformed or not.
        dtype: float16 or bfloat16, as given to `torch.autocast`; also float32 or float64.

    Raises:
        AdapterError: while adapters are merged: the weights that unmerging restores would not be cast with the others.
        ConfigError: for another dtype.
    """
    _check_dtype(dtype)
    transformed = [module for module in model.modules() if isinstance(module, LoraModel)]
    for each in transformed:
        if each._lora.merged:
            raise AdapterError(f"adapters {', '.join(each._lora.merged)} are merged; call unmerge_adapter first")
    kept = {id(each.parameter) for lora in transformed for each in owned_by(lora)}
    plain = [parameter for parameter in model.parameters() if parameter.dtype in _PLAIN]
    trained = [parameter for parameter in plain if parameter.requires_grad or id(parameter) in kept]
    _cast(trained, torch.float32)
    _cast([parameter for parameter in plain if not parameter.requires_grad and id(parameter) not in kept], dtype)
    for each in transformed:
        each._renew_weight_norms()


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _PLAIN:
        raise ConfigError(f"dtype must be one of {', '.join(map(str, _PLAIN))}, not {dtype}")


def _cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        if parameter.dtype != dtype:
            gradient, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None if gradient is None else gradient.to(dtype)


def _quantization_method(model: nn.Module) -> str:
    """How transformers says that a model is quantized; empty if it does not."""
    method = getattr(model, "quantization_method", None)
    if isinstance(method, str):
        method = str(getattr(method, "value", method))
        if method in _OWN_DTYPES:
            return method
    if getattr(model, "hqq_quantized", False):
        return "hqq"
    kbit = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    return "bitsandbytes" if kbit else ""


def _switch(model: nn.Module) -> Any:
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    return next((getattr(model, name) for name in names if callable(getattr(model, name, None))), None)


def _clear_caches() -> None:
    for device in (torch.cuda, torch.xpu):
        if device.is_available():
            device.empty_cache()
