"""Selection: pure functions from qualified names and rules to chosen sites, each with its reason.

The rules are those of peft's `LoraConfig`, exactly. Nothing here sees a module, a tensor or a graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from passes.errors import NoTargetError, did_you_mean

T = TypeVar("T")

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
    """One decision for each name, in the order given. The root's empty name is never a target."""
    return [decide(name, rules) for name in names if name]


def decide(name: str, rules: Rules) -> Decision:
    """The decision for one qualified name: exclusions first, then targets, then the layer index."""
    excluded = _matching(name, rules.exclude_modules)
    if excluded is not None:
        return Decision(name, "excluded", excluded)
    for saved in rules.modules_to_save:
        if re.match(rf"(^|.*\.){saved}($|\..*)", name):
            return Decision(name, "excluded", saved)
    target = _matching(name, rules.target_modules)
    if target is None:
        return Decision(name, "not targeted")
    is_suffix = not isinstance(rules.target_modules, str) and name not in rules.target_modules
    by_layer = bool(rules.layers_to_transform) and is_suffix
    if by_layer and layer_index(name, rules.layers_pattern) not in rules.layers_to_transform:
        return Decision(name, "other layer", target)
    return Decision(name, "matched", target)


def _matching(name: str, patterns: str | tuple[str, ...]) -> str | None:
    if isinstance(patterns, str):
        return patterns if patterns and re.fullmatch(patterns, name) else None
    if name in patterns:
        return name
    return next((each for each in patterns if name.endswith(f".{each}")), None)


def layer_index(name: str, layers_pattern: Sequence[str] = ()) -> int | None:
    """The index of the layer that a name lies in: the first number after a module list, or None.

    Without `layers_pattern` the list must have a parent (`model.layers.1.q_proj`, not `layers.1.q_proj`), as in peft.
    """
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in layers_pattern]
    for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        match = re.match(expression, name)
        if match is not None:
            return int(match["index"])
    return None


def lookup(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches `name` or a dotted suffix of it (`rank_pattern`, `alpha_pattern`).

    A name that no pattern matches as an expression may still be a key itself, as in peft.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return patterns.get(name, default)


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
    names = [decision.name for decision in decisions]
    if isinstance(targets, str):
        if not any(decision.matched for decision in decisions):
            raise NoTargetError(_nothing_found(f"target_modules='{targets}'", targets, decisions, available))
        return
    used = {decision.rule for decision in decisions if decision.rule and decision.verdict != "not targeted"}
    used |= {target for target in targets for name in names if name == target or name.endswith(f".{target}")}
    missing = [target for target in targets if target not in used]
    if missing or not any(decision.matched for decision in decisions):
        wanted = missing[0] if missing else targets[0] if targets else ""
        raise NoTargetError(_nothing_found(f"target_modules={list(targets)}", wanted, decisions, available, missing))


def _nothing_found(
    asked: str, wanted: str, decisions: Sequence[Decision], available: Sequence[str], missing: Sequence[str] = ()
) -> str:
    excluded = sum(decision.verdict == "excluded" for decision in decisions)
    other = sum(decision.verdict == "other layer" for decision in decisions)
    if missing and any(decision.matched for decision in decisions):
        what = f"{asked}: no module is called {' or '.join(map(repr, missing))}."
    elif excluded and not missing:
        what = f"{asked} finds nothing: {excluded} modules are excluded (exclude_modules, modules_to_save)."
    elif other and not missing:
        what = f"{asked} finds nothing: {other} modules match, but layers_to_transform leaves none of them."
    else:
        what = f"{asked} matches no module of the model."
    hint = did_you_mean(wanted, available)
    if asked.endswith("'") and not hint and re.fullmatch(r"[\w.]+", wanted):
        hint = " A string is a regular expression for the whole name: put a suffix into a list."
    return f"{what}{hint} The model's linear layers are: {summarise(available)}."


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
