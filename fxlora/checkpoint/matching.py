"""Which tensors of a base checkpoint the branches of a saved adapter are for, told from names and shapes alone.

Names in a file may have a prefix that those of the base lack, or the other way round, or be those of another version of
the model (`fxlora.checkpoint.renames`). Where shapes leave two readings
the merge is refused: a model knows, and `export_merged` asks it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from fxlora._passes import MergeError, did_you_mean, lookup
from fxlora.checkpoint.adapter import BASE_LAYER
from fxlora.checkpoint.base_view import BaseView
from fxlora.checkpoint.renames import HEAD, other_ends, other_names
from fxlora.checkpoint.safetensors_io import Entry
from fxlora.checkpoint.saved import SavedAdapter
from fxlora.compound import ATTENTION_WEIGHTS, OUT_PROJ
from fxlora.config import CONFIG_NAME, LoraConfig
from fxlora.errors import CheckpointError

Entries = Mapping[str, Entry]
"""The tensors of a base by name."""

EXPORT = "Load the model and use export_merged"
"""What works where files do not say enough."""


class Names:
    """Names of the base for those of one adapter: equal, renamed, or with one prefix more or less, the same for all."""

    def __init__(self, adapter: SavedAdapter, base: BaseView) -> None:
        self.entries: Entries = base.entries
        self.fused = frozenset(base.fused)
        self._base, self._adapter = base, adapter
        self._prefixes: dict[tuple[str, str], tuple[str, str]] = {}
        self._by_end: dict[str, list[str]] = {}
        for each in base.entries:
            for end in _ends(each):
                self._by_end.setdefault(end, []).append(each)

    def find(self, name: str, candidates: Sequence[str]) -> tuple[str, str]:
        """(name looked for, name in the base) of the first candidate that the base has.

        Raises:
            CheckpointError: when there is none, more than one, or one with another prefix than names before.
            MergeError: when it is quantized.
        """
        wanted, found = self._find(name, candidates)
        self._base.check_changeable(found)
        common = min(len(wanted), len(found))
        if wanted[-common:] == found[-common:] and not wanted.startswith(HEAD):
            self._prefixes.setdefault((wanted[:-common], found[:-common]), (name, found))
        if len(self._prefixes) > 1:
            (a, in_a), (b, in_b) = self._prefixes.values()
            raise CheckpointError(
                f"{self._adapter.file}: '{a}' would be '{in_a}' in the base and '{b}' would be '{in_b}': names differ in "
                "more than a common prefix; the adapter is for another model"
            )
        return wanted, found

    def has(self, name: str) -> str | None:
        """The name in the base of one tensor; None if the base has none."""
        return self._has(name, name)

    def lacks(self, name: str, candidates: Sequence[str]) -> bool:
        """Whether the base has none of the candidates."""
        return all(self._has(wanted, name) is None for wanted in candidates)

    def _has(self, wanted: str, name: str) -> str | None:
        if wanted in self.entries:
            return wanted
        found = self._one(name, [each for each in other_names(wanted) if each in self.entries])
        ends = (wanted, *other_ends(wanted))
        return found or self._one(name, [each for end in ends for each in self._with_prefix(end)])

    def _find(self, name: str, candidates: Sequence[str]) -> tuple[str, str]:
        for wanted in candidates:
            if wanted in self.entries:
                return wanted, wanted
        for wanted in candidates:
            found = self._has(wanted, name)
            if found is not None:
                return wanted, found
        raise CheckpointError(
            f"{self._adapter.file}: the base has no '{candidates[-1]}'.{did_you_mean(candidates[-1], self.entries)} The "
            "adapter is for another model, or the tensor is tied to another one, or named otherwise in memory than in "
            f"the files. {EXPORT} if the adapter fits the model, or merge with strict=False, which leaves such keys out"
        )

    def _with_prefix(self, wanted: str) -> Iterator[str]:
        yield from self._by_end.get(wanted, ())
        for end in _ends(wanted):
            if "." in end and end in self.entries:
                yield end

    def _one(self, name: str, found: Sequence[str]) -> str | None:
        different = sorted(set(found))
        if len(different) > 1:
            raise CheckpointError(
                f"{self._adapter.file}: '{name}' may be any of {', '.join(map(repr, different[:3]))} in the base; rename the "
                "adapter's keys to the base's names"
            )
        return different[0] if different else None


def _ends(name: str) -> Iterator[str]:
    """What is left of a name without its first parts, one after another."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


