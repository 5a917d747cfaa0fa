"""`fxlora.optimize`: a model's own code with operators in place of branches, in eager mode, in place and reversible.

The graphs, which everything else reads, stay as they are: only the code that is generated from them is another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from fxlora._passes import BranchSpec, Region, base_weight, original_forward, part_path, resolve
from fxlora.errors import AdapterError
from fxlora.model import LoraModel
from fxlora.ops import autotune as tuning
from fxlora.ops.call import branched_dora_swiglu, branched_doras, branched_linears, branched_swiglu
from fxlora.ops.choice import NAMES, SHORT_NAMES, Implementation, Shape, foreseen
from fxlora.rendering import Rendered, json_data


@dataclass(frozen=True, slots=True)
class ShapeChoice:
    """What computes the low-rank terms of calls that are alike, by what was measured or by an estimate.

    Attributes:
        shape: of the calls: dtype, features of the input, of the outputs, and ranks.
        calls: how many there are.
        how: `kernels` of Triton, ATen's `products`, or `composed`: torch's own operations, without an operator.
        reason: why, with the times that were measured, or those of an estimate. The number of rows is known at a call alone.
    """

    shape: str
    calls: int
    how: Implementation
    reason: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.calls} × {self.shape}: {NAMES[self.how]} ({self.reason})"


@dataclass(frozen=True, slots=True)
class OptimizeReport(Rendered):
    """What `optimize` did.

    Attributes:
        enabled: whether the model runs operators now.
        lowered: layers that are part of an operator, each with its branch.
        shared: those of them that share a call with others on the same input.
        blocks: SwiGLU blocks that are one operator: gate, up and down of each.
        kept: layers with branches that run as before, by the reason.
        choices: what computes the operators, by shape.
    """

    enabled: bool
    lowered: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    blocks: tuple[tuple[str, ...], ...] = ()
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    choices: tuple[ShapeChoice, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return json_data(asdict(self))

    def __str__(self) -> str:
        """A few lines for terminals."""
        if not self.enabled:
            return "The model runs its canonical graphs."
        layers, blocks = _count(len(self.lowered), "layer"), _count(len(self.blocks), "SwiGLU block")
        lines = [f"{layers} with branches are lowered: {len(self.shared)} share a call, {blocks} in one call each."]
        lines += [f"  {choice}" for choice in self.choices]
        for reason, sites in self.kept.items():
            first, *others = sites
            more = f" and {len(others)} more" if others else ""
            lines.append(f"  as before: {first}{more}: {reason}")
        return "\n".join(lines)


def optimize(model: nn.Module, enabled: bool = True, *, autotune: bool = False) -> OptimizeReport:
    """Run a transformed model's layers and their branches as operators, or no longer.

    Graphs, parameters, files and adapters are as before, and everything that works on the model still does; whatever
    cannot be an operator runs as before. Results are the same up to rounding; masks of dropout are others, which the
    generator decides as ever. Gradients of gradients need the canonical graphs.

    Args:
        model: from `lora_transform`, of any capture; changed in place. The choice stays through changes of adapters.
        enabled: False gives the canonical code back.
        autotune: True measures what computes a call fastest, once for each device, dtype, size and number of rows (up to the
            next power of two), at the first such call, for all models of this process from now on. Without it an estimate
            decides. Figures are kept in `$FXLORA_CACHE_DIR`, by default `fxlora` in the user's cache directory, and are in
            the report of a later call. Which one is fastest may differ from run to run, and with it the rounding.

    Returns:
        What is an operator now, and what is not and why.

    Raises:
        AdapterError: for a model without adapters of fxlora, or inside `adapter_rows`.
    """
    if not isinstance(model, LoraModel):
        raise AdapterError(f"optimize takes a model from lora_transform, not a plain {type(model).__name__}")
    if autotune:
        tuning.switch(True)
    state = model._lora
    before, state.optimized = state.optimized, enabled
    if enabled != before:
        try:
            model._render(state.rendered)
        except BaseException:
            state.optimized = before
            raise
    return _report(model)


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of an operator: the places of its factors A, and its region."""

    factors: tuple[str, ...]
    is_block: bool


