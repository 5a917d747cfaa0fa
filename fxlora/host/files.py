"""What adapter files hold beside factors: whole modules and biases, under peft's keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from fxlora._passes import SAVED, BranchSpec, resolve
from fxlora.host.biases import VALUE

if TYPE_CHECKING:
    from fxlora.plan import Plan

BASE_LAYER = "base_layer"
"""What peft's wrappers call what they wrap."""

ORIGINAL = "original_module"
"""What peft's wrapper of a module that is saved whole calls the base's."""


@dataclass(frozen=True, slots=True)
class Extra:
    """One tensor of an adapter that is no factor.

    Attributes:
        key: in files, without the prefix.
        path: of the tensor in the transformed model.
        like: path of the base's tensor that gives shape and dtype.
        owner: the module or bias that it belongs to, and `name` the part of that: its place among an adapter's tensors.
    """

    key: str
    path: str
    like: str
    owner: str
    name: str


def extras(plan: Plan) -> list[Extra]:
    """All tensors of an adapter that are no factors."""
    wrappers = _wrappers(plan.branches)
    modules = [
        Extra(f"{saved.module}.{name}", f"{saved.path}.{name}", f"{saved.module}.{name}", saved.module, name)
        for saved in plan.saved
        for name in saved.tensors
    ]
    return [*modules, *(Extra(_wrapped(name, wrappers), name, name, name, VALUE) for name in plan.biases)]


def copies_in_files(plan: Plan) -> set[str]:
    """Keys that peft writes beside those of a module that is saved whole, and that are not read.

    With bias="all" they are of its biases, with save_embedding_layers of embeddings. `modules_to_save` has the trained
    tensors a second time, `original_module` the base's, which the copy takes the place of.
    """
    tensors = [(saved.module, name) for saved in plan.saved for name in saved.tensors]
    return {f"{module}.{container}.{name}" for module, name in tensors for container in (ORIGINAL, SAVED)}


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its path."""
    return cast(Tensor, resolve(model, path))


def _wrappers(branches: Iterable[BranchSpec]) -> dict[str, int]:
    """By module, how many of peft's wrappers are around it: one for a layer, one for each of its bare parameters."""
    found: dict[str, int] = {}
    for spec in branches:
        module = spec.site.rpartition(".")[0] if spec.is_parameter else spec.site
        found[module] = found.get(module, 0) + 1
    return found


def _wrapped(path: str, wrappers: dict[str, int]) -> str:
    """The path of a parameter with `base_layer` for each wrapper around a module that it is in."""
    parts = path.split(".")
    result: list[str] = []
    for index, part in enumerate(parts):
        result += [part, *[BASE_LAYER] * wrappers.get(".".join(parts[: index + 1]), 0)]
    return ".".join(result)
