"""Batches whose rows have adapters of their own, for every kind of layer, variant and field, beside peft or float64.

A case of cases.py gets two adapters in files, "one" and "two". Outputs of a mixed batch in evaluation and gradients in
training are compared with peft's where it computes them, else with a float64 model in which each row has `W + s·BA` of
its adapter, else (where no weight holds the adapter) with rows of peft's one adapter at a time. Dropout is off, since it
draws other masks for other batches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlora import FxloraError, LoraModel
from tests.models.checks import error, tensors
from tests.oracle.adapters import FAILURES
from tests.oracle.cases import FIELDS, KINDS, VARIANTS, Case, Layer
from tests.oracle.cases import tensors as tensors_of
from tests.oracle.parity import DIFFERS, largest_error, line, quietly
from tests.oracle.sides import BASE, Ours, Setup, Side, gradients, picked

_NAMES = (
    "nn.Linear", "nn.Linear without bias", "transformers Conv1D", "nn.Embedding", "Gemma3 scaled embedding", "nn.Conv1d",
    "nn.Conv2d", "nn.Conv3d", "nn.Conv2d, groups", "nn.Conv1d, depthwise", "nn.Conv2d, padding_mode",
    "nn.ConvTranspose1d", "nn.Bilinear", "nn.MultiheadAttention, self", "nn.MultiheadAttention, cross",
    "nn.TransformerEncoderLayer", "parameter, F.linear", "parameter, x @ W",
    "parameter, einsum", "experts (E, out, in)", "experts (E, in, out), two parameters", "Mixtral's experts",
    "nn.LSTMCell", "nn.LSTM", "functional weight", "module under two names",
    "DoRA, nn.Linear", "DoRA, transformers Conv1D", "DoRA, nn.Embedding", "DoRA, nn.Conv1d", "DoRA, nn.Conv2d",
    "DoRA, nn.Conv3d", "DoRA, nn.Conv2d, groups", "DoRA with rsLoRA and patterns", "lora_bias, nn.Linear",
    "lora_bias, nn.Conv2d", "use_rslora", "rank_pattern", "modules_to_save", "trainable_token_indices",
    "trainable_token_indices, tied", "ensure_weight_tying, target_modules", "ensure_weight_tying, modules_to_save",
    "layer_replication",
)  # fmt: skip

_BY_NAME = {case.name: case for case in (*KINDS, *VARIANTS, *FIELDS)}


class TimeFirst(Layer):
    """A layer that has sequences in the first dimension, in a model that has the batch there."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        output = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return output[0].transpose(0, 1)


_TIME_FIRST = [
    replace(_BY_NAME[name], name=f"{name} in a model", make=make, inputs=tensors_of(x=(3, 5, 8)))
    for name, make in {
        "nn.MultiheadAttention, batch second": lambda: TimeFirst(nn.MultiheadAttention(8, 2)),
        "nn.GRU": lambda: TimeFirst(nn.GRU(8, 6)),
    }.items()
]

MIXED: list[Case] = [*(_BY_NAME[name] for name in _NAMES), *_TIME_FIRST]
"""The rows of the second table."""

_GRAPHS = ("symbolic", "export")

REFUSED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("nn.ConvTranspose1d", "nn.Bilinear", "parameter, x @ W", "Mixtral's experts", "nn.LSTMCell", "nn.LSTM",
         "nn.GRU in a model", "nn.MultiheadAttention, cross", "modules_to_save", "ensure_weight_tying, modules_to_save"),
        _GRAPHS,
    ),
    "experts (E, out, in)": ("symbolic",),
    "experts (E, in, out), two parameters": ("symbolic",),
    "nn.MultiheadAttention, batch second in a model": _GRAPHS,
}  # fmt: skip
"""Captures that hold a case, and cannot give its rows adapters of their own: in a graph all rows share an updated weight
or a copy of a module, and the batch must be found in the input of a branch."""


@dataclass
class Rows:
    """A case under a capture.

    Attributes:
        refused: our reason why this capture cannot.
        oracle: `peft`, `float64`, or `peft, one adapter at a time`.
        peft_says: why peft's mixed batch is no oracle, or what it computes instead.
        evaluation: error of the outputs.
        training: error of the gradients of both adapters' tensors, computed in training; None where peft's are no oracle.
        apart: how far the rows are from those of the active adapter; to see that there is something to compare.
    """

    case: str
    group: str
    capture: str
    refused: str = ""
    oracle: str = ""
    peft_says: str = ""
    evaluation: float | None = None
    training: float | None = None
    apart: float = 0.0


@dataclass
class _Expected:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    oracle: str
    peft_says: str = ""
    by_key: bool = False


