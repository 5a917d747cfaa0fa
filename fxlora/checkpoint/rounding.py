"""Merged weights in the dtype that is written: one rounding, and never NaN or infinity that was not there."""

from __future__ import annotations

import torch
from torch import Tensor

from fxlora._passes import FOLDABLE, MergeError, round_once
from fxlora.errors import ConfigError

PLAIN_DTYPES = FOLDABLE
"""Dtypes whose values are the weights themselves, without scales beside them."""


def check_out_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype in which merged weights cannot be written.

    Raises:
        ConfigError: names those that can be.
    """
    if dtype is not None and dtype not in PLAIN_DTYPES:
        allowed = ", ".join(str(each) for each in PLAIN_DTYPES)
        raise ConfigError(f"`out_dtype` should be one of {allowed}, or None for each weight's own, not {dtype!r}")


def check_foldable(dtype: torch.dtype | None, what: str) -> None:
    """Refuse to fold into a quantized weight.

    Raises:
        MergeError: naming `what`.
    """
    if dtype not in PLAIN_DTYPES:
        raise MergeError(f"'{what}' is {dtype or 'of a dtype torch does not have'}; dequantize the base, then merge")


def convert(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another dtype, rounded once; other than plain floating-point tensors are left as they are.

    Raises:
        MergeError: when a finite entry would become infinite.
    """
    if dtype is None or tensor.dtype == dtype or tensor.dtype not in PLAIN_DTYPES:
        return tensor
    # torch rounds float64 to half precision twice; its other casts are exact or one rounding
    result = round_once(tensor, dtype) if tensor.dtype == torch.float64 else tensor.to(dtype)
    if not bool((result.isfinite() | ~tensor.isfinite()).all()):
        raise MergeError(f"an entry is too large for {dtype}; choose a wider `out_dtype`")
    return result
