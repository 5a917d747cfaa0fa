"""The examples in docstrings, executed."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil

import fxlora
import passes

KERNELS = ("fxlora.ops.launch", "fxlora.ops.kernels.")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def test_examples() -> None:
    attempted = 0
    for package in (fxlora, passes):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if module.name in ("fxlora.cli.__main__", "fxlora.demo.run"):
                continue  # commands, without examples
            if module.name.startswith(KERNELS) and not HAS_TRITON:
                continue
            result = doctest.testmod(importlib.import_module(module.name))
            assert result.failed == 0, module.name
            attempted += result.attempted
    assert attempted >= 5