@dataclass(frozen=True, slots=True)
class Site:
    """One branch of an adapter and the weight that it is for.

    Attributes:
        branch: the branch's name in the file.
        pattern: the name that the configuration's patterns see.
        weight: the weight's name in the base.
        is_parameter: whether it is a bare parameter, and not the weight of a layer.
    """

    branch: str
    pattern: str
    weight: str
    is_parameter: bool = False


def find_weights(adapter: SavedAdapter, names: Names) -> Iterator[Site]:
    """The weight of each branch. Branches of several parameters of a module are nested in the file.

    Those that the base has nothing for are left out if the adapter is not read strictly.
    """
    modules: dict[str, dict[int, str]] = {}
    for branch in adapter.branches:
        module, depth = unwrapped(branch)
        other = modules.setdefault(module, {}).setdefault(depth, branch)
        if other != branch:
            raise CheckpointError(f"{adapter.file}: '{other}' and '{branch}' mean the same layer; remove one of them")
    for module, branches in modules.items():
        parameters = list(_parameters(adapter.config, module))
        layer, *compound = (f"{module}.{leaf}".lstrip(".") for leaf in ("weight", *_COMPOUND_FIRST))
        candidates = [*(each for each, _ in parameters), *compound, layer]
        if not adapter.strict and names.lacks(module, candidates):
            for branch in branches.values():
                adapter.skip_branch(branch)
            continue
        wanted, found = names.find(module, candidates)
        owner = found.rpartition(".")[0]
        if any(name == wanted for name, _ in parameters):
            held = {leaf: names.has(name) for name, leaf in parameters}
            weights = {leaf: weight for leaf, weight in held.items() if weight is not None}
            yield from _nested(adapter, module, branches, weights, names.entries, registered=False)
        elif wanted != layer:
            weights = {leaf: f"{owner}.{leaf}".lstrip(".") for leaf in _compound_weights(owner, names.entries)}
            yield from _nested(adapter, module, branches, weights, names.entries, registered=True)
        else:
            if list(branches) != [0]:
                raise CheckpointError(
                    f"{adapter.file}: '{branches[max(branches)]}' is nested as for parameters of one module, and "
                    f"{CONFIG_NAME} names none of '{module}' in target_parameters"
                )
            yield Site(branches[0], _pattern(module, owner, names.entries), found)


def unwrapped(branch: str) -> tuple[str, int]:
    """(name of the module, how deep the branch is nested in wrappers of it)."""
    parts = branch.split(".")
    depth = next((i for i, part in enumerate(reversed(parts)) if part != BASE_LAYER), len(parts))
    return ".".join(part for part in parts if part != BASE_LAYER), depth


def _parameters(config: LoraConfig, module: str) -> Iterator[tuple[str, str]]:
    """(full name, own name) of the parameters of a module that are targets."""
    seen: set[str] = set()
    for target in config.target_parameters or ():
        leaf = target.rpartition(".")[2]
        name = f"{module}.{leaf}".lstrip(".")
        if leaf not in seen and (name == target or name.endswith(f".{target}")):
            seen.add(leaf)
            yield name, leaf


_COMPOUND_FIRST = (*ATTENTION_WEIGHTS[:2], "weight_ih_l0", "weight_ih")
"""One weight that any compound module has: see `fxlora.compound`."""

