"""What a reader of adapter files is: a table of rules, each for a feature that it does not read as peft does.

A rule is data. Whether it applies is decided by functions of `Contents`, without a model and without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fxlora.checkpoint.contents import Contents
from fxlora.checkpoint.readers.features import FEATURES

Level = Literal["wrong", "fails", "ignored", "note"]
"""`wrong`: loads and computes something else. `fails`: refuses to load. `ignored`: drops it without an error.
`note`: works, under a condition that one should know."""

LEVELS: tuple[Level, ...] = ("wrong", "fails", "ignored", "note")
"""Worst first."""

PORTABLE = (
    "write it with the scales folded into B (fxlora portable ADAPTER -o OUT, or save_pretrained(…, portable=True))"
)
MERGE = "merge it into the base (fxlora merge BASE ADAPTER -o OUT) and deploy the merged model"
PLAIN = "convert it to plain LoRA for the original base (save_pretrained(…, convert_to_plain=True))"
LIVE = "merge it with the model loaded (export_merged) and deploy the merged model"
REPEATED = "give the repeated layers weights of their own, merge (export_merged), and deploy the merged model"
WITH_PEFT = "run it with peft, or merge it there, and deploy the merged model"
HERE = "run it here: no other program has single calls"
ALONE = "give this reader the directory of the adapter that is wanted"
NEWER = "remove the field if the adapter does not depend on it"


@dataclass(frozen=True, slots=True)
class Rule:
    """What one reader does with one feature.

    Attributes:
        feature: a key of `FEATURES`.
        level: how bad it is.
        effect: what would happen, as the end of a sentence that begins with the reader's name.
        remedy: what to do.
        source: the file that shows it, in the reader's own repository or package.
        when: the places where the rule applies, if they are not all of the feature's.
    """

    feature: str
    level: Level
    effect: str
    remedy: str
    source: str
    when: Callable[[Contents], tuple[str, ...]] | None = None

    def places(self, contents: Contents) -> tuple[str, ...]:
        """Where in an adapter the rule applies: fields and keys; empty if nowhere."""
        return (self.when or FEATURES[self.feature].found)(contents)


@dataclass(frozen=True, slots=True)
class Reader:
    """One program that loads adapters.

    Attributes:
        name: what users call it.
        title: its full name.
        version: the version whose source was read.
        rules: what it does not do as peft does.
    """

    name: str
    title: str
    version: str
    rules: tuple[Rule, ...]

    def findings(self, contents: Contents) -> tuple[Finding, ...]:
        """What this reader would make of an adapter, worst first."""
        found = [
            Finding(
                self.name, rule.level, rule.feature, places, f"{self.title} {rule.effect}", rule.remedy, self.cite(rule)
            )
            for rule in self.rules
            if (places := rule.places(contents))
        ]
        return tuple(sorted(found, key=lambda each: LEVELS.index(each.level)))

    def cite(self, rule: Rule) -> str:
        """The source of a rule, with the version."""
        return f"{self.version}: {rule.source}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a reader would not read as peft does.

    Attributes:
        reader: its name.
        level: how bad it is, see `Level`.
        feature: what of the adapter it is about, a key of `FEATURES`.
        places: fields of the configuration, or keys of the file.
        effect: a sentence: what would happen.
        remedy: what to do.
        source: version and file that show it.
    """

    reader: str
    level: Level
    feature: str
    places: tuple[str, ...]
    effect: str
    remedy: str
    source: str
