"""Errors that this project raises for its users: each says what is wrong, where, and what to do about it.

Errors that can only be our own mistake are `assert`s, not these. Every module of `passes` and `fxlora` may import
this one; it imports nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxloraError(Exception):
    """Base of all errors raised on purpose by fxlora."""


class NoTargetError(FxloraError, ValueError):
    """A target of the configuration matches nothing in the model."""


class PatternError(FxloraError, ValueError):
    """A regular expression of the configuration cannot be used: it is none, or matching with it takes too long."""


class PassError(FxloraError, RuntimeError):
    """A pass could not rewrite a graph, or left it in a state that `verify` rejects."""


class VerifyError(PassError):
    """A graph and its parameters do not have the form that the passes promise."""


class MergeError(FxloraError, RuntimeError):
    """A fold was refused; no weight was changed."""


def close_matches(name: str, names: Iterable[str], *, limit: int = 3) -> list[str]:
    """Names that a user probably meant when writing `name`, best first.

    Whole names and their last components are compared, since targets are usually suffixes.
    """
    pool: dict[str, None] = {}
    for candidate in names:
        pool[candidate] = None
        pool[candidate.rpartition(".")[2]] = None
    return difflib.get_close_matches(name, list(pool), n=limit, cutoff=0.5)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?`, or an empty string when nothing is close."""
    matches = close_matches(name, names)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""
