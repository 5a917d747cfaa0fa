"""The one door to the compiler package: fails clearly when another package called `passes` shadows ours."""

from __future__ import annotations

import passes

if not getattr(passes, "FXLORA_PASSES", False):
    raise ImportError(
        f"fxlora needs its own package 'passes', but another one was imported from {passes.__file__}. "
        "Remove or rename that one, or put fxlora's directory before it on sys.path."
    )

from passes.autocast import no_autocast
from passes.base import SELF_CALL, Instance, Pass, Pipeline, Region, Stage, copy_graph, resolve, target_name
from passes.branches import (
    KINDS,
    VARIANTS,
    BranchForm,
    Mode,
    Update,
    arrange,
    bias_fold,
    can_stack,
    containers,
    deltas,
    has_factors,
    is_inserted,
    part_shapes,
    plain_delta,
    shape_in_storage,
    shared_parts,
    site_kind,
    slot_values,
    stacked_parts,
    variant_leaves,
    variant_parts,
    weight_fold,
)
from passes.branches.base import CROSS_GROUPS, Branch, BranchDtype, BranchSpec, as_rows
from passes.branches.conv import conv_layer
from passes.branches.parameter import EXPERTS, multiplied, parameter_layer, shaped_layer
from passes.branches.tokens import TOKEN_IDS as TOKEN_IDS_OPTION
from passes.branches.tokens import TOKENS_AT, token_ids
from passes.branches.updates import Read
from passes.callsite import CallSite, Form, Layer, branch_owner
from passes.drop import DropBranches
from passes.errors import (
    FxloraError,
    MergeError,
    NoTargetError,
    PassError,
    PatternError,
    VerifyError,
    did_you_mean,
)
from passes.exact import round_once
from passes.fold import Fold, Loss, LowRank, NewRows, Shape3
from passes.freeze import FreezeBase
from passes.insert import InsertBranches
from passes.layouts import NoteLayouts
from passes.leaves import (
    BIAS_B,
    DROPOUT,
    EMBEDDING_A,
    EMBEDDING_B,
    FACTOR_A,
    FACTOR_B,
    FORM_CONTAINERS,
    MAGNITUDE,
    PARAMETERS,
    ROW_DROPOUT,
    SAVED,
    SCALING,
    SLOTS,
    SWITCH,
    TOKENS,
    WEIGHT_NORM,
    Factor,
    Scaling,
    WeightNorm,
    part_path,
)
from passes.merge import FOLDABLE, MergeBranches, changes, factors, foldable
from passes.nodes import LoraMeta, lora_meta
from passes.operands import owning_path
from passes.patterns import fault
from passes.printer import print_graph
from passes.redirect import (
    RedirectSaved,
    SavedModule,
    VerifySaved,
    copy_path,
    spread_template,
    tensors_of,
)
from passes.rows import FIRST, LAYOUT, Choice, Layout, RowDropout, RowsError, Selection, Switch, row_index
from passes.select import (
    Decision,
    Rules,
    check_targets,
    lookup,
    minimal_targets,
    select,
    select_parameters,
    summarise,
    unused,
)
from passes.sharing import Sharing, Tied, check_not_shared, shared_weights, uses_beside_sites
from passes.sites import base_weight, find_sites, is_leaf, layer_of, parameter_at, weight_path, weight_sites
from passes.verify import Verify

__all__ = [
    "BIAS_B",
    "CROSS_GROUPS",
    "DROPOUT",
    "EMBEDDING_A",
    "EMBEDDING_B",
    "EXPERTS",
    "FACTOR_A",
    "FACTOR_B",
    "FIRST",
    "FOLDABLE",
    "FORM_CONTAINERS",
    "KINDS",
    "LAYOUT",
    "MAGNITUDE",
    "PARAMETERS",
    "ROW_DROPOUT",
    "SAVED",
    "SCALING",
    "SELF_CALL",
    "SLOTS",
    "SWITCH",
    "TOKENS",
    "TOKENS_AT",
    "TOKEN_IDS_OPTION",
    "VARIANTS",
    "WEIGHT_NORM",
    "Branch",
    "BranchDtype",
    "BranchForm",
    "BranchSpec",
    "CallSite",
    "Choice",
    "Decision",
    "DropBranches",
    "Factor",
    "Fold",
    "Form",
    "FreezeBase",
    "FxloraError",
    "InsertBranches",
    "Instance",
    "Layer",
    "Layout",
    "LoraMeta",
    "Loss",
    "LowRank",
    "MergeBranches",
    "MergeError",
    "Mode",
    "NewRows",
    "NoTargetError",
    "NoteLayouts",
    "Pass",
    "PassError",
    "PatternError",
    "Pipeline",
    "Read",
    "RedirectSaved",
    "Region",
    "RowDropout",
    "RowsError",
    "Rules",
    "SavedModule",
    "Scaling",
    "Selection",
    "Shape3",
    "Sharing",
    "Stage",
    "Switch",
    "Tied",
    "Update",
    "Verify",
    "VerifyError",
    "VerifySaved",
    "WeightNorm",
    "arrange",
    "as_rows",
    "base_weight",
    "bias_fold",
    "branch_owner",
    "can_stack",
    "changes",
    "check_not_shared",
    "check_targets",
    "containers",
    "conv_layer",
    "copy_graph",
    "copy_path",
    "deltas",
    "did_you_mean",
    "factors",
    "fault",
    "find_sites",
    "foldable",
    "has_factors",
    "is_inserted",
    "is_leaf",
    "layer_of",
    "lookup",
    "lora_meta",
    "minimal_targets",
    "multiplied",
    "no_autocast",
    "owning_path",
    "parameter_at",
    "parameter_layer",
    "part_path",
    "part_shapes",
    "plain_delta",
    "print_graph",
    "resolve",
    "round_once",
    "row_index",
    "select",
    "select_parameters",
    "shape_in_storage",
    "shaped_layer",
    "shared_parts",
    "shared_weights",
    "site_kind",
    "slot_values",
    "spread_template",
    "stacked_parts",
    "summarise",
    "target_name",
    "tensors_of",
    "token_ids",
    "unused",
    "uses_beside_sites",
    "variant_leaves",
    "variant_parts",
    "weight_fold",
    "weight_path",
    "weight_sites",
]
