"""Who may import whom: passes only torch, the standard library and itself; fxlora reaches passes by one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxlora
import passes

PASSES = Path(passes.__file__).parent
FXLORA = Path(fxlora.__file__).parent
LIBRARY = sys.stdlib_module_names | {"__future__"}


def modules(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also those inside of functions, and of imports by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            first = node.args[0]
            yield node.lineno, str(first.value) if isinstance(first, ast.Constant) else "?"


def imports_of(path: Path) -> list[tuple[int, str]]:
    return list(imported(ast.parse(path.read_text(encoding="utf-8"))))


def test_imports_are_seen() -> None:
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    import i\nimportlib.import_module('j.k')"
    assert sorted(name for _, name in imported(ast.parse(source))) == [".", "a.b", "c", "d.e", "i", "j.k"]
    assert len(modules(PASSES)) > 10 and len(modules(FXLORA)) > 10


@pytest.mark.parametrize("path", modules(PASSES), ids=lambda path: str(path.relative_to(PASSES.parent)))
def test_passes_imports_torch_the_library_and_itself(path: Path) -> None:
    allowed = LIBRARY | {"torch", "passes"}
    assert [(line, name) for line, name in imports_of(path) if name.partition(".")[0] not in allowed] == []


@pytest.mark.parametrize("path", modules(FXLORA), ids=lambda path: str(path.relative_to(FXLORA.parent)))
def test_fxlora_imports_passes_by_one_door(path: Path) -> None:
    found = [(line, name) for line, name in imports_of(path) if name.partition(".")[0] == "passes"]
    if path == FXLORA / "_passes.py":
        assert found
    else:
        assert found == [], "use fxlora._passes"


def test_errors_imports_nothing_of_ours() -> None:
    assert all(name.partition(".")[0] in LIBRARY for _, name in imports_of(PASSES / "errors.py"))


def test_importing_passes_loads_no_other_package() -> None:
    """What torch itself loads is torch's affair."""
    code = """
import sys, torch, torch.fx, torch._subclasses.fake_tensor
before = set(sys.modules)
import passes.base, passes.branches, passes.drop, passes.freeze, passes.insert, passes.merge, passes.printer
import passes.select, passes.verify
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"torch", "passes"}))
"""
    assert python(code, PASSES.parent).stdout.strip() == "[]"


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with these directories first on its path."""
    setup = f"import sys; sys.path[:0] = {[str(path) for path in paths]}"
    command = [sys.executable, "-P", "-c", f"{setup}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_shadowing_package_is_a_clear_error(tmp_path: Path) -> None:
    shadow = tmp_path / "passes" / "__init__.py"
    shadow.parent.mkdir()
    shadow.touch()
    done = python("import fxlora", tmp_path, FXLORA.parent)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: fxlora needs its own package 'passes', but another one was imported from {shadow}."
    )
    assert "Remove or rename that one, or put fxlora's directory before it on sys.path." in last
