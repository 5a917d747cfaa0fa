"""The one door to the compiler package: fails clearly when another package called `passes` shadows ours."""

from __future__ import annotations

import passes

if not getattr(passes, "FXLORA_PASSES", False):
    raise ImportError(
        f"fxlora needs its own package 'passes', but another one was imported from {passes.__file__}. "
        "Remove or rename that one, or put fxlora's directory before it on sys.path."
    )

from passes.base import SELF_CALL, Instance, Pass, Pipeline, Region, Stage, copy_graph, resolve, target_name
from passes.branches import KINDS, BranchSpec
from passes.branches.base import BranchDtype
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
from passes.freeze import FreezeBase
from passes.insert import Branch, InsertBranches
from passes.leaves import CONTAINERS, DROPOUT, FACTOR_A, FACTOR_B, PARAMETERS, SCALING, Factor, Scaling
from passes.merge import MergeBranches, base_weight, check_not_shared, factors, fold, round_once
from passes.nodes import LoraMeta, lora_meta
from passes.patterns import fault
from passes.printer import print_graph
from passes.select import Decision, Rules, check_targets, lookup, select, summarise, unused
from passes.sites import CallSite, find_sites, linear_shape, owning_path
from passes.verify import Verify

__all__ = [
    "CONTAINERS",
    "DROPOUT",
    "FACTOR_A",
    "FACTOR_B",
    "KINDS",
    "PARAMETERS",
    "SCALING",
    "SELF_CALL",
    "Branch",
    "BranchDtype",
    "BranchSpec",
    "CallSite",
    "Decision",
    "DropBranches",
    "Factor",
    "FreezeBase",
    "FxloraError",
    "InsertBranches",
    "Instance",
    "LoraMeta",
    "MergeBranches",
    "MergeError",
    "NoTargetError",
    "Pass",
    "PassError",
    "PatternError",
    "Pipeline",
    "Region",
    "Rules",
    "Scaling",
    "Stage",
    "Verify",
    "VerifyError",
    "base_weight",
    "check_not_shared",
    "check_targets",
    "copy_graph",
    "did_you_mean",
    "factors",
    "fault",
    "find_sites",
    "fold",
    "linear_shape",
    "lookup",
    "lora_meta",
    "owning_path",
    "print_graph",
    "resolve",
    "round_once",
    "select",
    "summarise",
    "target_name",
    "unused",
]
