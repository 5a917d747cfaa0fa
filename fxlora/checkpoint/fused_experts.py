"""Experts that files hold one by one and models hold as one parameter.

Transformers stacks the experts' matrices when it loads them, and puts those of gate and up one below the other:
`experts.0.gate_proj.weight`, `experts.0.up_proj.weight`, … become `experts.gate_up_proj`, `(E, 2 · inner, hidden)`. An
adapter trained on the parameter has updates `B A` of each expert; the rows of B that belong to one matrix of the files,
with A, are the update of that matrix. No arithmetic is needed, and nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fxlora._passes import EXPERTS, KINDS, Update
from fxlora.checkpoint.safetensors_io import Entry

_STACKS = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("gate_up_proj", ("fc1", "fc3")),
    ("down_proj", ("down_proj",)),
    ("down_proj", ("w2",)),
    ("down_proj", ("fc2",)),
    ("up_proj", ("up_proj",)),
)
"""The parameter, and the layers of one expert that it is made of, from the first rows on."""

_EXPERT = re.compile(r"(.*\.)?experts\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a matrix of the files is in a parameter.

    Attributes:
        name: of the matrix.
        expert: index of the expert.
        rows: (first, one after the last) of its rows in the expert's matrix.
    """

    name: str
    expert: int
    rows: tuple[int, int]

    def of(self, value: Tensor) -> Tensor:
        """The matrix, from the parameter's value."""
        return value[self.expert, slice(*self.rows)]

    def update(self, update: Update) -> Update:
        """What an update of the parameter adds to the matrix."""
        spec = update.spec
        experts, (a, b) = spec.option(EXPERTS), KINDS[spec.kind].factor_names
        A = update.parts[a].reshape(experts, spec.r, spec.in_features)[self.expert]
        B = update.parts[b].reshape(spec.out_features, spec.r, experts)[slice(*self.rows), :, self.expert]
        of_matrix = replace(spec, site=self.name, out_features=self.rows[1] - self.rows[0], options=())
        return replace(update, spec=of_matrix, parts={a: A, b: B})


@dataclass(frozen=True, slots=True)
class Fused:
    """A parameter that is in no file.

    Attributes:
        entry: as the model has it: `(E, rows, columns)`, in the dtype of the files.
        pieces: what it is made of, all of it.
    """

    entry: Entry
    pieces: tuple[Piece, ...]


def fused_experts(entries: Mapping[str, Entry]) -> dict[str, Fused]:
    """The parameters that a model makes of experts in files, by the names that they have beside them.

    Args:
        entries: the tensors of a checkpoint.
    """
    modules: dict[str, dict[str, dict[int, Entry]]] = {}
    for name, entry in entries.items():
        match = _EXPERT.fullmatch(name)
        if match:
            module = f"{match[1] or ''}experts"
            modules.setdefault(module, {}).setdefault(match[3], {})[int(match[2])] = entry
    found: dict[str, Fused] = {}
    for module, layers in modules.items():
        for parameter, stacked in _STACKS:
            name = f"{module}.{parameter}"
            if name not in entries and all(each in layers for each in stacked) and _belongs(stacked, layers):
                fused = _stack(module, [(each, layers[each]) for each in stacked])
                if fused is not None:
                    found.setdefault(name, fused)
    return found


def _belongs(stacked: tuple[str, ...], layers: Mapping[str, object]) -> bool:
    if stacked == ("up_proj",):
        return "gate_proj" not in layers
    return stacked != ("fc2",) or "fc3" in layers


def _stack(module: str, layers: list[tuple[str, dict[int, Entry]]]) -> Fused | None:
    """The parameter, unless an expert is missing or the matrices differ."""
    first = layers[0][1].get(0)
    if first is None or len(first.shape) != 2:
        return None
    experts, pieces, start = len(layers[0][1]), list[Piece](), 0
    for layer, matrices in layers:
        like = matrices.get(0)
        if like is None or sorted(matrices) != list(range(experts)) or any(each != like for each in matrices.values()):
            return None
        if (like.dtype, like.shape[1:]) != (first.dtype, first.shape[1:]):
            return None
        rows = start, start + like.shape[0]
        pieces += [Piece(f"{module}.{index}.{layer}.weight", index, rows) for index in range(experts)]
        start = rows[1]
    return Fused(Entry(first.dtype, (experts, start, first.shape[1])), tuple(pieces))
