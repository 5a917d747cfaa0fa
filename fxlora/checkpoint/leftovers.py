"""What writers that were killed left behind: completed or removed by the next write to the place, or the next read.

A writer of `<place>/<name>` makes, in `<place>` or in the directory itself:

- `.<name>.fxlora-<pid>-<random>`: the staging directory, or after the exchange the old directory, on its way out;
- `….lock`: held while the writer lives; made before the directory and removed after it;
- `…-old`: the old directory between two renames, where the system cannot exchange;
- `…-journal`: where files are replaced one by one (`fxlora.checkpoint.in_place`);
- `.<name>.fxlora.lock`: held while files are put in place.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from fxlora.checkpoint.durable import sync_directory
from fxlora.checkpoint.exchange import ASIDE
from fxlora.checkpoint.in_place import JOURNAL, finish, journal_of
from fxlora.checkpoint.locks import LOCK, Held, Owner, abandoned, acquire, commit_lock
from fxlora.errors import CheckpointError

log = logging.getLogger("fxlora")

_OURS = re.compile(rf"(\..*\.fxlora-\d+-[0-9a-f]{{8}})({ASIDE}|{JOURNAL}|{re.escape(LOCK)})?")


def is_ours(name: str) -> bool:
    """Whether an entry of a directory is one that writers make while they write."""
    return _OURS.fullmatch(name) is not None or name.endswith(f".fxlora{LOCK}")


def claim(target: Path, place: Path) -> tuple[Path, Held]:
    """Make a staging directory that everyone can see is in use.

    Args:
        target: what is to be written.
        place: the directory to make it in.

    Returns:
        The staging directory, and the lock that says so.
    """
    staging = place / f".{target.name}.fxlora-{os.getpid()}-{secrets.token_hex(4)}"
    held = acquire(_lock_of(staging))
    try:
        held.write(Owner.this())
        staging.mkdir()
    except BaseException:
        held.release()
        raise
    return staging, held


def discard(staging: Path, target: Path, held: Held) -> None:
    """Remove a staging directory, and the old directory beside it; the lock goes when they are gone.

    Nothing is removed while a replacement is half done: the next write or read completes it.
    """
    left = [staging, _aside_of(staging)]
    if not interrupted(target):
        for path in left:
            for directory, _, _ in os.walk(path):
                with suppress(OSError):
                    os.chmod(directory, 0o700)  # the mode may have been taken over from one that nobody may change
            shutil.rmtree(path, ignore_errors=True)
    held.release(remove=not any(map(os.path.lexists, left)))


def _lock_of(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}{LOCK}")


def _aside_of(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}{ASIDE}")


def recover(target: Path) -> None:
    """Complete what writers of a directory left half done, and remove what else they left. Those that live are left alone.

    Args:
        target: with links resolved; need not exist.

    Raises:
        OSError: when that is not possible here.
        CheckpointError: when another process keeps the right to put files in place.
    """
    if not _left(target):
        return
    with commit_lock(target):
        for staging in _left(target):
            held = abandoned(_lock_of(staging))
            if held is None:
                continue
            try:
                _complete(staging, target)
            finally:
                discard(staging, target, held)


def _left(target: Path) -> list[Path]:
    """The staging directories of all writers, living or not, whether the directory itself is there or not."""
    start, found = f".{target.name}.fxlora-", dict[Path, None]()
    for place in (target.parent, target):
        for name in _names(place):
            if name.startswith(start) and (match := _OURS.fullmatch(name)):
                found[place / match[1]] = None
    return list(found)


def _complete(staging: Path, target: Path) -> None:
    aside = _aside_of(staging)
    if aside.exists() and not os.path.lexists(target):
        # the old directory is moved aside only when the new one is complete and on disk
        (staging if staging.exists() else aside).rename(target)
        sync_directory(target.parent)
        log.warning("'%s' is in place again: its writer was killed while it was being replaced", target)
    if journal_of(staging).exists():
        finish(staging, target)
        log.warning("'%s' is complete again: its writer was killed while its files were being replaced", target)


def forget_journals(target: Path) -> None:
    """Remove the journals of a directory that was just written whole: what they would complete is past."""
    for journal in interrupted(target):
        journal.unlink(missing_ok=True)


def settle(directory: str | Path) -> None:
    """Before a directory is read: complete a replacement of it that was interrupted.

    Does nothing, and costs two listings, if there is no sign of one.

    Raises:
        CheckpointError: when there is one, and it cannot be completed here. Says how to do it.
    """
    try:
        target = Path(os.path.realpath(directory))
    except ValueError:  # no path at all
        return
    if not interrupted(target):
        return
    try:
        recover(target)
    except OSError as error:
        raise CheckpointError(_advice(target, interrupted(target), str(error))) from error
    left = interrupted(target)
    if left:
        raise CheckpointError(_advice(target, left, "its writer was on another machine, or is not known to have ended"))


def interrupted(target: Path) -> list[Path]:
    """Signs that a directory is not whole: an old one beside a missing one, or a journal in it or beside it."""
    places, suffix = ((target, target.parent), JOURNAL) if os.path.isdir(target) else ((target.parent,), ASIDE)
    start = f".{target.name}.fxlora-"
    return [
        place / name for place in places for name in _names(place) if name.startswith(start) and name.endswith(suffix)
    ]


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except (OSError, ValueError):  # who reads or writes there says so
        return []


def _advice(target: Path, left: list[Path], reason: str) -> str:
    what = f"'{target}' was being replaced when its writer was stopped, and that cannot be completed here ({reason}). "
    if left and left[0].name.endswith(ASIDE):
        return what + f"The directory as it was before is '{left[0]}': if nothing writes there, rename it to '{target}'"
    return what + "Write it again, or read it once where its writer ran"
