"""Regular expressions that come from files of strangers, matched against module names in bounded time.

`re` knows no time limit, and an expression as short as `(a+)+$` keeps it busy for years. So a name is matched in this
process only if `passes.backtracking` has a small bound on the steps; otherwise in a child process, which is ended after
some seconds. Knows nothing of what the expressions select; `passes.select` does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from passes.backtracking import NEVER, NOTHING, Bound, Count, bound
from passes.errors import PatternError

SECONDS = 1.0
"""How long the expressions of one field may be matched."""

_SECONDS_PER_NAME = 5e-3
"""Large models may take longer, as far as their names go; the number of expressions is a stranger's to choose."""

_STEPS_PER_NAME = 4e6
"""For all expressions of a field. A step takes up to 2.5 ns: no name takes more than about 10 ms in this process."""

_LONGEST_HERE, _LONGEST = 10_000, 100_000
"""Characters of an expression: the parser takes quadratic time at worst, 0.1 s for the first of these."""

_MOST_HERE = 20_000
"""Characters of all expressions of a field: the analysis takes up to 30 µs for each."""

_LONGEST_NAME = 10_000

_START_SECONDS = 30.0
"""For the child to start, on the busiest of machines."""

_MOST_ANSWERS = 200_000

_PLAIN_IS_CHEAPER = 5
"""Plain names are compiled and not analysed."""

_TOO_MUCH = Bound(NEVER, compiles=False)

_PLAIN = re.compile(r"[\w.-]*+")
"""Names as they are: what peft and others write into `rank_pattern` by the thousand."""

_FAULTS = (re.error, ValueError, OverflowError, RecursionError)
"""What `re` raises for an expression that it cannot compile."""

_CHILD = """
import faulthandler, json, re, sys, time
seconds, whole, texts, names = json.load(sys.stdin)
faulthandler.dump_traceback_later(seconds, exit=True)
start = time.process_time()
expressions = []
for position, text in enumerate(texts):
    try:
        expressions.append(re.compile(text))
    except Exception as error:
        print(json.dumps({"fault": str(error), "position": position}))
        sys.exit()
answers = []
for name in names:
    matches = [each.fullmatch(name) if whole else each.match(name) for each in expressions]
    answers.append([(i, match.groupdict().get("idx")) for i, match in enumerate(matches) if match])
print(json.dumps({"answers": answers, "seconds": time.process_time() - start}))
"""
"""The watchdog thread of `faulthandler` ends the process even while `re` keeps the interpreter to itself."""


_bound, _compile = lru_cache(maxsize=1024)(bound), lru_cache(maxsize=4096)(re.compile)
"""A field is looked at several times: to select, and to say what of it was not used."""


class Found(NamedTuple):
    """An expression that matched, by its place in the field, and what its group `idx` holds."""

    position: int
    group: str | None = None


def fault(pattern: str) -> str | None:
    """Why something is no regular expression, or None if it is one or is too costly to compile in this process."""
    if _PLAIN.fullmatch(pattern):
        return None
    if len(pattern) > _LONGEST_HERE and not _words(pattern):
        return f"it has more than {_LONGEST} characters" if len(pattern) > _LONGEST else None
    try:
        if not _words(pattern) and bound(pattern).compiles:
            re.compile(pattern)
    except _FAULTS as error:
        return _reason(error)
    return None


def first_fault(patterns: Sequence[str]) -> tuple[str, str] | None:
    """The first of many that is no regular expression, and why. Those beyond what can be analysed here are passed over."""
    analysed = 0
    for pattern in patterns:
        if analysed <= _MOST_HERE or len(pattern) > _LONGEST:
            reason = fault(pattern)
            if reason is not None:
                return pattern, reason
            analysed += 0 if _PLAIN.fullmatch(pattern) else len(pattern)
    return None


