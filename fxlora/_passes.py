"""The one door to the compiler package: fails clearly when another package called `passes` shadows ours."""

from __future__ import annotations

import passes

if not getattr(passes, "FXLORA_PASSES", False):
    raise ImportError(
        f"fxlora needs its own package 'passes', but another one was imported from {passes.__file__}. "
        "Remove or rename that one, or put fxlora's directory before it on sys.path."
    )

from passes.base import SELF_CALL, Instance, Pass, Pipeline, Region, Stage, copy_graph, resolve, target_name
from passes.branches import KINDS, VARIANTS, containers, deltas, part_shapes, variant_leaves, variant_parts
from passes.branches.base import Branch, BranchDtype, BranchSpec
from passes.branches.parameter import parameter_layer
from passes.callsite import CallSite, Form, Layer, branch_owner
from passes.drop import DropBranches
from passes.errors import (
    FxloraError,
    MergeError,
    NoTargetError,
    PassError,
    VerifyError,
    did_you_mean,
)
from passes.freeze import FreezeBase
from passes.insert import InsertBranches
from passes.leaves import (
    BIAS_B,
    DROPOUT,
    FACTOR_A,
    FACTOR_B,
    MAGNITUDE,
    PARAMETERS,
    SCALING,
    TOKENS,
    WEIGHT_NORM,
    Factor,
    Scaling,
    WeightNorm,
    part_path,
)
from passes.merge import (
    MergeBranches,
    base_weight,
    changes,
    check_not_shared,
    factors,
    fold,
    parameter_at,
    round_once,
    uses_beside_sites,
)
from passes.nodes import LoraMeta, lora_meta
from passes.operands import owning_path
from passes.printer import print_graph
from passes.select import Decision, Rules, check_targets, lookup, select, summarise
from passes.sites import find_sites, is_leaf, layer_of, weight_path, weight_sites
from passes.verify import Verify

__all__ = [
    "BIAS_B",
    "DROPOUT",
    "FACTOR_A",
    "FACTOR_B",
    "KINDS",
    "MAGNITUDE",
    "PARAMETERS",
    "SCALING",
    "SELF_CALL",
    "TOKENS",
    "VARIANTS",
    "WEIGHT_NORM",
    "Branch",
    "BranchDtype",
    "BranchSpec",
    "CallSite",
    "Decision",
    "DropBranches",
    "Factor",
    "Form",
    "FreezeBase",
    "FxloraError",
    "InsertBranches",
    "Instance",
    "Layer",
    "LoraMeta",
    "MergeBranches",
    "MergeError",
    "NoTargetError",
    "Pass",
    "PassError",
    "Pipeline",
    "Region",
    "Rules",
    "Scaling",
    "Stage",
    "Verify",
    "VerifyError",
    "WeightNorm",
    "base_weight",
    "branch_owner",
    "changes",
    "check_not_shared",
    "check_targets",
    "containers",
    "copy_graph",
    "deltas",
    "did_you_mean",
    "factors",
    "find_sites",
    "fold",
    "is_leaf",
    "layer_of",
    "lookup",
    "lora_meta",
    "owning_path",
    "parameter_at",
    "parameter_layer",
    "part_path",
    "part_shapes",
    "print_graph",
    "resolve",
    "round_once",
    "select",
    "summarise",
    "target_name",
    "uses_beside_sites",
    "variant_leaves",
    "variant_parts",
    "weight_path",
    "weight_sites",
]
