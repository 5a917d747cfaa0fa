"""Which launches share a compiled form of a kernel: a function stands for the kernel, and records what it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from fxlora.ops import launch
from fxlora.ops.launcher import Kernel

MEMORY = torch.zeros(64, dtype=torch.float16)


class Recorded:
    """A `triton.jit` function: each call compiles, and a compiled form is launched by index and call likewise."""

    def __init__(self, most_stages: int = 1000) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.most_stages = most_stages

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*arguments: Any, num_warps: int) -> Any:
            if isinstance(arguments[-1], int) and arguments[-1] > self.most_stages:
                raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
            self.compiled.append(arguments)
            return Form(self.launched)

        return compile_and_launch


class Form:
    """What is compiled."""

    def __init__(self, launched: list[tuple[Any, ...]]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid, *arguments))


def test_a_form_is_compiled_once_and_gets_addresses() -> None:
    function = Recorded()
    kernel, other = Kernel(function), torch.ones(64, dtype=torch.float16)
    kernel((2, 3), [MEMORY, None], [7, 0.5], (64,), 4)
    kernel((5, 1), [other, None], [9, 0.25], (64,), 4)
    assert len(function.compiled) == 1
    assert function.launched == [((5, 1, 1), other.data_ptr(), 0, 9, 0.25, 64)]


@pytest.mark.parametrize(
    ("tensors", "numbers", "constants"),
    [
        ([MEMORY[1:], None], [7], (64,)),
        ([MEMORY.view(torch.bfloat16), None], [7], (64,)),
        ([MEMORY, MEMORY], [7], (64,)),
        ([MEMORY, None], [1], (64,)),
        ([MEMORY, None], [32], (64,)),
        ([MEMORY, None], [2**31 + 1], (64,)),
        ([MEMORY, None], [7], (128,)),
    ],
    ids=["address", "dtype", "presence", "one", "divisible", "long", "constant"],
)
def test_what_triton_specializes_on_has_a_form_of_its_own(
    tensors: list[Any], numbers: list[int], constants: tuple[int, ...]
) -> None:
    function = Recorded()
    kernel = Kernel(function)
    kernel((1, 1), [MEMORY, None], [7], (64,), 4)
    kernel((1, 1), tensors, numbers, constants, 4)
    assert len(function.compiled) == 2
    assert function.launched == []


def test_a_form_with_a_tensor_elsewhere_is_not_remembered() -> None:
    """The driver says at each launch whether a GPU can read it."""
    function = Recorded()
    kernel = Kernel(function)
    for _ in range(2):
        kernel((1, 1), [MEMORY, torch.empty(64, dtype=torch.float16, device="meta")], [7], (64,), 4)
    assert len(function.compiled) == 2


def test_factors_of_several_dtypes_are_cast_before_a_kernel_chooses_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        launch, "_prepare", lambda grid, tensors, *rest: given.append(tuple(each.dtype for each in tensors))
    )
    single, half = torch.ones(2, 8), torch.ones(3, 8, dtype=torch.bfloat16)
    for factors in ([single, single], [single, half]):
        launch.prepare(factors, torch.float16)
    f32, f16 = torch.float32, torch.float16
    assert given == [(f32, f32, f32, f16), (f16, f16, f16, f16)]


def test_as_many_stages_as_there_is_memory_for() -> None:
    function = Recorded(most_stages=2)
    kernel = Kernel(function)
    for _ in range(2):
        kernel((1, 1), [MEMORY], [7], (64,), 4, 4)
    assert [arguments[-1] for arguments in function.compiled] == [2]
    assert [arguments[-1] for arguments in function.launched] == [2]
    with pytest.raises(triton.runtime.errors.OutOfResources):
        Kernel(Recorded(most_stages=0))((1, 1), [MEMORY], [7], (64,), 4, 4)
