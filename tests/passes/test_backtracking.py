"""The bound on backtracking: beside a matcher that counts its steps, and for expressions that are known to explode."""

from __future__ import annotations

import importlib
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from passes.backtracking import NEVER, NOTHING, Count, bound

parser: Any = importlib.import_module("re._parser")
compiler: Any = importlib.import_module("re._compiler")


class Counting:
    """A matcher that goes through all ways in the order of `re`, without its shortcuts, and counts."""

    def __init__(self, text: str, most: int) -> None:
        self.text, self.most, self.steps = text, most, 0

    def sequence(self, nodes: Any, start: int) -> Iterator[int]:
        """The places where a match of all nodes ends."""
        self.count()
        if not nodes:
            yield start
            return
        for end in self.node(*nodes[0], start):
            yield from self.sequence(nodes[1:], end)

    def node(self, op: Any, value: Any, start: int) -> Iterator[int]:
        self.count()
        name = str(op)
        if name == "SUBPATTERN":
            yield from self.sequence(list(value[3]), start)
        elif name == "BRANCH":
            for alternative in value[1]:
                yield from self.sequence(list(alternative), start)
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            yield from self.repeat(name, value[0], value[1], list(value[2]), start, 0)
        elif name in ("ASSERT", "ASSERT_NOT"):
            inside = any(True for _ in self.sequence(list(value[1]), start))
            yield from [start] if inside == (name == "ASSERT") else []
        elif name == "AT":
            yield from [start] if start == (0 if "BEGINNING" in str(value) else len(self.text)) else []
        elif start < len(self.text) and one_character(op, value).match(self.text[start]):
            yield start + 1

    def repeat(self, name: str, least: int, most: int, body: Any, start: int, done: int) -> Iterator[int]:
        self.count()
        leave = [start] if done >= least else []
        if name == "MIN_REPEAT":
            yield from leave
        if done < most:
            for end in self.sequence(body, start):
                if end > start or done < least:
                    yield from self.repeat(name, least, most, body, end, done + 1)
        if name == "MAX_REPEAT":
            yield from leave

    def count(self) -> None:
        self.steps += 1
        if self.steps > self.most:
            raise OverflowError


CHARACTERS: dict[str, re.Pattern[str]] = {}


def one_character(op: Any, value: Any) -> re.Pattern[str]:
    """A class of characters, compiled by the library itself."""
    key = repr((op, value))
    if key not in CHARACTERS:
        CHARACTERS[key] = compiler.compile(parser.SubPattern(parser.State(), [(op, value)]))
    return CHARACTERS[key]


def steps(expression: str, text: str, most: int = 300_000) -> tuple[int, bool | None]:
    """How many steps `fullmatch` takes, and whether it matches; None if there are more than `most`."""
    matcher = Counting(text, most)
    try:
        matched = any(end == len(text) for end in matcher.sequence(list(parser.parse(expression)), 0))
    except OverflowError:
        return matcher.steps, None
    return matcher.steps, matched


ATOMS = ["a", "a", "b", "c", ".", r"\w", "[ab]", "[^a]", r"\.", "ab", "aab", r"\d", "$", "^"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,3}", "{0,6}", "{2,9}", "{3,}", "{5}"]


def expression(draw: random.Random, depth: int) -> str:
    kind = draw.random()
    if depth == 0 or kind < 0.3:
        return draw.choice(ATOMS)
    if kind < 0.55:
        return expression(draw, depth - 1) + expression(draw, depth - 1)
    if kind < 0.7:
        words = ["", "a", "ab", "aba", "b", "ba"]
        parts = [draw.choice(words) if draw.random() < 0.3 else expression(draw, depth - 1) for _ in range(3)]
        return f"(?:{'|'.join(parts[: draw.randint(2, 3)])})"
    if kind < 0.75:
        return draw.choice(["(?=", "(?!"]) + expression(draw, depth - 1) + ")"
    return f"(?:{expression(draw, depth - 1)}){draw.choice(REPEATS)}"


TEXTS = ["", "a" * 24, "ab" * 12, "aab" * 8, "a" * 23 + ".", "a.b" * 8, "abc1." * 4]


@pytest.mark.parametrize("seed", range(4))
def test_no_expression_takes_more_steps_than_its_bound(seed: int) -> None:
    """The matcher takes up to three steps where the bound counts one: for the sequence, the node and a repeat."""
    draw = random.Random(seed)
    bounded = 0
    for _ in range(1000):
        text = expression(draw, draw.randint(1, 5)) + draw.choice(["", "#"])
        most = bound(text).steps
        if most.at(24) > 100_000:
            continue
        bounded += 1
        for name in TEXTS:
            taken, matched = steps(text, name)
            assert taken <= 3 * most.at(len(name)), (text, name)
            assert matched == bool(re.fullmatch(text, name)), (text, name)
    assert bounded > 500


def test_alternatives_that_fail_are_counted() -> None:
    text = "(?:" + "|".join(f"{letter}x" for letter in "abcdefghijklmnopqrstuvwxyz") + ")"
    assert 26 < steps(text, "1")[0] <= 3 * bound(text).steps.at(1)


