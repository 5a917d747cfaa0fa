"""The examples in docstrings, executed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import fxlora
import passes


def test_examples() -> None:
    attempted = 0
    for package in (fxlora, passes):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if module.name in ("fxlora.cli", "fxlora.demo.run"):
                continue  # commands, without examples
            result = doctest.testmod(importlib.import_module(module.name))
            assert result.failed == 0, module.name
            attempted += result.attempted
    assert attempted >= 5
