"""Checks of the adapters' numbers: finite, alive, of fitting dtype, rank and scale. Nothing is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fxlora import scaling
from fxlora._passes import KINDS, BranchSpec, base_weight, has_factors
from fxlora.algebra.lowrank import SVD
from fxlora.initialisers import changes_base
from fxlora.inspect.doctor.patient import Patient, is_zero
from fxlora.inspect.doctor.report import Finding

_LARGE_SCALE = 32
"""alpha / r is between 0.5 and 16 in practice."""
_SMALL_SCALE = 1e-3
_SATURATED = 0.9
_UNUSED = 0.25
"""Shares of the rank above and below which the effective rank says that another rank would do better."""
_RANKED_FROM = 8
"""Smaller ranks are not judged."""


def values(patient: Patient) -> Iterator[Finding]:
    """Everything about the numbers."""
    broken = [name for name in _names(patient) if not _is_finite(patient.parameter(name))]
    if broken:
        yield Finding(
            "error",
            "not-finite",
            "parameters of adapters have NaN or infinite entries",
            "one of them makes every output NaN; a step with a gradient that was not finite leaves this behind",
            "load the last good checkpoint, lower the learning rate, clip gradients, and train in float32 or bfloat16",
            tuple(broken),
        )
    bad = [
        name for name, each in patient.lora.named_parameters() if each.grad is not None and not _is_finite(each.grad)
    ]
    if bad:
        yield bad_gradients(bad)
    yield from _dead(patient)
    yield from _dtypes(patient)
    yield from _scales(patient)
    if not broken:
        yield from _ranks(patient)


def bad_gradients(names: list[str]) -> Finding:
    """The finding for gradients that are not finite."""
    return Finding(
        "error",
        "gradient-not-finite",
        "gradients have NaN or infinite entries",
        "the next step makes the parameters NaN; the loss, or a value on the way to it, overflows or divides by zero",
        "look for the first such value with torch.autograd.set_detect_anomaly(True); use bfloat16 in place of float16",
        tuple(names),
    )


def _names(patient: Patient) -> list[str]:
    return list(dict.fromkeys(name for spec in patient.branches() for name in patient.parts(spec)))


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_meta or bool(tensor.detach().isfinite().all())


def _dead(patient: Patient) -> Iterator[Finding]:
    """Branches that add nothing though they were trained, or never can add anything."""
    found: dict[str, list[tuple[BranchSpec, bool, bool]]] = {}
    stepped = {name: False for name in patient.lora._lora.adapters}
    for spec, A, B in patient.with_factors():
        found.setdefault(spec.adapter, []).append((spec, is_zero(A), is_zero(B)))
        stepped[spec.adapter] |= patient.steps(A) or patient.steps(B)
    stuck = [spec.site for each in found.values() for spec, a, b in each if a and b]
    if stuck:
        yield Finding(
            "error",
            "stuck-branch",
            "A and B are both zero",
            "the gradient of each is a multiple of the other, so that no step can ever change them",
            "add the adapter again for fresh factors, or load its files again",
            tuple(stuck),
        )
    for adapter, each in found.items():
        idle = [spec.site for spec, a, b in each if a != b]
        trained = stepped[adapter] or len(idle) + len(stuck) < len(each)
        if idle and trained:
            yield Finding(
                "warning",
                "dead-branch",
                f"{len(idle)} of {len(each)} branches of '{adapter}' still add nothing after training: a factor is zero",
                "no gradient reached them: they are not in the optimizer, not on the way from the loss, or their layers "
                "did not run",
                "run doctor with a batch, which says where the gradient is cut; leave layers that do not run out of the "
                "targets",
                tuple(idle),
            )


def _dtypes(patient: Patient) -> Iterator[Finding]:
    half: list[str] = []
    narrow: list[str] = []
    mixed: list[str] = []
    apart: list[str] = []
    for spec in patient.branches():
        try:
            weight = base_weight(patient.lora, spec.site)[1]
        except AttributeError:  # a structural check says so
            continue
        parts = patient.parts(spec)
        half += [name for name, each in parts.items() if each.requires_grad and each.dtype == torch.float16]
        narrow += [
            name
            for name, each in parts.items()
            if weight.dtype.is_floating_point and torch.promote_types(each.dtype, weight.dtype) != each.dtype
        ]
        apart += [name for name, each in parts.items() if each.device != weight.device]
        if has_factors(spec) and len({each.dtype for each in parts.values()}) > 1 and not spec.variant:
            mixed.append(spec.site)
    wide = "cast_adapter_dtype(model), or leave autocast_adapter_dtype at True, for float32 factors over any base"
    if half:
        yield Finding(
            "warning",
            "float16-factors",
            "trained parameters are float16",
            "small updates round to nothing and gradients overflow at 65504; torch.amp.GradScaler refuses to unscale them",
            f"call {wide}",
            tuple(half),
        )
    if narrow:
        yield Finding(
            "warning",
            "narrow-factors",
            "parameters of adapters have a lower precision than the weights that they change",
            "what the branch adds is rounded to fewer digits than the layer's own output has",
            f"call {wide}",
            tuple(narrow),
        )
    if mixed:
        yield Finding(
            "warning",
            "mixed-dtypes",
            "the parameters of one branch have different dtypes",
            "each step of the branch is cast to the next one's dtype; a part was converted by hand or loaded so",
            f"call {wide}",
            tuple(mixed),
        )
    if apart:
        yield Finding(
            "error",
            "other-device",
            "parameters of adapters are on another device than their layers' weights",
            "the branch cannot be computed there",
            "move the whole model with model.to(device)",
            tuple(apart),
        )


def _scales(patient: Patient) -> Iterator[Finding]:
    checks: list[tuple[str, str, Callable[[float], bool], str]] = [
        ("scale-zero", "is 0", lambda s: s == 0, "the branch adds nothing, and its gradients are zero"),
        ("scale-small", "is tiny", lambda s: 0 < abs(s) < _SMALL_SCALE, "training moves the outputs hardly at all"),
        ("scale-large", "is very large", lambda s: abs(s) > _LARGE_SCALE, "training is likely to be unstable"),
    ]
    branches = [spec for spec in patient.branches() if has_factors(spec)]
    for code, what, is_so, why in checks:
        found = [spec for spec in branches if is_so(spec.scaling)]
        if found:
            yield Finding(
                "error" if code == "scale-zero" else "warning",
                code,
                f"the scaling of branches {what}: {found[0].scaling:g}",
                f"{why}. It is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, times what set_scale says",
                "choose lora_alpha between r / 2 and 4 r, or unscale_adapter() for the configuration's scaling",
                tuple(spec.site for spec in found),
            )
    for adapter, plan in patient.lora._lora.adapters.items():
        configured = scaling.configured(patient.lora, adapter)
        own = [spec for spec in plan.branches if has_factors(spec)]
        other = [spec.site for spec in own if not math.isclose(spec.scaling, configured[spec.site])]
        if other:
            yield Finding(
                "note",
                "scale-not-saved",
                f"adapter '{adapter}' has other scales than its configuration says",
                "set_scale or scale_adapter changed them; files hold the configuration's, as with peft",
                "call unscale_adapter() before training, or save with portable=True, which folds the scales into B",
                tuple(other),
            )


def _ranks(patient: Patient) -> Iterator[Finding]:
    """What the spread of the singular values says about the rank of adapters that were trained."""
    shares: dict[str, dict[str, tuple[float, int]]] = {}
    for spec, A, B in patient.with_factors():
        plan = patient.lora._lora.adapters[spec.adapter]
        judged = spec.r >= _RANKED_FROM and not changes_base(plan.config.init_lora_weights)
        if judged and not is_zero(A) and not is_zero(B):
            as_matrices = partial(KINDS[spec.kind].as_matrices, spec.layer)
            S = SVD.of_product(as_matrices("A", A.detach()), as_matrices("B", B.detach())).S
            shares.setdefault(spec.adapter, {})[spec.site] = effective_rank(S), min(spec.r, S.shape[-1])
    for adapter, sites in shares.items():
        full = [site for site, (rank, most) in sites.items() if rank >= _SATURATED * most]
        few = [site for site, (rank, most) in sites.items() if rank <= _UNUSED * most]
        for code, found, what, why, remedy in (
            ("rank-saturated", full, "use their whole rank", "a higher rank may learn more", "try a larger r there"),
            (
                "rank-unused",
                few,
                "use a small part of their rank",
                "a lower rank would hold the same with less memory",
                f"reduce_rank('{adapter}', max_error=0.05) finds it; train with a smaller r there",
            ),
        ):
            if found:
                mean = sum(sites[site][0] for site in found) / len(found)
                yield Finding(
                    "note",
                    code,
                    f"{len(found)} of {len(sites)} branches of '{adapter}' {what}: "
                    f"the effective rank is {mean:.1f} of {sites[found[0]][1]}",
                    f"{why}. It is the exponential of the entropy of the singular values of B A (Roy and Vetterli, 2007)",
                    f"{remedy} (rank_pattern gives layers ranks of their own)",
                    tuple(found),
                )


def effective_rank(S: Tensor) -> float:
    """The exponential of the entropy of singular values `(…, q)`, the mean over a stack."""
    p = S.double() / S.double().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(p).sum(-1).exp().mean())
