"""`check_adapter`: what each reader would make of a saved adapter, before it is deployed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxlora._passes import did_you_mean
from fxlora.checkpoint.contents import read_contents
from fxlora.checkpoint.readers.base import Finding
from fxlora.checkpoint.readers.features import FEATURES
from fxlora.checkpoint.readers.registry import READERS
from fxlora.errors import ConfigError
from fxlora.rendering import Rendered, Section, Tone, json_data

_SHOWN = 3
"""How many places of a finding are printed."""


@dataclass(frozen=True, slots=True)
class AdapterReport(Rendered):
    """What readers would make of an adapter.

    Attributes:
        directory: of the adapter.
        readers: names of the readers that were asked about.
        findings: by reader, worst first; empty where a reader reads it as peft does.
    """

    directory: str
    readers: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every reader reads it as peft does. Notes do not count."""
        return all(finding.level == "note" for finding in self.findings)

    def of(self, reader: str) -> tuple[Finding, ...]:
        """The findings of one reader."""
        return tuple(finding for finding in self.findings if finding.reader == reader)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return json_data({**asdict(self), "ok": self.ok})

    def __str__(self) -> str:
        """One paragraph for each finding, under the reader that it is about."""
        lines = [self.directory]
        for reader in self.readers:
            found = self.of(reader)
            lines += ["", _heading(reader, found)]
            for finding in found:
                lines += _paragraph(finding)
        return "\n".join(lines)

    def sections(self) -> list[Section]:
        """One for each reader, with a row for each finding."""
        found = {reader: self.of(reader) for reader in self.readers}
        return [
            Section(self.directory),
            *(
                Section(_heading(reader, each), _tone(each), rows=tuple(map(_row, each)))
                for reader, each in found.items()
            ),
        ]


def check_adapter(
    directory: str | Path, readers: Iterable[str] | str | None = None, *, base: str | Path | None = None
) -> AdapterReport:
    """Say what other programs would get wrong about a saved adapter. Reads headers and JSON only, no weights.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        readers: names, of `peft`, `vllm`, `sglang`, `llama.cpp`, `torchtune` and `onnxruntime`; all of them if None.
        base: directory of the base model, whose `config.json` tells the size of the vocabulary and whether the head is
            tied; None for the one that the adapter names, if it is a directory here.

    Raises:
        ConfigError: for a reader that is not known, with the nearest names.
        CheckpointError: when a file is missing or corrupt.

    Example:
        >>> import fxlora, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> config = fxlora.LoraConfig(r=4, target_modules=["0"], use_rslora=True)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     fxlora.lora_transform(model, config).save_pretrained(directory)
        ...     report = fxlora.check_adapter(directory, ["peft", "llama.cpp"])
        >>> report.ok, report.of("llama.cpp")[0].effect
        (False, 'llama.cpp scales by alpha / r all the same.')
    """
    names = _known(readers)
    contents = read_contents(directory, base)
    findings = tuple(finding for name in names for finding in READERS[name].findings(contents))
    return AdapterReport(str(directory), names, findings)


def _known(readers: Iterable[str] | str | None) -> tuple[str, ...]:
    if readers is None:
        return tuple(READERS)
    names = tuple(dict.fromkeys([readers] if isinstance(readers, str) else readers))
    for name in names:
        if name not in READERS:
            raise ConfigError(
                f"no reader is called '{name}'.{did_you_mean(name, READERS)} Known are: {', '.join(READERS)}"
            )
    return names


def _heading(reader: str, found: tuple[Finding, ...]) -> str:
    return f"{READERS[reader].title} ({READERS[reader].version})" + ("" if found else ": reads it as peft does")


def _tone(found: tuple[Finding, ...]) -> Tone:
    levels = {finding.level for finding in found}
    return "error" if levels & {"wrong", "fails"} else "warning" if "ignored" in levels else "plain"


def _row(finding: Finding) -> tuple[str, str]:
    title, *body = _texts(finding)
    return finding.level, "\n".join([title, *body])


def _texts(finding: Finding) -> list[str]:
    """The title, what happens with its remedy, and where it comes from."""
    more = len(finding.places) - _SHOWN
    places = ", ".join(finding.places[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return [
        FEATURES[finding.feature].title.replace("`", ""),
        f"{finding.effect} Remedy: {finding.remedy}.",
        f"Found: {places}. Source: {finding.source}.",
    ]


def _paragraph(finding: Finding) -> list[str]:
    title, *body = _texts(finding)
    wrapped = [
        line for text in body for line in textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)
    ]
    return [f"  {finding.level:<8} {title}", *(f"           {line}" for line in wrapped)]
