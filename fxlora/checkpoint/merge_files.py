"""`merge_checkpoint`: adapters folded into a checkpoint, from files to files, without building the model.

Base weights are read, folded and written one after another. What happens to each: `fxlora.checkpoint.merge_plan`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch

from fxlora._passes import Loss, Tied
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.layout import copy_companions, parse_size, refuse_adapter_directory, stays, write_index
from fxlora.checkpoint.manifest import write_manifest
from fxlora.checkpoint.merge_plan import MergePlan, plan_merge
from fxlora.checkpoint.merge_report import MergeReport
from fxlora.checkpoint.merge_run import Progress, default_threads, write_weights
from fxlora.checkpoint.merge_steps import Rounding
from fxlora.checkpoint.rounding import check_out_dtype
from fxlora.checkpoint.saved import SavedAdapter, read_saved
from fxlora.errors import CheckpointError, ConfigError
from fxlora.host.untying import check_tied
from fxlora.rounding import RoundingReport

Directories = str | Path | Sequence[str | Path]


def merge_checkpoint(
    base_dir: str | Path,
    adapter_dirs: Directories,
    out_dir: str | Path,
    *,
    weights: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    tied: Tied = "refuse",
    dequantize: bool = False,
    strict: bool = True,
    max_shard_size: int | str | None = None,
    rounding: Rounding | None = "sample",
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> MergeReport:
    """Fold saved adapters into the safetensors checkpoint of their base, each weight rounded once.

    `W' = W + Σ weight · ΔW`, the exact sum rounded, with the ΔW of each layer's kind and variant. Saved modules and
    trained biases take the place of the base's tensors. Configuration, tokenizer and other files are copied. Memory is
    bounded by the adapters and blocks of weights: the base may be larger than the machine's memory. The bytes that are
    written depend on the input alone, not on threads.

    Args:
        base_dir: with `model.safetensors`, or shards and their index.
        adapter_dirs: one saved adapter or several; their order does not matter.
        out_dir: the new checkpoint, put in place as one. Files in it that are no model weights stay.
        weights: a factor for each adapter; 1 if None.
        out_dtype: of all floating-point weights; each one's own if None.
        tied: what to do where a weight that the model ties (`tie_word_embeddings`) is changed at one of its ends only, or
            differently: `"refuse"` the merge, `"untie"` them, so that each end has a weight of its own, or change it
            for `"both"`. Ends that were trained whole (`modules_to_save`) are untied without a question.
        dequantize: write plain weights in place of quantized ones, where the format is known (float8 and int8 with scales,
            bitsandbytes), in `out_dtype`, or in the dtype that the configuration says; without it a merge into a
            quantized weight is refused.
        strict: if False, keys of adapters that the base has nothing for are left out, and a warning says which; a branch
            with one factor only is refused in any case.
        max_shard_size: bytes, or a text such as `"5GB"`, of weights in a file; files as the base has them if None.
        rounding: what the report says of the loss by rounding: estimated from some rows of each weight, measured on
            all, or nothing. Above a quarter of an update a warning is logged.
        threads: how many compute and write; one for each processor, up to 8, if None.
        progress: called now and then with the bytes that are done, and those in all.
        dry_run: plan everything, with all checks that need no data of the base, and write nothing.

    Returns:
        What was merged, and how long it took.

    Raises:
        CheckpointError: when a file is missing or broken, an adapter's layer is not in the base, or shapes do not fit.
        MergeError: when a weight is quantized or tied, cannot hold an update, or would become NaN or infinite; when names
            and shapes do not tell what a tensor is for, so that only a live model can be merged (`export_merged`).
        ConfigError: when an argument cannot be used.
        NotImplementedError: for adapters with a feature that is not supported yet.
        In all cases `out_dir` is as before.
    """
    start = time.perf_counter()
    base, out = Path(base_dir), Path(out_dir)
    check_out_dtype(out_dtype)
    check_tied(tied)
    if rounding not in ("sample", "all", None):
        raise ConfigError(f"`rounding` should be 'sample', 'all' or None, not {rounding!r}")
    if threads is not None and threads < 1:
        raise ConfigError(f"`threads` should be 1 or more, not {threads}")
    max_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    directories = [adapter_dirs] if isinstance(adapter_dirs, (str, Path)) else list(adapter_dirs)
    if base.resolve() == out.resolve():
        raise CheckpointError(f"out_dir '{out_dir}' is the base itself; write the merged checkpoint somewhere else")
    if out.exists() and not out.is_dir():
        raise CheckpointError(
            f"out_dir '{out_dir}' is a file, and a directory is to be written there; choose another path"
        )
    refuse_adapter_directory(out)
    saved = _read_adapters(directories, weights, strict=strict)
    plan = plan_merge(base, saved, out_dtype=out_dtype, tied=tied, dequantize=dequantize, max_shard_bytes=max_bytes)
    report = partial(MergeReport.of, plan, out, [Path(directory) for directory in directories])
    if dry_run:
        return report(seconds=time.perf_counter() - start)
    with staged(out, keep=stays) as staging:
        copy_companions(base, staging, excluded=out)
        for name in plan.left_out:
            (staging / name).unlink(missing_ok=True)
        _write_texts(plan, staging)
        written = write_weights(
            plan, staging, threads=threads or default_threads(), progress=progress, rounding=rounding
        )
        write_manifest(staging, written.digests)
    losses = _rounding_report(plan, written.losses) if rounding is not None else None
    if losses is not None:
        losses.warn()
    return report(written=True, rounding=losses, seconds=time.perf_counter() - start)


def _write_texts(plan: MergePlan, directory: Path) -> None:
    """Write configuration and index, where they are not those of the base."""
    if plan.config is not None:
        text = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
    if plan.index is not None:
        shards = plan.shards().items()
        write_index(directory, {shard: [each.name for each in outputs] for shard, outputs in shards}, plan.index)


def _rounding_report(plan: MergePlan, losses: Mapping[str, Loss]) -> RoundingReport:
    entries = {output.name: output.entry for output in plan.outputs}
    written = {name: (cast(torch.dtype, entries[name].torch_dtype), entries[name].num_entries) for name in losses}
    return RoundingReport.of(losses, written)


def _read_adapters(
    directories: Sequence[str | Path], weights: Sequence[float] | None, *, strict: bool
) -> list[SavedAdapter]:
    """All adapters, in an order that does not depend on the caller's."""
    if not directories:
        raise ConfigError("`adapter_dirs` is empty; name at least one saved adapter")
    factors = [1.0] * len(directories) if weights is None else list(weights)
    if len(factors) != len(directories) or not all(math.isfinite(factor) for factor in factors):
        raise ConfigError(
            f"`weights` should be {len(directories)} finite numbers, one for each adapter, not {weights!r}"
        )
    pairs = sorted((os.path.realpath(path), factor) for path, factor in zip(directories, factors, strict=True))
    return [read_saved(Path(path), factor, strict=strict) for path, factor in pairs]
