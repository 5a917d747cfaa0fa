"""What of an adapter's file does not fit the model that it is read for, where the reader is asked to go on without it.

Knows names and shapes, and reads nothing. Strict reading, which refuses all of this: `fxlora.checkpoint.adapter`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxlora.errors import CheckpointError
from fxlora.naming import LoadResult

log = logging.getLogger("fxlora")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that a model wants from a file.

    Attributes:
        name: its key without the prefix.
        owner: the layer, module or bias that it is a part of.
        shape: what it has in files.
    """

    name: str
    owner: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Misfits:
    """What does not fit.

    Attributes:
        result: the keys, by what is wrong with them.
        fresh: owners that take nothing from the file, and start as those of a fresh adapter do.
    """

    result: LoadResult
    fresh: frozenset[str]

    @classmethod
    def of(
        cls,
        wanted: Sequence[Wanted],
        keys: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        unknown: Iterable[str],
        tied: Mapping[str, str],
        prefix: str,
    ) -> Misfits:
        """Compare a file with what is wanted.

        One factor without the other, or with another one than it was trained with, is noise: an owner of which a part is
        missing or misshapen takes none of its other parts either, nor does one that is tied to it.

        Args:
            wanted: all that the model wants.
            keys: of the file, by names without the prefix.
            shapes: of the file's tensors, by key.
            unknown: keys that mean nothing to the model.
            tied: owners by those that share their parts.
            prefix: what stands before the names in files.
        """
        missing = [each for each in wanted if each.name not in keys]
        misshapen = [each for each in wanted if each.name in keys and shapes[keys[each.name]] != each.shape]
        broken = {each.owner for each in (*missing, *misshapen)}
        broken |= {tied[owner] for owner in broken if owner in tied}
        fresh = frozenset({*broken, *(owner for owner, source in tied.items() if source in broken)})
        unused = [
            keys[each.name]
            for each in wanted
            if each.owner in fresh and each.name in keys and each not in misshapen
        ]  # fmt: skip
        mismatched = tuple((keys[each.name], shapes[keys[each.name]], each.shape) for each in misshapen)
        result = LoadResult(
            tuple(prefix + each.name for each in missing), tuple(sorted({*unknown, *unused})), mismatched
        )
        return cls(result, fresh)

    @classmethod
    def none(cls) -> Misfits:
        """Everything fits."""
        return cls(LoadResult(), frozenset())

    def check_some(self, path: Path, wanted: Sequence[Wanted]) -> None:
        """Refuse a file of which nothing fits.

        Raises:
            CheckpointError: says that it is for another model.
        """
        if wanted and self.fresh.issuperset(each.owner for each in wanted):
            raise CheckpointError(
                f"{path}: none of its tensors fits, so that there is nothing to load; the adapter is for another model, or "
                "its configuration is"
            )

    def warn(self, path: Path) -> None:
        """Say once what was left out, if anything was."""
        missing, unexpected, mismatched = self.result
        parts = [
            f"lacks {listed(missing)}" if missing else "",
            f"{listed(unexpected)} not used" if unexpected else "",
            f"{listed([key for key, _, _ in mismatched])} of another shape than the model needs" if mismatched else "",
        ]
        if any(parts):
            started = f"; {listed(sorted(self.fresh))} started as in a fresh adapter" if self.fresh else ""
            log.warning("%s: %s%s", path, ", ".join(part for part in parts if part), started)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names in quotes, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
