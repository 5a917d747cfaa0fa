"""The registries of layer kinds and variants, and what follows from them without a graph: parts, leaves, updates.

Adding a kind or a variant is a file beside this one and a line below.
"""

from __future__ import annotations

from torch import Tensor, nn

from passes.branches.base import Branch, BranchSpec, Kind, Variant
from passes.branches.conv import Conv
from passes.branches.dora import Dora
from passes.branches.embedding import Embedding
from passes.branches.linear import Linear
from passes.branches.parameter import Parameter
from passes.branches.tied import Tied
from passes.branches.tokens import ROWS, current_rows, row_change, row_shape, token_ids
from passes.leaves import BIAS_B, CONTAINERS, PARAMETERS, SAVED, TOKEN_IDS, TOKENS, TokenIds

KINDS: dict[str, Kind] = {
    "linear": Linear(),
    "embedding": Embedding(),
    "conv": Conv(),
    "parameter": Parameter(),
    "tied": Tied(),
}

SITE_KINDS = {"tied": "linear"}
"""Kinds whose branches are at call sites of another kind, and of which one."""

VARIANTS: dict[str, Variant] = {"dora": Dora()}


def site_kind(branch: BranchSpec | Branch) -> str:
    """The kind of the call sites that a branch is for."""
    return SITE_KINDS.get(branch.kind, branch.kind)


def has_factors(branch: BranchSpec | Branch) -> bool:
    """Whether a branch has its kind's two factors, and so a scaling; a branch of `ROWS` has neither."""
    return branch.variant not in ROWS


def shared_parts(spec: BranchSpec) -> tuple[str, ...]:
    """The parts that a branch has from the site that it is tied to."""
    if not spec.tied_to:
        return ()
    return KINDS[spec.kind].factor_names if has_factors(spec) else (TOKENS,)


def containers() -> frozenset[str]:
    """Names under which a site's adapters keep their parts and leaves, those of all registered kinds among them."""
    return frozenset((*CONTAINERS, *(name for kind in KINDS.values() for name in kind.factor_names)))


def is_inserted(name: str) -> bool:
    """Whether a qualified name is of something that adapters added to a model."""
    return not {*containers(), PARAMETERS, SAVED}.isdisjoint(name.split("."))


def part_shapes(spec: BranchSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of all parts of a branch, by part name, in the order in which files list them."""
    kind = KINDS[spec.kind]
    if not has_factors(spec):
        return {TOKENS: row_shape(spec)}
    shapes = dict(zip(kind.factor_names, kind.factor_shapes(spec), strict=True))
    if spec.bias:
        shapes[BIAS_B] = (spec.out_features,)
    if spec.variant:
        shapes.update(VARIANTS[spec.variant].part_shapes(kind, spec))
    return shapes


def variant_parts(spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Initial values of the parts that a variant adds to a kind's, or of rows; none for plain LoRA."""
    if not has_factors(spec):
        return {TOKENS: current_rows(spec, weight)}
    return VARIANTS[spec.variant].init(KINDS[spec.kind], spec, weight, parts) if spec.variant else {}


def variant_leaves(spec: BranchSpec, weight: Tensor) -> dict[str, nn.Module]:
    """The leaf modules that a variant's graph calls, by container name; none for plain LoRA."""
    if not has_factors(spec):
        return {TOKEN_IDS: TokenIds(token_ids(spec.options), weight.device)}
    return VARIANTS[spec.variant].leaves(KINDS[spec.kind], spec, weight) if spec.variant else {}


def deltas(spec: BranchSpec, weight: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a branch adds to its layer's tensors when it is folded, scaling included.

    Args:
        spec: the branch.
        weight: the original base weight.
        parts: the branch's tensors.

    Returns:
        float64 tensors: `weight` in the base weight's layout, and `bias` for a branch with a bias.
    """
    kind = KINDS[spec.kind]
    wide = {name: part.detach().double() for name, part in parts.items()}
    if not has_factors(spec):
        return {"weight": row_change(spec, weight, wide[TOKENS])}
    if spec.variant:
        return {"weight": VARIANTS[spec.variant].delta(kind, spec, weight, wide)}
    result = {"weight": plain_delta(kind, spec, wide)}
    if spec.bias:
        result["bias"] = wide[BIAS_B] * spec.scaling
    return result


def plain_delta(kind: Kind, spec: BranchSpec, parts: dict[str, Tensor]) -> Tensor:
    """`scaling · B A` in the base weight's layout, in the dtype of the parts."""
    A, B = (parts[name] for name in kind.factor_names)
    function, extra = kind.update(spec.layer)
    return function(A, B, *extra) * spec.scaling
