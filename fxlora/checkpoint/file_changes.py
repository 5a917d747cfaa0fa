"""Changes of what models have, as changes of the tensors that files have: experts taken apart, tied weights decided.

Called by `fxlora.checkpoint.merge_plan` between matching and planning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxlora._passes import KINDS, TOKENS, MergeError, Tied, Update, has_factors, token_ids
from fxlora.checkpoint.adapter import repeats
from fxlora.checkpoint.base_view import BaseView
from fxlora.checkpoint.changes import Change
from fxlora.checkpoint.ties import Family

log = logging.getLogger("fxlora")


@dataclass(frozen=True, slots=True)
class FileChanges:
    """What becomes of a checkpoint's tensors.

    Attributes:
        changes: by the names in the merged checkpoint.
        added: names that the base has not, and the names of the tensors that they start from.
        untied: whether a tied weight is several weights now.
    """

    changes: dict[str, Change]
    added: dict[str, str]
    untied: bool


def in_files(changes: Mapping[str, Change], base: BaseView, tied: Tied) -> FileChanges:
    """Changes as those of the tensors in files.

    Args:
        changes: by name, as `find_changes` gives them.
        base: the base.
        tied: what to do where a weight is changed at one of its ends only, or differently. Ends that were trained whole
            (modules_to_save) are untied without a word, as in live models.

    Raises:
        MergeError: when that is to be refused, or `tied="both"` leaves it open which change is meant.
    """
    result = FileChanges(_taken_apart(changes, base), {}, False)
    for family in base.families:
        named = {end: result.changes[end] for end in family.ends if end in result.changes}
        if named and _is_tied(family, base):
            result = _decided(result, _with_rows(named, family), family, tied)
    return result


# ---- experts ----


def _taken_apart(changes: Mapping[str, Change], base: BaseView) -> dict[str, Change]:
    """Changes of the parameters of experts as changes of their matrices."""
    result = {name: change for name, change in changes.items() if name not in base.fused}
    for name, change in changes.items():
        if name not in base.fused:
            continue
        loaded = [replace(update, parts=dict(update.parts)) for update in change.updates]  # once for all experts
        for piece in base.fused[name].pieces:
            other = result.get(piece.name, Change())
            if (other.value is not None or other.updates) and (other.value is not None or change.value is not None):
                raise MergeError(f"'{name}' has '{piece.name}', and adapters replace both; merge one of them only")
            result[piece.name] = replace(
                other,
                value=piece.of(change.value) if change.value is not None else other.value,
                replaced_by=change.replaced_by,
                updates=[*other.updates, *(piece.update(update) for update in loaded)],
            )
    return result


# ---- tied weights ----


def _is_tied(family: Family, base: BaseView) -> bool:
    """Whether all names that files have mean one weight.

    Raises:
        MergeError: when the configuration says so, and the tensors differ.
    """
    if len(family.stored) == 1:
        return True
    different = [name for name in family.stored[1:] if not base.are_equal(name, family.stored[0])]
    if different and family.said:
        raise MergeError(
            f"'{family.stored[0]}' and '{different[0]}' differ in the files, and config.json says that they are one "
            "(tie_word_embeddings), so that readers take one or the other; set it to what is meant; nothing was written"
        )
    return not different


def _with_rows(named: Mapping[str, Change], family: Family) -> dict[str, Change]:
    """The changes at each end; rows that are trained at the embeddings only are those of all ends, as in models."""
    rows = [each for each in named.get(family.embedding, Change()).updates if not has_factors(each.spec)]
    result = dict(named)
    for end in family.others if rows else ():
        change = result.get(end, Change())
        own = {each.spec.adapter for each in change.updates if not has_factors(each.spec)}
        added = [each for each in rows if each.spec.adapter not in own]
        result[end] = replace(change, updates=[*change.updates, *added])
    return result


def _decided(result: FileChanges, named: Mapping[str, Change], family: Family, tied: Tied) -> FileChanges:
    changes = {name: change for name, change in result.changes.items() if name not in family.ends}
    different = _different(named.values())
    if len(different) == 1 and (tied == "both" or len(named) == len(family.ends)):
        changes.update(dict.fromkeys(family.stored, different[0]))
        return replace(result, changes=changes)
    whole = tied == "refuse" and _are_whole(named.values())
    if whole:
        log.warning(
            "'%s' has other weights than the layers that it was tied to, as it was trained whole (modules_to_save): "
            "tie_word_embeddings is now False",
            next(iter(named)),
        )
    if tied == "untie" or whole:
        added = {end: family.stored[0] for end in family.ends if end not in family.stored}
        return FileChanges({**changes, **named}, {**result.added, **added}, True)
    changed = next(iter(named))
    other = next((end for end in family.ends if end not in named), list(named)[-1])
    if tied == "both":
        raise MergeError(
            f"'{changed}' and '{other}' have one weight and an update each, so that tied='both' cannot say which one is "
            "meant; use tied='untie', or train with ensure_weight_tying; nothing was written"
        )
    how = "changes them differently" if other in named else f"changes '{changed}' only"
    raise MergeError(
        f"'{changed}' and '{other}' are tied: they have one weight, and the adapter {how}. Say what is wanted with "
        "tied='untie' (each gets a weight of its own, and tie_word_embeddings becomes false) or tied='both' (the one weight "
        "is changed), or leave this layer out of the targets; nothing was written"
    )


def _are_whole(changes: Iterable[Change]) -> bool:
    """Whether all that changes was trained as a copy, which was a weight of its own all the time."""
    return all(change.value is not None and not change.folds for change in changes)


def _different(changes: Iterable[Change]) -> list[Change]:
    found: list[Change] = []
    for change in changes:
        if not any(_is_same(change, other) for other in found):
            found.append(change)
    return found


def _is_same(one: Change, other: Change) -> bool:
    """Whether two changes give one weight the same value, told without arithmetic."""
    if (one.value is None) != (other.value is None) or len(one.updates) != len(other.updates):
        return False
    if one.value is not None and other.value is not None and not repeats(one.value, other.value):
        return False
    rest = list(other.updates)
    for update in one.updates:
        equal = next((each for each in rest if _is_same_update(update, each)), None)
        if equal is None:
            return False
        rest.remove(equal)
    return True


def _is_same_update(one: Update, other: Update) -> bool:
    if one is other:
        return True
    if has_factors(one.spec) != has_factors(other.spec) or one.weight != other.weight:
        return False
    if not has_factors(one.spec):
        same_rows = token_ids(one.spec.options) == token_ids(other.spec.options)
        return same_rows and torch.equal(one.parts[TOKENS], other.parts[TOKENS])
    if one.spec.variant or other.spec.variant or one.spec.scaling != other.spec.scaling:
        return False
    pairs = zip(_product(one), _product(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _product(update: Update) -> tuple[Tensor, Tensor]:
    """(left, right) whose product is the update of a weight `(V, D)`, of an embedding or a linear layer."""
    kind = KINDS[update.spec.kind]
    A, B = (update.parts[name] for name in kind.factor_names)
    return (A.mT, B.mT) if update.spec.kind == "embedding" else (B, A)
