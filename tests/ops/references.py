"""The operators against their formulas in float64: outputs, and gradients of all that is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxlora.ops import aten, lora_dora_siblings, lora_dora_swiglu, lora_linear_siblings, lora_swiglu
from fxlora.ops.choice import has_kernels
from fxlora.ops.linear import implementation
from fxlora.ops.mask import COARSE_RESOLUTION, RESOLUTION, dropped, threshold
from fxlora.ops.norms import row_norms

TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Of the norm of an error over the norm of what is right, by the coarsest dtype."""

OF_ONE_ROW = {**TOLERANCE, torch.float16: 4e-3}
"""Likewise where no other rows make up for sums that happen to cancel: 3.2e-3 was seen."""

SEED = 123456789012345


@dataclass(frozen=True)
class Case:
    """What an operator is called with.

    Attributes:
        lead: shape of x without its features.
        columns: features of x.
        outputs: features of the layers' outputs; of a SwiGLU block those of gate and up, and of down.
        ranks: of each layer.
        dtype: of x, weights and biases.
        factors: dtypes of A and B; that of x if None.
        bias: whether layers have biases.
        p: dropout.
        layout: how tensors lie in memory: `contiguous`, `strided`, x and the incoming gradients `expanded`, or x at an
            `odd` address.
        trained: what gets gradients: letters out of `x`, `A` and `B`, `W`, `b`, `R` (the residual), `m` (DoRA's ratios).
        extras: what the operator is given beside its operands: the `source` of x, a `residual`, or `both`.
        device: where.
        ratios: their dtype, for cases of DoRA.
    """

    lead: tuple[int, ...] = (7,)
    columns: int = 14
    outputs: tuple[int, ...] = (9,)
    ranks: tuple[int, ...] = (3,)
    dtype: torch.dtype = torch.float32
    factors: tuple[torch.dtype, torch.dtype] | None = None
    bias: bool = False
    p: float = 0.0
    layout: str = "contiguous"
    trained: str = "xAB"
    extras: str = ""
    device: str = "cpu"
    ratios: torch.dtype | None = None

    def __str__(self) -> str:
        fields = (
            ("x".join(map(str, self.lead)) or "vector"),
            self.columns,
            *self.outputs,
            "r",
            *self.ranks,
            self.dtype,
        )
        rest = (
            self.factors or "",
            "bias" * self.bias,
            self.p or "",
            self.layout,
            self.trained,
            self.extras,
            self.device,
            self.ratios and f"ratios {self.ratios}",
        )
        return "-".join(str(each) for each in (*fields, *rest) if each).replace("torch.", "")


Tensors = dict[str, Tensor]
Call = Callable[[Case, Tensors, Tensor | None], list[Tensor]]


def sibling_errors(case: Case) -> dict[str, float]:
    """The relative error of each output and gradient of `lora_linear_siblings`, or `lora_dora_siblings`."""
    sizes = [(N, case.columns) for N in case.outputs]
    return _errors(case, sizes, _call_siblings, _exact_siblings)


def swiglu_errors(case: Case) -> dict[str, float]:
    """The relative error of the output and each gradient of `lora_swiglu`, or `lora_dora_swiglu`."""
    middle, last = case.outputs
    sizes = [(middle, case.columns), (middle, case.columns), (last, middle)]
    return _errors(case, sizes, _call_swiglu, _exact_swiglu)


def _errors(case: Case, sizes: Sequence[tuple[int, int]], call: Call, exact: Call) -> dict[str, float]:
    tensors = _tensors(case, sizes)
    seed = torch.tensor([SEED], device=case.device) if case.p else None
    doubles = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    outputs, expected = call(case, tensors, seed), exact(case, doubles, seed)
    generator = torch.Generator().manual_seed(len(str(case)))
    incoming = [_gradient_like(y, case.layout, generator) for y in outputs]
    found = _gradients(outputs, tensors, incoming)
    right = _gradients(expected, doubles, [dy.double() for dy in incoming])
    assert found.keys() == right.keys() and len(found) >= len(case.trained)
    for name, gradient in found.items():
        assert gradient.dtype == tensors[name].dtype and gradient.shape == tensors[name].shape, name
    named = {
        f"y{index}": (y.detach(), want.detach()) for index, (y, want) in enumerate(zip(outputs, expected, strict=True))
    }
    assert all(y.dtype == case.dtype and y.shape == want.shape for y, want in named.values())
    named |= {f"d{name}": (found[name], right[name]) for name in found}
    return {name: relative_error(*pair) for name, pair in named.items()}


