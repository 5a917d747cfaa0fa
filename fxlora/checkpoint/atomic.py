"""Putting a directory in place at one stroke: at any time, also after a crash, it is the old or the new one.

Everything is written to a staging directory beside the target, brought to disk, and exchanged with the target by one
system call. Knows nothing of adapters or checkpoints.

Two cases have no such stroke, and are completed by the next write or read if they are interrupted (`leftovers`). Where
the system cannot exchange directories, two renames follow each other (`exchange`). Where the target must stay the
directory that it is, or cannot be renamed, its files are replaced one by one (`in_place`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxlora.checkpoint.durable import remedy, sync_directory, sync_file, sync_tree
from fxlora.checkpoint.exchange import exchange
from fxlora.checkpoint.in_place import must_stay, replace_files
from fxlora.checkpoint.leftovers import claim, discard, forget_journals, interrupted, is_ours, recover
from fxlora.checkpoint.locks import commit_lock
from fxlora.errors import CheckpointError

Keep = Callable[[str], bool]
"""Whether an entry of the old directory, given its name, stays."""


@contextmanager
def staged(target: str | Path, keep: Keep | None = None) -> Generator[Path]:
    """A new, empty directory to write into, which takes the place of `target` when the context ends without an error.

    What earlier writers that were killed left is completed or removed first. Of several processes that write one target
    at once, the last to end wins.

    Args:
        target: the directory to make or replace; parents are created. A symbolic link is followed.
        keep: which entries of an existing target stay, besides those that were written. None replaces it whole. Kept
            files are hard links, so large ones cost nothing; they are copied where the file system has no hard links.

    Yields:
        The staging directory, `.<name>.fxlora-<pid>-<random>` beside the target; in it, if the target must stay.

    Raises:
        CheckpointError: when the target is a file or cannot be written. On this and any other error the staging
            directory is removed and the target is as it was.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"'{target}' is a file, and a directory is to be written there; choose another path")
    made: list[Path] = []
    state = "is as it was"
    try:
        made = _make_parents(path.parent)
        recover(path)
        staging, held = claim(path, path if path.is_dir() and must_stay(path) else path.parent)
        try:
            if path.is_dir():
                _take_over_attributes(path, staging, also=0o700)  # its group is that of the files to come
            yield staging
            sync_tree(staging)
            _put_in_place(staging, path, keep)
        finally:
            if interrupted(path):
                state = "is half replaced, and the next write or read completes it"
            discard(staging, path, held)
    except BaseException as error:
        for parent in reversed(made):
            with suppress(OSError):  # not empty: the target is in place, or someone else uses it
                parent.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"'{target}' cannot be written: {error}{remedy(error)}. It {state}") from error
        raise


def _make_parents(directory: Path) -> list[Path]:
    """Create a directory and its parents; returns those that were missing, outermost first."""
    missing: list[Path] = []
    while not directory.exists():
        missing.insert(0, directory)
        directory = directory.parent
    for each in missing:
        each.mkdir(exist_ok=True)
    return missing


def _put_in_place(staging: Path, target: Path, keep: Keep | None) -> None:
    with commit_lock(target):
        if not target.exists():
            staging.rename(target)
            with suppress(OSError):  # it is in place already
                sync_directory(target.parent)
        elif staging.parent == target or must_stay(target):
            _replace_files(staging, target, keep)
        else:
            _exchange(staging, target, keep)
        forget_journals(target)


def _exchange(staging: Path, target: Path, keep: Keep | None) -> None:
    if keep is not None:
        _link_missing(target, staging, keep)
        sync_tree(staging, files=False)
    _take_over_attributes(target, staging)
    try:
        old = exchange(staging, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # a directory of a lower layer of an overlay, such as a container's image, cannot be renamed
        _replace_files(staging, target, keep)
        return
    with suppress(OSError):  # the new directory is in place already
        sync_directory(target.parent)
    if keep is not None:
        with suppress(OSError):
            # Another process of the same run may have added files (its random state, say) since they were listed.
            _link_missing(old, target, keep)


def _replace_files(staging: Path, target: Path, keep: Keep | None) -> None:
    replace_files(staging, target, lambda name: is_ours(name) or (keep is not None and keep(name)))


def _take_over_attributes(source: Path, destination: Path, also: int = 0) -> None:
    status = source.stat()
    with suppress(OSError, AttributeError):  # only root may give files away, and Windows has no owners
        os.chown(destination, status.st_uid, status.st_gid)
    destination.chmod(status.st_mode & 0o7777 | also)


def _link_missing(source: Path, destination: Path, keep: Keep) -> None:
    """Hard-link every kept entry of `source` that `destination` does not have, recursively."""
    for entry in source.iterdir():
        if not keep(entry.name) or is_ours(entry.name):
            continue
        to = destination / entry.name
        if entry.is_dir() and not entry.is_symlink():
            if to.exists():
                _link_missing(entry, to, lambda _: True)
            else:
                to.mkdir()
                _link_missing(entry, to, lambda _: True)
                _take_over_attributes(entry, to)  # after its files are in it: it may be one that nobody may change
        elif not os.path.lexists(to):
            _link(entry, to)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except FileNotFoundError:
        pass  # removed by its owner since it was listed
    except (OSError, NotImplementedError):
        shutil.copy2(source, destination, follow_symlinks=False)
        if not destination.is_symlink():
            sync_file(destination)
