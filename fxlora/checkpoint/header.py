r"""The header of a safetensors file, parsed and checked in full, with memory in proportion to its text.

Knows the format, not torch and not files. `fxlora.checkpoint.safetensors_io` calls it.

The format: https://github.com/huggingface/safetensors#format. A file is the header's length (8 bytes, little endian), the
header (a JSON object in UTF-8 that begins with `{` and may be padded with spaces) and the data, which the tensors cover
without a hole. It asks for no alignment: the library pads headers to 8 bytes since its version 0.3, MLX does not, and
both are read here. Members and fields may come in any order.

Stricter than the library, where readers differ or a file can only be an accident or an attack: no name twice (the library
takes the last), no white space before `{`, no unknown field, no name that is empty or has a NUL, no `"__metadata__": null`,
no dimension that torch cannot hold, no more than `MAX_TENSORS` tensors.

What is accepted is one regular expression, since Python's JSON would take fifty times the memory of a hostile text. Only
the message about what it does not match comes from a JSON parser, run on that part.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn, TypeVar, cast

MAX_HEADER = 100_000_000
"""Bytes of a header, as in the library."""

MAX_TENSORS = 150_000
"""Tensors of one file: more than the largest published models have in a hundred files together."""

MAX_NAME = 4_096
"""Characters of a tensor's name."""

MAX_METADATA = 1_024
"""Texts of the metadata that may be short; any more must have 32 bytes each, or memory would not be in proportion."""

MAX_TEXTS = 200_000
"""Texts of the metadata."""

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of an element by the format's names of dtypes."""

T = TypeVar("T")

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_LARGEST = 2**63 - 1
_COPY = "Copy or download it again"
_WRITE = "Write it again with the safetensors library"

_SPACE = r"[ \t\n\r]*+"
_INTEGER = r"(?:0|[1-9][0-9]{0,19})(?![0-9])"
_STRING = r'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'


def _pattern(text: str) -> re.Pattern[bytes]:
    """A blank in `text` is white space of JSON."""
    return re.compile(text.replace(" ", _SPACE).encode())


_FIELD = (
    r'(?: "dtype" : "([A-Z0-9_]{1,20}+)" '
    rf'| "shape" : \[ ((?:{_INTEGER}(?: , {_INTEGER})*+)?+) \] '
    rf'| "data_offsets" : \[ ({_INTEGER}) , ({_INTEGER}) \] )'
)
_NAME = _pattern(f" ({_STRING}) : ")
_ENTRY = _pattern(rf"\{{{_FIELD},{_FIELD},{_FIELD}\}}")
_TEXTS = _pattern(f" ({_STRING}) : ({_STRING}) ([,}}])")
_NEXT = _pattern(" ([,}])")
_EMPTY = _pattern(r"\{ \}")


class HeaderError(ValueError):
    """What is wrong with a header.

    Attributes:
        remedy: what to do about it.
    """

    def __init__(self, reason: str, remedy: str = _COPY) -> None:
        """Take the two parts of the message."""
        super().__init__(reason)
        self.remedy = remedy


def parse(
    text: bytes, size: int, entry: Callable[[str, tuple[int, ...]], T]
) -> tuple[dict[str, T], dict[str, range], dict[str, str]]:
    """Check a header in full.

    Args:
        text: the header.
        size: the file's size in bytes.
        entry: makes what is kept of a tensor from its dtype, by the format's name, and its shape. Equal ones are shared.

    Returns:
        The tensors by name, in the order of the header; the bytes of the file that are the data of each; the texts of
        the metadata.

    Raises:
        HeaderError: for anything that the format or this module does not allow.
    """
    begin = 8 + len(text)
    entries: dict[str, T] = {}
    offsets: dict[str, range] = {}
    metadata: dict[str, str] | None = None
    entry = lru_cache(4096)(entry)
    at, separator = _first(text)
    while separator == b",":
        found = _NAME.match(text, at)
        if found is None:
            _not_json(text, at)
        name, at = _text(text, *found.span(1)), found.end()
        if name in entries or (name == _METADATA and metadata is not None):
            raise HeaderError(f"the header has '{shown(name)}' twice, and readers differ in which they take", _WRITE)
        if name == _METADATA:
            metadata, at = _metadata(text, at)
        else:
            dtype, shape, start, end, at = _entry(text, at, name)
            _check_size(name, dtype, shape, start, end, size - begin)
            entries[name] = entry(dtype, shape)
            offsets[name] = range(begin + start, begin + end)
            if len(entries) > MAX_TENSORS:
                raise HeaderError(f"the header has more than {MAX_TENSORS:,} tensors", "Split the file")
        at, separator = _after(text, at)
    if text[at:].strip(b" \t\n\r"):
        _not_json(text, at)
    _check_covered(offsets, begin, size)
    return entries, offsets, metadata or {}


def _first(text: bytes) -> tuple[int, bytes]:
    """Where the first member begins, and what is before it: a comma in place of the brace, or the end."""
    if not text.startswith(b"{"):
        raise HeaderError("its header does not begin with '{'")
    empty = _EMPTY.match(text)
    return (1, b",") if empty is None else (empty.end(), b"}")


def _after(text: bytes, at: int) -> tuple[int, bytes]:
    """Where the next member begins, and the comma or brace before it."""
    found = _NEXT.match(text, at)
    if found is None:
        _not_json(text, at)
    return found.end(), found[1]