_RECURRENT = re.compile(r"weight_(ih|hh|hr)(?:_l(\d+)(_reverse)?)?")


def _compound_weights(owner: str, entries: Entries) -> list[str]:
    """Own names of the weights of a compound module, in the order in which torch registers them."""
    found = [name for name in ATTENTION_WEIGHTS if f"{owner}.{name}".lstrip(".") in entries]
    if found:
        return found
    order: dict[str, tuple[int, bool, int]] = {}
    for name in entries:
        module, _, leaf = name.rpartition(".")
        match = _RECURRENT.fullmatch(leaf)
        if module == owner and match:
            order[leaf] = (int(match[2] or 0), bool(match[3]), ("ih", "hh", "hr").index(match[1]))
    return sorted(order, key=order.__getitem__)


def _pattern(module: str, owner: str, entries: Entries) -> str:
    """The name that patterns see: an attention's for its output projection."""
    attention, _, leaf = owner.rpartition(".")
    if leaf == OUT_PROJ and any(f"{attention}.{name}".lstrip(".") in entries for name in ATTENTION_WEIGHTS):
        return module.rpartition(".")[0]
    return module


def _nested(
    adapter: SavedAdapter,
    module: str,
    branches: Mapping[int, str],
    weights: Mapping[str, str],
    entries: Entries,
    *,
    registered: bool,
) -> list[Site]:
    """The parameters of one module: the one that is registered last is the outermost.

    Args:
        adapter: for messages, and for the configuration.
        module: its name in the adapter's model.
        branches: by depth, the names in the file.
        weights: by the parameters' own names, their names in the base.
        entries: of the base.
        registered: whether `weights` are in the order of registration, which files do not tell.

    Raises:
        CheckpointError: when the numbers differ, or no order fits the shapes.
        MergeError: when several orders fit.
    """
    if sorted(branches) != list(range(len(weights))):
        raise CheckpointError(
            f"{adapter.file}: '{module}' has the factors of {len(branches)} parameters, and {len(weights)} of the base's are "
            f"targets ({', '.join(weights)}); the adapter is for another model, or its configuration is"
        )
    inwards = [branches[depth] for depth in sorted(branches, reverse=True)]

    def sites(order: Iterable[str]) -> list[Site]:
        of_module = {leaf: module if registered else f"{module}.{leaf}".lstrip(".") for leaf in weights}
        return [
            Site(branch, of_module[leaf], weights[leaf], is_parameter=True)
            for branch, leaf in zip(inwards, order, strict=True)
        ]

    if registered or len(weights) == 1:
        return sites(weights)
    orders = [sites(order) for order in permutations(weights)]
    possible = [order for order in orders if all(_fits(adapter, site, entries) for site in order)]
    if not possible:
        shapes = ", ".join(f"{leaf} {entries[weight].shape}" for leaf, weight in weights.items())
        raise CheckpointError(
            f"{adapter.file}: the factors of '{module}' fit its parameters in no order ({shapes}); the adapter is for "
            "another model, or its configuration has another rank"
        )
    if len(possible) > 1:
        raise MergeError(
            f"{adapter.file}: which factors of '{module}' are for which of {', '.join(weights)} cannot be told from shapes, "
            f"and files do not have the parameters' order. {EXPORT}"
        )
    return possible[0]


def _fits(adapter: SavedAdapter, site: Site, entries: Entries) -> bool:
    shape = entries[site.weight].shape
    a, b = adapter.factors(site.branch)
    rank = lookup(adapter.config.rank_pattern, site.pattern, adapter.config.r)
    rows = rank * (shape[0] if len(shape) == 3 else 1)
    sizes = [(b.shape[0], a.shape[1])]
    sizes += [(a.shape[1], b.shape[0])] if len(shape) == 3 else []
    return a.shape[0] == b.shape[1] == rows and tuple(shape[-2:]) in sizes
