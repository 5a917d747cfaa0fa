"""Replacing the files of a directory that must stay itself, one by one, with a journal that lets a later run finish.

A directory stays if it is, or holds, the working directory or a mount point, or if it cannot be renamed. Once
the journal is in place, all new files are complete and on disk, and `finish` may be repeated until it is done.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from fxlora.checkpoint.durable import sync_directory, sync_file
from fxlora.errors import CheckpointError
from fxlora.files import MAX_INDEX, read_object

JOURNAL = "-journal"
"""Ends the name of the file that says what is to be removed and replaced. While it is there, the staging directory holds what is to be
moved."""


def must_stay(target: Path) -> bool:
    """Whether a directory cannot be exchanged: it would be pulled away from under a process, or take a mount with it."""
    with suppress(FileNotFoundError):  # the working directory itself may be gone
        if Path.cwd().is_relative_to(target):
            return True
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return True
    return any(os.path.ismount(directory) for directory, _, _ in os.walk(target))


def replace_files(staging: Path, target: Path, stays: Callable[[str], bool]) -> None:
    """Move everything in `staging` into `target`, and remove what is there besides.

    Args:
        staging: complete and on disk.
        target: the directory.
        stays: whether an entry of `target` that is not replaced, given its name, stays.

    Raises:
        OSError: when that fails. While there is a journal, `finish` goes on.
    """
    written = set(os.listdir(staging))
    stale = [
        (name, *_identity(target / name)) for name in os.listdir(target) if name not in written and not stays(name)
    ]
    draft = staging / JOURNAL
    text = json.dumps({"remove": stale, "replace": _there_already(staging, target)})
    draft.write_text(text, encoding="utf-8")
    sync_file(draft)
    draft.rename(journal_of(staging))
    sync_directory(staging.parent)
    finish(staging, target)


def _there_already(staging: Path, target: Path) -> list[tuple[str, int, int]]:
    """What is in the place of new files, with its identity."""
    names = [
        str((Path(directory) / name).relative_to(staging)) for directory, _, names in os.walk(staging) for name in names
    ]
    return [(name, *_identity(target / name)) for name in sorted(names) if os.path.lexists(target / name)]


def journal_of(staging: Path) -> Path:
    """Where the journal of a staging directory is."""
    return staging.with_name(f"{staging.name}{JOURNAL}")


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_ino, 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns


def finish(staging: Path, target: Path) -> None:
    """Do what is left to do of a replacement whose journal is in place.

    Raises:
        CheckpointError: when the journal cannot be read, or what it was to replace is another file by now.
        OSError: when a file cannot be moved or removed.
    """
    journal = journal_of(staging)
    stale, replaced = (_read(journal, what) for what in ("remove", "replace"))
    _check_unchanged(staging, target, {name: (inode, modified) for name, inode, modified in replaced})
    for directory, subdirectories, names in os.walk(staging):
        to = target / Path(directory).relative_to(staging)
        for name in subdirectories:
            if not (to / name).is_dir():
                _remove(to / name)
                (to / name).mkdir()
        for name in sorted(names):
            _move(Path(directory) / name, to / name)
        sync_directory(to)
    for name, inode, modified in stale:
        with suppress(FileNotFoundError):
            if _identity(target / name) == (inode, modified):  # and not another one of that name, made since
                _remove(target / name)
    sync_directory(target)
    shutil.rmtree(staging, ignore_errors=True)
    journal.unlink()


def _check_unchanged(staging: Path, target: Path, replaced: Mapping[str, tuple[int, int]]) -> None:
    """Refuse to replace a file that somebody has put there since."""
    for directory, _, names in os.walk(staging):
        for name in names:
            new = Path(directory) / name
            relative = str(new.relative_to(staging))
            old = target / relative
            if os.path.lexists(old) and _identity(old) != replaced.get(relative) and not _is_copy(new, old):
                raise CheckpointError(
                    f"'{old}' was changed after the writer of '{target}' was stopped, and is not replaced by that writer's. To "
                    f"keep it, remove '{staging}' and '{journal_of(staging)}'; to have the writer's version, remove '{old}'"
                )


def _is_copy(new: Path, old: Path) -> bool:
    """Whether a file was moved already, to another file system, and only its source is left."""
    return old.is_file() and not old.is_symlink() and filecmp.cmp(new, old, shallow=False)


def _read(journal: Path, what: str) -> list[tuple[str, int, int]]:
    entries = read_object(journal, MAX_INDEX).get(what)
    stale: list[tuple[str, int, int]] = []
    for entry in cast("list[Any]", entries) if isinstance(entries, list) else [None]:
        match entry:
            case [str(name), int(inode), int(modified)] if _is_inside(name, deep=what == "replace"):
                stale.append((name, inode, modified))
            case _:
                raise CheckpointError(f"{journal} is no journal of fxlora; remove it and write the directory again")
    return stale


def _is_inside(name: str, *, deep: bool) -> bool:
    parts = Path(name).parts
    return bool(parts) and (deep or len(parts) == 1) and not {"..", os.sep}.intersection(parts)


def _move(source: Path, destination: Path) -> None:
    if destination.is_dir() and not destination.is_symlink():
        shutil.rmtree(destination)
    try:
        os.replace(source, destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # another file system is mounted below the target
        beside = destination.with_name(f".{destination.name}.fxlora-new")
        shutil.copyfile(source, beside)
        sync_file(beside)
        os.replace(beside, destination)
        source.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
