"""How reports are shown: one description, as sections, gives the forms for `rich`, for notebooks and for terminals.

Knows nothing of what is reported, and imports rich only when something is shown with it. Every report has `__str__`,
`to_dict`, `__rich__` and `_repr_html_`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from rich.console import RenderableType

Tone = Literal["plain", "error", "warning", "note"]

_STYLES: dict[Tone, str] = {"plain": "bold", "error": "bold red", "warning": "yellow", "note": "cyan"}
_COLOURS: dict[Tone, str] = {"plain": "inherit", "error": "#c62828", "warning": "#b26a00", "note": "#00707a"}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: a heading, a table and lines of text, each of which may be missing.

    Attributes:
        heading: in bold.
        tone: the heading's colour.
        code: a short name after the heading.
        header: names of the table's columns; without them the first column has the names of the rows.
        rows: the table's cells.
        right: columns of numbers, which are aligned to the right.
        lines: text below the table, a paragraph a line; spaces at the start of a line are kept.
    """

    heading: str = ""
    tone: Tone = "plain"
    code: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    right: tuple[int, ...] = ()
    lines: tuple[str, ...] = ()


class Rendered:
    """A report that `rich.print` and notebooks show as its sections say; as its text, if it has none of its own."""

    __slots__ = ()

    def sections(self) -> list[Section]:
        """What the report says, for people."""
        return [Section(lines=tuple(str(self).splitlines()))]

    def __rich__(self) -> RenderableType:
        """The report for `rich.print`."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        for section in self.sections():
            parts += [Text(), *_rich(section)] if parts else _rich(section)
        return Group(*parts)

    def _repr_html_(self) -> str:
        """The report for a notebook."""
        return "".join(_html(section) for section in self.sections())


def _rich(section: Section) -> list[RenderableType]:
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    if section.heading or section.code:
        parts.append(
            Text.assemble((section.heading, _STYLES[section.tone]), f"  {section.code}" if section.code else "")
        )
    if section.rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False) if section.header else Table.grid(padding=(0, 1))
        for index in range(len(section.rows[0])):
            heading = section.header[index] if section.header else ""
            style = None if section.header or index else "dim"
            side: Literal["right", "left"] = "right" if index in section.right else "left"
            table.add_column(Text(heading), justify=side, style=style, overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        parts.append(table if section.header else Padding(table, (0, 0, 0, 2)))
    return [*parts, *map(Text, section.lines)]


def _html(section: Section) -> str:
    parts: list[str] = []
    if section.rows:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in section.header)
        body = "".join(f"<tr>{''.join(_cell(section, *cell) for cell in enumerate(row))}</tr>" for row in section.rows)
        parts.append(f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>")
    if section.lines:
        text = "<br>".join(html.escape(line) for line in section.lines)
        parts.append(f"<p style='white-space:pre-wrap'>{text}</p>")
    code = f" <code>{html.escape(section.code)}</code>" if section.code else ""
    heading = f"<b style='color:{_COLOURS[section.tone]}'>{html.escape(section.heading)}</b>{code}"
    if not section.heading and not code:
        return "".join(parts)
    if not parts:
        return f"<p>{heading}</p>"
    return f"<details open><summary>{heading}</summary>{''.join(parts)}</details>"


def _cell(section: Section, index: int, text: str) -> str:
    side = "right" if index in section.right else "left"
    return f"<td style='text-align:{side}'>{html.escape(text)}</td>"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines of text with columns two spaces apart.

    Args:
        rows: of one length; a header is a row as any other.
        right: columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def json_data(value: object) -> Any:
    """A value as data that JSON has: what `to_dict` gives back.

    JSON has no infinite numbers and no NaN, and what Python writes for them other readers refuse: they become the texts
    `"inf"`, `"-inf"` and `"nan"`, which `float` reads.

    Args:
        value: numbers, texts, None, paths, and lists, tuples and dicts of these; anything else becomes its text.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): json_data(each) for key, each in cast("Mapping[object, object]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [json_data(each) for each in cast("Sequence[object]", value)]
    return fspath(cast("PathLike[str]", value)) if isinstance(value, PathLike) else str(value)


def human_bytes(size: float) -> str:
    """A size with a unit: `9.8 MB`."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def human_count(number: float, unit: str = "") -> str:
    """A large number in four digits at most, of a unit if there is one: `424.7 MFLOPs`."""
    for letter in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.0f} {unit}".strip() if not letter else f"{number:.1f} {letter}{unit}"
        number /= 1000
    return f"{number:.1f} P{unit}"
