"""Run by `test_kernels.py` in a process of its own, with Triton's interpreter: writes the errors of all cases as JSON."""

from __future__ import annotations

import json
import sys

import torch

from fxlora.ops import choice, mask
from tests.ops.cases import KERNEL_DORA, KERNEL_DORA_SWIGLU, KERNEL_LINEAR, KERNEL_SWIGLU
from tests.ops.references import runs_kernels, sibling_errors, swiglu_errors, worst


def main() -> None:
    """Print `{case: errors above the tolerance}`, and the mask that kernels make."""
    assert choice.has_kernels(torch.device("cpu"))
    torch.use_deterministic_algorithms(True)  # fresh tensors are full of NaN
    linear, blocks = (*KERNEL_LINEAR, *KERNEL_DORA), (*KERNEL_SWIGLU, *KERNEL_DORA_SWIGLU)
    used = {str(case): runs_kernels(case) for case in (*linear, *blocks)}
    found = {f"linear {case}": worst(case, sibling_errors(case)) for case in linear}
    found |= {f"swiglu {case}": worst(case, swiglu_errors(case)) for case in blocks}
    json.dump({"errors": found, "by kernels": sum(used.values()), "masks": _masks()}, sys.stdout)


def _masks() -> dict[str, float]:
    """Share of entries in which masks of p = 0.5 agree with the first, the share that p = 0.1 keeps, and the spectrum.

    The largest singular value of independent numbers of variance 1 is close to the sum of the roots of both sizes.
    """
    ones = torch.ones(257, 302)

    def kept(p: float, seed: int, sibling: int = 0) -> torch.Tensor:
        return mask.dropped(ones, p, torch.tensor([seed]), sibling) != 0

    first = kept(0.5, 5)
    others = {
        "another seed": kept(0.5, 6),
        "another upper half": kept(0.5, 5 + 2**40),
        "second sibling": kept(0.5, 5, 1),
        "third sibling": kept(0.5, 5, 2),
        "next row": first.roll(1, 0),
        "next column": first.roll(1, 1),
        "next pair": first.roll(2, 1),
    }
    others["corners of squares"] = (first ^ first.roll(1, 0) ^ first.roll(1, 1) ^ first.roll((1, 1), (0, 1))) ^ first
    agreement = {name: (first == other).double().mean().item() for name, other in others.items()}
    siblings = {f"kept by sibling {index}": kept(0.1, 5, index).double().mean().item() for index in range(3)}
    largest = torch.linalg.matrix_norm(2.0 * first.double() - 1, ord=2).item() / (257**0.5 + 302**0.5)
    return {**agreement, **siblings, "spectrum": largest, "itself": (first == kept(0.5, 5)).double().mean().item()}


if __name__ == "__main__":
    main()
