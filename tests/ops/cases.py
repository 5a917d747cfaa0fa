"""The sizes, dtypes and layouts at which the operators are compared with float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.ops.references import Case

F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

_SIBLINGS = Case(lead=(7,), columns=26, outputs=(24, 9, 17), ranks=(3, 3, 3), bias=True)

LINEAR = [
    *(Case(dtype=dtype, bias=bias) for dtype in (F64, F32, F16, B16) for bias in (False, True)),
    *(replace(_SIBLINGS, dtype=dtype, p=p) for dtype in (F64, F32, F16, B16) for p in (0.0, 0.3, 1.0)),
    *(
        Case(lead=lead, outputs=(9, 5), ranks=(3, 2), p=p)
        for lead in ((1,), (4097,), (2, 3), (2, 3, 4), ())
        for p in (0.0, 0.1)
    ),
    *(Case(lead=(0,), outputs=(9, 5), ranks=(3, 2), p=p, bias=True, trained="xABWb") for p in (0.0, 0.1)),
    Case(lead=(2, 0, 3)),
    *(Case(lead=(33,), columns=51, ranks=(rank,), p=0.1) for rank in (1, 3, 16, 100)),
    *(
        Case(lead=(33,), columns=51, outputs=(11, 13, 40), ranks=(100, 1, 16), dtype=dtype, p=0.1)
        for dtype in (F32, B16)
    ),
    *(replace(_SIBLINGS, dtype=dtype, factors=(F32, F32), p=0.1) for dtype in (F16, B16)),
    replace(_SIBLINGS, dtype=B16, factors=(B16, F32)),
    replace(_SIBLINGS, dtype=F32, factors=(B16, B16)),
    *(
        replace(_SIBLINGS, lead=(4, 5), layout=layout, p=p)
        for layout in ("strided", "expanded", "odd")
        for p in (0.0, 0.1)
    ),
    *(replace(_SIBLINGS, trained=trained, p=0.1) for trained in ("AB", "A", "B", "x", "W", "b", "xABWb")),
    Case(lead=(), trained="xABWb", bias=True),
    *(replace(_SIBLINGS, dtype=dtype, extras="source", p=p) for dtype in (F64, F32, B16) for p in (0.0, 0.3)),
    replace(_SIBLINGS, lead=(4, 5), extras="source", trained="xABWb"),
    *(
        Case(dtype=dtype, extras="residual", bias=bias, trained="xABR")
        for dtype in (F64, B16)
        for bias in (False, True)
    ),
    Case(lead=(2, 3), extras="both", layout="strided", trained="ABR", p=0.1),
    Case(lead=(2, 0, 3), extras="both", trained="xABR"),
]
"""Of `lora_linear_siblings`."""

_DORA = replace(_SIBLINGS, ratios=F32, trained="xABm")

DORA = [
    *(Case(dtype=dtype, bias=bias, ratios=F32, trained="xABm") for dtype in (F32, F16, B16) for bias in (False, True)),
    *(replace(_DORA, dtype=F64, ratios=F64, bias=bias) for bias in (False, True)),
    *(replace(_DORA, dtype=dtype) for dtype in (F16, B16)),
    *(replace(_DORA, lead=lead) for lead in ((1,), (4097,), (2, 3), (2, 3, 4), ())),
    *(replace(_DORA, lead=lead, trained="xABWbm") for lead in ((0,), (2, 0, 3), (), (7,))),
    *(replace(_DORA, ranks=(rank,) * 3) for rank in (1, 16, 100)),
    *(replace(_DORA, ranks=(100, 1, 16), dtype=dtype) for dtype in (F32, B16)),
    *(replace(_DORA, dtype=dtype, factors=(F32, F32)) for dtype in (F16, B16)),
    replace(_DORA, dtype=B16, factors=(B16, F32), ratios=B16),
    replace(_DORA, factors=(B16, B16)),
    *(replace(_DORA, lead=(4, 5), layout=layout) for layout in ("strided", "expanded", "odd")),
    *(replace(_DORA, dtype=dtype, extras="source") for dtype in (F32, B16)),
    replace(_DORA, lead=(4, 5), extras="source", trained="xABWbm"),
    *(
        Case(dtype=dtype, extras="residual", bias=bias, trained="xABRm", ratios=F32)
        for dtype in (F32, B16)
        for bias in (False, True)
    ),
    *(Case(lead=lead, extras="both", layout="strided", trained="ABRm", ratios=F32) for lead in ((2, 3), (2, 0, 3))),
    *(replace(_DORA, trained=trained) for trained in ("ABm", "AB", "m", "x", "W", "b")),
]
"""Of `lora_dora_siblings`."""

_BLOCK = Case(lead=(2, 5), columns=26, outputs=(30, 11), ranks=(3, 3, 3))

SWIGLU = [
    *(replace(_BLOCK, dtype=dtype, p=p) for dtype in (F64, F32, F16, B16) for p in (0.0, 0.3, 1.0)),
    *(replace(_BLOCK, lead=lead, p=p) for lead in ((1,), (4097,), (), (2, 3, 4)) for p in (0.0, 0.1)),
    *(replace(_BLOCK, lead=(0,), p=p, trained="xABW") for p in (0.0, 0.1)),
    *(replace(_BLOCK, columns=13, outputs=(31, 7), ranks=(rank,) * 3, p=0.1) for rank in (1, 16, 100)),
    *(replace(_BLOCK, ranks=ranks, dtype=dtype, p=0.1) for ranks in ((3, 3, 16), (1, 5, 2)) for dtype in (F32, B16)),
    *(replace(_BLOCK, dtype=dtype, factors=(F32, F32), p=0.1) for dtype in (F16, B16)),
    replace(_BLOCK, dtype=B16, factors=(F32, B16)),
    *(replace(_BLOCK, layout=layout, p=0.1) for layout in ("strided", "expanded")),
    *(replace(_BLOCK, trained=trained, p=0.1) for trained in ("AB", "A", "x", "W", "xABW")),
    *(replace(_BLOCK, dtype=dtype, extras="both", trained="xABWR", p=p) for dtype in (F64, B16) for p in (0.0, 0.3)),
    replace(_BLOCK, extras="source"),
    replace(_BLOCK, extras="residual"),
]
"""Of `lora_swiglu`."""

_DORA_BLOCK = replace(_BLOCK, ratios=F32, trained="xABm")

DORA_SWIGLU = [
    *(replace(_DORA_BLOCK, dtype=dtype) for dtype in (F32, F16, B16)),
    replace(_DORA_BLOCK, dtype=F64, ratios=F64),
    *(replace(_DORA_BLOCK, lead=lead) for lead in ((1,), (4097,), (), (2, 3, 4))),
    replace(_DORA_BLOCK, lead=(0,), trained="xABWm"),
    *(replace(_DORA_BLOCK, columns=13, outputs=(31, 7), ranks=(rank,) * 3) for rank in (1, 16, 100)),
    *(replace(_DORA_BLOCK, ranks=(1, 5, 2), dtype=dtype) for dtype in (F32, B16)),
    *(replace(_DORA_BLOCK, dtype=dtype, factors=(F32, F32)) for dtype in (F16, B16)),
    replace(_DORA_BLOCK, dtype=B16, factors=(F32, B16), ratios=B16),
    *(replace(_DORA_BLOCK, layout=layout) for layout in ("strided", "expanded")),
    *(replace(_DORA_BLOCK, dtype=dtype, extras="both", trained="xABWRm") for dtype in (F32, B16)),
    *(replace(_DORA_BLOCK, extras=extras) for extras in ("source", "residual")),
    *(replace(_DORA_BLOCK, trained=trained) for trained in ("AB", "m", "x", "W", "xABWm")),
]
"""Of `lora_dora_swiglu`."""

_NARROW = replace(_SIBLINGS, dtype=F16, factors=(F32, F32))
_NARROW_BLOCK = replace(_BLOCK, dtype=F16, factors=(F32, F32))

KERNEL_LINEAR = [
    *(replace(_NARROW, lead=(rows,), p=p) for rows in (1, 7, 129) for p in (0.0, 0.3)),
    *(
        replace(_NARROW, columns=70, outputs=(130, 40), ranks=ranks, p=p)
        for ranks in ((1, 16), (5, 64))
        for p in (0.0, 0.1)
    ),
    *(Case(dtype=F16, outputs=(24,), ranks=(17,), bias=True, p=p) for p in (0.0, 0.1, 1.0)),
    *(replace(_NARROW, lead=(4, 5), layout=layout, p=0.1) for layout in ("strided", "expanded")),
    replace(_NARROW, factors=(F16, F32), trained="xABWb", p=0.1),
    *(replace(_NARROW, columns=27, p=p) for p in (0.0, 0.1)),
    replace(_NARROW, lead=(0,), p=0.1),
    *(replace(_NARROW, lead=(129,), extras="source", p=p) for p in (0.0, 0.1)),
    *(Case(dtype=F16, outputs=(130,), ranks=(17,), bias=bias, extras="both", trained="xABR") for bias in (False, True)),
]
"""Of `lora_linear_siblings` by Triton's kernels, small enough for its interpreter."""

