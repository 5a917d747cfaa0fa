"""Mutated files neither crash, hang, take much memory, nor are accepted otherwise than an independent reader would."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from fxlora import config
from fxlora.checkpoint import adapter, header
from tests.faults.fuzz import run


def test_twenty_thousand_cases() -> None:
    result = run(20_000)
    assert result.faults == []
    assert sum(result.cases.values()) == 20_000
    assert all(result.accepted[kind] > 10 for kind in ("header", "config", "load", "merge"))  # and are judged


def _no_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_check_covered", lambda *_: None)


def _no_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_check_size", lambda *_: None)


def _names_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of several entries of one name wins, as in the library."""

    def parse(text: bytes, size: int, entry: Any) -> Any:
        offsets = {
            name: range(8 + len(text) + value["data_offsets"][0], 8 + len(text) + value["data_offsets"][1])
            for name, value in json.loads(text).items()
            if name != "__metadata__"
        }
        entries = {
            name: entry(value["dtype"], tuple(value["shape"]))
            for name, value in json.loads(text).items()
            if name != "__metadata__"
        }
        return entries, offsets, {}

    def parsed(text: bytes, size: int, entry: Any) -> Any:
        try:
            return parse(text, size, entry)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise header.HeaderError(str(error)) from error

    monkeypatch.setattr("fxlora.checkpoint.safetensors_io.parse", parsed)


def _no_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_check_types", lambda _: None)


def _no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_check_numbers", lambda _: None)


def _no_duplicates_of_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxlora.files.reject_duplicates", dict)


def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "check_keys", lambda *_: None)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("ERROR"):
        yield


BUGS = (_no_offsets, _no_sizes, _names_twice, _no_types, _no_numbers, _no_duplicates_of_fields, _no_keys)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_check_that_is_gone_is_noticed(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    assert run(4_000).faults
