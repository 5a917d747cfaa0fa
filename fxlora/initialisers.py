"""Initial values of LoRA factors, by the names of `init_lora_weights`, and what they do to the base weight.

Pure functions of tensors and branch specs; they know nothing of models, graphs or configurations. Whoever creates an
adapter calls `start` once for each layer, in the order of the layers. What needs no base weight is drawn by the kinds.

| name | factors | base weight |
|---|---|---|
| True | A Kaiming-uniform with a = sqrt(5), B = 0 | W |
| `"gaussian"` | A ~ N(0, 1/r²), B = 0: LoRA, arXiv:2106.09685 | W |
| False | both as new `nn.Linear`s: the update is not zero | W |
| `"orthogonal"` | rows of A and of B orthogonal, B A = 0 up to rounding: datta0.github.io/posts/rethink-lora-init | W |
| `"pissa"` | A = sqrt(S_r / s) V_rᵀ, B = U_r sqrt(S_r / s), of W = U S Vᵀ: PiSSA, arXiv:2404.02948 | W - s B A |
| `"pissa_niter_N"` | the same, of a randomised decomposition with N power iterations | W - s B A |
| `"olora"` | A = R[:r], B = Q[:, :r], of W = Q R: OLoRA, arXiv:2406.01775 | W - s B A |
| `"mica"` | A = 0, B = the last r columns of U, not trained: MiCA, arXiv:2604.01694 | W |

`s` is the scaling, alpha / r or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732). Where the base weight changes, the new one
with its branch computes what the old one did.

**One seed, peft's bits.** Every function draws from torch's generators what peft 0.21 draws, in its order and in
torch's default dtype: what the kind draws for new layers, then what the method itself draws. Decompositions are made in float32, as there. Factors are returned as computed; casting them to
a half-precision base's dtype, as peft does, rounds `s B A` after it was taken out of the base.

A second adapter on the same layer starts from the base weight that the first one left.

**Where this differs from peft**, each time because its result is wrong: `"olora"` also works for weights stored
`(in, out)`, which peft decomposes untransposed; a rank above min(in, out) is refused for `"pissa"` and `"olora"`, where
peft makes factors of another rank than the configuration says; NaN, infinite and meta weights are refused; so is a
negative scaling for `"pissa"`, whose root peft takes; autocast is ignored, where peft rounds `s B A` to half precision;
`"mica"` freezes B also for a half-precision embedding, where peft's cast to float32 makes it trainable again.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxlora._passes import KINDS, BranchSpec, as_rows, did_you_mean, no_autocast
from fxlora.errors import AdapterError, ConfigError

log = logging.getLogger("fxlora")

_UNSUPPORTED: dict[str, str] = {
    "corda": "needs covariances of activations; what works instead: 'pissa', which decomposes the weight alone",
    "eva": "needs activations of training data; what works instead: True",
    "loftq": "quantizes the base; what works instead: 'pissa', before a quantization of your own",
    "lora_ga": "needs gradients of training data; what works instead: True, or 'pissa'",
}
"""Initialisers of peft that need more than the weight."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PISSA_NITER = re.compile(r"pissa_niter_([0-9]+)")
_DECOMPOSABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Initial:
    """What a layer's branch starts from.

    Attributes:
        parts: the branch's tensors by part name, on the device and in the dtype of their computation: the caller casts.
        weight: the base weight that goes with them, in the base's layout and dtype; None if it stays as it is.
    """

    parts: dict[str, Tensor]
    weight: Tensor | None = None


def frozen_parts(name: bool | str, kind: str) -> tuple[str, ...]:
    """Parts of a branch that an initialiser makes and nothing trains afterwards."""
    return KINDS[kind].factor_names[1:] if name == "mica" else ()


def check_init(name: bool | str, r: int) -> None:
    """Check an initialiser's name, and that it can work with rank `r`.

    Raises:
        ConfigError: for an unknown or malformed name, and for an odd rank with `"orthogonal"`.
        NotImplementedError: for an initialiser of peft's that needs data, gradients or a quantized base.
    """
    method = _method(name)
    if method == "orthogonal" and r % 2:
        raise ConfigError(
            f"init_lora_weights='orthogonal' requires an even rank, since A and B get half of it each, but r={r}; "
            f"use {r + 1}, or another initialiser"
        )


def changes_base(name: bool | str) -> bool:
    """Whether an adapter that started so is valid only with a base weight that was changed with it.

    Also True for initialisers that can not be computed here, whose adapters may be read.
    """
    return isinstance(name, str) and name.lower().startswith(_CHANGES_BASE)