_NARROW_DORA = replace(_NARROW, ratios=F32, trained="xABm")

KERNEL_DORA = [
    *(replace(_NARROW_DORA, lead=(rows,)) for rows in (1, 7, 129)),
    replace(_NARROW_DORA, lead=(128,), outputs=(256, 128, 256)),  # tiles without masks
    *(replace(_NARROW_DORA, columns=70, outputs=(130, 40), ranks=ranks) for ranks in ((1, 16), (5, 64))),
    *(replace(_NARROW_DORA, outputs=(24,), ranks=(17,), bias=bias, ratios=F16) for bias in (False, True)),
    *(replace(_NARROW_DORA, lead=(4, 5), layout=layout) for layout in ("strided", "expanded")),
    replace(_NARROW_DORA, factors=(F16, F32), trained="xABWbm"),
    replace(_NARROW_DORA, lead=(129,), extras="source"),
    *(
        Case(dtype=F16, outputs=(130,), ranks=(17,), bias=bias, extras="both", trained="xABRm", ratios=F32)
        for bias in (False, True)
    ),
    replace(_NARROW_DORA, lead=(0,)),
]
"""Likewise of `lora_dora_siblings`."""

KERNEL_SWIGLU = [
    *(replace(_NARROW_BLOCK, lead=(rows,), p=p) for rows in (1, 7, 129) for p in (0.0, 0.3)),
    *(
        replace(_NARROW_BLOCK, columns=70, outputs=(131, 40), ranks=(rank,) * 3, p=p)
        for rank in (1, 17, 64)
        for p in (0.0, 0.1)
    ),
    replace(_NARROW_BLOCK, p=1.0),
    *(replace(_NARROW_BLOCK, columns=27, p=p) for p in (0.0, 0.1)),
    replace(_NARROW_BLOCK, layout="strided", p=0.1),
    replace(_NARROW_BLOCK, ranks=(3, 2, 5), trained="xABW", p=0.1),
    replace(_NARROW_BLOCK, lead=(0,), p=0.1),
    replace(_NARROW_BLOCK, lead=(129,), extras="both", trained="xABR", p=0.1),
]
"""Likewise of `lora_swiglu`."""

