"""What a case gives with fxlora, with peft and in float64: measured for the tests and for `benchmarks.parity`.

An adapter gets the same factors in both libraries through files: its initial ones plus a shift that depends on the key
only. The float64 reference knows neither library's code: it runs the original model with `W + s B A` in place of W
(`torch.func.functional_call`), and gradients flow through that sum.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import CaptureError, ConfigError, LoraConfig, LoraModel, MergeError, NoTargetError, lora_transform
from tests.models.checks import error, same, tensors
from tests.oracle.cases import Case

WEIGHTS = "adapter_model.safetensors"
DIFFERS = 1e-3
"""Relative error from which a library computes something else, and not the same with other rounding."""


@dataclass
class Side:
    """What one library, or the reference, computes of a case.

    Attributes:
        failure: what is wrong with it as an oracle, with the step that shows it; empty if nothing is.
        initial: tensors of the fresh adapter's file.
        outputs: in evaluation, with the shifted factors.
        trained: the same in training, under one seed.
        gradients: of the factors, by key.
        weights: the base's state dict after the merge.
        merged: outputs after the merge.
    """

    failure: str = ""
    initial: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    outputs: list[Tensor] = field(default_factory=list[Tensor])
    trained: list[Tensor] = field(default_factory=list[Tensor])
    gradients: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    merged: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def computes(self) -> bool:
        """Whether its outputs are right, if not its merge."""
        return not self.failure or self.failure.startswith("merge:")


@dataclass
class Outcome:
    """Measurements of one case under one capture; errors are relative to the largest value.

    Attributes:
        refused: why fxlora has no such adapter.
        oracle: `peft`, or `float64` where peft is wrong.
        peft_fails: what peft does wrong.
        fresh_eval: whether the fresh adapter's output has the frozen base's bits; None where it should not.
        fresh_train: the same in training, under one seed.
        initial: whether the fresh factors have the bits of peft's; None where peft has none, or others on purpose.
        forward: error of the output.
        training: error of the output in training, under one seed.
        gradients: error of the gradients.
        weights: error of the merged weights.
        merged: error of the merged model's output, against the branches'.
        reference: error of output and gradients against float64, where the branches equal an update of the weight.
        file_bits: whether peft reads every tensor of our file, bit for bit; None where it has no such adapter.
        read_bits: whether we read every tensor of peft's file so.
        to_peft: error of peft's output with our file; None where peft is wrong anyway.
        from_peft: error of our output with peft's file; None likewise.
        names: whether the state dict keeps the base's names.
        restored: whether unmerging gives all bits back.
        notes: what a file direction said when it failed.
    """

    case: str
    group: str
    capture: str
    refused: str = ""
    oracle: str = ""
    peft_fails: str = ""
    fresh_eval: bool | None = None
    fresh_train: bool | None = None
    initial: bool | None = None
    forward: float | None = None
    training: float | None = None
    gradients: float | None = None
    weights: float | None = None
    merged: float | None = None
    reference: float | None = None
    file_bits: bool | None = None
    read_bits: bool | None = None
    to_peft: float | None = None
    from_peft: float | None = None
    names: bool = False
    restored: bool = False
    notes: list[str] = field(default_factory=list[str])


def measure(case: Case, capture: Any, *, files: bool = True) -> Outcome:
    """Transform the case's model and compare with peft, or with float64 where peft is wrong."""
    outcome, theirs = Outcome(case.name, case.group, capture), peft_side(case)
    try:
        fresh = ours(case, capture)
    except NotImplementedError as refusal:
        outcome.refused = f"not yet (refused: NotImplementedError: {refusal})"
    except (CaptureError, ConfigError, NoTargetError) as refusal:
        name = "CaptureError" if isinstance(refusal, CaptureError) else type(refusal).__name__
        outcome.refused = f"refused: {name}: {refusal}"
    if outcome.refused:
        return outcome
    outcome.peft_fails = theirs.failure
    outcome.oracle = "float64" if theirs.failure else "peft"
    _measure_fresh(case, fresh, outcome)
    with tempfile.TemporaryDirectory() as directory:
        fresh.save_pretrained(directory, save_embedding_layers=False)
        initial = load_file(Path(directory, WEIGHTS))
        if theirs.initial and not case.other_factors:
            outcome.initial = initial.keys() == theirs.initial.keys() and all(
                torch.equal(initial[key], theirs.initial[key]) for key in initial
            )
        if case.other_factors:  # files may keep them in peft's shapes, where a shift has no meaning of ours
            shift_in_place(fresh)
        else:
            save_file(shifted(initial), Path(directory, WEIGHTS))
            fresh.load_state_dict(our_reading(case, directory, case.captures[-1]).state_dict())
    side = _our_side(fresh, case, outcome)
    _compare(case, fresh, side, theirs, outcome)
    if files:
        _measure_files(case, fresh, side, theirs, capture, outcome)
    for name in case.without:
        setattr(outcome, name, None)
    return outcome