def worst_norms(dtype: torch.dtype, device: str) -> float:
    """The largest error of `row_norms`, relative to the norm, over several shapes; a row of zeros has none."""
    worst = 0.0
    for out, columns, rank in ((1, 5, 1), (7, 26, 3), (130, 70, 17), (33, 300, 64)):
        W, A, B = (torch.randn(shape, device=device) for shape in ((out, columns), (rank, columns), (out, rank)))
        W = W.to(dtype)
        W[-1], B[-1] = 0, 0
        A, B = A / rank, B.to(torch.promote_types(dtype, torch.float32))
        squared = torch.linalg.norm(W.to(B.dtype), dim=1).square()
        found = row_norms(W, A, B, torch.tensor(1.5, device=device), squared)
        right = (W.double() + 1.5 * B.to(dtype).double() @ A.to(dtype).double()).norm(dim=1)
        assert found.dtype == squared.dtype and not found[-1]
        worst = max(worst, ((found - right).norm() / right.norm().clamp(min=1e-9)).item())
    return worst


def runs_kernels(case: Case) -> bool:
    """Whether Triton's kernels compute the low-rank terms."""
    x = torch.empty(torch.Size(case.lead).numel(), case.columns, dtype=case.dtype, device=case.device)
    Bs = [torch.empty(out, rank, device=case.device) for out, rank in zip(case.outputs, case.ranks, strict=False)]
    return implementation(x, Bs) is not aten


def relative_error(found: Tensor, right: Tensor) -> float:
    """The norm of the error over that of what is right; 0 for two empty tensors or two zeros."""
    error, size = (found.double() - right.double()).norm().item(), right.double().norm().item()
    return error / size if size else error


def worst(case: Case, errors: dict[str, float]) -> str:
    """Names and errors above the tolerance; empty if there are none (NaN is above)."""
    tolerances = OF_ONE_ROW if math.prod(case.lead) == 1 else TOLERANCE
    tolerance = max(tolerances[dtype] for dtype in (case.dtype, *(case.factors or ())))
    return ", ".join(f"{name}: {error:.2g}" for name, error in errors.items() if not error <= tolerance)


def _tensors(case: Case, sizes: Sequence[tuple[int, int]]) -> Tensors:
    generator = torch.Generator().manual_seed(len(str(case)))

    def made(name: str, *shape: int, dtype: torch.dtype = case.dtype, scale: float = 1.0) -> Tensor:
        value = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(case.device, dtype)
        if case.layout == "odd" and name == "x":
            value = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(shape)
        if case.layout == "strided" and len(shape) > 1:
            value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        return value.requires_grad_(name in case.trained)

    A_dtype, B_dtype = case.factors or (case.dtype, case.dtype)
    lead = (1, *case.lead[1:]) if case.layout == "expanded" else case.lead
    tensors = {"x": made("x", *lead, case.columns)}
    if case.extras in ("source", "both"):
        tensors |= _scaled(tensors["x"], generator)
    if case.extras in ("residual", "both"):
        tensors["R"] = made("R", *lead, sizes[-1][0])
    for index, ((out, columns), rank) in enumerate(zip(sizes, case.ranks, strict=True)):
        tensors[f"W{index}"] = made("W", out, columns, scale=columns**-0.5)
        if case.bias:
            tensors[f"b{index}"] = made("b", out)
        if case.ratios:
            tensors[f"m{index}"] = made("m", out, dtype=case.ratios)
            with torch.no_grad():
                tensors[f"m{index}"][0] = 0
        tensors[f"A{index}"] = made("A", rank, columns, dtype=A_dtype, scale=columns**-0.5)
        tensors[f"B{index}"] = made("B", out, rank, dtype=B_dtype, scale=rank**-0.5)
    return tensors


def _scaled(source: Tensor, generator: torch.Generator) -> Tensors:
    """An input that is made of a source, with the source and the scales, which are not rounded to its dtype."""
    wide = torch.promote_types(source.dtype, torch.float32)
    row_scale, column_scale = (
        (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).to(source.device, wide)
        for shape in ((*source.shape[:-1], 1), source.shape[-1:])
    )
    x = (source.detach() * row_scale * column_scale).to(source.dtype).requires_grad_(source.requires_grad)
    return {"x": x, "source": source.detach(), "row_scale": row_scale, "column_scale": column_scale}


