"""Layer kinds and variants: the parts of a branch, their initial values, the branch in a graph, and the fold.

A kind is pure tensor and node functions; a variant wraps them. `registry` lists both, `single` builds one adapter's
branch, `forms` several at once.
"""

from __future__ import annotations

from passes.branches.base import Branch, BranchDtype, BranchSpec, Kind, Part, Variant, as_rows
from passes.branches.forms import BranchForm, Mode, arrange, can_stack, slot_values, stacked_parts
from passes.branches.registry import (
    KINDS,
    SITE_KINDS,
    VARIANTS,
    containers,
    deltas,
    has_factors,
    is_inserted,
    part_shapes,
    plain_delta,
    shared_parts,
    site_kind,
    variant_leaves,
    variant_parts,
)
from passes.branches.single import build_branch
from passes.branches.tokens import ROWS, Rows
from passes.branches.updates import Update, bias_fold, shape_in_storage, weight_fold

__all__ = [
    "KINDS",
    "ROWS",
    "SITE_KINDS",
    "VARIANTS",
    "Branch",
    "BranchDtype",
    "BranchForm",
    "BranchSpec",
    "Kind",
    "Mode",
    "Part",
    "Rows",
    "Update",
    "Variant",
    "arrange",
    "as_rows",
    "bias_fold",
    "build_branch",
    "can_stack",
    "containers",
    "deltas",
    "has_factors",
    "is_inserted",
    "part_shapes",
    "plain_delta",
    "shape_in_storage",
    "shared_parts",
    "site_kind",
    "slot_values",
    "stacked_parts",
    "variant_leaves",
    "variant_parts",
    "weight_fold",
]
