"""DoRA (arXiv:2402.09353): direction and magnitude of a weight are learnt apart, `W' = m · (W + s B A) / ‖W + s B A‖`.

The norm is taken over each row of the weight and is a constant for gradients (section 4.3 of the paper). It is computed
in closed form, `‖W‖² + 2 s ⟨W, B A⟩ + s² ‖B A‖²`, from the two small factors: neither `B A` nor `W + s B A` is made, and
`‖W‖²` is computed once. In a graph a branch adds `(m / n - 1) · (y - bias) + (m / n) · s B A x`, which does not depend on
other branches: the order of several adapters is irrelevant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.autocast import no_autocast
from passes.branches.base import BranchSpec, Kind, Stacked, as_rows
from passes.callsite import CallSite
from passes.leaves import BASE_OUTPUT, MAGNITUDE, WEIGHT_NORM, WeightNorm
from passes.nodes import BranchBuilder
from passes.rows import Layout, Selection, channel_values


@dataclass(frozen=True)
class Dora:
    """The DoRA variant."""

    def part_shapes(self, kind: Kind, spec: BranchSpec) -> dict[str, tuple[int, ...]]:
        """One magnitude for each row, shaped to multiply the output as in peft's files."""
        positions = -1 - kind.channel_dim(spec.layer)
        return {MAGNITUDE: (1, spec.out_features, *[1] * positions) if positions else (spec.out_features,)}

    def init(self, kind: Kind, spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The norms of the weight with the branch folded in, so that the fresh adapter changes nothing beyond it."""
        A, B = (parts[name] for name in kind.factor_names)
        norms = self._norms(kind, spec, weight, A.to(weight), B.to(weight))
        return {MAGNITUDE: norms.view(self.part_shapes(kind, spec)[MAGNITUDE])}

    def _norms(self, kind: Kind, spec: BranchSpec, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = as_rows(kind, spec.layer, "weight", weight.detach())
        a, b = as_rows(kind, spec.layer, "A", A), as_rows(kind, spec.layer, "B", B)
        scaling = torch.tensor(spec.scaling, dtype=squared_norms(rows).dtype, device=rows.device)
        return row_norms(rows, a, b, scaling, squared_norms(rows))

    def leaves(self, kind: Kind, spec: BranchSpec, weight: Tensor) -> dict[str, nn.Module]:
        """The squared norms of the weight; with dropout also the base's operation, which training runs on dropped input."""
        leaves: dict[str, nn.Module] = {
            WEIGHT_NORM: WeightNorm(squared_norms(as_rows(kind, spec.layer, "weight", weight)))
        }
        if spec.dropout:
            leaves[BASE_OUTPUT] = BaseOutput(*kind.operation(spec.layer), kind.channel_dim(spec.layer))
        return leaves

    def build(
        self, add: BranchBuilder, kind: Kind, site: CallSite, x: fx.Node, parts: dict[str, fx.Node], s: fx.Node,
        scaling: fx.Node, dropout: bool,
    ) -> fx.Node:  # fmt: skip
        """`(m / n - 1) · (y - bias) + (m / n) · s`; in training with dropout `y - bias` is made from the dropped input."""
        ratio = self.build_ratio(add, kind, site, parts, scaling)
        y = self.build_base(add, kind, site, x, dropout)
        return add.call("dora", rescale, s, y, ratio, kind.channel_dim(site.layer))

    def build_ratio(
        self, add: BranchBuilder, kind: Kind, site: CallSite, parts: dict[str, fx.Node], scaling: fx.Node
    ) -> fx.Node:
        """`m / n`."""

        def rows(part: Any, node: fx.Node, role: str) -> fx.Node:
            view = kind.row_view(site.layer, part)
            return node if view is None else add.method(role, view[0], node, *view[1])

        A, B = (parts[name] for name in kind.factor_names)
        matrices = (rows("weight", add.base(site.weight, "weight"), "weight"), rows("A", A, "A"), rows("B", B, "B"))
        norms = add.call("norm", row_norms, *matrices, scaling, add.weight_norm())
        return add.call("ratio", magnitude_ratio, add.part(MAGNITUDE, "m"), norms)

    def build_base(self, add: BranchBuilder, kind: Kind, site: CallSite, x: fx.Node, dropout: bool) -> fx.Node:
        """The base's output without its bias; in training with dropout made from the dropped input."""
        bias = add.base(site.bias, "bias") if isinstance(site.bias, str) else site.bias
        if dropout:
            return add.base_output(site.node, bias, x, add.base(site.weight, "weight"))
        return add.call("base", without_bias, site.node, bias, kind.channel_dim(site.layer))

    def build_stack(
        self, add: BranchBuilder, kind: Kind, site: CallSite, y: fx.Node, s: fx.Node, ratios: fx.Node, stack: Stacked
    ) -> fx.Node:
        """`(m / n - 1) · (y - bias) + s`, where B has the factor m / n in it already."""
        return add.call("dora", rescale_rows, s, y, ratios, stack.select, stack.layout, kind.channel_dim(site.layer))

    def channel_ratio(self, kind: Kind, spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """`m / n`, `(out,)`."""
        A, B = (parts[name].to(weight) for name in kind.factor_names)
        return magnitude_ratio(parts[MAGNITUDE], self._norms(kind, spec, weight, A, B))

    def row_ratio(self, parts: dict[str, Tensor], norms: Tensor) -> Tensor:
        """`m / n`."""
        return magnitude_ratio(parts[MAGNITUDE].to(norms.device), norms)

    def delta(self, kind: Kind, spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """`(m / n) · (W + s B A) - W`, with the norm of the very weight it is for."""
        A, B = (parts[name] for name in kind.factor_names)
        function, extra = kind.update(spec.layer)
        wide = weight.detach().double()
        moved = wide + function(A, B, *extra).to(wide.device) * spec.scaling
        ratio = self.row_ratio(parts, as_rows(kind, spec.layer, "weight", moved).norm(dim=-1))
        return _scale_rows(kind, spec, moved, ratio) - wide


def _scale_rows(kind: Kind, spec: BranchSpec, weight: Tensor, ratio: Tensor) -> Tensor:
    """Multiply each row of a weight, in the weight's own layout."""
    result = weight.clone(memory_format=torch.contiguous_format)
    as_rows(kind, spec.layer, "weight", result).mul_(ratio[:, None])  # the rows are a view
    return result


def squared_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row, in float32 or wider: `(rows,)`.

    The root of the square is the norm again, bit for bit, so that a fresh magnitude is peft's.
    """
    wide = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.norm(wide, dim=-1).square()


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: Tensor, squared: Tensor) -> Tensor:
    """Norms of the rows of `W + s B A` in closed form, a constant for gradients.

    Args:
        weight: W, `(rows, columns)`.
        A: `(r, columns)`.
        B: `(rows, r)`.
        scaling: s, 0-dim.
        squared: squared norms of W's rows.

    Returns:
        `(rows,)`, in the dtype of `squared`.
    """
    a, b, s = A.detach().to(weight.dtype), B.detach().to(squared.dtype), scaling.detach()
    with no_autocast(weight):
        along = (weight.detach() @ a.t()).to(squared.dtype)
        gram = (a @ a.t()).to(squared.dtype)
        total = squared + 2 * s * (along * b).sum(-1) + s**2 * ((b @ gram) * b).sum(-1)
    return total.clamp(min=0).sqrt()


def magnitude_ratio(magnitude: Tensor, norms: Tensor) -> Tensor:
    """`m / n`, `(rows,)`; a row of zeros, which has no direction, stays zero."""
    return magnitude.flatten() / torch.where(norms == 0, 1, norms)


def without_bias(y: Tensor, bias: Tensor | None, channels: int) -> Tensor:
    """The base's output without its bias."""
    return y if bias is None else y - _along(bias, channels)


def rescale(s: Tensor, y: Tensor, ratio: Tensor, channels: int) -> Tensor:
    """`(ratio - 1) · y + ratio · s`, with one ratio for each channel."""
    dtype = torch.promote_types(y.dtype, s.dtype)
    less_one, ratio = (_along(value.to(dtype), channels) for value in (ratio - 1, ratio))
    return less_one * y + ratio * s


def rescale_rows(s: Tensor, y: Tensor, ratios: Tensor, select: Selection, layout: Layout, channels: int) -> Tensor:
    """`(ratio - 1) · y + s`, with the ratios `(S, out)` of each row's slot."""
    dtype = torch.promote_types(y.dtype, s.dtype)
    return channel_values(ratios - 1, y, select, layout, channels).to(dtype) * y + s


def _along(vector: Tensor, channels: int) -> Tensor:
    """A vector shaped to multiply along a dimension that is counted from the end."""
    return vector.view(-1, *[1] * (-1 - channels))


class BaseOutput(nn.Module):
    """The base's output without its bias: in training its operation on the dropped input, else what the base gave."""

    def __init__(self, function: Callable[..., Tensor], extra: tuple[Any, ...], channels: int) -> None:
        super().__init__()
        self._function, self._extra, self._channels = function, extra, channels

    def forward(self, y: Tensor, bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
        """See the class; `y` and the result are `(…, out)` or `(…, out, *positions)`."""
        if self.training:
            return self._function(x, weight.to(x.dtype), *self._extra)
        return without_bias(y, bias, self._channels)