def check(case: Case, capture: Any) -> Outcome:
    """Measure, and hold every figure against what the case promises; a field that is not there yet is skipped."""
    outcome = measure(case, capture, files=capture == case.captures[-1])
    if outcome.refused.startswith("not yet"):
        pytest.skip(outcome.refused)
    if capture not in case.captures:
        assert outcome.refused.startswith("refused: CaptureError"), outcome
        return outcome
    assert not outcome.refused, outcome.refused
    assert re.search(case.peft_fails, outcome.peft_fails) if case.peft_fails else not outcome.peft_fails, outcome
    assert outcome.fresh_eval is not False and outcome.fresh_train is not False, outcome
    assert outcome.names and outcome.restored, outcome
    assert outcome.initial is not False, outcome
    errors = [outcome.forward, *([] if "gradients" in case.without else [outcome.gradients])]
    errors += [] if case.unmergeable else [outcome.merged]
    errors += [] if case.unmergeable or "weights" in case.without else [outcome.weights]
    if case.by_weight:
        errors.append(outcome.reference)
    if not case.peft_fails:
        errors.append(outcome.training)
        if capture == case.captures[-1]:
            assert outcome.file_bits and outcome.read_bits, outcome
            errors += [outcome.to_peft, outcome.from_peft]
    assert all(each is not None and each <= case.tolerance for each in errors), outcome
    return outcome


def ours(case: Case, capture: Any) -> LoraModel:
    """The case's model with a fresh adapter of ours."""
    model, batch = case.model(), case.batch()
    torch.manual_seed(5)
    config = LoraConfig(**case.settings, **case.ours)
    return lora_transform(model, config, capture=capture, example_inputs=batch).eval()


def our_reading(case: Case, directory: str | Path, capture: Any) -> LoraModel:
    """The case's model with the adapter of a directory; seeded, since some initialisers decompose W at random."""
    model, batch = case.model(), case.batch()
    torch.manual_seed(5)
    return lora_transform(model, directory, capture=capture, example_inputs=batch).eval()


def shift_in_place(model: LoraModel, salt: str = "") -> None:
    """Move every factor by random values that depend on its name, and on a word, only."""
    factors = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, value in shifted({salt + name: factor.detach() for name, factor in factors.items()}).items():
            factors[name.removeprefix(salt)].copy_(value)