def _extras(tensors: Tensors) -> dict[str, Tensor]:
    """The keywords that the operators are called with."""
    names = {"source": "source", "row_scale": "row_scale", "column_scale": "column_scale", "R": "residual"}
    return {keyword: tensors[name] for name, keyword in names.items() if name in tensors}


def _input(case: Case, tensors: Tensors) -> Tensor:
    return tensors["x"].expand(*case.lead, case.columns) if case.layout == "expanded" else tensors["x"]


def _gradient_like(y: Tensor, layout: str, generator: torch.Generator) -> Tensor:
    shape = y.shape[-1:] if layout == "expanded" else y.shape
    dy = torch.randn(shape, generator=generator).to(y.device, y.dtype)
    if layout == "expanded":
        return dy.expand(y.shape)
    return dy.transpose(-1, -2).contiguous().transpose(-1, -2) if layout == "strided" and y.dim() > 1 else dy


def _gradients(outputs: Sequence[Tensor], tensors: Tensors, incoming: Sequence[Tensor]) -> Tensors:
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    return dict(zip(trained, torch.autograd.grad(outputs, list(trained.values()), incoming), strict=True))


def _named(tensors: Tensors, letter: str) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors) if name[0] == letter and name[1:].isdigit()]


def _scales(case: Case) -> list[Tensor]:
    return [torch.tensor(1.5 - index, device=case.device) for index in range(len(case.ranks))]


def _call_siblings(case: Case, tensors: Tensors, seed: Tensor | None) -> list[Tensor]:
    W, A, B = (_named(tensors, letter) for letter in "WAB")
    b: list[Any] = _named(tensors, "b") or [None] * len(W)
    extras: dict[str, Any] = _extras(tensors)
    if case.ratios:
        ratios = _named(tensors, "m")
        return lora_dora_siblings(_input(case, tensors), W, b, A, B, _scales(case), ratios, **extras)[: len(W)]
    return lora_linear_siblings(_input(case, tensors), W, b, A, B, _scales(case), case.p, seed, **extras)[: len(W)]


def _call_swiglu(case: Case, tensors: Tensors, seed: Tensor | None) -> list[Tensor]:
    W, A, B = (_named(tensors, letter) for letter in "WAB")
    extras: dict[str, Any] = _extras(tensors)
    if case.ratios:
        return lora_dora_swiglu(_input(case, tensors), W, A, B, _scales(case), _named(tensors, "m"), **extras)[:1]
    return lora_swiglu(_input(case, tensors), W, A, B, _scales(case), case.p, seed, **extras)[:1]


def _exact_linear(case: Case, tensors: Tensors, index: int, x: Tensor, seed: Tensor | None) -> Tensor:
    branch = x if seed is None else x * mask(x, case, seed, index)
    scale = float(_scales(case)[index])
    y = F.linear(x, tensors[f"W{index}"]) + scale * F.linear(
        F.linear(branch, tensors[f"A{index}"]), tensors[f"B{index}"]
    )
    return y * tensors.get(f"m{index}", 1.0) + tensors.get(f"b{index}", 0.0)


def mask(x: Tensor, case: Case, seed: Tensor, sibling: int) -> Tensor:
    """What a branch's input is multiplied with, in float64."""
    ones = torch.ones(x[..., 0].numel(), x.shape[-1], dtype=case.dtype, device=x.device)
    coarse = round(case.p * COARSE_RESOLUTION) / COARSE_RESOLUTION
    dropped_share = threshold(case.p) / RESOLUTION if has_kernels(x.device) else coarse
    kept = dropped(ones, case.p, seed, sibling) != 0
    return (kept.double() / (1 - dropped_share) if dropped_share < 1 else kept.double()).view(x.shape)


def _exact_siblings(case: Case, tensors: Tensors, seed: Tensor | None) -> list[Tensor]:
    x = _input(case, tensors)
    return [_exact_linear(case, tensors, index, x, seed) + tensors.get("R", 0.0) for index in range(len(case.ranks))]


def _exact_swiglu(case: Case, tensors: Tensors, seed: Tensor | None) -> list[Tensor]:
    x = _input(case, tensors)
    gate, up = (_exact_linear(case, tensors, index, x, seed) for index in (0, 1))
    return [_exact_linear(case, tensors, 2, F.silu(gate) * up, seed) + tensors.get("R", 0.0)]
