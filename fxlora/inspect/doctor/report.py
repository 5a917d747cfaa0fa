"""What `doctor` found, as data, for terminals, for notebooks and for JSON. Knows nothing of models."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fxlora.rendering import Rendered, Section, human_bytes, json_data

Severity = Literal["error", "warning", "note"]
"""`error`: it cannot work as it is. `warning`: it is probably not what is meant. `note`: good to know."""

_SEVERITIES: tuple[Severity, ...] = get_args(Severity)
_SHOWN = 4
"""How many groups of places of a finding are printed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or good to know.

    Attributes:
        severity: see `Severity`.
        code: short name of the check, such as `no-gradient`.
        what: what is the case, in a sentence.
        why: how it comes, and what it leads to.
        remedy: what to do.
        places: qualified names of modules, parameters or adapters, all of them.
    """

    severity: Severity
    code: str
    what: str
    why: str
    remedy: str
    places: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The places; those that differ in numbers only are counted together: `layers.*.q_proj (30)`."""
        counts = Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", place) for place in self.places)
        single = {re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", place): place for place in self.places}
        texts = [f"{name} ({count})" if count > 1 else single[name] for name, count in counts.items()]
        more = len(texts) - _SHOWN
        return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the memory of training goes, in bytes.

    Attributes:
        weights: of all parameters and buffers.
        trained: of the parameters that require gradients.
        gradients: what these gradients take.
        optimizer: of the optimizer's state as it is, or of AdamW's if none was given or it has not stepped yet.
        activations: what one forward pass on the batch saves for the backward pass; None without a batch.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int | None = None

    def __str__(self) -> str:
        """The figures in one line."""
        parts = [
            f"weights {human_bytes(self.weights)}, of which {human_bytes(self.trained)} trained",
            f"gradients {human_bytes(self.gradients)}",
            f"optimizer {human_bytes(self.optimizer)}",
        ]
        if self.activations is not None:
            parts.append(f"saved for the backward pass {human_bytes(self.activations)}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class DoctorReport(Rendered):
    """What `doctor` found.

    Attributes:
        subject: what was examined, in a line.
        findings: worst first.
        examined: what was looked at: `model`, and `batch` and `optimizer` if they were given.
        memory: where the memory of training goes; None where there is no model to measure.
    """

    subject: str
    findings: tuple[Finding, ...]
    examined: tuple[str, ...] = ("model",)
    memory: Memory | None = None

    @classmethod
    def of(
        cls, subject: str, findings: Iterable[Finding], examined: tuple[str, ...], memory: Memory | None = None
    ) -> DoctorReport:
        """A report with its findings in order."""
        ordered = sorted(findings, key=lambda finding: _SEVERITIES.index(finding.severity))
        return cls(subject, tuple(ordered), examined, memory)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. Notes do not count."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of all findings, in their order."""
        return tuple(finding.code for finding in self.findings)

    def of_code(self, code: str) -> tuple[Finding, ...]:
        """The findings of one check."""
        return tuple(finding for finding in self.findings if finding.code == code)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return json_data({**asdict(self), "ok": self.ok})

    def summary(self) -> str:
        """How much was found, in a sentence."""
        counts = Counter(finding.severity for finding in self.findings)
        found = [f"{counts[each]} {each}{'s' * (counts[each] > 1)}" for each in _SEVERITIES if counts[each]]
        return f"{', '.join(found) or 'nothing is wrong'} (examined: {', '.join(self.examined)})"

    def __str__(self) -> str:
        """A paragraph for each finding."""
        lines = [self.subject]
        for finding in self.findings:
            lines += ["", f"{finding.severity}  {finding.code}"]
            for label, text in _rows(finding):
                lines += textwrap.wrap(f"{label:<7} {text}", 100, initial_indent="  ", subsequent_indent=" " * 10)
        lines += ["", *([f"memory: {self.memory}"] if self.memory else []), self.summary()]
        return "\n".join(lines)

    def sections(self) -> list[Section]:
        """One for each finding, between the subject and the totals."""
        found = [Section(each.severity, each.severity, each.code, rows=tuple(_rows(each))) for each in self.findings]
        memory = [f"memory: {self.memory}"] if self.memory else []
        return [Section(self.subject), *found, Section(lines=(*memory, self.summary()))]


def _rows(finding: Finding) -> list[tuple[str, str]]:
    """The texts of a finding with their labels."""
    rows = [("what", finding.what), ("where", finding.where), ("why", finding.why), ("remedy", finding.remedy)]
    return [(label, text) for label, text in rows if text]
