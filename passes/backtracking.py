r"""How long `re` can take over a name: an upper bound on its backtracking, from the parse tree of the expression.

Nothing here matches anything. `passes.patterns` asks, and keeps expressions without a small bound out of this process.

The argument. `re` tries the ways to match one after another, and a way is fixed by the alternative that each branch
takes and by the place where each ambiguous repeat ends. Those places, in the order of the expression, never go back in
the name. So an expression with k ambiguous repeats, none inside of another, has at most C(n + k, k) ways for each
choice of alternatives on a name of n characters: a polynomial. What is not a polynomial (an ambiguous expression inside
of an unbounded repeat) or not known to be one (a reference to an earlier group) has the bound infinity.

A choice is not ambiguous if the next character decides it: where the alternatives begin with different characters, or
where a repeat cannot go on with any character that may follow it (`\d+\.`). The other choices then fail at once.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, cast

_parser = cast("Any", importlib.import_module("re._parser"))
"""The parser of `re`, whose tree is all that is read here; the library has no public way to it."""

_OTHER = 1 << 128
_END = 1 << 129
_ANY = (1 << 129) - 1
"""Sets of characters are bit masks: one bit for each of ASCII, one for all others, one for the end of the expression."""

_FEW = 4
"""Repeats with no more choices than this are counted as alternatives, longer ones by the place where they end."""

_MOST_CUTS = 12
"""Expressions with more places to choose have no bound that is worth computing."""

_MOST_WIDE_CLASSES = 20
"""`re.compile` takes milliseconds for each class with a character beyond Latin-1."""

_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")

_CATEGORIES = {
    f"CATEGORY_{name}": sum(1 << code for code in range(128) if re.match(text, chr(code))) | _OTHER
    for name, text in {
        "DIGIT": r"\d", "NOT_DIGIT": r"\D", "SPACE": r"\s", "NOT_SPACE": r"\S", "WORD": r"\w", "NOT_WORD": r"\W",
    }.items()
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Count:
    """A number of ways or steps for a name of n characters: the sum of `factors[k] * C(n + k, k)`."""

    factors: tuple[float, ...]

    def __add__(self, other: Count) -> Count:
        return Count(tuple(a + b for a, b in zip_longest(self.factors, other.factors, fillvalue=0.0)))

    def __mul__(self, other: Count) -> Count:
        """The count of one thing after another: the places of the second come after those of the first."""
        factors = [0.0] * (len(self.factors) + len(other.factors) - 1)
        for i, a in enumerate(self.factors):
            for j, b in enumerate(other.factors):
                factors[i + j] += a * b if a and b else 0.0
        return Count(tuple(factors)) if len(factors) <= _MOST_CUTS + 1 else NEVER

    def at_most(self, other: Count) -> Count:
        """A bound for both."""
        return Count(tuple(max(pair) for pair in zip_longest(self.factors, other.factors, fillvalue=0.0)))

    def power(self, exponent: int) -> Count:
        """The count of one thing `exponent` times in a row."""
        result = _ONE
        for _ in range(exponent if self != _ONE else 0):
            result = result * self
            if result.factors[-1] == math.inf:
                return NEVER
        return result

    def at(self, length: int) -> float:
        """The count for a name of `length` characters."""
        return sum(factor * math.comb(length + k, k) for k, factor in enumerate(self.factors) if factor)


NOTHING, NEVER = Count(()), Count((math.inf,))
"""The counts zero and infinity."""

_ONE = Count((1.0,))
_PLACE = Count((0.0, 1.0))  # as many as there are places in the name


@dataclass(frozen=True, slots=True)
class _Start:
    """What something can begin with.

    Attributes:
        first: the characters.
        steps: after so many, any other character has failed.
        empty: whether it can match nothing, so that what follows may come first.
        ends: whether it is nothing but ends of the name.
    """

    first: int
    steps: float
    empty: bool = False
    ends: bool = False

    def then(self, after: _Start) -> _Start:
        if not self.empty:
            return self
        return _Start(self.first | after.first, self.steps + after.steps, after.empty, self.ends and after.ends)


_NOTHING = _Start(0, 0.0, empty=True, ends=True)
_SUCCESS = _Start(_END, 1.0, ends=True)


@dataclass(frozen=True, slots=True)
class _Effort:
    """What it takes to match something from one place.

    Attributes:
        ways: how often at most what follows is begun with a character that it can begin with.
        steps: the steps of all ways.
        sure: whether it always matches, only ends of the name follow, and so no second way is tried.
        once: steps of parts that are sure, which are taken once however many ways lead there.
    """

    ways: Count
    steps: Count
    sure: bool = False
    once: Count = NOTHING


_HOPELESS = _Effort(NEVER, NEVER)


@dataclass(frozen=True, slots=True)
class Bound:
    """What an expression can cost.

    Attributes:
        steps: at most so many for `re.match` and `re.fullmatch`, on success as on failure, with a name of any length
            without line breaks; infinite where there is no polynomial bound.
        compiles: whether `re.compile` takes about as long as the parser took.
    """

    steps: Count
    compiles: bool = True


def bound(expression: str) -> Bound:
    """An upper bound on the cost of a regular expression.

    Raises:
        re.error: if it is none; likewise OverflowError, ValueError and RecursionError.
    """
    tree = _parser.parse(expression)
    analysis = _Analysis()
    effort = analysis.effort(tree, _SUCCESS, bool(tree.state.flags & re.IGNORECASE))
    return Bound(effort.steps + effort.once, len(analysis.wide_classes) <= _MOST_WIDE_CLASSES)


@dataclass
class _Analysis:
    """One walk over a parse tree."""

    wide_classes: set[int] = field(default_factory=set[int])
    starts: dict[tuple[int, bool], _Start] = field(default_factory=dict[tuple[int, bool], _Start])

    def effort(self, nodes: Any, after: _Start, fold: bool) -> _Effort:
        """A sequence: every way through a node is followed by all of what comes after it."""
        rest = _Effort(_ONE, _ONE)
        for node in reversed(nodes):
            here = self._node_effort(node, after, fold)
            once = here.once + rest.once
            if here.sure:
                rest = _Effort(_ONE, _ONE, sure=True, once=here.steps + rest.steps + once)
            else:
                rest = _Effort(here.ways * rest.ways, here.steps + here.ways * rest.steps, once=once)
            after = self._node_start(node, fold).then(after)
        return rest

    def _node_effort(self, node: Any, after: _Start, fold: bool) -> _Effort:
        name, value = str(node[0]), node[1]
        if name in _REPEATS:
            return self._repeat(value[0], value[1], value[2], after, fold)
        if name == "BRANCH":
            return self._branch(value[1], after, fold)
        if name == "SUBPATTERN":
            return self.effort(value[3], after, _folds(fold, value[1], value[2]))
        if name == "ATOMIC_GROUP":
            return self.effort(value, after, fold)
        if name in ("ASSERT", "ASSERT_NOT"):
            inside = self.effort(value[1], _SUCCESS, fold)
            return _Effort(_ONE, inside.steps + inside.once)
        if name in ("GROUPREF", "GROUPREF_EXISTS"):
            return _HOPELESS
        return _Effort(_ONE, _ONE)

    def _branch(self, alternatives: Sequence[Any], after: _Start, fold: bool) -> _Effort:
        """Alternatives that can begin with the same character add up; the others fail at once."""
        words = Counter(filter(None, (_word(each, fold) for each in alternatives)))
        by_first: dict[int, _Effort] = {}
        at_once: dict[int, float] = {}
        failing = 1.0
        for each in alternatives:
            start, effort = self.start(each, fold).then(after), self.effort(each, after, fold)
            failing += start.steps
            if word := _word(each, fold):  # of words only those match together of which one begins the other
                together = sum(words[word[:length]] for length in range(1, len(word) + 1))
                at_once[start.first] = max(at_once.get(start.first, 0.0), together)
                effort = _Effort(NOTHING, effort.steps)
            by_first[start.first] = _sum([by_first.get(start.first, _FAILURE), effort])
        ways, steps = NOTHING, NOTHING
        for kind in _kinds(by_first):
            here = _sum(effort for first, effort in by_first.items() if first & kind)
            ways = ways.at_most(here.ways + Count((at_once.get(kind, 0.0),)))
            steps = steps.at_most(here.steps)
        return _Effort(ways, steps + Count((failing,)), once=_sum(by_first.values()).once)

    def _repeat(self, least: int, most: int, body: Any, after: _Start, fold: bool) -> _Effort:
        start = self.start(body, fold)
        again = _Start(start.first | after.first, 1 + start.steps + after.steps) if most > 1 else after
        inside = self.effort(body, again, fold)
        if most > _FEW and start.empty:
            return _HOPELESS
        decided = least == most or not (start.empty or start.first & after.first)
        if inside.ways != _ONE:
            return self._rounds(least, most, inside, after)
        rounds = Count((float(most),)) if most <= _FEW else _PLACE  # each takes a character
        ends = _ONE if decided else Count((most - least + 1.0,)) if most - least < _FEW else _PLACE
        leaving = Count((1 + after.steps,)) if decided else _ONE
        sure = least == 0 and after.ends and most == _parser.MAXREPEAT and [str(op) for op, _ in body] == ["ANY"]
        return _Effort(ends, _ONE + rounds * (inside.steps + leaving), sure, inside.once)

    def _rounds(self, least: int, most: int, inside: _Effort, after: _Start) -> _Effort:
        """Up to `most` rounds of something ambiguous: the ways of one round to the power of the rounds."""
        ways = Count((most - least + 1.0,)) * inside.ways.power(most)
        tried = Count((float(most),)) * inside.ways.power(most - 1) * inside.steps
        return _Effort(ways, _ONE + tried + ways * Count((1 + after.steps,)), once=inside.once)

    def start(self, nodes: Any, fold: bool) -> _Start:
        """What a sequence can begin with; remembered, since repeats ask again at each level of nesting."""
        key = id(nodes), fold
        if key not in self.starts:
            found = _NOTHING
            for node in nodes:
                found = found.then(self._node_start(node, fold))
            self.starts[key] = found
        return self.starts[key]

    def _node_start(self, node: Any, fold: bool) -> _Start:
        name, value = str(node[0]), node[1]
        if name in _REPEATS:
            body = self.start(value[2], fold)
            return _Start(body.first, 1 + body.steps, body.empty or value[0] == 0)
        if name == "BRANCH":
            return _any_of([self.start(each, fold) for each in value[1]])
        if name == "SUBPATTERN":
            return self.start(value[3], _folds(fold, value[1], value[2]))
        if name == "ATOMIC_GROUP":
            return self.start(value, fold)
        if name == "AT":
            return _Start(0, 1.0, empty=True, ends=str(value) in ("AT_END", "AT_END_STRING"))
        if name in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
            return _Start(self._characters(name, value, fold), 1.0)
        return _Start(_ANY | _END, 1.0, empty=True)  # a look ahead takes its steps whatever comes

    def _characters(self, name: str, value: Any, fold: bool) -> int:
        if name == "ANY":
            return _ANY
        if name == "LITERAL":
            return _mask(value, value, fold)
        if name == "NOT_LITERAL":
            return _all_but(_mask(value, value, fold), fold)
        negated = str(value[0][0]) == "NEGATE"
        members = 0
        for kind, item in value[negated:]:
            if str(kind) == "CATEGORY":
                members |= _CATEGORIES[str(item)]
            else:
                low, high = item if str(kind) == "RANGE" else (item, item)
                if high > 255:
                    self.wide_classes.add(id(value))
                members |= _mask(low, high, fold)
        return _all_but(members, fold) if negated else members


def _kinds(sets: Iterable[int]) -> list[int]:
    """The characters, together where no set tells them apart."""
    kinds = [_ANY | _END]
    for each in sets:
        kinds = [part for kind in kinds for part in (kind & each, kind & ~each) if part]
    return kinds


def _word(nodes: Any, fold: bool) -> tuple[int, ...]:
    """The characters of an alternative that is one word, else nothing."""
    return () if fold or any(str(op) != "LITERAL" for op, _ in nodes) else tuple(code for _, code in nodes)


def _folds(fold: bool, added: int, removed: int) -> bool:
    """Whether case is ignored inside of a group."""
    return (fold or bool(added & re.IGNORECASE)) and not removed & re.IGNORECASE


def _mask(low: int, high: int, fold: bool) -> int:
    """The set of the characters from `low` to `high`; with `fold` also what Unicode takes for the same letters."""
    mask = _OTHER if high > 127 or fold else 0
    for code in range(low, min(high, 127) + 1):
        mask |= 1 << code | (1 << ord(chr(code).swapcase()) if fold else 0)
    if fold and high > 127:
        mask |= sum(1 << ord(letter) for letter in "iIkKsS")
    return mask


def _all_but(members: int, fold: bool) -> int:
    """A set that contains the complement; a class without regard to case is taken for everything."""
    return _ANY if fold else _ANY & ~members | _OTHER


def _any_of(starts: Sequence[_Start]) -> _Start:
    first = 0
    for each in starts:
        first |= each.first
    return _Start(first, 1 + sum(each.steps for each in starts), any(each.empty for each in starts))


_FAILURE = _Effort(NOTHING, NOTHING)


def _sum(efforts: Iterable[_Effort]) -> _Effort:
    total = _FAILURE
    for each in efforts:
        total = _Effort(total.ways + each.ways, total.steps + each.steps, once=total.once + each.once)
    return total