def start(spec: BranchSpec, weight: Tensor) -> Initial:
    """The initial values of a branch, and of its base weight where that changes.

    Initialisers other than True, False and `"gaussian"` are for linear layers, and `"mica"` for embeddings too. With the
    others an embedding starts as with True, like in peft, and a log line says so.

    Args:
        spec: the branch; `spec.init` names the initialiser.
        weight: the base weight in the base's layout, of any dtype and device. Not changed.

    Raises:
        ConfigError: for a name, kind or rank that cannot work, and for a weight that has no values, or none that can be
            decomposed.
        NotImplementedError: for an initialiser of peft's that needs data, gradients or a quantized base.

    >>> W = torch.randn(6, 5)
    >>> spec = BranchSpec("fc", "default", "linear", 5, 6, False, r=2, scaling=0.5, init="pissa")
    >>> first = start(spec, W)
    >>> torch.allclose(first.weight + 0.5 * first.parts["lora_B"] @ first.parts["lora_A"], W, atol=1e-5)
    True
    """
    check_init(spec.init, spec.r)
    method, kind = _method(spec.init), KINDS[spec.kind]
    if method not in _METHODS:
        return Initial(kind.init(replace(spec, init=_DRAWN[method])))
    if not kind.float_input and method != "mica":
        log.info("init_lora_weights=%r is for linear layers; '%s' starts as with True", spec.init, spec.site)
        return Initial(kind.init(replace(spec, init=True)))
    if spec.kind not in ("linear", "embedding"):
        raise ConfigError(
            f"init_lora_weights={spec.init!r} is for linear layers, but '{spec.site}' is of the kind '{spec.kind}'; leave "
            "it out with `exclude_modules`, or use True, False or 'gaussian'"
        )
    _check_has_values(spec.init, weight, spec.site)
    drawn = kind.init(replace(spec, init=False))
    matrix = as_rows(kind, spec.layer, "weight", weight.detach())
    A, B, rest = _METHODS[method](_Layer(spec, matrix, *(drawn[name] for name in kind.factor_names)))
    parts = {**drawn, **dict(zip(kind.factor_names, (A, B), strict=True))}
    return Initial(parts, None if rest is None else rest.T if spec.transposed else rest)


def to_plain(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of twice the rank for the original base weight, from an adapter that started with a changed one.

    `B A - B0 A0 = [B, -B0] [A; A0]`, since the changed weight is `W - s B0 A0`. Nothing is rounded. The scaling must
    stay: `r` doubles, and alpha becomes `plain_alpha(alpha, ...)`.

    Args:
        A: trained, `(r, in)`.
        B: trained, `(out, r)`.
        A0: initial value of A.
        B0: initial value of B.

    Returns:
        `[A; A0]`, `(2r, in)`, and `[B, -B0]`, `(out, 2r)`: the order of peft's `subtract_mutated_init`.

    Raises:
        AdapterError: when the initial factors have other shapes than the trained ones.
    """
    if A.shape != A0.shape or B.shape != B0.shape:
        raise AdapterError(
            f"the trained factors are {tuple(A.shape)} and {tuple(B.shape)}, but the initial ones "
            f"{tuple(A0.shape)} and {tuple(B0.shape)}; use the initial values of this very adapter"
        )
    return torch.cat([A, A0], dim=0), torch.cat([B, -B0], dim=1)


def plain_alpha(alpha: float, use_rslora: bool) -> float:
    """The alpha that keeps the scaling when the rank doubles: `2 alpha`, or `sqrt(2) alpha` with rsLoRA.

    It also holds for the values of `alpha_pattern`; those of `rank_pattern` double.
    """
    return alpha * math.sqrt(2) if use_rslora else alpha * 2


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a method works on: the branch, the base weight `(out, in)`, and A and B with what new layers hold."""

    spec: BranchSpec
    weight: Tensor
    A: Tensor
    B: Tensor


_Start = tuple[Tensor, Tensor, Tensor | None]
"""A, B, and the changed base weight `(out, in)` if there is one."""

_DRAWN: dict[str, bool | str] = {"kaiming": True, "default": False, "gaussian": "gaussian"}
"""Methods that kinds draw by themselves."""


def _method(name: bool | str) -> str:
    """The key of `_DRAWN` or `_METHODS` that a name stands for.

    Like peft, `"gaussian"` and `"olora"` are read in any case.
    """
    if isinstance(name, bool):
        return "kaiming" if name else "default"
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"init_lora_weights should be True, False or the name of an initialiser, not {name!r}")
    if name in _UNSUPPORTED:
        raise NotImplementedError(f"init_lora_weights={name!r} is not supported: it {_UNSUPPORTED[name]}")
    if name.lower() in ("gaussian", "olora"):
        return name.lower()
    if name in ("orthogonal", "pissa", "mica") or _PISSA_NITER.fullmatch(name):
        return name.partition("_")[0]
    if name.startswith("pissa_niter"):
        raise ConfigError(
            f"init_lora_weights={name!r} should be 'pissa_niter_N' with a number of power iterations for N, such as "
            "'pissa_niter_4'"
        )
    named = ["gaussian", *_METHODS]
    raise ConfigError(
        f"Unknown initialization init_lora_weights={name!r}.{did_you_mean(name.lower(), named)} Known: True, False, "
        f"{', '.join(map(repr, [*named, 'pissa_niter_N']))}"
    )