_NARROW_DORA_BLOCK = replace(_NARROW_BLOCK, ratios=F32, trained="xABm")

KERNEL_DORA_SWIGLU = [
    *(replace(_NARROW_DORA_BLOCK, lead=(rows,)) for rows in (1, 7, 129)),
    replace(_NARROW_DORA_BLOCK, lead=(128,), outputs=(256, 64)),  # tiles without masks
    *(replace(_NARROW_DORA_BLOCK, columns=70, outputs=(131, 40), ranks=(rank,) * 3) for rank in (1, 17, 64)),
    replace(_NARROW_DORA_BLOCK, layout="strided", ratios=F16),
    replace(_NARROW_DORA_BLOCK, ranks=(3, 2, 5), trained="xABWm"),
    replace(_NARROW_DORA_BLOCK, lead=(129,), extras="both", trained="xABRm"),
    replace(_NARROW_DORA_BLOCK, lead=(0,)),
]
"""Likewise of `lora_dora_swiglu`."""


def _on_gpu(case: Case) -> list[Case]:
    return [replace(case, dtype=dtype, device="cuda") for dtype in (F16, B16)]


GPU_LINEAR = [
    each
    for rows in (1, 7, 1024, 4097)
    for p in (0.0, 0.1)
    for case in (
        Case(
            lead=(rows,), columns=514, outputs=(1000, 264, 24), ranks=(16, 16, 16), factors=(F32, F32), bias=True, p=p
        ),
        Case(lead=(rows,), columns=130, outputs=(70, 258), ranks=(3, 33), p=p),
        Case(lead=(rows,), columns=131, outputs=(257,), ranks=(100,), factors=(F32, F32), p=p),
    )
    for each in _on_gpu(case)
]
GPU_LINEAR += _on_gpu(
    Case(lead=(2, 1030), columns=64, outputs=(40,), ranks=(1,), layout="strided", trained="xABW", p=0.1)
)
GPU_LINEAR += [
    each
    for rows in (1, 4097)
    for p in (0.0, 0.1)
    for case in (
        Case(lead=(rows,), columns=514, outputs=(264, 24), ranks=(16, 16), factors=(F32, F32), extras="source", p=p),
        Case(lead=(rows,), columns=130, outputs=(258,), ranks=(33,), bias=True, extras="both", trained="xABR", p=p),
    )
    for each in _on_gpu(case)
]
GPU_LINEAR += _on_gpu(Case(lead=(0,), columns=64, outputs=(40,), ranks=(1,), p=0.1))
"""Of `lora_linear_siblings` on a GPU; by kernels from 1024 rows."""