def run(model: nn.Module, case: Case, *, training: bool = False, copied: bool = True) -> list[Tensor]:
    """Outputs in one mode, without kernels that round otherwise than a graph does; by a copy, to leave no mark."""
    model = (copy.deepcopy(model) if copied else model).train(training)
    torch.manual_seed(3)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return tensors(model(**case.batch()))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def shifted(initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, each moved by random values that depend on its key only."""

    def shift(key: str, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        return (tensor + 0.2 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    values = {key: shift(key, tensor) for key, tensor in initial.items()}
    for key, tensor in initial.items():  # a head that is tied to an embedding has its factors, transposed
        for part, other in (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")):
            for tied in [each for each in initial if each.endswith(other)]:
                if key.endswith(part) and torch.equal(tensor, initial[tied].t()):
                    values[key] = values[tied].t().contiguous()
    return values


def backward(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Outputs, after gradients of a fixed weighting of them were added up in the parameters."""
    generator = torch.Generator().manual_seed(11)
    outputs = tensors(model(**batch))
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum() for out in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    return [out.detach() for out in outputs]


def largest_error(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest relative error of tensors by name; infinite when the names differ."""
    if a.keys() != b.keys():
        return math.inf
    pairs = [(a[key].double(), b[key].double()) for key in b if b[key].is_floating_point()]
    return error([x for x, _ in pairs], [y for _, y in pairs])


# ---- our side ----


def _measure_fresh(case: Case, fresh: LoraModel, outcome: Outcome) -> None:
    base = case.model().requires_grad_(False)
    names = list(base.state_dict())
    outcome.names = [key for key in fresh.state_dict() if key in names] == names
    if case.settings.get("init_lora_weights", True) in (True, "gaussian"):
        outcome.fresh_eval = same(run(fresh, case), run(base, case))
        draws = case.settings.get("lora_dropout", 0)  # the branch's dropout draws from the generator of the base's
        outcome.fresh_train = None if draws else same(run(fresh, case, training=True), run(base, case, training=True))


def _our_side(model: LoraModel, case: Case, outcome: Outcome) -> Side:
    side = Side(outputs=run(model, case), trained=run(model, case, training=True))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = case.model().state_dict()
    try:
        model.merge_adapter()
        side.merged = run(model, case)
        model.unmerge_adapter()
        whole = copy.deepcopy(model).merge_and_unload()
        side.weights = {key: value.clone() for key, value in whole.state_dict().items() if key in names}
    except MergeError as refusal:
        outcome.notes.append(f"merge refused: {refusal}")
    outcome.restored = all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    backward(copy_gradients := copy.deepcopy(model), case.batch())
    found = {name: p.grad for name, p in copy_gradients.named_parameters() if p.grad is not None}
    zeros = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, state_dict={**zeros, **found}, save_embedding_layers=False)
        side.gradients = load_file(Path(directory, WEIGHTS))
    return side


def _compare(case: Case, model: LoraModel, side: Side, theirs: Side, outcome: Outcome) -> None:
    if side.merged:
        outcome.merged = error(side.merged, side.outputs)
    if case.by_weight:
        reference = reference_side(model, case)
        named = _gradients_by_name(model, case)
        outcome.reference = max(
            error(_wide(side.outputs), reference.outputs), largest_error(named, reference.gradients)
        )
    if not theirs.failure:
        outcome.forward = error(side.outputs, theirs.outputs)
        outcome.training = error(side.trained, theirs.trained)
        outcome.gradients = largest_error(side.gradients, theirs.gradients)
        outcome.weights = largest_error(side.weights, theirs.weights) if side.weights else None
    elif case.by_weight:
        outcome.forward = error(_wide(side.outputs), reference.outputs)
        outcome.gradients = largest_error(named, reference.gradients)
        outcome.weights = largest_error(side.weights, reference.weights)


def _gradients_by_name(model: LoraModel, case: Case) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    backward(model, case.batch())
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name and p.grad is not None}


def _wide(values: Iterable[Tensor]) -> list[Tensor]:
    return [value.double() for value in values]


def _measure_files(case: Case, model: LoraModel, side: Side, theirs: Side, capture: Any, outcome: Outcome) -> None:
    """Our file in peft, and peft's file here."""
    if not theirs.initial:
        return
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, save_embedding_layers=False)
        written = load_file(Path(directory, WEIGHTS))
        try:
            reader = peft_reading(case, directory)
            read = _peft_tensors(reader)
            outcome.file_bits = read.keys() == written.keys() and all(torch.equal(read[k], written[k]) for k in read)
            if theirs.computes:
                outcome.to_peft = error(run(reader, case, copied=False), side.outputs)
        except (RuntimeError, ValueError) as failure:
            outcome.file_bits = False
            outcome.notes.append(f"peft reads our file: {line(failure)}")
    with tempfile.TemporaryDirectory() as directory:
        writer = trained_peft(case, theirs.initial)
        quietly(writer.save_pretrained)(directory, save_embedding_layers=False)
        try:
            back = our_reading(case, directory, capture)
            written = load_file(Path(directory, WEIGHTS))
            back.save_pretrained(Path(directory, "again"), save_embedding_layers=False)
            read = load_file(Path(directory, "again", WEIGHTS))
            outcome.read_bits = read.keys() == written.keys() and all(torch.equal(read[k], written[k]) for k in read)
            if theirs.computes:
                outcome.from_peft = error(run(back, case), run(writer, case, copied=False))
        except (RuntimeError, ValueError, NotImplementedError) as failure:
            outcome.read_bits = False
            outcome.notes.append(f"we read peft's file: {line(failure)}")


def line(failure: BaseException) -> str:
    """An error in one line."""
    text = re.sub(r"/\S*/adapter_model", "adapter_model", str(failure).strip())  # not the folder, which is temporary
    return f"{type(failure).__name__}: {' '.join(text.split())}"


# ---- peft ----


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the warnings that peft gives on Conv1D, tied weights, merges and more."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return wrapped


@functools.cache
@quietly
def peft_side(case: Case) -> Side:
    """What peft computes; where it fails, the step and the reason."""
    side = Side()
    step = "adapter"
    try:
        fresh = peft_model(case)
        side.initial = _peft_tensors(fresh)

        def make() -> Any:  # anew for each step, since tied factors of peft cannot be copied
            return trained_peft(case, side.initial)

        step = "forward"
        side.outputs = run(make(), case, copied=False)
        side.trained = run(make(), case, training=True, copied=False)
        model = make()
        backward(model, case.batch())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        zeros = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
        side.gradients = _peft_tensors(model, {**zeros, **found})
        step = "merge"
        merged = make().merge_and_unload()
        side.weights, side.merged = dict(merged.state_dict()), run(merged, case)
        step = ""
    except (RuntimeError, TypeError, ValueError, ImportError, AttributeError, KeyError) as failure:
        side.failure = f"{step}: {line(failure)}"
    if case.by_weight and side.outputs:
        fitting = _reference_of_peft(case, side.initial)
        difference = 0.0 if fitting is None else error(_wide(side.outputs), fitting)
        if difference > DIFFERS:
            side.failure = f"forward differs from W + s·BA by {difference:.0e}"
    return side


def peft_model(case: Case) -> Any:
    """The case's model with a fresh adapter of peft's, in evaluation."""
    model = case.model()
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**copy.deepcopy(case.settings))).eval()


