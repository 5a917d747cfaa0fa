"""`check_files`: whether the files of a directory are those that were written, and hold together.

Reads every file once, piece by piece. What other programs make of an adapter: `fxlora.checkpoint.readers`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fxlora.checkpoint.adapter import FACTOR_DTYPES, PICKLED_NAME, WEIGHTS_NAME, load_factor
from fxlora.checkpoint.contents import read_contents
from fxlora.checkpoint.layout import INDEX_FILE, WEIGHTS_FILE, read_json, read_shards
from fxlora.checkpoint.leftovers import settle
from fxlora.checkpoint.manifest import MANIFEST_NAME, digest_of, read_manifest
from fxlora.checkpoint.safetensors_io import open_tensors, read_header
from fxlora.config import CONFIG_NAME
from fxlora.errors import CheckpointError, ConfigError
from fxlora.files import inside
from fxlora.rendering import Rendered, Section, json_data

State = Literal["ok", "differs", "missing", "unreadable"]
_SHOWN = 10
"""How many names of files are printed in a list."""


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A file that a manifest names.

    Attributes:
        name: relative to the checked directory.
        state: `"ok"` if it is as it was written, `"differs"`, `"missing"` or `"unreadable"`.
        reason: why it is unreadable.
    """

    name: str
    state: State
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FilesReport(Rendered):
    """What `check_files` found.

    Attributes:
        directory: that was checked.
        manifests: names of the manifests, relative to the directory.
        files: what the manifests name.
        not_in_manifest: other files beside, which no manifest vouches for; empty if there is no manifest.
        contents: a sentence about each model and adapter that is in order.
        problems: what is wrong with models and adapters; names files and remedies.
    """

    directory: str
    manifests: tuple[str, ...]
    files: tuple[CheckedFile, ...]
    not_in_manifest: tuple[str, ...]
    contents: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. Files that are not in a manifest do not count, nor does the lack of one."""
        return not self.problems and all(file.state == "ok" for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return json_data({**asdict(self), "ok": self.ok})

    def sections(self) -> list[Section]:
        """The findings under the directory's name."""
        directory, *lines = str(self).splitlines()
        return [Section(directory, "plain" if self.ok else "error", lines=tuple(lines))]

    def __str__(self) -> str:
        """A line for each finding."""
        lines = [self.directory]
        wrong = [file for file in self.files if file.state != "ok"]
        if self.manifests:
            good = len(self.files) - len(wrong)
            lines.append(f"  {good} of {len(self.files)} files are as {_listed(self.manifests)} says")
        else:
            lines.append(f"  no {MANIFEST_NAME}: nothing tells whether the files are those that were written")
        lines += [f"  {file.state:<10} {file.name}{': ' * bool(file.reason)}{file.reason}" for file in wrong]
        lines += [f"  {text}" for text in self.contents]
        lines += [f"  wrong      {text}" for text in self.problems]
        if self.not_in_manifest:
            lines.append(f"  not in the manifest: {_listed(self.not_in_manifest)}")
        if wrong:
            lines.append(
                "  Files differ that were changed, damaged or only half copied: copy, download or write the directory "
                f"again. If you changed them on purpose, remove {MANIFEST_NAME}"
            )
        return "\n".join(lines)


def check_files(directory: str | Path) -> FilesReport:
    """Verify the manifests of a directory, and that its models and adapters can be read.

    Every file that a `SHA256SUMS` names is read and compared. Headers, indices and shards must agree, JSON must be valid,
    and the tensors of an adapter finite. Directories inside are checked too, if they have a manifest, a model or an
    adapter; hidden ones are not.

    Raises:
        CheckpointError: when there is nothing to check, or a manifest is broken.

    Example:
        >>> import fxlora, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> config = fxlora.LoraConfig(r=4, target_modules=["0"])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     fxlora.lora_transform(model, config).save_pretrained(directory)
        ...     report = fxlora.check_files(directory)
        >>> report.ok, [file.name for file in report.files]
        (True, ['adapter_config.json', 'adapter_model.safetensors'])
    """
    root = Path(directory)
    settle(root)
    if not root.is_dir():
        raise CheckpointError(f"'{directory}' is not a directory; name one with a model or an adapter")
    manifests: list[str] = []
    files: list[CheckedFile] = []
    listed: set[str] = set()
    beside: set[str] = set()
    contents: list[str] = []
    problems: list[str] = []
    for here, names in _walk(root):
        prefix = "" if here == root else here.relative_to(root).as_posix() + "/"
        digests = read_manifest(here)
        if digests is not None:
            manifests.append(prefix + MANIFEST_NAME)
            listed |= {prefix + name for name in digests}
            files += [_checked(root, prefix + name, digest) for name, digest in digests.items()]
        beside |= {prefix + name for name in names if name != MANIFEST_NAME}
        for what, check in _CHECKS.items():
            if any(name in names for name in what):
                try:
                    contents.append(prefix + ": " * bool(prefix) + check(here))
                except (CheckpointError, ConfigError, OSError) as error:
                    problems.append(str(error))
    if not manifests and not contents and not problems:
        raise CheckpointError(
            f"'{directory}' holds neither a {MANIFEST_NAME} nor a model or adapter in safetensors files; name a directory "
            "that does"
        )
    unlisted = sorted(beside - listed) if manifests else []
    return FilesReport(
        str(directory), tuple(manifests), tuple(files), tuple(unlisted), tuple(contents), tuple(problems)
    )


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for here, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        yield Path(here), sorted(names)


def _checked(root: Path, name: str, digest: str) -> CheckedFile:
    if not os.path.lexists(root / name):
        return CheckedFile(name, "missing")
    try:
        found = digest_of(inside(root, name))
    except (CheckpointError, OSError) as error:
        return CheckedFile(name, "unreadable", str(error))
    return CheckedFile(name, "ok" if found == digest else "differs")


def _check_adapter(directory: Path) -> str:
    """A sentence about an adapter that can be read."""
    if not (directory / WEIGHTS_NAME).exists() and (directory / PICKLED_NAME).exists():
        return f"adapter, pickled ({PICKLED_NAME}), which is not read"
    contents = read_contents(directory)
    with open_tensors(directory / WEIGHTS_NAME) as file:
        for key, entry in file.entries.items():
            if entry.dtype in FACTOR_DTYPES:
                load_factor(file, key)
    return f"adapter of {_counted(len(contents.branches), 'layer')}, {_counted(len(contents.entries), 'tensor')}"


def _check_model(directory: Path) -> str:
    """A sentence about a checkpoint that can be read."""
    shards, _ = read_shards(directory)
    if (directory / "config.json").exists():
        read_json(directory / "config.json")
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in shards:
            read_header(path)
    return f"model of {_counted(sum(map(len, shards.values())), 'tensor')} in {_counted(len(shards), 'file')}"


_CHECKS = {(CONFIG_NAME, WEIGHTS_NAME): _check_adapter, (WEIGHTS_FILE, INDEX_FILE): _check_model}
"""By the files that tell what a directory holds."""


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _listed(names: tuple[str, ...]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