def _entry(text: bytes, at: int, name: str) -> tuple[str, tuple[int, ...], int, int, int]:
    """dtype, shape, first and last offset of a tensor, and where its description ends."""
    if not name or "\0" in name or len(name) > MAX_NAME:
        raise HeaderError(f"the name {shown(repr(name))} in the header is empty, too long or has a NUL", _WRITE)
    found = _ENTRY.match(text, at)
    groups = [group for group in found.groups() if group is not None] if found else []
    if found is None or len(groups) != 4:
        _explain(text, at, name)
    dtype, shape, start, end = (next(filter(None, found.groups()[i::4]), b"") for i in range(4))
    sizes = tuple(map(int, shape.split(b","))) if shape else ()
    return dtype.decode(), sizes, int(start), int(end), found.end()


def _check_size(name: str, dtype: str, shape: tuple[int, ...], start: int, end: int, data: int) -> None:
    """dtype, shape, offsets and the size of the data agree."""
    if dtype not in BITS:
        raise HeaderError(f"'{name}' in the header has the dtype '{dtype}', which is none of the format's")
    if not start <= end <= data:
        raise HeaderError(f"'{name}' has the offsets {[start, end]}, and the file {data:,} bytes of data")
    bits = BITS[dtype] * math.prod(shape)
    if math.prod(size or 1 for size in shape) > _LARGEST:
        raise HeaderError(f"'{name}' has the shape {shown(list(shape))}, which no memory can hold")
    if bits != 8 * (end - start):
        raise HeaderError(
            f"'{name}' is {dtype} of shape {shown(list(shape))} in the header, and its offsets {[start, end]} are for another "
            "number of bytes"
        )


def _check_covered(offsets: dict[str, range], begin: int, size: int) -> None:
    """Tensors follow each other without hole and overlap, and end where the file ends."""
    at = begin
    for name in sorted(sorted(offsets, key=lambda name: offsets[name].stop), key=lambda name: offsets[name].start):
        if offsets[name].start != at:
            what = "overlaps the one before it" if offsets[name].start < at else "leaves a hole before it"
            raise HeaderError(f"the data of '{shown(name)}' {what}")
        at = offsets[name].stop
    if at != size:
        raise HeaderError(f"{size - at:,} bytes follow the data of its last tensor")


def _metadata(text: bytes, at: int) -> tuple[dict[str, str], int]:
    """The metadata, and where it ends."""
    begin = at
    if (empty := _EMPTY.match(text, at)) is not None:
        return {}, empty.end()
    texts: dict[str, str] = {}
    at, separator = at + 1, text[at : at + 1].replace(b"{", b",")
    while separator == b",":
        found = _TEXTS.match(text, at)
        if found is None:
            break
        name = _text(text, *found.span(1))
        if name in texts:
            raise HeaderError(f"'{_METADATA}' in the header has '{shown(name)}' twice", _WRITE)
        texts[name] = _text(text, *found.span(2))
        if len(texts) > min(MAX_METADATA + (found.end() - begin) // 32, MAX_TEXTS):
            raise HeaderError(f"'{_METADATA}' in the header has too many or too short texts to be genuine", _WRITE)
        at, separator = found.end(), found[3]
    if separator != b"}":
        raise HeaderError(f"'{_METADATA}' in the header is no object of texts", _WRITE)
    return texts, at


def _text(text: bytes, start: int, end: int) -> str:
    """A JSON string of the header."""
    try:
        if text.find(b"\\", start, end) < 0:
            return text[start + 1 : end - 1].decode()
        decoded: str = json.loads(text[start:end].decode())
        if re.search("[\ud800-\udfff]", decoded):
            raise ValueError("it has half of a surrogate pair")
    except ValueError as error:
        raise HeaderError(f"a name or text in the header, at byte {start}, is not valid: {error}", _WRITE) from None
    return decoded


def _explain(text: bytes, at: int, name: str) -> NoReturn:
    """Say what is wrong with the description of a tensor."""
    end = text.find(b"}", at, at + 4096) + 1
    try:
        if text[at : at + 1] != b"{" or not end:
            raise ValueError("it is no short object")
        pairs = cast("list[tuple[str, Any]]", _PAIRS.decode(text[at:end].decode()))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"'{shown(name)}' in the header has no valid description of a tensor: {error}") from None
    fields = dict(pairs)
    if sorted(field for field, _ in pairs) != sorted(_FIELDS):
        found = ", ".join(shown(field) for field, _ in pairs) or "nothing"
        raise HeaderError(f"'{shown(name)}' in the header should have {', '.join(_FIELDS)} once each, and has {found}")
    values = ", ".join(f"{field} {shown(fields[field])}" for field in _FIELDS)
    raise HeaderError(
        f"'{shown(name)}' in the header has {values}; a shape and two offsets should be whole numbers from 0, and a dtype "
        "the format's name of one"
    )


_PAIRS = json.JSONDecoder(object_pairs_hook=list, parse_int=str, parse_float=str)


def _not_json(text: bytes, at: int) -> NoReturn:
    raise HeaderError(
        f"its header is not that of a safetensors file (no valid JSON at byte {at}: {text[at : at + 20]!r})"
    )


def shown(value: object, most: int = 100) -> str:
    """A value for a message, cut where it gets long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
