"""The operators that lowered graphs call: linear layers with their branches, computed with few passes over memory."""

from fxlora.ops.linear import lora_linear_siblings
from fxlora.ops.mask import draw_seed

__all__ = ["draw_seed", "lora_linear_siblings"]