def trained_peft(case: Case, initial: Mapping[str, Tensor]) -> Any:
    model = quietly(peft_model)(case)
    quietly(peft.set_peft_model_state_dict)(model, shifted(initial))
    return model


@quietly
def peft_reading(case: Case, directory: str | Path) -> Any:
    """The case's model with the adapter of a directory in peft, seeded as ours."""
    model = case.model()
    torch.manual_seed(5)
    return peft.PeftModel.from_pretrained(model, directory).eval()


@quietly
def _peft_tensors(model: Any, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What peft writes into a file."""
    found = peft.get_peft_model_state_dict(model, state_dict, save_embedding_layers=False)
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


# ---- float64 ----


def reference_side(model: LoraModel, case: Case) -> Side:
    """The original model in float64 with `W + s B A` in place of each adapted W; factors are those of `model`."""
    factors = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    base = case.model().double()
    weights = updated(base, factors, case)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in case.batch().items()}
    reference = _Replaced(base, weights)
    outputs = backward(reference, batch)
    gradients = {name: factor.grad for name, factor in factors.items() if factor.grad is not None}
    values = {key: weights[key].detach() if key in weights else value for key, value in base.state_dict().items()}
    return Side(outputs=outputs, gradients=gradients, weights=values)


class _Replaced(nn.Module):
    """A model that runs with other values of some parameters."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.values = model, values

    def forward(self, **batch: Any) -> Any:
        return torch.func.functional_call(self.model, self.values, (), batch)


def updated(base: nn.Module, factors: Mapping[str, Tensor], case: Case, adapter: str = "default") -> dict[str, Tensor]:
    """Parameters of the base with an adapter's update, by name, from factors by our names of them."""
    found: dict[str, Tensor] = {}
    for name, a in factors.items():
        for part, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            owner, middle, rest = name.partition(f".{part}.")
            if not middle or rest.partition(".")[0] != adapter:
                continue
            parts = {
                each: factors.get(f"{owner}.{path}")
                for each, path in {
                    "B": f"{other}.{adapter}.weight",
                    "bias": f"{other}.{adapter}.bias",
                    "m": f"lora_magnitude_vector.{adapter}.weight",
                }.items()
            }
            assert parts["B"] is not None
            found.update(update_of(base, owner, a, parts["B"], parts["bias"], parts["m"], case))
    return found


def update_of(
    base: nn.Module, owner: str, a: Tensor, b: Tensor, bias: Tensor | None, magnitude: Tensor | None, case: Case
) -> dict[str, Tensor]:
    """The adapted weight (and bias) of one layer or parameter, written down from the definition."""
    scaling = _scaling(case, owner, a)
    if "lora_parameters" in owner:
        path = owner.replace("lora_parameters.", "")
        weight = base.get_parameter(path)
        transposed = getattr(base.get_submodule(path.rpartition(".")[0]), "is_transposed", False)
        return {path: weight + scaling * _parameter_update(weight, a, b, transposed)}
    layer = base.get_submodule(owner)
    weight = layer.get_parameter("weight")
    turned = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
    moved = weight + scaling * (
        torch.einsum("or,ri->io", b, a) if turned else (b.flatten(1) @ a.flatten(1)).view_as(weight)
    )
    if magnitude is not None:
        norms = (moved.norm(dim=0) if turned else moved.flatten(1).norm(dim=1)).detach()
        ratio = magnitude.flatten() / norms
        moved = moved * (ratio if turned else ratio.view(-1, *[1] * (moved.dim() - 1)))
    found = {f"{owner}.weight": moved}
    if bias is not None:
        found[f"{owner}.bias"] = layer.get_parameter("bias") + scaling * bias
    return found


def _scaling(case: Case, owner: str, a: Tensor) -> float:
    settings = case.settings
    r = next((r for pattern, r in settings.get("rank_pattern", {}).items() if owner.endswith(pattern)), settings["r"])
    return settings["lora_alpha"] / (math.sqrt(r) if settings.get("use_rslora") else r)


def _parameter_update(weight: Tensor, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    if weight.dim() == 2:
        return b @ a
    experts = weight.shape[0]
    each = [b[:, e::experts] @ a.view(experts, -1, a.shape[1])[e] for e in range(experts)]
    return torch.stack([matrix.t() if transposed else matrix for matrix in each])


def _reference_of_peft(case: Case, initial: Mapping[str, Tensor]) -> list[Tensor] | None:
    """Outputs in float64 with peft's factors; None where the definition does not fit their shapes."""
    model = ours_for_reference(case)
    if model is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, save_embedding_layers=False)
        own = load_file(Path(directory, WEIGHTS))
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in initial.items()}:
            return None
        save_file(shifted(initial), Path(directory, WEIGHTS))
        found = our_reading(case, directory, case.captures[-1])
        return reference_side(found, case).outputs


def ours_for_reference(case: Case) -> LoraModel | None:
    """Our adapter, for its names only."""
    try:
        return ours(case, case.captures[-1])
    except (NotImplementedError, CaptureError, ConfigError, NoTargetError):
        return None
