"""Errors: their family, and the names that they suggest."""

from __future__ import annotations

import pytest

from passes.errors import FxloraError, MergeError, NoTargetError, PassError, VerifyError, close_matches, did_you_mean

NAMES = ["model.layers.0.q_proj", "model.layers.0.v_proj", "lm_head"]


@pytest.mark.parametrize(
    ("error", "kinds"),
    [
        (NoTargetError, (FxloraError, ValueError)),
        (PassError, (FxloraError, RuntimeError)),
        (VerifyError, (PassError, RuntimeError)),
        (MergeError, (FxloraError, RuntimeError)),
    ],
)
def test_family(error: type[Exception], kinds: tuple[type[Exception], ...]) -> None:
    assert all(issubclass(error, kind) for kind in kinds)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("q_porj", "q_proj"),
        ("lmhead", "lm_head"),
        ("model.layers.0.vproj", "model.layers.0.v_proj"),
        ("layers.0.q_proj", "model.layers.0.q_proj"),
    ],
)
def test_whole_names_and_last_components_are_compared(name: str, best: str) -> None:
    assert close_matches(name, NAMES)[0] == best
    assert did_you_mean(name, NAMES).startswith(f" Did you mean '{best}'")


def test_nothing_is_close() -> None:
    assert close_matches("zzz", NAMES) == []
    assert did_you_mean("zzz", NAMES) == ""
    assert did_you_mean("q", []) == ""


def test_each_name_is_suggested_once() -> None:
    assert close_matches("q_proj", ["a.q_proj", "b.q_proj"], limit=9).count("q_proj") == 1
    assert len(close_matches("fc1", [f"fc{i}" for i in range(9)])) == 3
