"""The compiler: rewrites of torch.fx graphs. Imports torch, the standard library and itself, nothing else."""

from __future__ import annotations

FXLORA_PASSES = True
"""Lets `fxlora` tell this package from another one that is called `passes`."""
