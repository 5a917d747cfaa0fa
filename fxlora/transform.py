"""`lora_transform`: capture a model, plan the branches, run the passes, and put everything in place at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxlora import logs
from fxlora._passes import (
    BranchDtype,
    CallSite,
    PassError,
)
from fxlora.capture import Capture, check_capture, export, modules, symbolic
from fxlora.capture.graph_module import LoraGraphModule
from fxlora.capture.inputs import Example
from fxlora.checkpoint.adapter import Reading, fit_plan, read_drawn
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError, CaptureError, NoTargetError
from fxlora.factors import Drawn, draw
from fxlora.host.input_grads import care_for_checkpointing
from fxlora.host.replication import replicate
from fxlora.model import LoraModel, watch_loading
from fxlora.naming import check_adapter_name
from fxlora.plan import Plan, plan
from fxlora.registered import freeze, trainable_names
from fxlora.state import LoraState

log = logging.getLogger("fxlora")


def lora_transform(
    model: nn.Module,
    config: object,
    *,
    adapter_name: str = "default",
    capture: Capture = "auto",
    example_inputs: object = None,
    dynamic_shapes: Any = None,
    is_trainable: bool | None = None,
    branch_dtype: BranchDtype | None = None,
    load_base_weights: bool = False,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    trace_passes: bool = False,
) -> LoraModel:
    """Add LoRA (arXiv:2106.09685) to a model as a compile step.

    The base is frozen and shared, never copied: its parameters keep their names and their memory. A failed call leaves
    the model as it was.

    Args:
        model: any `nn.Module`; may be on the meta device.
        config: a `LoraConfig`, a `peft.LoraConfig`, a dict of the same fields, or the path of a saved adapter, whose
            weights are loaded then.
        adapter_name: name of the new adapter; no dot.
        capture: `"symbolic"`, `"export"`, `"modules"`, or `"auto"` for the first that can hold the model in all its
            forms of call and mixtures of modes. Where training and evaluation compute different things, such as
            stochastic depth, `symbolic` and `export` keep a graph for each, and the whole model is in one mode.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. `export` needs them; the others
            use them to check that outputs are equal and that every site is called. `export`, and `symbolic` for a
            forward with optional arguments, hold for calls of this form and refuse others.
        dynamic_shapes: for `export`, as in `torch.export.export`; by default every dimension that can vary does.
        is_trainable: whether the factors require gradients; by default they do, unless they are loaded from files.
        branch_dtype: in place of the configuration's, which files do not hold.
        load_base_weights: take base weights that a saved adapter's file has into the model, as peft always does; see
            `LoraModel.load_adapter`.
        strict: if False, go on without what does not fit of a saved adapter; see `LoraModel.load_adapter`.
        ignore_mismatched_sizes: the same for misshapen tensors alone.
        trace_passes: keep the graphs before and after each pass, now and later: `model.pass_trace`.

    Returns:
        For `modules` the same object, now also a `LoraModel`; for the others a `LoraGraphModule` over the same
        parameters.

    Raises:
        NoTargetError: when a target matches nothing; names the nearest modules.
        ConfigError: for a field that cannot work.
        NotImplementedError: for a field of peft's that is not supported yet.
        CaptureError: when the capture cannot hold the model, with the reason.
        AdapterError: when the model is transformed already, or the adapter's name cannot be used.
        CheckpointError: when a saved adapter cannot be read.

    Example:
        >>> import torch
        >>> from fxlora import LoraConfig, lora_transform
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = lora_transform(model, LoraConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 32 || all params: 122 || trainable%: 26.2295
    """
    if isinstance(model, LoraModel):
        raise AdapterError("the model is transformed already; add_adapter gives it another adapter")
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    _check_order(model)
    check_capture(capture)
    check_adapter_name(adapter_name, {})
    adapter_path = Path(config) if isinstance(config, (str, Path)) else None
    lora_config = LoraConfig.read(adapter_path) if adapter_path is not None else LoraConfig.from_any(config)
    if adapter_path is not None or is_trainable is not None:
        lora_config = lora_config.replace(inference_mode=not is_trainable)
    if branch_dtype is not None:
        lora_config = lora_config.replace(branch_dtype=branch_dtype)
    if adapter_path is not None and not strict:
        lora_config = lora_config.replace(strict_targets=False)
    lora_config.validate()
    example = Example.of(example_inputs)
    reading = Reading.of(
        load_base_weights=load_base_weights, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes
    )
    request = _Request(model, lora_config, adapter_name, example, dynamic_shapes, adapter_path, reading, trace_passes)
    if lora_config.layer_replication:
        result, reason = _replicated(request, capture)
    else:
        result, reason = _auto(request) if capture == "auto" else (_CAPTURES[capture](request), "as asked")
    result._lora.reason = reason
    log.info("capture '%s': %s; %d sites", result.capture, reason, len(result._specs()))
    if logs.wanted("select"):
        for decision in result._lora.adapters[adapter_name].decisions:
            log.info("select %s: %s", decision.name, decision.reason)
    if logs.wanted("graph"):
        log.info("graphs after the rewrite\n%s", result.print_graph())
    return result


def _check_order(model: nn.Module) -> None:
    """Refuse a model that has been compiled, sharded or transformed in part: LoRA comes first, and once.

    Raises:
        AdapterError: naming the part that is transformed already.
        CaptureError: says what to do first.
    """
    if hasattr(model, "_orig_mod"):
        raise CaptureError("the model is compiled already; transform it first, then call torch.compile on the result")
    for name, module in model.named_modules():
        if isinstance(module, LoraModel):
            raise AdapterError(
                f"'{name}' in the model is transformed already; add adapters to it, or unload it and transform the whole"
            )
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise CaptureError(
                f"'{name}' is sharded already (a DTensor), and new factors would stay unsharded beside it; transform the "
                "model first, then shard it"
            )


@dataclass(frozen=True, slots=True)
class _Request:
    model: nn.Module
    config: LoraConfig
    adapter_name: str
    example: Example | None
    dynamic_shapes: Any
    adapter_path: Path | None
    reading: Reading
    trace_passes: bool = False

    def state(self, capture: str) -> LoraState:
        cls = type(self.model)
        trained = tuple(name for name, p in self.model.named_parameters() if p.requires_grad)
        names = cls.__name__, cls.__module__
        return LoraState(capture, "", self.config.branch_dtype, names, trained, traced=self.trace_passes)

    def plan(self, sites: Sequence[CallSite] = ()) -> Plan:
        found = plan(self.model, self.config, adapter_name=self.adapter_name, sites=sites)
        if self.adapter_path is None:
            return found
        return fit_plan(self.adapter_path, self.model, found, self.reading)

    def drawn(self, model: nn.Module, found: Plan) -> Drawn:
        if self.adapter_path is None:
            return draw(model, found)
        return read_drawn(self.adapter_path, model, found, self.reading)[0]


def _auto(request: _Request) -> tuple[LoraModel, str]:
    """The first capture that can hold the model, and why it was taken."""
    try:
        return _by_symbolic(request, restricted=False), "the model traces soundly"
    except (CaptureError, PassError) as error:
        why_not = str(error)
    needs_graph = bool(request.config.call_sites)
    if not needs_graph:
        try:
            return _by_modules(request), f"not 'symbolic', since {why_not}"
        except (CaptureError, NoTargetError) as error:  # a whole graph also shows what no known layer has
            why_not = f"{why_not}; not 'modules', since {error}"
            if request.example is None:
                raise
    if request.example is None:
        raise CaptureError(
            "call_sites need a whole graph. Not 'symbolic', since "
            f"{why_not}. 'export' can hold more models: pass example_inputs"
        )
    return _by_export(request), f"not 'symbolic', since {why_not}"


def _replicated(request: _Request, capture: str) -> tuple[LoraModel, str]:
    """`modules` capture of a model whose layers are rebuilt first, and are as before if it fails."""
    if capture not in ("auto", "modules"):
        raise CaptureError(
            f"`layer_replication` changes the model itself, of which capture='{capture}' makes a graph; use 'modules'"
        )
    replication = replicate(request.model, request.config.layer_replication or ())
    try:
        result = _by_modules(request)
    except BaseException:
        replication.undo(request.model)
        raise
    result._lora.replication = replication
    return result, "layer_replication changes the model itself"


def _by_symbolic(request: _Request, *, restricted: bool = True) -> LoraModel:
    captured = symbolic.capture(request.model, request.example, restricted=restricted)
    return _whole_graph(captured, request, "symbolic")


def _by_export(request: _Request) -> LoraModel:
    captured = export.capture(request.model, request.example, request.dynamic_shapes)
    return _whole_graph(captured, request, "export")


def _whole_graph(captured: LoraGraphModule, request: _Request, name: str) -> LoraModel:
    """Add the adapter to a captured graph. Only `requires_grad` is shared with the original, and set last."""
    captured._lora = request.state(name)
    found = captured._place(request.plan(captured._sites()))
    _finish(captured, found, request)
    return captured


def _by_modules(request: _Request) -> LoraModel:
    model = request.model
    found = modules.placed(model, request.plan())
    if request.example is not None:
        found = modules.checked_on(model, found, request.example)
    before = type(model)
    state = request.state("modules")
    host = modules.build(model)
    try:
        host._lora = state
        _finish(host, found, request)
    except BaseException:
        host.__dict__.pop("_lora", None)
        model.__class__ = before
        raise
    return host


def _finish(result: LoraModel, found: Plan, request: _Request) -> None:
    result._add(found, request.drawn(request.model, found), activate=True)
    freeze(result, set() if found.config.inference_mode else trainable_names([found]))
    watch_loading(result)
    care_for_checkpointing(result)


_CAPTURES = {"symbolic": _by_symbolic, "export": _by_export, "modules": _by_modules}
