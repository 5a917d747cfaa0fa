"""Selection: pure functions from qualified names and rules to chosen sites, each with its reason.

The rules are those of peft's `LoraConfig`, exactly. Nothing here sees a module, a tensor or a graph. All regular
expressions go through `passes.patterns`, since configurations are files of strangers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

from passes.errors import NoTargetError, close_matches, did_you_mean
from passes.patterns import Patterns

T = TypeVar("T")

_SAVED = r"(^|.*\.){}($|\..*)"
_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_KEY = r"(.*\.)?({})$"
"""What peft makes of an entry of `modules_to_save`, of `layers_pattern`, and of a key of a pattern."""

_KEYS = "rank_pattern or alpha_pattern"

_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."

Verdict = Literal["matched", "excluded", "other layer", "not targeted"]


@dataclass(frozen=True, slots=True)
class Rules:
    """Which names are targets.

    Attributes:
        target_modules: a regular expression that must match a whole name, or names of which one must be equal to a
            name or to its dotted suffix.
        exclude_modules: names to leave out, by the same two rules; looked at first.
        modules_to_save: modules that are trained whole; nothing in them can be a target.
        layers_to_transform: only names whose layer index is one of these (lists of targets only).
        layers_pattern: names of the module lists in which layers are counted.
    """

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a name was chosen, and why: `rule` is the pattern that decided, or None if none applied."""

    name: str
    verdict: Verdict
    rule: str | None = None

    @property
    def matched(self) -> bool:
        """Whether the name is a target."""
        return self.verdict == "matched"

    @property
    def reason(self) -> str:
        """The verdict as a sentence."""
        if self.verdict == "matched":
            return f"target_modules: '{self.rule}'"
        if self.verdict == "excluded":
            return f"excluded by '{self.rule}'"
        if self.verdict == "other layer":
            return f"'{self.rule}' matches, but the layer is not in layers_to_transform"
        return "no target matches"


def select(names: Iterable[str], rules: Rules) -> list[Decision]:
    """One decision for each name, in the order given. The root's empty name is never a target.

    Raises:
        PatternError: when a regular expression is none, or takes too long.
    """
    return _decide([name for name in names if name], rules)


def decide(name: str, rules: Rules) -> Decision:
    """The decision for one qualified name: exclusions first, then targets, then the layer index."""
    return _decide([name], rules)[0]


def _decide(names: list[str], rules: Rules) -> list[Decision]:
    excluded = _matching("exclude_modules", rules.exclude_modules, names)
    saved = _first_matches("modules_to_save", rules.modules_to_save, names, template=_SAVED)
    targets = _matching("target_modules", rules.target_modules, names)
    decisions = [
        Decision(name, "excluded", out if out is not None else save)
        if out is not None or save is not None
        else Decision(name, "not targeted" if target is None else "matched", target)
        for name, out, save, target in zip(names, excluded, saved, targets, strict=True)
    ]
    return _in_layers(decisions, rules) if rules.layers_to_transform else decisions


def _in_layers(decisions: list[Decision], rules: Rules) -> list[Decision]:
    """Leave out targets in other layers. A target that is given by its full name, or by an expression, stays."""
    if isinstance(rules.target_modules, str):
        return decisions
    exact, layers = set(rules.target_modules), set(rules.layers_to_transform)
    found = [each.name for each in decisions if each.matched and each.name not in exact]
    elsewhere = {
        name
        for name, index in zip(found, _layer_indices(found, rules.layers_pattern), strict=True)
        if index not in layers
    }
    return [Decision(each.name, "other layer", each.rule) if each.name in elsewhere else each for each in decisions]


def _matching(field: str, patterns: str | tuple[str, ...], names: Sequence[str]) -> list[str | None]:
    """For each name the entry that decides: an expression for the whole name, or a name or dotted suffix."""
    if isinstance(patterns, str):
        return _first_matches(field, (patterns,) if patterns else (), names, whole=True)
    places = {entry: place for place, entry in reversed(list(enumerate(patterns)))}
    longest = max(map(len, patterns), default=-1)
    return [_entry(name, places, longest) for name in names]


def _entry(name: str, places: Mapping[str, int], longest: int) -> str | None:
    """The name itself if it is an entry, else the first entry that is a dotted suffix of it."""
    if name in places:
        return name
    found = [suffix for suffix in _suffixes(name, longest) if suffix in places]
    return min(found, key=places.__getitem__) if found else None


def _suffixes(name: str, longest: int) -> Iterator[str]:
    """What comes after each dot of a name, shortest first, up to a length."""
    dot = name.rfind(".")
    while dot >= 0 and len(name) - dot - 1 <= longest:
        yield name[dot + 1 :]
        dot = name.rfind(".", 0, dot)


def _first_matches(
    field: str, patterns: tuple[str, ...], names: Sequence[str], *, template: str = "{}", whole: bool = False
) -> list[str | None]:
    if not patterns:
        return [None] * len(names)
    found = _compiled(field, patterns, template, whole).find(names)
    return [None if each is None else patterns[each.position] for each in found]


