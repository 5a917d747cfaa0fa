"""What `merge_checkpoint` did, or would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fxlora.checkpoint.merge_plan import MergePlan
from fxlora.rendering import Rendered, Section, json_data
from fxlora.rounding import RoundingReport


@dataclass(frozen=True, slots=True)
class MergeReport(Rendered):
    """What `merge_checkpoint` did, or would do.

    Attributes:
        out_dir: the new checkpoint.
        adapters: the adapters that were folded in.
        merged: names of the weights that are changed, sorted.
        tensors: number of all tensors of the result.
        files: size in bytes of each file of weights, by name.
        bytes: size of all weights.
        config: the fields of `config.json` that are not the base's, and their values.
        written: False for a dry run.
        rounding: what rounding takes of the updates; None if it was not measured.
        seconds: time that it took.
    """

    out_dir: Path
    adapters: tuple[Path, ...]
    merged: tuple[str, ...]
    tensors: int
    files: dict[str, int]
    bytes: int
    config: dict[str, Any]
    written: bool
    rounding: RoundingReport | None
    seconds: float

    @classmethod
    def of(
        cls,
        plan: MergePlan,
        out_dir: Path,
        adapters: Sequence[Path],
        *,
        seconds: float,
        written: bool = False,
        rounding: RoundingReport | None = None,
    ) -> MergeReport:
        """The report of a plan. For the arguments see the class."""
        files = {shard: layout.nbytes for shard, layout in plan.layouts().items()}
        return cls(
            out_dir,
            tuple(adapters),
            plan.changed,
            len(plan.outputs),
            files,
            plan.nbytes,
            plan.new_fields,
            written,
            rounding,
            seconds,
        )

    def __str__(self) -> str:
        adapters = "1 adapter" if len(self.adapters) == 1 else f"{len(self.adapters)} adapters"
        size = f"{self.bytes / 1e6:,.1f} MB"
        weights = f"{adapters} into {len(self.merged)} of {self.tensors} weights"
        if self.written:
            return f"merged {weights}; wrote {size} to {self.out_dir} in {self.seconds:.2f} s"
        width = max(len(name) for name in self.files)
        return "\n".join(
            [
                f"would merge {weights}, and write {size} to {self.out_dir}; nothing was written",
                *(f"  {name:{width}}  {nbytes / 1e6:12,.1f} MB" for name, nbytes in self.files.items()),
                *(f"  config.json: {name} = {value!r}" for name, value in self.config.items()),
            ]
        )

    def sections(self) -> list[Section]:
        """What was or would be done, and what rounding takes, if it was measured."""
        done = Section(lines=tuple(str(self).splitlines()))
        return [done, *([] if self.rounding is None else self.rounding.sections())]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        figures = {each.name: getattr(self, each.name) for each in fields(self)}
        return json_data({**figures, "rounding": None if self.rounding is None else self.rounding.to_dict()})
