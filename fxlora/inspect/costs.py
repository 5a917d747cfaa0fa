"""What LoRA costs, by arithmetic from shapes: block by block, and what a merge will take. Reads no values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fxlora._passes import BranchSpec, base_weight, foldable, has_factors, parameter_at
from fxlora.checkpoint.adapter import KEY_PREFIX
from fxlora.checkpoint.safetensors_io import Entry
from fxlora.plan import Plan

_FOLDED_AT_A_TIME = 1 << 20
"""Entries of a weight that are folded together: see `passes.fold`."""
_WORKING_COPIES = 7
"""How many times the memory of these entries a fold works in: for sums, both ends of their intervals, and roundings."""
_FACTOR_BYTES = 32
"""For each entry of the factors, in float64: as they are, scaled, and those rows and columns that are looked at again."""


@dataclass(frozen=True, slots=True)
class Block:
    """The blocks of one numbered list of modules together, or all that is in none.

    Attributes:
        pattern: `model.layers.*`; empty for what is in no numbered list.
        count: number of blocks.
        base_parameters: entries of the base; what is shared is counted where it comes first.
        trainable: entries that are trained.
        flops: FLOPs that the branches add forward, for each position (token) that their layers multiply.
        adapter_bytes: of the adapter's tensors; the file also has a header. None if it is not known.
    """

    pattern: str
    count: int
    base_parameters: int
    trainable: int
    flops: int
    adapter_bytes: int | None


@dataclass(frozen=True, slots=True)
class MergeCost:
    """What folding the adapter into the base will take.

    Attributes:
        flops: of the products B A: 2 r for each entry of a weight. Roundings and checks are not counted.
        read_bytes: of the weights that are folded into, which `merge_checkpoint` reads.
        written_bytes: of the weights that are changed, which it writes: these, and modules that were trained whole.
        copied_bytes: of all others, which it copies.
        kept_bytes: what `merge_adapter` keeps in memory, to unmerge with the original bits.
        peak_bytes: what it takes at most beside the model, about: this, the largest new weight, and a fold's own memory.
    """

    flops: int
    read_bytes: int
    written_bytes: int
    copied_bytes: int
    kept_bytes: int
    peak_bytes: int


def block_of(name: str) -> str:
    """The numbered list that a name lies in, with a star for the number; empty if it lies in none."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if first is None else ".".join([*parts[:first], "*"])


def blocks_of(
    model: nn.Module,
    trained: Iterable[tuple[str, int]],
    multiplied: Iterable[tuple[str, int]],
    entries: Mapping[str, Entry] | None,
) -> tuple[Block, ...]:
    """Sizes and costs by block, in the model's order; what is in no block comes last.

    Args:
        model: whose parameters are counted.
        trained: (name, entries) of all that is trained.
        multiplied: (name, entries) of the factors that are multiplied by activations.
        entries: of the adapter's file, by key; None if they are not known.
    """
    base: dict[str, int] = {}
    numbers: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        pattern = block_of(name)
        base[pattern] = base.get(pattern, 0) + parameter.numel()
        if pattern:
            numbers.setdefault(pattern, set()).add(name.split(".")[pattern.count(".")])
    stored = ((key.removeprefix(KEY_PREFIX), entry.nbytes) for key, entry in (entries or {}).items())
    sums = [_by_block(each, base) for each in (trained, multiplied, stored)]
    return tuple(
        Block(
            pattern,
            len(numbers.get(pattern, ())),
            base[pattern],
            sums[0].get(pattern, 0),
            2 * sums[1].get(pattern, 0),
            None if entries is None else sums[2].get(pattern, 0),
        )
        for pattern in sorted(base, key=lambda pattern: not pattern)
    )


def _by_block(sizes: Iterable[tuple[str, int]], known: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in sizes:
        pattern = block_of(name)
        pattern = pattern if pattern in known else ""
        found[pattern] = found.get(pattern, 0) + size
    return found


def merge_cost(model: nn.Module, plan: Plan) -> MergeCost | None:
    """What merging the plan's adapter will take; None where a branch cannot be merged, since it is at some calls only.

    Args:
        model: whose weights have the dtypes that the base is stored in; may be on the meta device.
        plan: of one adapter.
    """
    if any(spec.calls for spec in plan.branches):
        return None
    folded: dict[str, int] = {}
    flops = largest = working = 0
    for site, specs in foldable(plan.branches).items():
        path, weight = base_weight(model, site)
        folded[path] = weight.nbytes
        flops += sum(2 * spec.r * weight.numel() for spec in specs if has_factors(spec))
        largest = max(largest, weight.nbytes)
        block = _WORKING_COPIES * weight.itemsize * min(weight.numel(), _FOLDED_AT_A_TIME)
        working = max(working, block + _FACTOR_BYTES * sum(spec.num_parameters for spec in specs))
        folded.update(_bias(model, site, specs))
    state = model.state_dict(keep_vars=True)
    whole = [f"{saved.module}.{name}" for saved in plan.saved for name in saved.tensors]
    written = {**folded, **{path: state[path].nbytes for path in (*whole, *plan.biases)}}
    every = {id(each): each.nbytes for each in state.values() if isinstance(each, Tensor)}  # not extra state
    kept, changed = sum(folded.values()), sum(written.values())
    return MergeCost(flops, kept, changed, sum(every.values()) - changed, kept, kept + largest + working)


def _bias(model: nn.Module, site: str, specs: Iterable[BranchSpec]) -> dict[str, int]:
    """The layer's bias, where a branch has one that is folded into it."""
    if not any(spec.bias for spec in specs):
        return {}
    path = f"{site}.bias"
    bias = parameter_at(model, path)
    return {} if bias is None else {path: bias.nbytes}