class Patterns:
    """The expressions of one field of a configuration, compiled once and safe to match."""

    def __init__(self, field: str, patterns: Sequence[str], template: str = "{}", *, whole: bool = False) -> None:
        """Compile what can be compiled in no time.

        Args:
            field: the field's name, for messages.
            patterns: the expressions, in the order in which they are tried.
            template: what is matched, with `{}` for an expression.
            whole: whether a name must match to its end.

        Raises:
            PatternError: for what is no regular expression.
        """
        self._field, self._template, self._whole, self._analysed = field, template, whole, 0
        self._expressions = [self._compile(pattern) for pattern in patterns]
        steps = sum((each.steps for each in self._expressions), NOTHING)
        self._longest = bisect_right(range(_LONGEST_NAME), _STEPS_PER_NAME, key=steps.at) - 1
        self._answers: dict[str, list[Found]] = {}
        self._pairs, self._spent = 0, 0.0

    def find(self, names: Sequence[str]) -> list[Found | None]:
        """For each name the first expression that matches it.

        Raises:
            PatternError: when that takes too long.
        """
        self._ask_about(names)
        end = time.thread_time() + self._allowed(len(names))
        found: list[Found | None] = []
        for name in names:
            if self._is_quick(name):
                found.append(self._first(name))
                self._check(end, names)
            else:
                found.append(next(iter(self._answers[name]), None))
        return found

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """The expressions that match none of the names, as they were given.

        Raises:
            PatternError: when that takes too long.
        """
        self._ask_about(names)
        end = time.thread_time() + self._allowed(len(names))
        slow = {found.position for name in names if not self._is_quick(name) for found in self._answers[name]}
        quick = [name for name in names if self._is_quick(name)]

        def matches(each: _Expression, name: str) -> bool:
            self._check(end, names)
            return bool(each.match(name))

        return [
            each.pattern
            for position, each in enumerate(self._expressions)
            if position not in slow and not any(matches(each, name) for name in quick)
        ]

    def _compile(self, pattern: str) -> _Expression:
        text = self._template.replace("{}", pattern)
        words = _words(text) if self._whole else frozenset[str]()
        if words:
            return _Expression(pattern, text, Count((1.0,)), words.__contains__)
        if len(pattern) > _LONGEST:
            raise self._error(
                pattern, f"has more than {_LONGEST} characters, which is too long; list the names instead"
            )
        try:
            plain = _PLAIN.fullmatch(pattern) is not None
            self._analysed += len(text) // _PLAIN_IS_CHEAPER if plain else len(text)
            here = len(text) <= _LONGEST_HERE and self._analysed <= _MOST_HERE
            # dots, which match whatever the characters do, have a bound for all names of this length
            analysed = self._template.replace("{}", "." * len(pattern)) if plain else text
            cost = _bound(analysed) if here else _TOO_MUCH
            if not cost.compiles:
                return _Expression(pattern, text, NEVER, _not_here)
            expression = _compile(text)
        except _FAULTS as error:
            raise self._error(pattern, f"is no regular expression: {_reason(error)}") from error
        return _Expression(pattern, text, cost.steps, expression.fullmatch if self._whole else expression.match)

    def _is_quick(self, name: str) -> bool:
        """Whether the bound on the steps is small; it holds for names without line breaks."""
        return len(name) <= self._longest and "\n" not in name

    def _first(self, name: str) -> Found | None:
        for position, each in enumerate(self._expressions):
            if match := each.match(name):
                return Found(position, match.groupdict().get("idx") if isinstance(match, re.Match) else None)
        return None

    def _allowed(self, names: int) -> float:
        return max(SECONDS, _SECONDS_PER_NAME * names)

    def _check(self, end: float, names: Sequence[str]) -> None:
        """Between two names, each of which takes little time."""
        if time.thread_time() > end:
            self._give_up(self._allowed(len(names)), len(names))

    def _ask_about(self, names: Sequence[str]) -> None:
        """Have the child process match the names that are not matched here, and remember its answers.

        The time that it took is remembered too, so that names asked about one at a time take no longer in all.
        """
        if len(self._answers) > _MOST_ANSWERS:
            self._answers.clear()
        asked = [name for name in dict.fromkeys(names) if not self._is_quick(name) and name not in self._answers]
        if not asked:
            return
        self._pairs += len(asked)
        seconds = self._allowed(self._pairs) - self._spent
        answer = self._run_child(seconds, asked) if seconds > 0.01 else None
        if answer is None:
            self._give_up(self._allowed(self._pairs), len(asked))
        if "fault" in answer:
            pattern = self._expressions[answer["position"]].pattern
            raise self._error(pattern, f"is no regular expression: {answer['fault']}")
        self._spent += answer["seconds"]
        for name, found in zip(asked, answer["answers"], strict=True):
            self._answers[name] = [Found(*each) for each in found]

    def _run_child(self, seconds: float, names: Sequence[str]) -> dict[str, Any] | None:
        """What the child process says, or None if it had to be ended."""
        request = json.dumps([seconds, self._whole, [each.text for each in self._expressions], names])
        command = [sys.executable or "python", "-I", "-S", "-c", _CHILD]
        try:
            done = subprocess.run(
                command, input=request, capture_output=True, text=True, timeout=seconds + _START_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return None
        except OSError as error:
            raise self._error(self._costliest(), f"cannot be matched safely: no child process ({error})") from error
        if done.returncode and "Timeout" in done.stderr:
            return None
        if done.returncode:
            raise self._error(self._costliest(), f"cannot be matched: the child process failed ({done.stderr[-500:]})")
        return json.loads(done.stdout)

    def _costliest(self) -> str:
        return max(self._expressions, key=lambda each: each.steps.at(50)).pattern

    def _give_up(self, seconds: float, names: int) -> NoReturn:
        what = "1 name was" if names == 1 else f"{names} names were"
        raise self._error(
            self._costliest(),
            f"takes too long: {what} not matched within {seconds:g} s. Repeats inside of repeats, and "
            "several that can match the same text, make `re` try very many ways: write it without them ('.*' for "
            "'(.*)*'), or list the names",
        )

    def _error(self, pattern: str, what: str) -> PatternError:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        return PatternError(f"{self._field}: {shown!r} {what}")


@dataclass(frozen=True, slots=True)
class _Expression:
    """One expression: as it was given, as it is matched, its bound, and the compiled method."""

    pattern: str
    text: str
    steps: Count
    match: Callable[[str], re.Match[str] | bool | None]


def _not_here(name: str) -> bool:
    raise AssertionError(f"'{name}' is a matter for the child process")


def _words(pattern: str) -> frozenset[str]:
    """The words of an expression that is nothing but escaped words and `|`, else nothing.

    Names joined so are what we and others write into files, by the thousand: a set finds one of them at once.
    """
    parts = pattern.split("|")
    words = [re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in parts]
    return frozenset(words) if [re.escape(word) for word in words] == parts else frozenset()


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