GPU_DORA = [
    each
    for rows in (1, 7, 1024, 4097)
    for case in (
        Case(lead=(rows,), columns=514, outputs=(1000, 264, 24), ranks=(16, 16, 16), factors=(F32, F32), bias=True),
        Case(lead=(rows,), columns=128, outputs=(1024, 256), ranks=(16, 16), factors=(F32, F32)),
        Case(lead=(rows,), columns=130, outputs=(70, 258), ranks=(3, 33), extras="source"),
        Case(lead=(rows,), columns=130, outputs=(258,), ranks=(33,), bias=True, extras="both"),
        Case(lead=(rows,), columns=131, outputs=(257,), ranks=(100,), factors=(F32, F32)),
    )
    for each in _on_gpu(replace(case, ratios=F32, trained="xABRm" if case.extras == "both" else "xABm"))
]
GPU_DORA += _on_gpu(
    Case(lead=(2, 1030), columns=64, outputs=(40,), ranks=(1,), layout="strided", ratios=F32, trained="xABWm")
)
GPU_DORA += _on_gpu(Case(lead=(0,), columns=64, outputs=(40,), ranks=(1,), ratios=F32, trained="xABm"))
"""Of `lora_dora_siblings`."""

GPU_SWIGLU = [
    each
    for rows in (1, 7, 1024, 4097)
    for p in (0.0, 0.1)
    for ranks in ((16, 16, 16), (3, 3, 3), (16, 8, 16))
    for each in _on_gpu(Case(lead=(rows,), columns=514, outputs=(1001, 510), ranks=ranks, factors=(F32, F32), p=p))
]
GPU_SWIGLU += [
    each
    for rows in (1, 4097)
    for p in (0.0, 0.1)
    for each in _on_gpu(
        Case(lead=(rows,), columns=514, outputs=(1001, 510), ranks=(16,) * 3, extras="both", trained="xABR", p=p)
    )
]
"""Likewise of `lora_swiglu`."""

GPU_DORA_SWIGLU = [
    each
    for rows in (1, 7, 1024, 4097)
    for case in (
        Case(columns=514, outputs=(1001, 510), ranks=(16, 16, 16), trained="xABm"),
        Case(columns=512, outputs=(1024, 512), ranks=(16, 16, 16), extras="both", trained="xABRm"),
        Case(columns=514, outputs=(1001, 510), ranks=(16, 8, 16), trained="xABm"),
    )
    for each in _on_gpu(replace(case, lead=(rows,), factors=(F32, F32), ratios=F32))
]
"""Likewise of `lora_dora_swiglu`."""