def _check_has_values(name: bool | str, weight: Tensor, site: str) -> None:
    if weight.is_meta:
        raise ConfigError(
            f"init_lora_weights={name!r} cannot start '{site}', whose weight is on the meta device and has no values; "
            "load the weights of the model first"
        )


def _orthogonal(layer: _Layer) -> _Start:
    """A and B in the spans of alternate rows of one random orthogonal matrix."""
    dtype = torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"init_lora_weights='orthogonal' draws in torch's default dtype, {_plain(dtype)}, which has no QR "
            "decomposition; call torch.set_default_dtype(torch.float32) first"
        )
    r, half = layer.spec.r, layer.spec.r // 2
    basis = torch.linalg.qr(torch.randn(r, r)).Q
    with no_autocast(basis):
        A = torch.randn(layer.weight.shape[1], half) @ basis[0::2]
        B = torch.randn(half, layer.weight.shape[0]).T @ basis[1::2]
    return (A.T / 10).contiguous(), B / 10, None


def _pissa(layer: _Layer) -> _Start:
    """The principal part of the weight in the factors, the rest in the base."""
    weight = _decomposable(layer)
    if layer.spec.scaling <= 0:
        raise ConfigError(
            f"init_lora_weights={layer.spec.init!r} takes the root of the scaling, which must be positive, but that of "
            f"'{layer.spec.site}' is {layer.spec.scaling}; use a positive `lora_alpha`"
        )
    niter = _PISSA_NITER.fullmatch(str(layer.spec.init))
    left, values, right = _randomised_svd(weight, layer.spec.r, int(niter[1])) if niter else _svd(weight)
    root = (values[: layer.spec.r] / layer.spec.scaling).sqrt()
    A = (root[:, None] * right[: layer.spec.r]).contiguous()
    B = (left[:, : layer.spec.r] * root).contiguous()
    return A, B, _residual(layer, weight, A, B)


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(weight, full_matrices=False)


def _randomised_svd(weight: Tensor, r: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws once, on the weight's device."""
    with no_autocast(weight):
        left, values, right = torch.svd_lowrank(weight, r, niter=niter)
    return left, values, right.T


def _olora(layer: _Layer) -> _Start:
    """The first r columns of Q and rows of R in the factors, the rest in the base."""
    weight = _decomposable(layer)
    Q, R = torch.linalg.qr(weight)
    A = R[: layer.spec.r].clone(memory_format=torch.contiguous_format)
    B = Q[:, : layer.spec.r].clone(memory_format=torch.contiguous_format)
    return A, B, _residual(layer, weight, A, B)


def _mica(layer: _Layer) -> _Start:
    """The left singular vectors of the smallest singular values in B, which is kept; A zero."""
    left = _svd(_decomposable(layer))[0]
    B = left[:, -layer.spec.r :].clone(memory_format=torch.contiguous_format)
    return B.new_zeros(layer.A.shape), B, None


_METHODS: dict[str, Callable[[_Layer], _Start]] = {
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
    "mica": _mica,
}


def _decomposable(layer: _Layer) -> Tensor:
    """The weight in float32, once it is known that its decomposition has rank `r` and is finite."""
    weight, start = (
        layer.weight,
        f"init_lora_weights={layer.spec.init!r} decomposes the base weight of '{layer.spec.site}'",
    )
    if weight.dtype not in _DECOMPOSABLE:
        raise ConfigError(
            f"{start}, which must be float32, float16 or bfloat16 but is {_plain(weight.dtype)}; "
            "convert the model first (`model.float()`), or use init_lora_weights=True"
        )
    if layer.spec.r > min(weight.shape):
        raise ConfigError(
            f"{start}, {tuple(weight.shape)}, which has rank {min(weight.shape)} at most, but r={layer.spec.r}; give this "
            "layer a smaller rank in `rank_pattern`, or leave it out with `exclude_modules`"
        )
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise ConfigError(
            f"{start}, but {bad} of its {weight.numel()} entries are NaN or infinite; repair the checkpoint, or leave "
            "the layer out with `exclude_modules`"
        )
    return weight.float()


def _residual(layer: _Layer, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`W - s B A` in float32, rounded once to the base's dtype."""
    with no_autocast(weight):
        rest = (weight - layer.spec.scaling * B @ A).to(layer.weight.dtype)
    if not rest.isfinite().all():
        raise ConfigError(
            f"init_lora_weights={layer.spec.init!r} changes the base weight of '{layer.spec.site}' to values that "
            f"{_plain(rest.dtype)} cannot hold; convert the model to float32 or bfloat16, or use init_lora_weights=True"
        )
    return rest


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
