"""Bars on the terminal: for work that goes over layers, and for bytes that are written."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def progress(description: str, total: int, *, shown: bool) -> Generator[Callable[[object], None]]:
    """Within this context a bar on standard error shows how many steps of `total` are done.

    Args:
        description: what is being done, before the bar.
        total: the number of steps.
        shown: False shows and prints nothing.

    Yields:
        To be called after each step, with anything.
    """
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda _: bar.advance(task)


@contextmanager
def byte_progress(description: str, *, shown: bool) -> Generator[Callable[[int, int], None] | None]:
    """Within this context a bar on standard error shows bytes, their rate, and the time that is left.

    Args:
        description: what is being done, before the bar.
        shown: False shows and prints nothing.

    Yields:
        To be called with the bytes that are done, and those in all; None if nothing is shown.
    """
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