def _report(model: LoraModel) -> OptimizeReport:
    if not model._lora.optimized:
        return OptimizeReport(False)
    specs = [spec for name in model._lora.rendered for spec in model._lora.adapters[name].branches]
    regions = model.lowered_regions() if model._lora.mode == "plain" else []
    calls = [call for region in regions for call in _calls(region)]
    own = {f"{spec.owner}.{part_path('lora_A', spec.adapter)}".removeprefix("."): spec for spec in specs}
    known = [[own[factor] for factor in call.factors] for call in calls]
    blocks = [group for call, group in zip(calls, known, strict=True) if call.is_block]
    in_blocks = {(spec.site, spec.adapter) for group in blocks for spec in group}
    known = [
        group for call, group in zip(calls, known, strict=True)
        if call.is_block or not all((spec.site, spec.adapter) in in_blocks for spec in group)
    ]  # fmt: skip
    lowered = {(spec.site, spec.adapter) for group in known for spec in group}
    kept: dict[str, list[str]] = {}
    for spec in specs:
        if (spec.site, spec.adapter) not in lowered:
            kept.setdefault(_reason(model, spec, {site for site, _ in lowered}), []).append(spec.site)
    return OptimizeReport(
        True,
        _sites(spec for group in known for spec in group),
        _sites(spec for group in known if len(group) > 1 and group not in blocks for spec in group),
        tuple(_sites(group) for group in blocks),
        {reason: tuple(sites) for reason, sites in kept.items()},
        _choices(model, known, blocks),
    )


def _calls(region: Region) -> Iterator[_Call]:
    for node in region.graph.nodes:
        is_block = node.target in (branched_swiglu, branched_dora_swiglu)
        if is_block or node.target in (branched_linears, branched_doras):
            As = cast("Sequence[fx.Node]", node.args[2 if is_block else 3])
            for instance in region.instances:
                yield _Call(tuple(instance.qualify(str(A.target)) for A in As), is_block)


def _reason(model: LoraModel, spec: BranchSpec, lowered: set[str]) -> str:
    """Why a branch is no part of an operator."""
    if model._lora.mode != "plain":
        return "several adapters are in one graph (rows or slots)"
    if spec.site in lowered:
        return f"adapter '{spec.adapter}' is added to what the operator of another adapter gives"
    if spec.form == "weight":
        return "the branch is in the weight, which is read and not called"
    if spec.variant and spec.variant != "dora":
        return f"variant '{spec.variant}' has no operator"
    if spec.layer.kind != "linear" or spec.layer.transposed:
        return (
            f"layers of kind '{spec.layer.kind}' have no operator"
            if spec.layer.kind != "linear"
            else "its weight is transposed"
        )
    if spec.variant and spec.dropout:
        return "DoRA with dropout multiplies the layer's own weight with the dropped input, too"
    if spec.bias:
        return "the branch has a bias"
    if model._lora.branch_dtype == "adapter":
        return "branch_dtype='adapter' computes the branch in the factors' dtype"
    module = resolve(model, spec.site)
    if (
        isinstance(module, nn.Module)
        and model.capture != "export"
        and original_forward(module) is not nn.Linear.forward
    ):
        return "its class has a forward of its own"
    return "its call has hooks, or another form than a layer with a branch"


def _choices(
    model: LoraModel, groups: Sequence[Sequence[BranchSpec]], blocks: Sequence[Sequence[BranchSpec]]
) -> tuple[ShapeChoice, ...]:
    counts: dict[tuple[str, Implementation, str], int] = {}
    for group in groups:
        weight = base_weight(model, group[0].site)[1]
        outputs, columns = tuple(spec.layer.out_features for spec in group), group[0].layer.in_features
        ranks = tuple(spec.r for spec in group)
        sharing = 2 if group in blocks else len(group)  # of a block's layers, down has another input
        layers = Shape(columns, outputs[:sharing], ranks[:sharing], group[0].dropout > 0)
        how, why = _choice(weight.device, weight.dtype, layers)
        sizes = " + ".join(map(str, outputs))
        dtype = str(weight.dtype).removeprefix("torch.")
        shape = f"{dtype} {columns} -> {sizes}, r {', '.join(map(str, dict.fromkeys(ranks)))}"
        key = (shape, how, why)
        counts[key] = counts.get(key, 0) + 1
    return tuple(ShapeChoice(shape, count, how, why) for (shape, how, why), count in counts.items())


def _choice(device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[Implementation, str]:
    """What computes calls, and why."""
    choice = foreseen(device, dtype, shape)
    if not tuning.can_measure(device, dtype, shape):
        return choice.how, choice.reason
    found = tuning.known(device, dtype, shape)
    if not found:
        return choice.how, f"until calls are measured: {choice.reason}"
    lines: list[str] = []
    for kind, times in found.items():
        figures = ", ".join(f"{SHORT_NAMES[cast(Implementation, how)]} {time:,.0f} us" for how, time in times.items())
        lines.append(f"{kind.rows:,} rows {figures}")
    last = list(found.values())[-1]
    return cast(Implementation, min(last, key=last.__getitem__)), f"measured: {'; '.join(lines)}"


def _sites(specs: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(spec.site for spec in specs))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