@lru_cache(maxsize=64)
def _compiled(field: str, patterns: tuple[str, ...], template: str, whole: bool) -> Patterns:
    return Patterns(field, patterns, template, whole=whole)


def layer_index(name: str, layers_pattern: Sequence[str] = ()) -> int | None:
    """The index of the layer that a name lies in: the first number after a module list, or None.

    Without `layers_pattern` the list must have a parent (`model.layers.1.q_proj`, not `layers.1.q_proj`), as in peft.
    """
    return _layer_indices([name], layers_pattern)[0]


def _layer_indices(names: Sequence[str], layers_pattern: Sequence[str]) -> list[int | None]:
    if layers_pattern:
        found = _compiled("layers_pattern", tuple(layers_pattern), _LAYER, False).find(names)
    else:
        found = _compiled("layers_to_transform", (_ANY_LAYER,), "{}", False).find(names)
    return [int(each.group) if each is not None and each.group is not None else None for each in found]


def lookup(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches `name` or a dotted suffix of it (`rank_pattern`, `alpha_pattern`).

    A name that no pattern matches as an expression may still be a key itself, as in peft.

    Raises:
        PatternError: when a key is no regular expression, or takes too long.
    """
    if not patterns:
        return default
    keys = tuple(patterns)
    (found,) = _compiled(_KEYS, keys, _KEY, False).find([name])
    return patterns.get(name, default) if found is None else patterns[keys[found.position]]


def select_parameters(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The parameters that `target_parameters` asks for, by full name or dotted suffix, in the order of `names`.

    The order of the model is also that in which peft draws the factors and, for several parameters of one module, nests
    its wrappers.
    """
    entries = {target: 0 for target in targets}
    longest = max(map(len, entries), default=-1)
    return [name for name in names if _entry(name, entries, longest) is not None]


def minimal_targets(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest suffixes that are enough to select modules and none of the others, sorted: what peft writes.

    Args:
        wanted: full names of the modules.
        others: full names of the other modules; none of them may end with `.` and a name of `wanted`.

    Raises:
        ValueError: when nothing is wanted, or the same name is in both.
    """
    names, rest = set(wanted), set(others)
    if not names or "" in names:
        raise ValueError("wanted must be names of modules, at least one, none of them empty")
    if both := names & rest:
        raise ValueError(f"'{min(both)}' is among the wanted names and among the others")
    taken = {suffix for name in rest for suffix in _all_suffixes(name)}
    chosen: set[str] = set()
    for suffixes in sorted(_all_suffixes(name) for name in names):
        if chosen.isdisjoint(suffixes[:-1]):
            chosen.update(next(([suffix] for suffix in suffixes if suffix not in taken), []))
    return sorted(chosen or names)


def _all_suffixes(name: str) -> list[str]:
    """All dotted suffixes of a name, shortest first; the last is the name."""
    return [*_suffixes(name, len(name)), name]


def check_targets(decisions: Sequence[Decision], rules: Rules, available: Sequence[str]) -> None:
    """Refuse a selection that found nothing, or a list of targets of which one found nothing.

    Args:
        decisions: what `select` said.
        rules: the rules it used.
        available: names of the layers that can be targets, for the message.

    Raises:
        NoTargetError: naming what was asked for, the nearest names and what there is.
    """
    targets = rules.target_modules
    found = any(decision.matched for decision in decisions)
    if isinstance(targets, str):
        if not found:
            raise NoTargetError(_nothing_found(f"target_modules='{targets}'", targets, decisions, available))
        return
    missing = _absent(targets, [decision.name for decision in decisions])
    if missing or not found:
        wanted = missing[0] if missing else targets[0] if targets else ""
        raise NoTargetError(_nothing_found(f"target_modules={list(targets)}", wanted, decisions, available, missing))


def _absent(entries: Sequence[str], names: Iterable[str]) -> list[str]:
    """The entries that are neither a name nor a dotted suffix of one."""
    wanted = set(entries)
    longest = max(map(len, entries), default=-1)
    present: set[str] = set()
    for name in names:
        present.update(suffix for suffix in (name, *_suffixes(name, longest)) if suffix in wanted)
    return [entry for entry in entries if entry not in present]


def _nothing_found(
    asked: str, wanted: str, decisions: Sequence[Decision], available: Sequence[str], missing: Sequence[str] = ()
) -> str:
    excluded = sum(decision.verdict == "excluded" for decision in decisions)
    other = sum(decision.verdict == "other layer" for decision in decisions)
    hint = did_you_mean(wanted, available)
    if missing and any(decision.matched for decision in decisions):
        what = f"{asked}: no module is called {' or '.join(map(repr, missing))}."
    elif excluded and not missing:
        what = f"{asked} finds nothing: {excluded} modules are excluded (exclude_modules, modules_to_save)."
        hint = " Take them out of there, or name other targets."
    elif other and not missing:
        what = f"{asked} finds nothing: {other} modules match, but layers_to_transform leaves none of them."
        hint = (
            " Its indices count from 0 in the first numbered list below another module, or in the list that "
            "`layers_pattern` names."
        )
    else:
        what = f"{asked} matches no module of the model."
        if asked.endswith("'") and re.fullmatch(r"[\w.]+", wanted):
            hint += " A string is a regular expression for the whole name: put a suffix into a list."
    return f"{what}{hint} The model's linear layers are: {summarise(available)}."


@dataclass(frozen=True, slots=True)
class Unused:
    """The entries of one field of a configuration that do nothing.

    Attributes:
        field: the field's name.
        entries: what does nothing, as it is written.
        close: what the first of them probably meant.
    """

    field: str
    entries: tuple[str, ...]
    close: tuple[str, ...] = ()

    @property
    def is_error(self) -> bool:
        """Whether a user certainly wants to know: something would not be trained. Else a warning will do."""
        return self.field in ("target_modules", "modules_to_save")

    @property
    def message(self) -> str:
        """What is unused, and what was probably meant."""
        what = _WHAT_IS_MISSING.get(self.field, "no module is matched by")
        more = f" (and {len(self.entries) - 5} more)" if len(self.entries) > 5 else ""
        hint = f" Did you mean {' or '.join(map(_shown, self.close))}?" if self.close else ""
        return f"{self.field}: {what} {' or '.join(map(_shown, self.entries[:5]))}{more}.{hint}"


_WHAT_IS_MISSING = {
    "layers_to_transform": "no target lies in layer",
    "rank_pattern": "no target is matched by",
    "alpha_pattern": "no target is matched by",
}


def _shown(entry: str) -> str:
    return entry if entry.isdigit() else repr(entry if len(entry) <= 200 else f"{entry[:200]}...")


def unused(
    decisions: Sequence[Decision],
    rules: Rules,
    *,
    rank_pattern: Iterable[str] = (),
    alpha_pattern: Iterable[str] = (),
    targets: Sequence[str] | None = None,
) -> list[Unused]:
    """What in a configuration matches nothing, field by field. What to do about it is for the caller to decide.

    Args:
        decisions: what `select` said. Without any, only the patterns are looked at.
        rules: the rules it used.
        rank_pattern: the keys of `rank_pattern`.
        alpha_pattern: the keys of `alpha_pattern`.
        targets: the names that get a branch, if they are not just those that `select` chose.

    Raises:
        PatternError: when a regular expression is none, or takes too long.
    """
    names = [decision.name for decision in decisions]
    if targets is None:
        targets = [decision.name for decision in decisions if decision.matched]
    found: list[Unused] = []
    if decisions:
        found += _unused("target_modules", _without_match("target_modules", rules.target_modules, names), names)
        found += _unused("exclude_modules", _without_match("exclude_modules", rules.exclude_modules, names), names)
        # peft looks for modules to save by any ending of their names, with or without a dot
        absent = [each for each in rules.modules_to_save if not any(name.endswith(each) for name in names)]
        found += _unused("modules_to_save", absent, names)
        found += _unused_layers(decisions, rules)
    for field, keys in (("rank_pattern", tuple(rank_pattern)), ("alpha_pattern", tuple(alpha_pattern))):
        if keys:
            without = _compiled(_KEYS, keys, _KEY, False).unmatched(targets)
            found += _unused(field, [key for key in without if key not in targets], targets)
    return found


def _without_match(field: str, patterns: str | tuple[str, ...], names: Sequence[str]) -> list[str]:
    if isinstance(patterns, str):
        return [patterns] if patterns and not any(_first_matches(field, (patterns,), names, whole=True)) else []
    return _absent(patterns, names)


def _unused(field: str, entries: Sequence[str], names: Iterable[str]) -> list[Unused]:
    if not entries:
        return []
    alike = {re.sub(r"\b\d+\b", "0", name): name for name in names}  # one layer of many is enough to compare with
    return [Unused(field, tuple(entries), tuple(close_matches(entries[0][:200], alike.values())))]


def _unused_layers(decisions: Sequence[Decision], rules: Rules) -> list[Unused]:
    if isinstance(rules.target_modules, str) or not rules.layers_to_transform:
        return []
    found = [each.name for each in decisions if each.verdict in ("matched", "other layer") and each.rule != each.name]
    layers = {index for index in _layer_indices(found, rules.layers_pattern) if index is not None}
    missing = [index for index in rules.layers_to_transform if index not in layers]
    if not missing:
        return []
    close = sorted(sorted(layers, key=lambda index: abs(index - missing[0]))[:3])
    return [Unused("layers_to_transform", tuple(map(str, missing)), tuple(map(str, close)))]


def summarise(names: Sequence[str], *, limit: int = 12) -> str:
    """The distinct last components of names with their counts: `q_proj (32), v_proj (32)`."""
    counts: dict[str, int] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        counts[name if leaf.isdigit() else leaf] = counts.get(name if leaf.isdigit() else leaf, 0) + 1
    shown = [f"{leaf} ({count})" if count > 1 else leaf for leaf, count in list(counts.items())[:limit]]
    if len(counts) > limit:
        shown.append(f"and {len(counts) - limit} more")
    return ", ".join(shown) or "none"
