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

from fxlora._passes import KINDS, BranchSpec, has_factors
from fxlora.capture.inputs import Example
from fxlora.checkpoint.adapter_writing import entries_in_files
from fxlora.checkpoint.safetensors_io import FileLayout
from fxlora.config import LoraConfig
from fxlora.errors import NoTargetError
from fxlora.inspect.activations import Activations, on_meta, predict_activations
from fxlora.inspect.costs import Block, MergeCost, blocks_of, merge_cost
from fxlora.inspect.reasons import Reason, Reasons, ranges
from fxlora.plan import Candidate, Plan, candidates, plan, target_rules
from fxlora.rendering import Rendered, Section, aligned, human_bytes, human_count, json_data
from fxlora.transform import lora_transform

_ADAM_BYTES = 8
"""AdamW keeps two float32 values for each trained entry."""


@dataclass(frozen=True, slots=True)
class Row:
    """One layer: its name, sizes, the verdict with its reason, and its branch's rank and number of entries.

    Attributes:
        reason: the rule that decided.
        nearest: the shortest entry of `target_modules` that would have matched it; empty where one did, and where none
            would help, since it is excluded.
        close: an entry that matches nothing and is probably a misspelling of this layer's name.
        layer: the number of its layer, where this is why it is left out.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    weight_entries: int
    matched: bool
    reason: str
    r: int = 0
    parameters: int = 0
    nearest: str = ""
    close: str = ""
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that differ only in the numbers in their names, and share size and verdict."""

    pattern: str
    rows: tuple[Row, ...]

    @property
    def row(self) -> Row:
        """The first of the layers."""
        return self.rows[0]

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self.rows)

    @property
    def parameters(self) -> int:
        """Entries of all branches of the group."""
        return sum(row.parameters for row in self.rows)

    @property
    def reason(self) -> str:
        """Why, with what would match, for all of the layers."""
        row, text = self.row, self.row.reason
        if row.layer is not None and self.count > 1:
            numbers = ranges(each.layer for each in self.rows if each.layer is not None)
            text = text.replace(f"layer {row.layer} is ", f"layers {numbers} are ")
        if row.close:
            return f"{text}; '{_short(row.close)}' is close"
        alike = {each.nearest for each in self.rows}
        return f"{text}; {row.nearest} would match" if row.nearest and len(alike) == 1 else text


