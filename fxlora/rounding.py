"""What rounding takes of an update when it is folded into weights of few bits: layer by layer, and at the outputs.

A bfloat16 weight has 8 bits: an update of a thousandth of it is mostly rounded away. Merges measure a sample and warn;
`fxlora.inspect.rounding` measures all of it before anything is merged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fxlora._passes import Loss
from fxlora.rendering import Rendered, Section, json_data

log = logging.getLogger("fxlora")

WARN_ABOVE = 0.25
"""Share of an update, by norm, that may be lost without a warning."""


@dataclass(frozen=True, slots=True)
class LayerRounding:
    """What rounding does to one merged tensor.

    Attributes:
        name: of the tensor.
        dtype: in which it is written.
        update_norm: Frobenius norm of the update.
        weight_norm: that of the original tensor.
        lost: norm of what rounding takes or adds, over the norm of the update; 0 for no update.
        largest: the largest magnitude of an entry of the update.
        unchanged: share of the entries that an update was for and that keep their value.
        entries: how many entries were looked at; with fewer than `all_entries` the other figures are estimates.
        all_entries: how many the tensor has.
    """

    name: str
    dtype: str
    update_norm: float
    weight_norm: float
    lost: float
    largest: float
    unchanged: float
    entries: int
    all_entries: int

    @classmethod
    def of(cls, name: str, loss: Loss, dtype: torch.dtype, num_entries: int) -> LayerRounding:
        """From what a fold has counted."""
        whole = math.sqrt(num_entries / loss.entries) if loss.entries else 0.0
        return cls(
            name,
            str(dtype).removeprefix("torch."),
            math.sqrt(loss.update) * whole,
            math.sqrt(loss.weight) * whole,
            math.sqrt(loss.lost / loss.update) if loss.update else 0.0,
            loss.largest,
            loss.unchanged / loss.entries if loss.entries else 0.0,
            loss.entries,
            num_entries,
        )

    @property
    def relative_change(self) -> float:
        """Norm of the update over that of the weight."""
        return self.update_norm / self.weight_norm if self.weight_norm else math.inf * bool(self.update_norm)


@dataclass(frozen=True, slots=True)
class OutputEffect:
    """How far rounding the merged weights moves the model's first output, on example inputs.

    Attributes:
        largest: the largest difference of an entry.
        mean: the mean magnitude of the differences.
        scale: the largest magnitude of an output.
        update: the mean magnitude of the difference that the adapters make at all.
        same_argmax: share of positions whose largest entry is the same; of a language model, the token.
    """

    largest: float
    mean: float
    scale: float
    update: float
    same_argmax: float

    def __str__(self) -> str:
        return (
            f"outputs move by {self.mean:.2g} on average and {self.largest:.2g} at most (largest output {self.scale:.3g}); the "
            f"adapters themselves move them by {self.update:.2g}. {self.same_argmax:.2%} of positions keep their largest entry"
        )


@dataclass(frozen=True, slots=True)
class RoundingReport(Rendered):
    """What rounding takes of a merge.

    Attributes:
        layers: each merged tensor.
        effect: at the outputs, if example inputs were given.
        warn_above: the share that may be lost without a warning.
    """

    layers: tuple[LayerRounding, ...]
    effect: OutputEffect | None = None
    warn_above: float = WARN_ABOVE

    @classmethod
    def of(
        cls,
        losses: Mapping[str, Loss],
        shapes: Mapping[str, tuple[torch.dtype, int]],
        *,
        effect: OutputEffect | None = None,
        warn_above: float = WARN_ABOVE,
    ) -> RoundingReport:
        """From what folds have counted.

        Args:
            losses: by the tensor's name.
            shapes: dtype that is written, and number of entries, by the tensor's name.
            effect: see the class.
            warn_above: see the class.
        """
        layers = tuple(LayerRounding.of(name, loss, *shapes[name]) for name, loss in losses.items())
        return cls(layers, effect, warn_above)

    @property
    def lost(self) -> float:
        """Norm of all that is lost over the norm of the whole update."""
        update = math.hypot(*(layer.update_norm for layer in self.layers))
        return math.hypot(*(layer.lost * layer.update_norm for layer in self.layers)) / update if update else 0.0

    @property
    def largest_change(self) -> float:
        """The largest relative change of a layer."""
        return max((layer.relative_change for layer in self.layers), default=0.0)

    @property
    def affected(self) -> tuple[LayerRounding, ...]:
        """Layers that lose more than may be lost without a warning, worst first."""
        found = [layer for layer in self.layers if layer.lost > self.warn_above]
        return tuple(sorted(found, key=lambda layer: -layer.lost))

    @property
    def warning(self) -> str:
        """What a user should know, with the remedy; empty if nothing is amiss."""
        if not self.affected:
            return ""
        worst = self.affected[0]
        return (
            f"rounding to {worst.dtype} loses more than {self.warn_above:.0%} of the update in {len(self.affected)} of "
            f"{len(self.layers)} merged weights (worst: '{worst.name}', {worst.lost:.0%}, where the update is "
            f"{worst.relative_change:.2g} of the weight). Merge into a wider dtype (out_dtype=torch.float32, or --dtype "
            "float32), or run the adapter unmerged"
        )

    def warn(self) -> None:
        """Log the warning, if there is one."""
        if self.warning:
            log.warning("%s", self.warning)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("weight")])
        lines = [f"{'weight':{width}}  {'dtype':8}  {'update/weight':>13}  {'lost':>7}  {'unchanged':>9}"]
        lines += [
            f"{layer.name:{width}}  {layer.dtype:8}  {layer.relative_change:13.2e}  {layer.lost:7.1%}  {layer.unchanged:9.1%}"
            for layer in self.layers
        ]
        warning = [f"warning: {self.warning}"] if self.warning else []
        return "\n".join([*lines, *self._totals(), *warning])

    def _totals(self) -> list[str]:
        sampled = any(layer.entries < layer.all_entries for layer in self.layers)
        total = (
            f"in all {self.lost:.1%} of the update is lost; the largest relative change of a weight is "
            f"{self.largest_change:.2g}{' (estimated from a sample of rows)' if sampled else ''}"
        )
        return [total, *([str(self.effect)] if self.effect is not None else [])]

    def sections(self) -> list[Section]:
        """A table of the weights, the totals, and the warning."""
        header = ("weight", "dtype", "update/weight", "lost", "unchanged")
        rows = tuple(
            (layer.name, layer.dtype, f"{layer.relative_change:.2e}", f"{layer.lost:.1%}", f"{layer.unchanged:.1%}")
            for layer in self.layers
        )
        warning = [Section("warning", "warning", lines=(self.warning,))] if self.warning else []
        return [Section(header=header, rows=rows, right=(2, 3, 4), lines=tuple(self._totals())), *warning]

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON; an infinite change, of a weight that was zero, is the text `"inf"`."""
        figures = {
            "lost": self.lost,
            "largest_change": self.largest_change,
            "warning": self.warning,
            "effect": None if self.effect is None else asdict(self.effect),
            "layers": [{**asdict(layer), "relative_change": layer.relative_change} for layer in self.layers],
        }
        return json_data(figures)
