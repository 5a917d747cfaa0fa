"""`spectra` and `update_norms`: how much of its rank an adapter uses at each layer, and how far it moves each weight.

Figures only; `fxlora.inspect.plots` draws them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fxlora.errors import AdapterError
from fxlora.inspect.doctor.values import effective_rank
from fxlora.inspect.updates import Source, features, layer_updates
from fxlora.model import LoraModel
from fxlora.rendering import Rendered, Section, aligned, json_data

_SHOWN = 10
"""Layers that a text lists; `to_dict` has them all."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of `s·BA` at one layer.

    Attributes:
        site: name of the layer or parameter.
        values: descending; of a stack of matrices (experts) the roots of the sums of their squares.
    """

    site: str
    values: tuple[float, ...]

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return len(self.values)

    @property
    def norm(self) -> float:
        """Frobenius norm of `s·BA`."""
        return math.hypot(*self.values)

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the singular values (Roy and Vetterli, 2007); 0 where there is no update."""
        return effective_rank(torch.tensor(self.values)) if any(self.values) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures = {"rank": self.rank, "effective_rank": self.effective_rank, "norm": self.norm}
        return {"site": self.site, **figures, "singular_values": list(self.values)}


@dataclass(frozen=True, slots=True)
class Spectra(Rendered):
    """The singular values of an adapter's updates.

    Attributes:
        subject: whose they are.
        sites: one for each layer, in the adapter's order.
        notes: what they leave out, in sentences.
    """

    subject: str
    sites: tuple[Spectrum, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        sites = [site.to_dict() for site in self.sites]
        return json_data({"subject": self.subject, "sites": sites, "notes": self.notes})

    def __str__(self) -> str:
        """A row for each module of a block, over all blocks."""
        return _text(self.sections())

    def sections(self) -> list[Section]:
        """The table."""
        header = ("module", "layers", "rank", "effective rank", "smallest", "largest")
        rows: list[tuple[str, ...]] = []
        for module, members in by_module(self.sites).items():
            ranks = sorted({each.rank for each in members})
            used = sorted(members, key=lambda each: each.effective_rank)
            rows.append(
                (
                    module,
                    str(len(members)),
                    f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
                    f"{statistics.median(each.effective_rank for each in used):.1f}",
                    _at(f"{used[0].effective_rank:.1f}", used[0].site),
                    _at(f"{used[-1].effective_rank:.1f}", used[-1].site),
                )
            )
        return [Section(f"singular values of s·BA: {self.subject}", header=header, rows=tuple(rows), lines=self.notes)]


@dataclass(frozen=True, slots=True)
class UpdateNorm:
    """How far one weight is moved.

    Attributes:
        site: name of the layer or parameter.
        norm: Frobenius norm of the update.
        weight_norm: Frobenius norm of the weight; None if it is not at hand.
    """

    site: str
    norm: float
    weight_norm: float | None = None

    @property
    def relative(self) -> float | None:
        """`norm / weight_norm`; None if the weight is not at hand, or zero."""
        return self.norm / self.weight_norm if self.weight_norm else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"site": self.site, "norm": self.norm, "weight_norm": self.weight_norm, "relative": self.relative}


