"""`rounding_report`: what merging a live model's adapters would lose by rounding, at the weights and at the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxlora._passes import FOLDABLE, Loss, changes, foldable
from fxlora.capture.inputs import Example, undisturbed
from fxlora.errors import AdapterError, ConfigError
from fxlora.model import LoraModel
from fxlora.rounding import WARN_ABOVE, OutputEffect, RoundingReport


def rounding_report(
    model: LoraModel,
    *,
    adapter_names: Sequence[str] | None = None,
    out_dtype: torch.dtype | None = None,
    example_inputs: Any = None,
    warn_above: float = WARN_ABOVE,
) -> RoundingReport:
    """What a merge of adapters would lose by rounding; the model stays as it is.

    Args:
        model: what `lora_transform` returned.
        adapter_names: which adapters; the active ones if None. Those that are merged already always are.
        out_dtype: in which merged weights would be written; each one's own if None.
        example_inputs: as for `lora_transform`. With them the model is run twice with merged weights, exact ones and
            rounded ones, in float32 (which takes a float32 copy of all weights).
        warn_above: share of a layer's update, by norm, that may be lost without a warning.

    Raises:
        AdapterError: for an unknown adapter, or while adapters are disabled.
        ConfigError: for another dtype than float64, float32, float16 and bfloat16.
        MergeError: when a weight cannot hold an update, or would not be finite.
    """
    if not isinstance(model, LoraModel):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(f"rounding_report takes what lora_transform returned, not a {type(model).__name__}")
    if out_dtype is not None and out_dtype not in FOLDABLE:
        raise ConfigError(f"`out_dtype` should be one of {', '.join(map(str, FOLDABLE))}, not {out_dtype!r}")
    names = _names(model, adapter_names)
    losses: dict[str, Loss] = {}
    shapes: dict[str, tuple[torch.dtype, int]] = {}
    rounded: dict[str, Tensor] = {}
    specs = [spec for name in names for spec in model._lora.adapters[name].branches]
    for site, branches in foldable(specs).items():
        for change in changes(model, site, branches, model._lora.originals, out_dtype):
            losses[change.path] = Loss()
            value = change.fold(losses[change.path])
            shapes[change.path] = value.dtype, value.numel()
            if example_inputs is not None:
                rounded[change.path] = value
    effect = None if example_inputs is None else _effect(model, names, rounded, example_inputs)
    return RoundingReport.of(losses, shapes, effect=effect, warn_above=warn_above)


def _names(model: LoraModel, names: Sequence[str] | None) -> list[str]:
    chosen = [names] if isinstance(names, str) else list(model.active_adapters if names is None else names)
    model._check_known(chosen)
    return sorted({*model._lora.merged, *chosen})


def _effect(model: LoraModel, names: list[str], rounded: Mapping[str, Tensor], inputs: Any) -> OutputEffect:
    """Run the base, the exactly merged and the rounded model; the adapters are merged for this time only."""
    wide = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
    specs = [spec for name in names for spec in model._lora.adapters[name].branches]
    exact = {
        change.path: change.fold()
        for site, branches in foldable(specs).items()
        for change in changes(model, site, branches, model._lora.originals, wide)
    }
    example = _in_dtype(wide, Example.of(inputs))
    merged, tied = model._lora.merged, model._lora.tied
    with undisturbed(model, training=False):
        with model.disable_adapter():
            base = _output(model, {}, wide, example)
        try:
            model._merge([name for name in names if name not in merged], "both")
            outputs = [_output(model, values, wide, example) for values in (exact, rounded)]
        finally:
            if model._lora.merged != merged:
                model.unmerge_adapter()
                model._merge(merged, tied)
    return _compare(base, outputs[0], outputs[1])


def _in_dtype(dtype: torch.dtype, example: Example | None) -> Example:
    if example is None:
        raise ConfigError("`example_inputs` is empty")
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (example.args, dict(example.kwargs))
    )
    return Example(args, kwargs)


def _output(model: LoraModel, values: Mapping[str, Tensor], dtype: torch.dtype, example: Example) -> Tensor:
    """The first output with some weights replaced and all others in a wider dtype."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **values}
    wide = {name: value.detach().to(dtype) for name, value in tensors.items() if value.is_floating_point()}
    result: Any = torch.func.functional_call(model, wide, example.args, example.kwargs)
    logits = getattr(result, "logits", None)
    found = [logits] if isinstance(logits, Tensor) else pytree.tree_leaves(result)
    for each in found:
        if isinstance(each, Tensor) and each.is_floating_point():
            return each.double()
    raise ConfigError(
        "the model gives no floating-point output for example_inputs, by which rounding could be measured"
    )


def _compare(base: Tensor, exact: Tensor, rounded: Tensor) -> OutputEffect:
    difference = (rounded - exact).abs()
    same = (rounded.argmax(-1) == exact.argmax(-1)).double().mean() if exact.dim() else torch.ones(())
    return OutputEffect(
        largest=float(difference.max()),
        mean=float(difference.mean()),
        scale=float(exact.abs().max()),
        update=float((exact - base).abs().mean()),
        same_argmax=float(same),
    )