class Batches:
    """Everything that is made once for all captures.

    Args:
        folder: for the adapters' files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._setups: dict[str, Setup] = {}
        self._expected: dict[str, _Expected] = {}

    def measure(self, case: Case, capture: Any) -> Rows:
        """A mixed batch of a case under a capture."""
        rows = Rows(case.name, case.group, capture)
        try:
            setup = self._setup(case)
            side = setup.ours(capture)
            names, expected = self._names(case), self._right(case)
            plain, outputs = side.outputs(), side.outputs(adapter_names=names)
            found = _our_gradients(side, names, by_key=expected.by_key)
        except (FxloraError, NotImplementedError) as refusal:
            rows.refused = line(refusal)
            return rows
        rows.oracle, rows.peft_says = expected.oracle, expected.peft_says
        rows.evaluation = error(_wide(outputs), _wide(expected.outputs))
        rows.training = None if "gradients" in case.without else largest_error(found, expected.gradients)
        rows.apart = error(_wide(plain), _wide(expected.outputs))
        return rows

    def check(self, case: Case, capture: Any) -> Rows:
        """Measure, and hold every figure against what is promised."""
        rows = self.measure(case, capture)
        able = capture in case.captures and capture not in REFUSED.get(case.name, ())
        assert bool(rows.refused) != able, rows
        if able:
            assert rows.apart > 1e-3, rows
            assert rows.evaluation is not None and rows.evaluation <= case.tolerance, rows
            assert "gradients" in case.without or (rows.training or 0) <= 2 * case.tolerance, rows
        else:
            reason = "capture='modules'|whose rows are not those" if capture in case.captures else "CaptureError"
            assert re.search(reason, rows.refused), rows
        return rows

    def _setup(self, case: Case) -> Setup:
        if case.name not in self._setups:
            ranks = {"one": {}, "two": {} if case.other_factors or "rank_pattern" in case.config else {"r": 2}}
            folder = self._folder / re.sub(r"\W+", "_", case.name)
            self._setups[case.name] = Setup(folder, replace(case, make=lambda: without_dropout(case.make())), ranks)
        return self._setups[case.name]

    def _names(self, case: Case) -> list[str]:
        main = next(iter(case.batch().values()))
        return [("two", "one", BASE)[row % 3] for row in range(main.shape[0])]

    def _right(self, case: Case) -> _Expected:
        if case.name not in self._expected:
            self._expected[case.name] = self._computed(case)
        return self._expected[case.name]

    def _computed(self, case: Case) -> _Expected:
        setup, names = self._setup(case), self._names(case)
        theirs, says = _peft_rows(setup, names)
        if case.by_weight:
            outputs = setup.exact.rows(names)
            off = error(_wide(theirs), _wide(outputs)) if theirs and not says else 0.0
            says = says or (f"outputs differ from W + s·BA by {off:.0e}" if off > DIFFERS else "")
            found = setup.exact.gradients(outputs)
            return _Expected(outputs if says else theirs, found, "float64" if says else "peft", says)
        alone, found = _one_at_a_time(setup, names)
        off = error(_wide(theirs), _wide(alone)) if theirs and not says else 0.0
        says = says or (f"outputs differ from those of one adapter at a time by {off:.0e}" if off > DIFFERS else "")
        oracle = "peft, one adapter at a time" if says else "peft"
        return _Expected(alone if says else theirs, found, oracle, says, by_key=True)


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with all its dropout off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    return model


def _wide(values: Any) -> list[Tensor]:
    return [value.detach().double() for value in values]


def _our_gradients(side: Ours, names: list[str], *, by_key: bool) -> dict[str, Tensor]:
    model: LoraModel = side.model
    model.set_requires_grad(side.setup.names)
    model.train()
    outputs = tensors(model(**side.setup.case.batch(), adapter_names=names))
    found = gradients(model, outputs)
    return _by_key(side, found) if by_key else {name: value for name, value in found.items() if "lora_" in name}


def _by_key(side: Side, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients under the keys of the adapters' files."""
    zeros = {name: torch.zeros_like(value) for name, value in side.model.state_dict().items()}
    return {
        f"{adapter}: {key}": value
        for adapter in side.model.peft_config
        for key, value in side.tensors(adapter, {**zeros, **found}).items()
    }


@quietly
def _peft_rows(setup: Setup, names: list[str]) -> tuple[list[Tensor], str]:
    """What peft computes for a mixed batch, or what it says."""
    try:
        return setup.theirs().outputs(adapter_names=names), ""
    except FAILURES as failure:
        return [], line(failure)


@quietly
def _one_at_a_time(setup: Setup, names: list[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Rows of the outputs of peft's models with one adapter each, and their gradients."""
    alone: dict[str, list[Tensor]] = {}
    total: dict[str, Tensor] = {}
    for name in setup.names:
        side = setup.theirs(name)
        alone[name] = side.outputs()
        with side.model.disable_adapter():
            alone[BASE] = side.outputs()
        mask = torch.tensor([float(each == name) for each in names])
        outputs = tensors(side.model(**setup.case.batch()))
        found = gradients(side.model, [out * mask.view(-1, *[1] * (out.dim() - 1)) for out in outputs])
        total.update(_by_key(side, found))
    return picked(alone, names), total
