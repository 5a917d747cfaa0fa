"""Healthy set-ups, of which no tool may say that something is wrong: architectures, captures and ways to use LoRA."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxlora import LoraConfig, LoraModel, VerifyError, compare, doctor, lora_transform, parameter_groups
from tests.faults.seeded.set_ups import switch_checkpointing_on
from tests.zoo import ARCHITECTURES, PLAIN, Entry

ENTRIES: dict[str, Entry] = {entry.name: entry for entry in (*ARCHITECTURES, *(entry for entry, _ in PLAIN))}


@dataclass
class Patient:
    """A healthy set-up while a way of use is applied.

    Attributes:
        entry: the architecture.
        capture: how it is captured.
        base: the model without LoRA.
        batch: a call.
        config: of the adapter.
        model: with LoRA.
        optimizer: what trains it.
    """

    entry: Entry
    capture: str
    base: nn.Module
    batch: dict[str, Any]
    config: dict[str, Any]
    optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def of(cls, name: str, capture: str) -> Patient:
        """Before the transform."""
        entry = ENTRIES[name]
        return cls(entry, capture, entry.model(), entry.batch(), {"r": 4, "target_modules": list(entry.targets)})

    @functools.cached_property
    def model(self) -> LoraModel:
        """The model with LoRA, transformed when it is first asked for."""
        example = self.batch if self.capture == "export" or self.entry.name in _NEED_INPUTS else None
        capture = cast(Any, self.capture)
        return lora_transform(self.base, LoraConfig(**self.config), capture=capture, example_inputs=example)

    def train(self, steps: int = 2) -> None:
        """Some steps of training with AdamW."""
        self.model.train()
        self.optimizer = self.optimizer or torch.optim.AdamW(parameter_groups(self.model), lr=1e-2)
        for _ in range(steps):
            output = self.model(**self.batch)
            values = [output] if isinstance(output, Tensor) else list(output.values())
            floats = [value.float().square().mean() for value in values if isinstance(value, Tensor)]
            torch.stack(floats).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def to(self, dtype: torch.dtype) -> None:
        """The base and the inputs in another dtype."""
        self.base = self.base.to(dtype)
        self.batch = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in self.batch.items()
        }


_NEED_INPUTS = {"functional-weight", "given-input", "torch-encoder"}
"""Plain models that read a weight without its layer, or take calls of one form."""

USES: dict[str, Callable[[Patient], object]] = {}
"""What is done with a set-up, by its name in the table."""


def use(name: str) -> Callable[[Callable[[Patient], object]], Callable[[Patient], object]]:
    """Enter a way of use."""

    def enter(apply: Callable[[Patient], object]) -> Callable[[Patient], object]:
        USES[name] = apply
        return apply

    return enter


@use("fresh")
def fresh(patient: Patient) -> None:
    patient.optimizer = torch.optim.AdamW(parameter_groups(patient.model))


@use("trained")
def trained(patient: Patient) -> None:
    patient.train()


@use("trained with DoRA and dropout")
def dora(patient: Patient) -> None:
    patient.config |= {"use_dora": True, "lora_dropout": 0.1}
    patient.train()


@use("trained with rsLoRA, rank 16 and biases")
def rslora(patient: Patient) -> None:
    patient.config |= {"use_rslora": True, "r": 16, "bias": "all"}
    patient.train(3)


@use("a bfloat16 base, trained")
def bfloat16(patient: Patient) -> None:
    patient.to(torch.bfloat16)
    patient.train()


@use("a bfloat16 base with bfloat16 factors")
def bfloat16_factors(patient: Patient) -> None:
    patient.to(torch.bfloat16)
    patient.config["autocast_adapter_dtype"] = False
    patient.train()


@use("trained under autocast")
def autocast(patient: Patient) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        patient.train()


@use("reentrant checkpointing")
def reentrant(patient: Patient) -> None:
    switch_checkpointing_on(patient.model, use_reentrant=True)
    patient.train()


@use("checkpointing")
def checkpointing(patient: Patient) -> None:
    switch_checkpointing_on(patient.model, use_reentrant=False)
    patient.train()


@use("two adapters, both active")
def two_adapters(patient: Patient) -> None:
    patient.model.add_adapter("other", LoraConfig(r=2, target_modules=patient.entry.targets[:1]))
    patient.model.set_adapter(["default", "other"])
    patient.train()


@use("a second adapter that is not active")
def second_adapter(patient: Patient) -> None:
    patient.model.add_adapter("other", LoraConfig(r=2, target_modules=patient.entry.targets[:1]))
    patient.train()


@use("a module trained whole")
def saved_module(patient: Patient) -> None:
    heads = ("lm_head", "classifier", "pooler", "head", "out", "fc2")
    (head, *_) = [name for name, _ in patient.base.named_children() if name in heads]
    patient.config |= {"modules_to_save": [head]}
    patient.config["target_modules"] = [name for name in patient.entry.targets if name != head]
    patient.train()


@use("tied embeddings, targets in the blocks")
def tied(patient: Patient) -> None:
    base: Any = patient.base
    base.config.tie_word_embeddings = True
    base.tie_weights()
    patient.train()


@use("tied embeddings, trained together")
def tied_together(patient: Patient) -> None:
    base: Any = patient.base
    base.config.tie_word_embeddings = True
    base.tie_weights()
    patient.config |= {"target_modules": [*patient.entry.targets, "embed_tokens"], "ensure_weight_tying": True}
    patient.train()


@use("merged and taken apart again")
def unmerged(patient: Patient) -> None:
    patient.train()
    patient.model.merge_adapter()
    patient.model.unmerge_adapter()


@use("saved and loaded to go on training")
def loaded(patient: Patient) -> None:
    patient.train()
    with tempfile.TemporaryDirectory() as directory:
        patient.model.save_pretrained(directory)
        example = patient.batch if patient.capture == "export" else None
        capture = cast(Any, patient.capture)
        patient.base = patient.entry.model()
        patient.__dict__["model"] = lora_transform(
            patient.base, directory, capture=capture, example_inputs=example, is_trainable=True
        )
    patient.optimizer = None
    patient.train(1)


@use("rows of the embedding trained")
def token_rows(patient: Patient) -> None:
    patient.config["trainable_token_indices"] = {"embed_tokens": [7, 8]}
    patient.train()


@use("initialised with PiSSA")
def pissa(patient: Patient) -> None:
    patient.config["init_lora_weights"] = "pissa"
    patient.train()


@use("a copy of the model")
def copied(patient: Patient) -> None:
    patient.__dict__["model"] = copy.deepcopy(patient.model)
    patient.train()


_OF_LANGUAGE_MODELS = ("tied", "rows", "reentrant", "checkpointing", "a module")

SET_UPS: list[tuple[str, str, str]] = [
    *[(name, "modules", "trained") for name in ("qwen2", "gemma2", "gpt2", "bert", "bart", "clip", "whisper", "mamba")],
    *[(name, "modules", "trained") for name in ("mixtral", "albert", "convnext", "wav2vec2", "deberta-v2")],
    *[("llama", "modules", each) for each in USES],
    *[("vit", "modules", each) for each in ("fresh", "trained with DoRA and dropout", "a module trained whole")],
    *[("vit", "modules", each) for each in ("a bfloat16 base, trained", "checkpointing", "a copy of the model")],
    *[("t5", "modules", each) for each in ("fresh", "trained with DoRA and dropout", "reentrant checkpointing")],
    *[("t5", "modules", each) for each in ("a bfloat16 base, trained", "two adapters, both active")],
    *[("attention", "symbolic", each) for each in USES if not each.startswith(_OF_LANGUAGE_MODELS)],
    ("mlp", "symbolic", "a module trained whole"),
    *[(name, "symbolic", "trained") for name in ("cnn", "batch-norm", "residual", "shared-module", "functional-weight")],
    *[(name, "symbolic", "trained") for name in ("given-input", "torch-encoder")],
    *[("residual", "export", each) for each in ("trained", "trained with DoRA and dropout", "merged and taken apart again")],
    ("functional-weight", "modules", "trained"),
    ("functional-weight", "export", "trained"),
    ("vit", "export", "two adapters, both active"),
]  # fmt: skip
"""Architectures, captures and uses."""


@dataclass(frozen=True)
class Alarms:
    """What was said of a healthy set-up."""

    entry: str
    capture: str
    use: str
    alarms: tuple[str, ...]


def examine(name: str, capture: str, way: str) -> Alarms:
    """Ask doctor with and without a batch, verify, and compare with the merged model, or the base while B is zero."""
    patient = Patient.of(name, capture)
    USES[way](patient)
    model, alarms = patient.model, []
    for batch in (None, patient.batch):
        report = doctor(model, batch, optimizer=patient.optimizer)
        alarms += [f"doctor: {each.code}: {each.what}" for each in report.findings if each.severity != "note"]
    try:
        model.verify()
    except VerifyError as error:
        alarms.append(f"verify: {error}")
    other = patient.entry.model() if way == "fresh" else copy.deepcopy(model).merge_and_unload()
    found = compare(model, other, patient.batch, backward=True)
    alarms += [] if found.agrees and found.compared else [f"compare: {found}"]
    return Alarms(name, capture, way, tuple(alarms))