@dataclass(frozen=True, slots=True)
class UpdateNorms(Rendered):
    """How far an adapter moves each weight.

    Attributes:
        subject: whose updates they are.
        sites: one for each layer, in the adapter's order.
        relative: whether the weights' norms are known, so that `value` is a share of them.
        notes: what the norms leave out, in sentences.
    """

    subject: str
    sites: tuple[UpdateNorm, ...]
    relative: bool
    notes: tuple[str, ...] = ()

    def value(self, site: UpdateNorm) -> float | None:
        """What is compared between layers: the relative norm, or the norm where no weight is known."""
        return site.relative if self.relative else site.norm

    def largest(self) -> list[UpdateNorm]:
        """The layers whose value is known, the most changed first."""
        known = [site for site in self.sites if self.value(site) is not None]
        return sorted(known, key=lambda site: self.value(site) or 0.0, reverse=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        sites = [site.to_dict() for site in self.sites]
        return json_data({"subject": self.subject, "relative": self.relative, "sites": sites, "notes": self.notes})

    def shown(self, value: float) -> str:
        """A value as text: a percentage if it is relative."""
        return f"{100 * value:.3g}%" if self.relative else f"{value:.3g}"

    def __str__(self) -> str:
        """The layers that are changed most, and a row for each module of a block, over all blocks."""
        return _text(self.sections())

    def sections(self) -> list[Section]:
        """Both tables."""
        what = "‖s·BA‖ / ‖W‖" if self.relative else "‖s·BA‖, with the weights not at hand"
        ordered = self.largest()
        values = {site.site: self.value(site) or 0.0 for site in ordered}
        top = tuple((site.site, self.shown(values[site.site])) for site in ordered[:_SHOWN])
        header = ("module", "layers", "median", "smallest", "largest")
        rows: list[tuple[str, ...]] = []
        for module, members in by_module(ordered).items():
            first, last = members[0], members[-1]
            median = self.shown(statistics.median(values[each.site] for each in members))
            least, most = (_at(self.shown(values[each.site]), each.site) for each in (last, first))
            rows.append((module, str(len(members)), median, least, most))
        unknown = len(self.sites) - len(ordered)
        missing = f"left out, since the weights' norms are not known: {unknown} of {len(self.sites)} layers"
        lines = (*([missing] if unknown else []), *self.notes)
        return [
            Section(f"{what}: {self.subject}", header=("most changed", ""), rows=top),
            Section(header=header, rows=tuple(rows), lines=lines),
        ]


Each = TypeVar("Each", Spectrum, UpdateNorm)


def spectra(source: Source, adapter: str | None = None) -> Spectra:
    """The singular values of `s·BA` at each layer, from the small factors: no product is made.

    An adapter that started with a changed base (PiSSA) is compared with its start, where that is remembered.

    Args:
        source: a transformed model, merged or not, or the directory of a saved adapter.
        adapter: which of a model's adapters; the active one if None.

    Raises:
        AdapterError: when there is no such adapter, it has no factors, or the model has no values.
        CheckpointError: when a file is missing or broken.
    """
    subject, updates = layer_updates(source, adapter, None)
    sites = [Spectrum(each.site, tuple(each.singular_values().tolist())) for each in updates]
    dora = "DoRA: singular values are of s·BA alone, without the magnitudes"
    return Spectra(subject, _some(sites, subject), _notes(source, adapter, dora))


def update_norms(source: Source, adapter: str | None = None, *, base: str | Path | None = None) -> UpdateNorms:
    """The Frobenius norm of the update of each layer, beside that of its weight where this is at hand.

    The weight is the one before any merge, and before an initialisation that changed it. DoRA's update is the whole
    change of the weight, where that is at hand.

    Args:
        source: a transformed model, merged or not, or the directory of a saved adapter.
        adapter: which of a model's adapters; the active one if None.
        base: for a directory: that of the base model, whose weights are read one after another.

    Raises:
        AdapterError: when there is no such adapter, it has no factors, or the model has no values.
        CheckpointError: when a file is missing or broken, or the adapter is for another base.

    Example:
        >>> import fxlora, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> model = fxlora.lora_transform(net, {"r": 2, "target_modules": ["0"]})
        >>> norms = fxlora.update_norms(model)
        >>> norms.relative, [(site.site, site.norm) for site in norms.sites]
        (True, [('0', 0.0)])
    """
    subject, updates = layer_updates(source, adapter, base)
    sites = [UpdateNorm(each.site, each.norm(), each.weight_norm()) for each in updates]
    relative = any(site.relative is not None for site in sites)
    if isinstance(source, LoraModel) or base is not None:
        dora = "DoRA: norms are of the whole change of the weight"
    else:
        dora = "DoRA: norms are of s·BA alone, since the magnitudes need the base's weights"
    return UpdateNorms(subject, _some(sites, subject), relative, _notes(source, adapter, dora))


def _notes(source: Source, adapter: str | None, dora: str) -> tuple[str, ...]:
    is_dora, holds_base = features(source, adapter)
    base = "the factors hold what the initialisation took out of the base's weights"
    return tuple(note for note, said in ((dora, is_dora), (base, holds_base)) if said)


def _some(sites: list[Each], subject: str) -> tuple[Each, ...]:
    if not sites:
        raise AdapterError(f"{subject} has no factors A and B whose product could be looked at")
    return tuple(sites)


# ---- places ----


def place(site: str) -> tuple[int | None, str]:
    """(number of the block, name of the module within blocks): `layers.3.fc1` is 3 and `layers.*.fc1`.

    The first number in a name counts as the block's; a name without any has none.
    """
    parts = site.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return None, site
    return int(parts[at]), ".".join([*parts[:at], "*", *parts[at + 1 :]])


def by_module(sites: Sequence[Each]) -> dict[str, list[Each]]:
    """Layers that differ in the block's number alone, by the name of the module."""
    found: dict[str, list[Each]] = {}
    for each in sites:
        found.setdefault(place(each.site)[1], []).append(each)
    return found


def _at(text: str, site: str) -> str:
    block = place(site)[0]
    return text if block is None else f"{text} (block {block})"


def _text(sections: Sequence[Section]) -> str:
    """Headings, tables and notes with an empty line between them."""
    parts: list[str] = []
    for each in sections:
        parts += [each.heading] if each.heading else []
        parts.append("\n".join(aligned([each.header, *each.rows])))
        parts += ["\n".join(each.lines)] if each.lines else []
    return "\n\n".join(parts)
