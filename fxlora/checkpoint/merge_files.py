"""`merge_checkpoint`: adapters folded into a checkpoint, from files to files, without building the model.

Base weights are read, folded and written one after another. What happens to each: `fxlora.checkpoint.merge_plan`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxlora._passes import Tied
from fxlora.checkpoint import rounding
from fxlora.checkpoint.atomic import staged
from fxlora.checkpoint.layout import copy_companions, refuse_adapter_directory, stays, write_index
from fxlora.checkpoint.manifest import write_manifest
from fxlora.checkpoint.merge_plan import MergePlan, plan_merge
from fxlora.checkpoint.merge_run import default_threads, write_weights
from fxlora.checkpoint.saved import SavedAdapter, read_saved
from fxlora.errors import CheckpointError, ConfigError
from fxlora.host.untying import check_tied

Directories = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge_checkpoint` did.

    Attributes:
        out_dir: the new checkpoint.
        adapters: the adapters that were folded in.
        merged: names of the weights that were changed, sorted.
        tensors: number of all tensors written.
        bytes: size of all weights written.
        seconds: time that it took.
    """

    out_dir: Path
    adapters: tuple[Path, ...]
    merged: tuple[str, ...]
    tensors: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        adapters = "1 adapter" if len(self.adapters) == 1 else f"{len(self.adapters)} adapters"
        return (
            f"merged {adapters} into {len(self.merged)} of {self.tensors} weights; wrote {self.bytes / 1e6:,.1f} MB to "
            f"{self.out_dir} in {self.seconds:.2f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {
            "out_dir": str(self.out_dir),
            "adapters": [str(path) for path in self.adapters],
            "merged": list(self.merged),
            "tensors": self.tensors,
            "bytes": self.bytes,
            "seconds": self.seconds,
        }


def merge_checkpoint(
    base_dir: str | Path,
    adapter_dirs: Directories,
    out_dir: str | Path,
    *,
    weights: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    tied: Tied = "refuse",
    dequantize: bool = False,
) -> MergeReport:
    """Fold saved adapters into the safetensors checkpoint of their base, each weight rounded once.

    `W' = W + Σ weight · ΔW`, summed in float64, with the ΔW of each layer's kind and variant. Saved modules and trained
    biases take the place of the base's tensors. The files and shards are those of the base; configuration, tokenizer
    and other files are copied.

    Args:
        base_dir: with `model.safetensors`, or shards and their index.
        adapter_dirs: one saved adapter or several; their order does not matter.
        out_dir: the new checkpoint, put in place as one. Files in it that are no model weights stay.
        weights: a factor for each adapter; 1 if None.
        out_dtype: of all floating-point weights; each one's own if None.
        tied: what to do where a weight that the model ties (`tie_word_embeddings`) is changed at one of its ends only, or
            differently: `"refuse"` the merge, `"untie"` them, so that each end has a weight of its own, or change it
            for `"both"`.
        dequantize: write plain weights in place of quantized ones, where the format is known (float8 and int8 with scales,
            bitsandbytes), in `out_dtype`, or in the dtype that the configuration says; without it a merge into a
            quantized weight is refused.

    Returns:
        What was merged, and how long it took.

    Raises:
        CheckpointError: when a file is missing or broken, an adapter's layer is not in the base, or shapes do not fit.
        MergeError: when a weight is quantized or tied, cannot hold an update, or would become NaN or infinite; when names
            and shapes do not tell what a tensor is for, so that only a live model can be merged (`export_merged`).
        ConfigError: when `weights` or `out_dtype` cannot be used.
        NotImplementedError: for adapters with a feature that is not supported yet.
        In all cases `out_dir` is as before.
    """
    start = time.perf_counter()
    base, out = Path(base_dir), Path(out_dir)
    rounding.check_out_dtype(out_dtype)
    check_tied(tied)
    directories = [adapter_dirs] if isinstance(adapter_dirs, (str, Path)) else list(adapter_dirs)
    if base.resolve() == out.resolve():
        raise CheckpointError(f"out_dir '{out_dir}' is the base itself; write the merged checkpoint somewhere else")
    refuse_adapter_directory(out)
    saved = _read_adapters(directories, weights)
    plan = plan_merge(base, saved, out_dtype=out_dtype, tied=tied, dequantize=dequantize)
    with staged(out, keep=stays) as staging:
        copy_companions(base, staging, excluded=out)
        for name in plan.left_out:
            (staging / name).unlink(missing_ok=True)
        write_manifest(staging, _carry_out(plan, staging))
    seconds = time.perf_counter() - start
    paths = tuple(Path(directory) for directory in directories)
    return MergeReport(out, paths, plan.changed, len(plan.outputs), plan.nbytes, seconds)


def _carry_out(plan: MergePlan, directory: Path) -> dict[str, str]:
    """Write the checkpoint of a plan, except for the files that are copied; returns the digests of the shards."""
    if plan.config is not None:
        text = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
    digests = write_weights(plan, directory, threads=default_threads())
    if plan.index is not None:
        shards = plan.shards().items()
        write_index(directory, {shard: [each.name for each in outputs] for shard, outputs in shards}, plan.index)
    return digests


def _read_adapters(directories: Sequence[str | Path], weights: Sequence[float] | None) -> list[SavedAdapter]:
    """All adapters, in an order that does not depend on the caller's."""
    if not directories:
        raise ConfigError("`adapter_dirs` is empty; name at least one saved adapter")
    factors = [1.0] * len(directories) if weights is None else list(weights)
    if len(factors) != len(directories) or not all(math.isfinite(factor) for factor in factors):
        raise ConfigError(
            f"`weights` should be {len(directories)} finite numbers, one for each adapter, not {weights!r}"
        )
    pairs = sorted((os.path.realpath(path), factor) for path, factor in zip(directories, factors, strict=True))
    return [read_saved(Path(path), factor) for path, factor in pairs]