EXPLODING = [
    ("(a+)+$", "a"), ("(a*)*b", "a"), ("(?:a|a)*$", "a"), ("(?:a|aa)+$", "a"), ("([a-z]+)*1", "a"), (r"(\w+\s?)*$", "a"),
    ("(?:a?b?)*$", "ab"), ("(?:(?:a+)+)+$", "a"), (r"(?:.*,)*#", ","), (r"(?:a*?a*?)*#", "a"), ("(?=(a+)+$)a", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "unit"), EXPLODING)
def test_expressions_that_explode_have_no_bound(text: str, unit: str) -> None:
    assert bound(text).steps.at(1) == math.inf
    shorter, longer = (steps(text, unit * count + "!")[0] for count in (7, 10))
    assert longer > 1.4**3 * shorter  # each further character multiplies the steps


@pytest.mark.parametrize("text", [r"(.)\1", r"(a)(?(1)b|c)", "(?:.*a){25}", "(?:[ab]*?){30}", "(?:a?){0,50}"])
def test_what_is_not_known_to_be_polynomial_has_no_bound(text: str) -> None:
    assert bound(text).steps.at(1) == math.inf


@pytest.mark.parametrize(
    ("text", "degree"),
    [
        ("model", 0),
        ("q_proj|v_proj|(k|o)_proj", 0),
        ("(?:[ab]c?){2}", 0),
        (r"\d+\.\w+", 1),  # the next character ends the repeat
        (r"(?:[a-z]+\.)*9", 1 + 1),  # a word in each round, and the end of the last round
        (r".*\.(q|v)_proj", 1),
        (r"^(?!.*vision).*(q|v)_proj$", 1),
        (r".*layers.*proj", 2),
        (r"a.*", 1),
        (r".*a.*", 1),  # the second cannot fail and is reached once
        (r".*a.*b", 2),
        (r"(?>.*a)b", 1),
        (r"(?:.*\.)?q", 1),
        (r"a++b", 1),
        ("(?i)a+A", 1),
        ("(?i:K+)k", 1),
        ("(?-i:a+)A", 1),
    ],
)
def test_degrees(text: str, degree: int) -> None:
    factors = bound(text).steps.factors
    assert max((k for k, factor in enumerate(factors) if factor), default=0) == degree


@pytest.mark.parametrize(
    ("ambiguous", "decided"),
    [
        ("a*ab", "a*bb"),
        ("(?:ab|a)(?:ab|b)*#", "(?:ab|c)(?:ab|c)*#"),
        (r"\w*1", r"\D*1"),
        ("[^a]*b", "[^a]*a"),
        ("(?i)a*A", "a*A"),
        ("(?i)[a-c]*B", "[a-c]*B"),
        ("(?i)k*\u212a", "k*\u212a"),  # the Kelvin sign is a k
        ("[^a]*\u00e9", "a*\u00e9"),
        (r"\w*\u00e9", r"\.*\u00e9"),
        ("(?i:\u017f*)s", "(?i:\u017f*)t"),  # and the long s an s
        (r"a*(?=.*#)b", r"a*b"),  # what is looked for ahead costs steps at each place
    ],
)
def test_the_next_character_decides(ambiguous: str, decided: str) -> None:
    assert bound(ambiguous).steps.at(60) > bound(decided).steps.at(60)


def test_words_of_which_none_begins_another_are_one_way() -> None:
    one, two = (bound(f"(?:{words}).*#").steps.at(60) for words in ("attn|attention", "attn|attn_out"))
    assert one < two


@pytest.mark.parametrize("text", ["(", "a**", "(?P<n>a)(?P<n>b)", "(?z)"])
def test_no_expression(text: str) -> None:
    with pytest.raises(re.error):
        bound(text)


def test_expressions_that_break_the_parser() -> None:
    with pytest.raises(RecursionError):
        bound("(" * 2000 + ")" * 2000)
    with pytest.raises(OverflowError):
        bound("a{99999999999}")


def test_classes_that_take_long_to_compile() -> None:
    assert bound("[\u0100-\uffff]").compiles
    assert bound("[\u0100-\uffff]").steps.at(60) < 10
    assert not bound("(?i)" + "[\u0100-\uffff]" * 100).compiles
    assert bound("[a-z]" * 100).compiles


def test_counts() -> None:
    line, square = Count((1.0, 2.0)), Count((0.0, 0.0, 1.0))
    assert [line.at(n) for n in (0, 1, 9)] == [3, 5, 21]
    assert [square.at(n) for n in (0, 1, 2)] == [1, 3, 6]  # pairs of places in order
    assert (line + square).factors == (1, 2, 1)
    assert (line * line).factors == (1, 4, 4)
    assert line.power(3) == line * line * line
    assert line.at_most(square).factors == (1, 2, 1)
    assert NOTHING.at(5) == 0 and NEVER.at(0) == math.inf
    assert (NOTHING + line) == line
    assert square.power(1000) == NEVER
