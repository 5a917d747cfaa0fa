"""Grouped convolutions in adapter files: our compact factors in peft's form, and back.

With g groups our A is `(r, in / g, *kernel)` and B `(out, r, 1, …)`: every group's update is its rows of `B A`. peft's A
is a convolution over all inputs, `(R, in, *kernel)`, and B a grouped one, `(out, R / g, 1, …)`. With `R = r g`, and A
repeated along the diagonal of blocks `(r, in / g)`, peft computes exactly our branch, and B is the same tensor. A file
whose A has any other structure mixes the groups; it is run as it is (the option `cross_groups`).

Rank and alpha of such a layer are other numbers in files than here: `in_files` and `in_memory` translate. peft's A is
g² times as large as ours: with more than `MOST_GROUPS` groups (depthwise layers) files keep the compact form, which only
this library reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxlora._passes import CROSS_GROUPS, FACTOR_A, KINDS, BranchSpec, lookup
from fxlora.config import LoraConfig
from fxlora.errors import CheckpointError
from fxlora.plan import configured_scaling

MOST_GROUPS = 16
"""Up to how many groups files have peft's form."""


def is_compact(spec: BranchSpec) -> bool:
    """Whether a branch is that of a grouped convolution, in our form."""
    return groups_of(spec) > 1 and not spec.option(CROSS_GROUPS)


def is_expanded(spec: BranchSpec) -> bool:
    """Whether files have a branch of our compact form in peft's."""
    return is_compact(spec) and groups_of(spec) <= MOST_GROUPS


def groups_of(spec: BranchSpec) -> int:
    """Number of groups of a convolution, 1 for any other layer."""
    return spec.option("groups", 1) if spec.kind == "conv" else 1


def shape_in_file(spec: BranchSpec, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a part has in files."""
    if part != FACTOR_A or not is_expanded(spec):
        return shape
    return shape[0] * groups_of(spec), shape[1] * groups_of(spec), *shape[2:]


def to_file(spec: BranchSpec, part: str, tensor: Tensor) -> Tensor:
    """A part as files have it: the A of a grouped convolution repeated along the diagonal of its groups."""
    if part != FACTOR_A or not is_expanded(spec):
        return tensor
    (r, inputs), groups = tensor.shape[:2], groups_of(spec)
    dense = tensor.new_zeros(r * groups, inputs * groups, *tensor.shape[2:])
    for group in range(groups):
        dense[group * r : (group + 1) * r, group * inputs : (group + 1) * inputs] = tensor
    return dense


def from_file(spec: BranchSpec, part: str, tensor: Tensor) -> Tensor:
    """The inverse of `to_file`."""
    if part != FACTOR_A or not is_expanded(spec):
        return tensor
    groups = groups_of(spec)
    return tensor[: tensor.shape[0] // groups, : tensor.shape[1] // groups].clone()


def fitted(spec: BranchSpec, A: Tensor, where: str) -> BranchSpec:
    """A grouped convolution's branch as its A in a file asks for: compact where that is exact, else across groups.

    Args:
        spec: with the rank that the file's configuration says.
        A: as the file has it.
        where: the file and A's key, for messages.

    Raises:
        CheckpointError: for a rank that the groups do not divide, and for DoRA across groups.
    """
    groups = groups_of(spec)
    if tuple(A.shape) == KINDS[spec.kind].factor_shapes(spec)[0]:
        return spec
    if spec.r % groups:
        raise CheckpointError(
            f"{where}: '{spec.site}' has {groups} groups, and rank {spec.r} is no multiple of that; correct the rank in "
            "adapter_config.json"
        )
    small = replace(spec, r=spec.r // groups)
    compact = from_file(small, FACTOR_A, A)
    if is_expanded(small) and torch.equal(to_file(small, FACTOR_A, compact), A):
        return small
    if spec.variant:
        raise CheckpointError(
            f"{where} mixes the groups of '{spec.site}', and a variant ({spec.variant}) rescales the layer's own weight, "
            "which cannot hold that. peft computes its norms from another matrix than the update; train the layer again "
            "with fxlora, or without the variant"
        )
    return replace(spec, options=tuple(sorted((*spec.options, (CROSS_GROUPS, True)))))


def in_files(config: LoraConfig, specs: Iterable[BranchSpec]) -> LoraConfig:
    """The configuration with the ranks and alphas that peft must have for grouped convolutions."""
    for spec in specs:
        if is_expanded(spec):
            r, scaling = spec.r * groups_of(spec), configured_scaling(config, spec.site, spec.r)
            config = _with_rank(config, spec.site, r, scaling, _Exactly(config, r, scaling))
    return config


def in_memory(config: LoraConfig, specs: Iterable[BranchSpec]) -> LoraConfig:
    """The inverse of `in_files`, for branches that `fitted` gave."""
    for spec in specs:
        if is_expanded(spec):
            scaling = configured_scaling(config, spec.site, spec.r * groups_of(spec))
            config = _with_rank(config, spec.site, spec.r, scaling, _WrittenAs(config, spec, scaling))
    return config


def _with_rank(config: LoraConfig, site: str, r: int, scaling: float, fits: Callable[[float], bool]) -> LoraConfig:
    """A configuration that gives one layer this rank, and an alpha that fits, with no more patterns than it takes."""
    key = f"^{re.escape(site)}"
    ranks = {name: value for name, value in config.rank_pattern.items() if name != key}
    if lookup(ranks, site, config.r) != r:
        ranks = {key: r, **ranks}  # the first that matches wins
    alphas = {name: value for name, value in config.alpha_pattern.items() if name != key}
    if not fits(lookup(alphas, site, config.lora_alpha)):
        alphas = {key: _alpha(config, r, scaling, fits), **alphas}
    return config.replace(rank_pattern=ranks, alpha_pattern=alphas)


def _alpha(config: LoraConfig, r: int, scaling: float, fits: Callable[[float], bool]) -> float:
    """An alpha for this scaling: of those that fit the roundest, else the nearest."""
    near = scaling * (math.sqrt(r) if config.use_rslora else r)
    beside = (math.nextafter(near, -math.inf), math.nextafter(near, math.inf))
    return next((alpha for alpha in (round(near), float(f"{near:.12g}"), near, *beside) if alpha and fits(alpha)), near)


@dataclass(frozen=True, slots=True)
class _Exactly:
    """Whether an alpha makes a scaling to the last bit. Not every scaling has one: quotients are rounded."""

    config: LoraConfig
    r: int
    scaling: float

    def __call__(self, alpha: float) -> bool:
        return self.config.scaling(self.r, alpha) == self.scaling


@dataclass(frozen=True, slots=True)
class _WrittenAs:
    """Whether an alpha here is written as one that makes a file's scaling."""

    config: LoraConfig
    spec: BranchSpec
    in_file: float

    def __call__(self, alpha: float) -> bool:
        r, scaling = self.spec.r * groups_of(self.spec), self.config.scaling(self.spec.r, alpha)
        written = _alpha(self.config, r, scaling, _Exactly(self.config, r, scaling))
        return self.config.scaling(r, written) == self.in_file