@dataclass(frozen=True, slots=True)
class Explanation(Rendered):
    """What a configuration does to a model.

    Attributes:
        rows: one for each linear layer, in the model's order.
        base_parameters: entries of the model, shared ones counted once.
        problem: why the configuration would be refused, empty if it would not.
        copies: name and entries of each module that is trained whole, as a copy.
        bias_parameters: entries of the base's biases that are trained.
        adapter_bytes: size of `adapter_model.safetensors`; None where the layers cannot be found without running the model.
        activations: bytes between forward and backward, if example inputs were given and the model runs without values.
        blocks: sizes and costs by the model's numbered lists of modules, such as `model.layers.*`, and of the rest.
        merge: what folding the adapter into the base will take; None where it cannot be merged, or the configuration is
            refused.
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
    blocks: tuple[Block, ...] = ()
    merge: MergeCost | None = None

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
        alike: dict[tuple[object, ...], list[Row]] = {}
        for row in self.rows:
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.name)
            reason = row.reason if row.layer is None else row.reason.replace(f"layer {row.layer} is ", "")
            key = (pattern, row.kind, row.in_features, row.out_features, row.matched, reason, row.close, row.r)
            alike.setdefault(key, []).append(row)
        return [Group(str(key[0]) if len(rows) > 1 else rows[0].name, tuple(rows)) for key, rows in alike.items()]

    def to_dict(self) -> dict[str, Any]:
        """All figures and rows, for JSON."""
        figures = {
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
            "merge": None if self.merge is None else asdict(self.merge),
            "blocks": [asdict(block) for block in self.blocks],
            "sites": [asdict(row) for row in self.rows],
        }
        return json_data(figures)

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
            group.reason,
        )

    def block_table(self) -> list[tuple[str, ...]]:
        """The blocks as text cells, a header first; empty for a model without numbered blocks."""
        if not any(block.count > 1 for block in self.blocks):
            return []
        header = ("blocks", "number", "parameters", "trained", "of all trained", "FLOPs/position", "in the file")
        return [header, *(self._block_cells(block) for block in self.blocks)]

    def _block_cells(self, block: Block) -> tuple[str, ...]:
        share = f"{100 * block.trainable / self.trainable:.1f}%" if self.trainable else ""
        cells = (f"{block.trainable:,}", share, f"+{human_count(block.flops)}")
        stored = "" if block.adapter_bytes is None else human_bytes(block.adapter_bytes)
        return (
            block.pattern.replace("*", "0", 1) if block.count == 1 else block.pattern or "the rest",
            str(block.count or ""),
            f"{block.base_parameters:,}",
            *(cells if block.trainable else ("", "", "")),
            stored if block.trainable else "",
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
            lines.append(_told(self.activations))
        if self.merge is not None:
            lines.append(_merging(self.merge))
        if self.unknown:
            lines.append(f"not predicted: {self.unknown}")
        lines += [f"'{name}' is trained whole, as a copy: {entries:,} parameters" for name, entries in self.copies]
        if self.bias_parameters:
            lines.append(f"biases of the base are trained in place: {self.bias_parameters:,} parameters")
        return [*lines, f"This configuration would be refused: {self.problem}"] if self.problem else lines

    def __str__(self) -> str:
        """The table and the totals."""
        blocks = self.block_table()
        tables = [*aligned(self.table()), *(["", *aligned(blocks, _BLOCK_NUMBERS)] if blocks else [])]
        return "\n".join([*tables, "", *self.summary()])

    def sections(self) -> list[Section]:
        """The tables and the totals."""
        header, *rows = self.table()
        layers = Section(header=header, rows=tuple(rows), right=(1, 5, 6))
        table = self.block_table()
        blocks = [Section(header=table[0], rows=tuple(table[1:]), right=_BLOCK_NUMBERS)] if table else []
        return [layers, *blocks, Section(lines=tuple(self.summary()))]


_BLOCK_NUMBERS = tuple(range(1, 7))


def _short(entry: str) -> str:
    return entry if len(entry) <= 40 else f"{entry[:39]}…"


def _told(activations: Activations) -> str:
    full, lora = human_bytes(activations.full), human_bytes(activations.lora)
    saved, kept = human_bytes(activations.saved_by_freezing), human_bytes(activations.kept_for_branches)
    return (
        f"activations kept for backward {lora}: {full} when all parameters are trained, {saved} less with the base frozen, "
        f"{kept} more for what is trained"
    )


def _merging(cost: MergeCost) -> str:
    files = f"{human_bytes(cost.read_bytes)} of weights read and written"
    if cost.written_bytes != cost.read_bytes:
        files = f"{human_bytes(cost.read_bytes)} of weights read, {human_bytes(cost.written_bytes)} written"
    return (
        f"merge {human_count(cost.flops, 'FLOPs')}; of files {files}, {human_bytes(cost.copied_bytes)} copied; in memory "
        f"{human_bytes(cost.kept_bytes)} kept to unmerge, about {human_bytes(cost.peak_bytes)} at the peak"
    )


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
    problem, planned = "", None
    try:
        planned = plan(model, lora_config)
    except NoTargetError as error:
        problem = str(error)
    rows = tuple(_rows(model, lora_config, planned))
    base = sum(parameter.numel() for parameter in model.parameters())
    result = Explanation(rows, base, problem)
    if planned is None:
        return replace(result, blocks=blocks_of(model, (), (), None))
    result = replace(
        result,
        copies=tuple((saved.module, saved.entries) for saved in planned.saved),
        bias_parameters=sum(model.get_parameter(name).numel() for name in planned.biases),
        merge=merge_cost(model, planned),
    )
    return _predicted(result, model, lora_config, planned, Example.of(example_inputs))


def _predicted(
    result: Explanation, model: nn.Module, config: LoraConfig, planned: Plan, example: Example | None
) -> Explanation:
    """With what a copy of the model without values tells."""
    entries, unknown = None, ""
    activations: Activations | None = None
    try:
        lora = lora_transform(on_meta(model), config, capture="modules")
        entries = entries_in_files(lora, next(iter(lora._lora.adapters.values())))
        if example is not None:
            activations = predict_activations(model, lora, _trained_modules(planned), example)
    except Exception as error:  # noqa: BLE001 whatever a model does that runs without values
        text = " ".join(str(error).split())
        unknown = f"{type(error).__name__}: {text[:200]}"
    biases = [(name, model.get_parameter(name).numel()) for name in planned.biases]
    trained = [*((row.name, row.parameters) for row in result.rows), *result.copies, *biases]
    multiplied = [(row.name, row.parameters) for row in result.rows if row.kind != "embedding"]
    return replace(
        result,
        adapter_bytes=None if entries is None else FileLayout.of(entries).nbytes,
        activations=activations,
        unknown=unknown,
        blocks=blocks_of(model, trained, multiplied, entries),
    )


def _trained_modules(planned: Plan) -> list[str]:
    """The modules in which something is trained."""
    sites = [spec.owner if not spec.is_parameter else spec.site.rpartition(".")[0] for spec in planned.branches]
    biased = [name.rpartition(".")[0] for name in planned.biases]
    return list(dict.fromkeys([*sites, *(saved.module for saved in planned.saved), *biased]))


def _rows(model: nn.Module, config: LoraConfig, planned: Plan | None) -> Iterator[Row]:
    layers, found = candidates(model), {spec.site: spec for spec in (planned.branches if planned else ())}
    named = {layer.name for layer in layers}
    parameters = [
        Candidate(spec.site, spec.layer, spec.is_parameter) for spec in found.values() if spec.site not in named
    ]
    reasons = _reasons(model, config, planned, layers)
    for each in [*layers, *parameters]:
        spec, layer = found.get(each.name), each.layer
        why = Reason(_matched(spec, reasons)) if spec else reasons.of(each.name)
        yield Row(
            name=each.name,
            kind=layer.kind,
            in_features=layer.in_features,
            out_features=layer.out_features,
            weight_entries=math.prod(KINDS[layer.kind].weight_shape(layer)),
            matched=spec is not None,
            reason=why.text,
            r=spec.r if spec else 0,
            parameters=spec.num_parameters if spec else 0,
            nearest=why.nearest,
            close=why.close,
            layer=why.layer,
        )


def _reasons(model: nn.Module, config: LoraConfig, planned: Plan | None, layers: list[Candidate]) -> Reasons:
    try:
        rules = target_rules(model, config)
    except NoTargetError:  # which is the problem that the explanation names
        rules = None
    names = [name for name, _ in model.named_modules() if name]
    kinds = [(layer.name, layer.layer.kind) for layer in layers]
    return Reasons(names, kinds, rules, config.target_modules, planned.decisions if planned else ())


def _matched(spec: BranchSpec, reasons: Reasons) -> str:
    """Why a layer has a branch."""
    if spec.tied_to:
        return f"shares its weight with {spec.tied_to}"
    if not has_factors(spec):
        return f"{spec.num_parameters // KINDS[spec.kind].weight_shape(spec.layer)[1]} trainable tokens"
    owner = spec.site.rpartition(".")[0]  # of a bare parameter, or of a layer inside of an attention
    return reasons.matched(spec.site) or reasons.matched(owner) or "target_parameters"
