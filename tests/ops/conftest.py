"""Memory in which an entry that nobody wrote is seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
