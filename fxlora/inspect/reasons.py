"""Why a layer is a target or not, in a few words: the rule that it failed, and the target that would have matched it.

Names and rules only; knows nothing of modules. `explain` calls it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxlora._passes import Decision, Rules, layer_index, select
from fxlora.errors import PatternError

_SHOWN = 3
"""How many targets are named."""
_LONGEST = 40
"""Characters of a target that are shown."""
_CLOSE = 0.6
"""How alike a misspelt target must be to a name, by difflib's ratio."""
_MOST_MISSPELT = 20


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a layer is a target, or is not.

    Attributes:
        text: the rule that decided, in a few words.
        nearest: the shortest entry of `target_modules` that would have matched, written as the others are; empty where
            one did, and where none would help.
        close: an entry that matches nothing and is probably meant for this layer.
        layer: the layer's number, where this is why it is left out.
    """

    text: str
    nearest: str = ""
    close: str = ""
    layer: int | None = None


class Reasons:
    """The reasons for the layers of one model.

    Args:
        names: of all modules.
        layers: (name, kind) of those that can be targets.
        rules: by which modules are chosen; None if none are.
        asked: `target_modules` as the user gave it: a list, an expression, `"all-linear"`, or None for the model's own.
        decisions: by name, if they are known.
    """

    def __init__(
        self,
        names: Sequence[str],
        layers: Sequence[tuple[str, str]],
        rules: Rules | None,
        asked: object,
        decisions: Iterable[Decision] = (),
    ) -> None:
        self._kinds, self._rules = dict(layers), rules
        self._all_linear = isinstance(asked, str) and asked.lower() == "all-linear"
        self._default = asked is None
        found = decisions or (select(names, rules) if rules is not None else ())
        self._decisions = {each.name: each for each in found}
        failed = [name for name in self._kinds if self._verdict(name) == "not targeted"]
        self._close = _misspelt(rules, names, failed) if rules is not None else {}
        expression = rules.target_modules if rules is not None else ()
        self._parts = _parts_that_match(expression, failed) if isinstance(expression, str) else {}

    def matched(self, name: str) -> str:
        """Why a name is a target; empty if no target matches it."""
        decision = self._decisions.get(name)
        if decision is None or not decision.matched:
            return ""
        if self._all_linear:
            return "target_modules: 'all-linear'"
        if decision.rule == name:
            return "named as a target"
        return f"{'default target' if self._default else 'target_modules:'} '{_cut(decision.rule or '')}'"

    def of(self, name: str) -> Reason:
        """Why a layer is no target."""
        decision, rules = self._decisions.get(name), self._rules
        if rules is None or decision is None:
            return Reason("target_modules is empty")
        if decision.matched:
            return Reason(f"'{_cut(decision.rule or '')}' matches, but the configuration is refused")
        rule = decision.rule or ""
        if decision.verdict == "excluded":
            field = "modules_to_save" if rule in rules.modules_to_save else "exclude_modules"
            return Reason(f"left out by {field}: '{_cut(rule)}'")
        if decision.verdict == "other layer":
            return _in_other_layer(rule, layer_index(name, rules.layers_pattern), rules.layers_to_transform)
        return self._not_targeted(name, rules)

    def _verdict(self, name: str) -> str:
        decision = self._decisions.get(name)
        return "" if decision is None else decision.verdict

    def _not_targeted(self, name: str, rules: Rules) -> Reason:
        nearest, close, targets = _shortest(name), self._close.get(name, ""), rules.target_modules
        if self._all_linear:
            linear = self._kinds.get(name) == "linear"
            text = f"'all-linear' {'leaves the output layer out' if linear else 'takes linear layers only'}"
        elif isinstance(targets, str):
            part = self._parts.get(name)
            what = "does not match the name" if part is None else f"matches '{part}' only, not the whole name"
            text, nearest = f"{'default target ' * self._default}'{_cut(targets)}' {what}", _expression(nearest, name)
        else:
            text = f"{'does not end with' if len(targets) == 1 else 'ends with none of'} {_listed(targets)}"
            text += " (the model's defaults)" * self._default
        return Reason(text, nearest, close)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _listed(entries: Sequence[str]) -> str:
    more = len(entries) - _SHOWN
    return ", ".join(map(_cut, entries[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _shortest(name: str) -> str:
    """The last part of a name; more of it where that is a number, which would match much else."""
    parts = name.split(".")
    first = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
    return ".".join(parts[first:])


def _expression(ending: str, name: str) -> str:
    return re.escape(name) if ending == name else rf".*\.{re.escape(ending)}"


def _in_other_layer(rule: str, layer: int | None, wanted: tuple[int, ...]) -> Reason:
    numbers = ranges(wanted)
    if layer is None:
        return Reason(f"'{_cut(rule)}' matches, but it is in no numbered layer (layers_to_transform: {numbers})")
    return Reason(f"'{_cut(rule)}' matches, but layer {layer} is not in layers_to_transform ({numbers})", layer=layer)


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, runs of three and more shortened: `0, 2–5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _misspelt(rules: Rules, names: Sequence[str], failed: Sequence[str]) -> dict[str, str]:
    """By layer the target that matches no module and is closest to the layer's name, in as many of its parts."""
    targets = rules.target_modules
    if isinstance(targets, str):
        targets = (targets,) if re.fullmatch(r"[\w.]+", targets) else ()
    endings = {".".join(name.split(".")[i:]) for name in names for i in range(name.count(".") + 1)}
    found: dict[str, str] = {}
    for target in [each for each in targets if each not in endings][:_MOST_MISSPELT]:
        parts = target.count(".") + 1
        by_ending: dict[str, list[str]] = {}
        for name in failed:
            by_ending.setdefault(".".join(name.split(".")[-parts:]), []).append(name)
        for best in difflib.get_close_matches(target, list(by_ending), n=1, cutoff=_CLOSE):
            found.update(dict.fromkeys(by_ending[best], target))
    return found


def _parts_that_match(expression: str, failed: Sequence[str]) -> dict[str, str]:
    """How far an expression gets that does not match whole names: the end, or the beginning, that it does match."""
    pieces: dict[str, list[str]] = {}
    for name in failed:
        dots = [at for at, letter in enumerate(name) if letter == "."]
        pieces[name] = [*(name[at + 1 :] for at in dots), *(name[:at] for at in reversed(dots))]
    every = list(dict.fromkeys(piece for each in pieces.values() for piece in each))
    try:
        matching = {each.name for each in select(every, Rules(expression)) if each.matched}
    except PatternError:  # which took its time for the names, and takes too long for their parts
        return {}
    return {name: piece for name, each in pieces.items() for piece in reversed(each) if piece in matching}
