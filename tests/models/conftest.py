"""Tests here have many models in common: each is exported once."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.exports import exports_shared


@pytest.fixture(autouse=True, scope="session")
def _exports_shared() -> Generator[None]:
    with exports_shared():
        yield
