"""`FXLORA_LOGS`: which topics are asked for, and what is said of others."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from fxlora import logs


@pytest.fixture
def kept() -> Iterator[None]:
    """The loggers' handlers and levels, put back after the test."""
    loggers = [logging.getLogger(name) for name in ("fxlora", "passes")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


def test_topics_are_read_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXLORA_LOGS", " Graph , select,")
    assert [topic for topic in logs.TOPICS if logs.wanted(topic)] == ["graph", "select"]


def test_an_unknown_topic_is_named_and_the_others_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kept: None
) -> None:
    monkeypatch.setenv("FXLORA_LOGS", "selct,passes")
    logs.setup()
    assert caplog.messages == [
        "FXLORA_LOGS: unknown topic 'selct'; there is graph, passes, select. Did you mean 'select'?"
    ]
    assert logging.getLogger("passes").level == logging.DEBUG and not logs.wanted("select")


def test_nothing_is_set_up_unless_asked_for(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    monkeypatch.delenv("FXLORA_LOGS", raising=False)
    before = list(logging.getLogger("fxlora").handlers)
    logs.setup()
    assert logging.getLogger("fxlora").handlers == before
