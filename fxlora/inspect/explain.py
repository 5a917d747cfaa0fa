"""`explain`: for every layer of a model, whether a configuration matches it and why, and what LoRA will cost.

Nothing is changed, and nothing is computed; the model may be on the meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from fxlora._passes import KINDS, BranchSpec, Decision, has_factors
from fxlora.capture.inputs import Example
from fxlora.checkpoint.adapter_writing import entries_in_files
from fxlora.checkpoint.safetensors_io import FileLayout
from fxlora.config import LoraConfig
from fxlora.errors import NoTargetError
from fxlora.inspect.activations import Activations, on_meta, predict_activations
from fxlora.plan import Candidate, candidates, plan
from fxlora.transform import lora_transform

_ADAM_BYTES = 8
"""AdamW keeps two float32 values for each trained entry."""


@dataclass(frozen=True, slots=True)
class Row:
    """One layer: its name, sizes, the verdict with its reason, and its branch's rank and number of entries."""

    name: str
    kind: str
    in_features: int
    out_features: int
    weight_entries: int
    matched: bool
    reason: str
    r: int = 0
    parameters: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that differ only in the numbers in their names, and share size and verdict."""

    pattern: str
    count: int
    row: Row

    @property
    def parameters(self) -> int:
        """Entries of all branches of the group."""
        return self.count * self.row.parameters


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a configuration does to a model.

    Attributes:
        rows: one for each linear layer, in the model's order.
        base_parameters: entries of the model, shared ones counted once.
        problem: why the configuration would be refused, empty if it would not.
        copies: name and entries of each module that is trained whole, as a copy.
        bias_parameters: entries of the base's biases that are trained.
        adapter_bytes: size of `adapter_model.safetensors`; None where the layers cannot be found without running the model.
        activations: bytes between forward and backward, if example inputs were given and the model runs without values.
        unknown: why `adapter_bytes` or `activations` is not known, empty if both are or were not asked for.
    """

    rows: tuple[Row, ...]
    base_parameters: int
    problem: str = ""
    copies: tuple[tuple[str, int], ...] = ()
    bias_parameters: int = 0
    adapter_bytes: int | None = None
    activations: Activations | None = None
    unknown: str = ""

    @property
    def trainable(self) -> int:
        """Entries that are trained: of factors, of whole modules, of biases."""
        return sum(row.parameters for row in self.rows) + self._copied + self.bias_parameters

    @property
    def _copied(self) -> int:
        return sum(entries for _, entries in self.copies)

    @property
    def trainable_percent(self) -> float:
        """Share of the trained entries in all, in percent."""
        total = self.base_parameters + self.trainable - self.bias_parameters
        return 100 * self.trainable / total if total else 0.0

    @property
    def optimizer_bytes(self) -> int:
        """Size of AdamW's state."""
        return _ADAM_BYTES * self.trainable

    @property
    def extra_flops_percent(self) -> float:
        """Multiplications that branches add to those of all layers but embeddings, forward, in percent."""
        multiplying = [row for row in self.rows if row.kind != "embedding"]
        base = sum(row.weight_entries for row in multiplying)
        return 100 * sum(row.parameters for row in multiplying) / base if base else 0.0

    def groups(self) -> list[Group]:
        """The rows, those alike counted together."""
        counts: dict[tuple[object, ...], int] = {}
        first: dict[tuple[object, ...], Row] = {}
        for row in self.rows:
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.name)
            key = (pattern, row.kind, row.in_features, row.out_features, row.matched, row.reason, row.r)
            counts[key] = counts.get(key, 0) + 1
            first.setdefault(key, row)
        return [
            Group(str(key[0]) if count > 1 else first[key].name, count, first[key]) for key, count in counts.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All figures and rows, for JSON."""
        return {
            "base_parameters": self.base_parameters,
            "trainable_parameters": self.trainable,
            "trainable_percent": self.trainable_percent,
            "adapter_bytes": self.adapter_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "activation_bytes": None if self.activations is None else asdict(self.activations),
            "unknown": self.unknown,
            "extra_flops_percent": self.extra_flops_percent,
            "problem": self.problem,
            "modules_to_save": dict(self.copies),
            "bias_parameters": self.bias_parameters,
            "sites": [asdict(row) for row in self.rows],
        }

    def table(self) -> list[tuple[str, ...]]:
        """The groups as text cells, a header first."""
        header = ("layers", "number", "kind", "in → out", "LoRA", "rank", "parameters", "why")
        return [header, *(self._cells(group) for group in self.groups())]

    def _cells(self, group: Group) -> tuple[str, ...]:
        row = group.row
        size = f"{row.in_features} → {row.out_features}"
        rank, entries = (str(row.r), f"{group.parameters:,}") if row.matched else ("", "")
        return (
            group.pattern,
            str(group.count),
            row.kind,
            size,
            "yes" if row.matched else "no",
            rank,
            entries,
            row.reason,
        )

    def summary(self) -> list[str]:
        """The totals, a sentence a line."""
        matched = sum(row.matched for row in self.rows)
        trained = f"{self.trainable:,} trainable parameters, {self.trainable_percent:.4f}% of all"
        file = "" if self.adapter_bytes is None else f"adapter file {human_bytes(self.adapter_bytes)}, "
        sizes = f"{file}AdamW state {human_bytes(self.optimizer_bytes)}"
        lines = [
            f"{matched} of {len(self.rows)} layers get LoRA: {trained}",
            f"{sizes}, {self.extra_flops_percent:.2f}% more multiplications in layers",
        ]
        if self.activations is not None:
            lines.append(
                f"activations kept for backward {human_bytes(self.activations.lora)}, of {human_bytes(self.activations.full)} "
                "when all parameters are trained"
            )
        if self.unknown:
            lines.append(f"not predicted: {self.unknown}")
        lines += [f"'{name}' is trained whole, as a copy: {entries:,} parameters" for name, entries in self.copies]
        if self.bias_parameters:
            lines.append(f"biases of the base are trained in place: {self.bias_parameters:,} parameters")
        return [*lines, f"This configuration would be refused: {self.problem}"] if self.problem else lines

    def __str__(self) -> str:
        """The table and the totals."""
        rows = self.table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", *self.summary()])


def explain(model: nn.Module, config: object, *, example_inputs: object = None) -> Explanation:
    """Say of every layer whether `config` matches it and why, and predict the cost.

    Args:
        model: any model; not changed; may be on the meta device.
        config: anything that `lora_transform` takes as a configuration.
        example_inputs: as for `lora_transform`: for the prediction of activations. Their sizes count, nothing is computed.

    Returns:
        The explanation. A configuration that matches nothing is explained too; see `Explanation.problem`.

    Raises:
        ConfigError: for a field that cannot work.
    """
    lora_config = LoraConfig.from_any(config)
    problem, found, reasons = "", {}, {}
    copies: tuple[tuple[str, int], ...] = ()
    biases = 0
    try:
        planned = plan(model, lora_config)
        found = {spec.site: spec for spec in planned.branches}
        reasons = {decision.name: decision for decision in planned.decisions}
        copies = tuple((saved.module, saved.entries) for saved in planned.saved)
        biases = sum(model.get_parameter(name).numel() for name in planned.biases)
    except NoTargetError as error:
        problem = str(error)
    rows = tuple(_rows(candidates(model), found, reasons))
    base = sum(parameter.numel() for parameter in model.parameters())
    result = Explanation(rows, base, problem, copies, biases)
    return result if problem else _predicted(result, model, lora_config, Example.of(example_inputs))


def _predicted(result: Explanation, model: nn.Module, config: LoraConfig, example: Example | None) -> Explanation:
    """With what a copy of the model without values tells."""
    try:
        lora = lora_transform(on_meta(model), config, capture="modules")
        entries = entries_in_files(lora, next(iter(lora._lora.adapters.values())))
        result = replace(result, adapter_bytes=FileLayout.of(entries).nbytes)
        if example is not None:
            result = replace(result, activations=predict_activations(model, lora, example))
    except Exception as error:  # noqa: BLE001 whatever a model does that runs without values
        text = " ".join(str(error).split())
        return replace(result, unknown=f"{type(error).__name__}: {text[:200]}")
    return result


def _rows(layers: list[Candidate], found: dict[str, BranchSpec], reasons: dict[str, Decision]) -> Iterator[Row]:
    named = {layer.name for layer in layers}
    parameters = [
        Candidate(spec.site, spec.layer, spec.is_parameter) for spec in found.values() if spec.site not in named
    ]
    for each in [*layers, *parameters]:
        spec, layer = found.get(each.name), each.layer
        owner = each.name.rpartition(".")[0] if each.is_parameter else each.name
        yield Row(
            name=each.name,
            kind=layer.kind,
            in_features=layer.in_features,
            out_features=layer.out_features,
            weight_entries=math.prod(KINDS[layer.kind].weight_shape(layer)),
            matched=spec is not None,
            reason=_shared_reason(spec) or _reason(reasons.get(owner), parameter=each.is_parameter),
            r=spec.r if spec else 0,
            parameters=spec.num_parameters if spec else 0,
        )


def _shared_reason(spec: BranchSpec | None) -> str:
    """Why a layer has a branch that no target names; empty for all others."""
    if spec is None or (has_factors(spec) and not spec.tied_to):
        return ""
    if spec.tied_to:
        return f"shares its weight with {spec.tied_to}"
    return f"{spec.num_parameters // KINDS[spec.kind].weight_shape(spec.layer)[1]} trainable tokens"


def _reason(decision: Decision | None, *, parameter: bool = False) -> str:
    if parameter and (decision is None or not decision.matched):
        return "target_parameters"
    if decision is None:
        return "no target matches"
    return "named as a target" if decision.matched and decision.rule == decision.name else decision.reason


def human_bytes(size: float) -> str:
    """A size with a unit: `9.8 MB`."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
