"""`merge-branches`: fold `scaling · B A` into the base weights, each entry rounded once, all weights or none.

The arithmetic is `passes.fold`'s, what each branch adds that of `passes.branches`; this pass applies it to a live model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from passes.base import PassResult, Region
from passes.branches import BranchSpec, Update, bias_fold, part_shapes, shape_in_storage, weight_fold
from passes.errors import MergeError, PassError
from passes.fold import Fold, Loss, Shape3
from passes.leaves import part_path
from passes.sharing import Tied, check_sharing, foldable
from passes.sites import base_weight, parameter_at

FOLDABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose values are the weights themselves, without scales beside them."""


@dataclass(frozen=True)
class MergeBranches:
    """Fold adapters into the weights of a model: the region's one instance is the model.

    Attributes:
        specs: the branches to fold; all of one site are summed before rounding, so that their order does not matter.
        originals: if given, receives what is replaced, by parameter path.
        on_folded: if given, called with the name of each site once it is folded.
        tied: whether weights may be changed that other layers have too; `"untie"` is the caller's work.
        losses: if given, receives what rounding takes of a sample of each update, by parameter path.
    """

    name: ClassVar[str] = "merge-branches"
    specs: tuple[BranchSpec, ...]
    originals: dict[str, Tensor] | None = field(default=None, compare=False)
    on_folded: Callable[[str], None] | None = field(default=None, compare=False)
    tied: Tied = "refuse"
    losses: dict[str, Loss] | None = field(default=None, compare=False)

    def run(self, region: Region) -> PassResult:
        """Fold one weight after another; if one cannot be, those before it get their bits back.

        Raises:
            MergeError: when a weight is shared with something else, is on the meta device, is quantized, or would
                become NaN or infinite. No weight is changed then.
        """
        model = region.module
        check_sharing(region, self.specs, self.tied)
        replaced: dict[str, Tensor] = {}
        try:
            for site, specs in foldable(self.specs).items():
                for change in changes(model, site, specs):
                    value = change.fold(self._loss(change))
                    replaced[change.path] = change.parameter.detach().clone()
                    with torch.no_grad():
                        change.parameter.copy_(value)
                if self.on_folded is not None:
                    self.on_folded(site)
        except BaseException:
            _put_back(model, replaced)
            raise
        if self.originals is not None:
            self.originals.update(replaced)
        return PassResult(bool(replaced), f"{len(replaced)} weights")

    def _loss(self, change: Change) -> Loss | None:
        if self.losses is None:
            return None
        return self.losses.setdefault(change.path, Loss.sample(change.before.numel()))


def _put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for path, value in values.items():
        parameter = parameter_at(model, path)
        assert parameter is not None
        with torch.no_grad():
            parameter.copy_(value)


@dataclass(frozen=True, slots=True)
class Change:
    """What a fold does to one tensor of a model.

    Attributes:
        site: the layer's name.
        adapters: names of the adapters, for messages.
        path: of the parameter.
        parameter: the parameter itself.
        before: the value that is folded into.
        update: what is added, prepared.
    """

    site: str
    adapters: str
    path: str
    parameter: nn.Parameter
    before: Tensor
    update: Fold

    def fold(self, loss: Loss | None = None) -> Tensor:
        """The merged value, in the parameter's shape; `loss` counts what rounding took.

        Raises:
            MergeError: when a finite entry would become NaN or infinite; says where.
        """
        try:
            return self.update(self.before.reshape(self.update.shape), loss).reshape(self.before.shape)
        except MergeError as error:
            raise _broken(self.path, self.adapters, error) from error


def _broken(path: str, adapters: str, error: MergeError) -> MergeError:
    return MergeError(
        f"'{path.removesuffix('.weight')}': {error}. Adapter {adapters} is broken or its scaling too large; nothing was "
        "changed"
    )


def changes(
    model: nn.Module,
    site: str,
    specs: Sequence[BranchSpec],
    originals: Mapping[str, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Iterator[Change]:
    """What the branches of one site change when they are folded: the weight, and the bias if a branch has one.

    Args:
        model: whose parameters are read, not changed.
        site: name of the layer or bare parameter.
        specs: its branches.
        originals: values to fold into in place of the parameters' own, by path.
        out_dtype: of the merged values; each parameter's own if None.

    Raises:
        MergeError: when a tensor is on the meta device, quantized or missing, or cannot hold the update.
    """
    path, weight = base_weight(model, site)
    _check_real(site, weight)
    values = originals or {}
    adapters = ", ".join(sorted(spec.adapter for spec in specs))
    for spec in specs:
        if spec.calls:
            raise MergeError(
                f"'{site}': adapter '{spec.adapter}' is at some calls of this layer only, which one weight cannot hold; "
                "run it unmerged"
            )
    updates = [Update(spec, factors(model, spec)) for spec in specs]
    before = values.get(path, weight.detach())
    try:
        fold = weight_fold(
            updates,
            tuple(before.shape),
            before.dtype,
            _rows_of(before, shape_in_storage(specs[0], tuple(before.shape))),
            out_dtype=out_dtype,
            device=before.device,
        )
    except MergeError as error:
        raise _broken(path, adapters, error) from error
    except PassError as error:
        raise MergeError(f"'{site}': {error}; nothing was changed") from error
    yield Change(site, adapters, path, weight, before, fold)
    with_bias = [each for each in updates if each.spec.bias]
    if with_bias:
        yield _bias_change(model, site, adapters, with_bias, values, out_dtype)


def _bias_change(
    model: nn.Module,
    site: str,
    adapters: str,
    updates: Sequence[Update],
    values: Mapping[str, Tensor],
    out_dtype: torch.dtype | None,
) -> Change:
    path = f"{site}.bias".lstrip(".")
    bias = parameter_at(model, path)
    if bias is None:
        raise MergeError(
            f"'{site}': the adapter has a bias (lora_bias) and the layer has none that could take it; give the layer a "
            "zero bias before the transform, or run the adapter unmerged"
        )
    before = values.get(path, bias.detach())
    fold = bias_fold(updates, before.numel(), before.dtype, out_dtype=out_dtype, device=before.device)
    return Change(site, adapters, path, bias, before, fold)


def _rows_of(weight: Tensor, shape: Shape3) -> Callable[[int, int, int], Tensor]:
    stored = weight.reshape(shape)
    return lambda group, start, stop: stored[group, start:stop]


def _check_real(site: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise MergeError(f"'{site}': the weight is on the meta device; load real weights, then merge")
    if weight.dtype not in FOLDABLE:
        raise MergeError(f"'{site}': the weight is {weight.dtype}; dequantize the layer, then merge")


def factors(model: nn.Module, spec: BranchSpec) -> dict[str, Tensor]:
    """The parts of one branch as they are registered in a model, detached."""
    owner = model.get_submodule(spec.owner)
    return {part: owner.get_parameter(part_path(part, spec.adapter)).detach() for part in part_shapes(spec)}
