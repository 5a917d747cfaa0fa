"""One way to run a model with LoRA: whose code, dtype of the factors, dropout, DoRA, compiled or eager. Read from words.

`frozen` is the floor: forward, and backward to the input only. `fxlora` is the optimized model, `fxlora canonical` our graph
in plain operations; `peft` and the peers of `benchmarks.peers` are others'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.peers import PEERS, with_liger

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUT = 0.1
MODES = ("compiled", "eager")
_FLAGS = ("merged", "canonical", "normed", "dora", "dropout", "eager")
_NAMES = ("frozen", "fxlora", "peft", *PEERS)


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run a model.

    Attributes:
        name: whose code.
        dtype: of the factors; empty for the frozen model.
        dropout: whether there is dropout before the branches.
        dora: whether magnitudes are trained too.
        canonical: for fxlora, the graph without operators.
        normed: whether Liger's norms and rotary embedding replace the model's own; of `frozen` and `fxlora`.
        merged: whether the adapter is in the weights: for inference.
        eager: whether it is not compiled.
    """

    name: str
    dtype: str = ""
    dropout: bool = False
    dora: bool = False
    canonical: bool = False
    normed: bool = False
    merged: bool = False
    eager: bool = False

    @classmethod
    def parse(cls, text: str, mode: str = "") -> Variant:
        """A variant from words in any order after its name, such as `peft bf16 dropout eager`.

        Args:
            text: the words.
            mode: `eager` to add that word.

        Raises:
            ValueError: a word is unknown; says which there are.
        """
        name, *words = text.split()
        unknown = [] if name in _NAMES else [name]
        unknown += [word for word in words if word not in _FLAGS and word not in DTYPES]
        if unknown:
            known = ", ".join(_NAMES), ", ".join([*DTYPES, *_FLAGS])
            raise ValueError(
                f"'{unknown[0]}' in variant '{text}' is unknown: a name ({known[0]}), then any of {known[1]}"
            )
        dtype = next((word for word in words if word in DTYPES), "" if name == "frozen" else "fp32")
        flags = {flag: flag in words for flag in _FLAGS}
        flags["eager"] |= mode == "eager"
        return cls(name, dtype, **flags)

    @property
    def mode(self) -> str:
        """Which floor it is compared with."""
        return MODES[self.eager]

    @property
    def label(self) -> str:
        """Its words without the mode."""
        flags = [flag for flag in _FLAGS if getattr(self, flag) and flag != "eager"]
        return " ".join([self.name, *filter(None, [self.dtype]), *flags])

    def __str__(self) -> str:
        """Its words."""
        return self.label + (" eager" if self.eager else "")


@dataclass(frozen=True, slots=True)
class Adapter:
    """The settings that all variants of a run share.

    Attributes:
        rank: of the factors; alpha is twice it.
        targets: last parts of names of layers.
        parameters: names of weights that are no layers.
        random: whether B is random too; else it is zero, as at the start of a training.
    """

    rank: int
    targets: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    random: bool = True

    def settings(self, variant: Variant) -> dict[str, Any]:
        """As keywords of a LoRA configuration, peft's or ours."""
        return dict(
            r=self.rank, lora_alpha=2 * self.rank, target_modules=list(self.targets), use_dora=variant.dora,
            target_parameters=list(self.parameters) or None, lora_dropout=DROPOUT if variant.dropout else 0.0,
            init_lora_weights=not self.random,
        )  # fmt: skip


def with_adapter(model: Any, variant: Variant, adapter: Adapter) -> Any:
    """The model with its adapter, from the same seed for every variant; in place where that is how the variant works.

    Args:
        model: frozen.
        variant: says how.
        adapter: and what.

    Raises:
        ModuleNotFoundError: a peer is not installed.
        NotImplementedError: a peer has no such variant.
    """
    torch.manual_seed(2)
    if variant.normed:
        with_liger(model, swiglu=False)
    if variant.name == "fxlora":
        import fxlora

        model = fxlora.lora_transform(model, fxlora.LoraConfig(**adapter.settings(variant)))
        if variant.eager and not variant.canonical and not variant.merged:
            fxlora.optimize(model)
    elif variant.name == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**adapter.settings(variant)))
    elif variant.name != "frozen":
        if adapter.parameters:
            raise NotImplementedError("LoRA on experts is not measured for peers")
        model = PEERS[variant.name](model, adapter.settings(variant))
    for parameter in trained(model):
        parameter.data = parameter.data.to(DTYPES[variant.dtype])
    return model.merge_and_unload() if variant.merged else model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that want gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Likewise, by names that are the same whichever library's they are: without peft's prefix."""
    return {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}


def callable_of(model: Any, variant: Variant, **options: Any) -> Callable[..., Any]:
    """What to call: the model itself, or compiled by Inductor, for ours after our passes.

    Args:
        model: from `with_adapter`.
        variant: the same.
        options: for `torch.compile`.
    """
    if variant.eager:
        return model
    if variant.name == "fxlora" and not variant.canonical and not variant.merged:
        from fxlora.compile import backend

        return torch.compile(model, backend=backend, **options)
    return torch.compile(model, **options)


def parse_all(texts: Iterable[str], modes: Iterable[str]) -> list[Variant]:
    """Variants of each mode with the mode's floor first, each once.

    Args:
        texts: words, without `eager` for all modes asked for.
        modes: of `MODES`.
    """
    found: dict[Variant, None] = {}
    for mode in modes:
        group = [variant for variant in (Variant.parse(text, mode) for text in texts) if variant.mode == mode]
        if group:
            found.update(dict.fromkeys([Variant("frozen", eager=mode == "eager"), *group]))
    return list(found)
