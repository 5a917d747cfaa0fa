"""What each tool says about a set-up, in one form, and the table of faults with what must be said."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from fxlora import FxloraError, PassTrace, VerifyError, bisect_passes, check_files, compare, diff, doctor, explain
from tests.faults.seeded.set_ups import SET_UPS, Case


@dataclass(frozen=True)
class Said:
    """One thing that a tool says.

    Attributes:
        code: of the check, or the name of a pass; the message itself for tools that raise it.
        places: names of sites, parameters, keys or files that it names.
        text: what is printed.
        is_message: whether the places are all that a message quotes, with remedies such as nearest names.
    """

    code: str
    places: tuple[str, ...]
    text: str
    is_message: bool = False

    def is_at(self, expected: Sequence[str]) -> bool:
        """Whether it names these places and no others."""
        return set(expected) <= set(self.places) if self.is_message else set(expected) == set(self.places)


def _doctor(case: Case) -> list[Said]:
    report = doctor(case.model if case.whole is None else case.whole, case.batch, optimizer=case.optimizer)
    wanted = [each for each in report.findings if each.severity != "note" or each.code in NOTES]
    return [Said(each.code, each.places, each.what) for each in wanted]


def _verify(case: Case) -> list[Said]:
    try:
        case.model.verify()
    except VerifyError as error:
        return [Said(str(error), _quoted(error)[:1], str(error))]
    return []


def _compare(case: Case) -> list[Said]:
    found = compare(case.reference, case.model, case.batch, backward=True)
    saids: list[Said] = []
    for code, each in (("output", found.first), ("gradient", found.gradient)):
        if each is not None:
            owner = re.sub(r"\.lora_\w+(\..*)?$", "", each.site)
            saids.append(Said(code, (owner,), str(each)))
    return saids[:1]


def _diff(case: Case) -> list[Said]:
    found = diff(case.reference, case.model)
    sites = tuple(dict.fromkeys(change.site for change in found.changes if change.site))
    return [] if found.is_empty else [Said("diff", sites, " ".join(str(found).split()))]


def _bisect(case: Case) -> list[Said]:
    found = bisect_passes(PassTrace(tuple(case.stages or case.model.pass_trace), case.model), case.batch)
    if found is None:
        return []
    first = found.comparison.first if found.comparison is not None else None
    return [Said(found.stage.pass_name, (first.site if first is not None else "",), str(found))]


def _explain(case: Case) -> list[Said]:
    text = explain(case.host.model(), case.config).problem
    return [Said(text, _quoted(text), text, True)] if text else []


def _loading(case: Case) -> list[Said]:
    try:
        if case.attempt is not None:
            case.attempt()
    except FxloraError as error:
        return [Said(str(error), _quoted(error), str(error), True)]
    return []


def _check_files(case: Case) -> list[Said]:
    if case.directory is None:
        return []
    report = check_files(case.directory)
    states = [
        Said(file.state, (file.name,), f"{file.state}: {file.name}") for file in report.files if file.state != "ok"
    ]
    return states + [Said(text, _quoted(text), text, True) for text in report.problems]


def _quoted(text: object) -> tuple[str, ...]:
    return tuple(re.findall(r"'([^']*)'", str(text)))


TOOLS: dict[str, Callable[[Case], list[Said]]] = {
    "doctor": _doctor,
    "verify": _verify,
    "compare": _compare,
    "diff": _diff,
    "bisect_passes": _bisect,
    "explain": _explain,
    "loading": _loading,
    "check_files": _check_files,
}

NOTES = ("rank-saturated", "scale-not-saved", "whole-modules-trained")
"""Notes that faults of the table are found by."""


@dataclass(frozen=True)
class Fault:
    """A broken set-up, and what must be said of it.

    Attributes:
        what: is wrong.
        tool: that must find it.
        code: what it must say: the code of a check, the name of a pass, or words of a message.
        put: breaks a healthy set-up, and returns the places that must be named.
        also: codes of what else follows from it.
        set_ups: names of hosts and captures that it can happen in.
    """

    what: str
    tool: str
    code: str
    put: Callable[[Case], str | Sequence[str]]
    also: tuple[str, ...] = ()
    set_ups: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What was said about a fault in one set-up.

    Attributes:
        fault: that was put.
        host: the architecture.
        capture: of the model.
        places: that had to be named.
        found: what was said of it; None if nothing was.
        others: what else was said, which does not follow from the fault.
    """

    fault: Fault
    host: str
    capture: str
    places: tuple[str, ...]
    found: Said | None
    others: tuple[Said, ...]

    @property
    def right_place(self) -> bool:
        """Whether it was found, and where it is."""
        return self.found is not None and self.found.is_at(self.places)


FAULTS: list[Fault] = []
"""All of them, in the order of the modules that put them."""


def fault(
    what: str,
    tool: str,
    code: str = "",
    *,
    also: Sequence[str] = (),
    hosts: Sequence[str] = ("llama", "vit", "t5", "plain"),
    captures: Sequence[str] = ("modules", "symbolic", "export"),
    anew: bool = False,
) -> Callable[[Callable[[Case], str | Sequence[str]]], Callable[[Case], str | Sequence[str]]]:
    """Enter a function that breaks a set-up into the table; it may be entered for several tools.

    Args:
        what: is wrong.
        tool: that must find it.
        code: what it must say.
        also: codes of what follows from it.
        hosts: that it can happen in.
        captures: that it can happen in.
        anew: whether it captures the model anew: of exports, which take seconds, only that of the plain model then.
    """
    set_ups = tuple(
        (host, capture)
        for host, capture in SET_UPS
        if host in hosts and capture in captures and not (anew and capture == "export" and host != "plain")
    )

    def enter(put: Callable[[Case], str | Sequence[str]]) -> Callable[[Case], str | Sequence[str]]:
        FAULTS.append(Fault(what, tool, code, put, tuple(also), set_ups))
        return put

    return enter


def seed(fault: Fault, host: str, capture: str) -> Outcome:
    """Break a set-up and ask the tool."""
    with tempfile.TemporaryDirectory() as directory:
        case = Case.of(host, capture)
        case.directory = Path(directory)
        places = fault.put(case)
        if isinstance(case.model, fx.GraphModule):
            case.model.recompile()
        said = TOOLS[fault.tool](case)
    found = next((each for each in said if fault.code in each.code), None)
    others = tuple(each for each in said if each is not found and each.code not in fault.also)
    return Outcome(fault, host, capture, (places,) if isinstance(places, str) else tuple(places), found, others)
