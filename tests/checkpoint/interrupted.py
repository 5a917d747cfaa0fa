"""What writers leave when they are stopped, made by hand, for the tests of recovery."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fxlora.checkpoint import in_place
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.locks import Owner

BASE = ".t.fxlora-1-0123abcd"


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def make(root: Path, text: str) -> Path:
    root.mkdir(parents=True)
    (root / "x").write_text(text)
    return root


def left(place: Path, owner: Owner | None, *suffixes: str) -> None:
    """What a writer left: directories, and its lock."""
    for suffix in suffixes:
        make(place / f"{BASE}{suffix}", suffix)
    if owner is not None:
        (place / f"{BASE}.lock").write_text(json.dumps(asdict(owner)))


def write(target: Path, text: str) -> None:
    with staged(target) as staging:
        (staging / "x").write_text(text)


DEAD = replace(Owner.this(), pid=2**22 + 1)
FOREIGN = Owner(1, "elsewhere", "another kernel", "")


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the replacement of files stop after some of them."""
    move, moved = in_place._move, []

    def some(source: Path, destination: Path) -> None:
        if len(moved) == after:
            raise OSError(5, "Input/output error")
        moved.append(source)
        move(source, destination)

    monkeypatch.setattr(in_place, "_move", some)
