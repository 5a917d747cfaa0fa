"""Launches of a Triton kernel, at a third of what Triton's own call costs the host.

That call binds, inspects and hashes all arguments and asks the driver about each tensor; small models wait for it. The
compiled form of a kernel depends on little: dtypes, devices and alignment of tensors, and which numbers are 1, divisible by
16 or longer than 32 bits.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

_LONGEST = 2**31 - 1


@functools.cache
def _are_several() -> bool:
    return torch.cuda.device_count() > 1


class Kernel:
    """A kernel with its compiled forms.

    Args:
        function: a `triton.jit` function that takes tensors or None first, then numbers, then constants.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._forms: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[float],
        constants: tuple[int, ...], warps: int, stages: int = 0,
    ) -> None:  # fmt: skip
        """Launch it on the current stream of the first tensor's device.

        Args:
            grid: how many programs.
            tensors: the first is none of those that are None.
            numbers: an argument is an int at every call or a float at every call.
            constants: without the stages of the pipeline, which are the last one where a kernel has them.
            warps: of a program.
            stages: as many as the device has shared memory for, at most these; 0 for a kernel without.
        """
        assert tensors[0] is not None
        device = tensors[0].get_device()
        if device >= 0 and _are_several() and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(grid, tensors, numbers, constants, warps, stages)
            return
        pointers = [0 if each is None else each.data_ptr() for each in tensors]
        form = (
            constants, warps, stages,
            *[each if each is None else (each.dtype, each.get_device(), pointer % 16)
              for each, pointer in zip(tensors, pointers, strict=True)],
            *[(each == 1, each % 16 == 0, each > _LONGEST) for each in numbers],
        )  # fmt: skip
        known = self._forms.get(form)
        if known is None:
            self._compile(form, grid, tensors, numbers, constants, warps, stages)
        else:
            compiled, constants = known
            # of a tensor the driver would be asked whether a kernel can read it, which the form says
            compiled[(*grid, 1)](*pointers, *numbers, *constants)

    def _compile(
        self, form: Any, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[float],
        constants: tuple[int, ...], warps: int, stages: int,
    ) -> None:  # fmt: skip
        for fewer in range(stages, 0, -1) if stages else [0]:
            staged = (*constants, fewer) if fewer else constants
            try:
                compiled = self._function[grid](*tensors, *numbers, *staged, num_warps=warps)
            except OutOfResources:
                if fewer < 2:
                    raise
            else:
                # None by the interpreter. Pinned memory is not remembered: known forms do not ask what a GPU can read.
                if compiled is not None and len({each.device for each in tensors if each is not None}) == 1:
                    self._forms[form] = compiled, staged
                return
