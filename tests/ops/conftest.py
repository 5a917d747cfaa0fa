"""Operators on the CPU, where models would do without, and memory in which an entry that nobody wrote is seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxlora.ops import choice
from tests.ops.compiling import Recorder


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN: what torch does in its deterministic mode, and what freed memory on a GPU holds."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    if torch.cuda.is_available():
        blocks = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 25) for _ in range(3)]
        del blocks
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def operators_everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models call operators on the CPU too, as on a GPU, but in tests that ask for the `composed` form."""
    if "composed" not in request.fixturenames:
        monkeypatch.setattr(choice, "composes", lambda device: False)


@pytest.fixture
def composed() -> None:
    """What models do on a CPU: branches in torch's own operations."""
    assert choice.composes(torch.device("cpu"))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands for Inductor."""
    import torch._inductor.compile_fx

    torch._dynamo.reset()
    found = Recorder()
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", found)
    return found
