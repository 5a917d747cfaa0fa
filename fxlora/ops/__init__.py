"""The operators that lowered graphs call: linear layers with their branches, computed with few passes over memory."""

from fxlora.ops.dora import lora_dora_siblings
from fxlora.ops.dora_swiglu import lora_dora_swiglu
from fxlora.ops.linear import lora_linear_siblings
from fxlora.ops.mask import draw_seed
from fxlora.ops.swiglu import lora_swiglu

__all__ = ["draw_seed", "lora_dora_siblings", "lora_dora_swiglu", "lora_linear_siblings", "lora_swiglu"]
