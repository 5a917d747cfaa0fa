"""What one does with adapters, once for both libraries: the rows of docs/adapters.md, and the cases of test_adapters.py.

An operation is a function of a `Side`, which holds the adapters "one" (active), "two" and "three"; it gives back what is
compared: tensors by their error, anything else by equality. Where peft refuses, or lacks the method, `reference` says
what is right instead, from float64.
"""

from __future__ import annotations

import json
import tempfile
import unittest.mock
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fxlora.algebra import COMBINATIONS
from tests.oracle.cases import ALL, Case, indices, llama, token_ids
from tests.oracle.parity import WEIGHTS
from tests.oracle.sides import BASE, Exact, Side, gradients

Seen = dict[str, Any]


class Words(nn.Module):
    """An embedding, two layers and a head, each of which may have an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1 = nn.Embedding(11, 8), nn.Linear(8, 12)
        self.fc2, self.head = nn.Linear(12, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(self.embed(x)).tanh()).tanh())


WORDS = Case("words", "adapters", Words, indices, {"target_modules": ["fc1"]})
LLAMA = Case(
    "llama", "adapters", llama(bos_token_id=1, eos_token_id=2, pad_token_id=0), token_ids,
    {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}, captures=("export", "modules"),
)  # fmt: skip

ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "words": {
        "one": {"r": 4, "lora_alpha": 6, "target_modules": ["embed", "fc1", "fc2"]},
        "two": {"r": 4, "lora_alpha": 3, "target_modules": ["fc1", "fc2", "head"]},
        "three": {"r": 2, "lora_alpha": 5, "target_modules": ["fc2"]},
    },
    "llama": {"one": {"r": 4}, "two": {"r": 4, "lora_alpha": 9}, "three": {"r": 2, "target_modules": ["v_proj"]}},
}
"""Fields of the adapters' configurations, by the case's name."""

OTHERS: dict[str, dict[str, Any]] = {
    "same": {"r": 4, "lora_alpha": 7, "target_modules": ["fc1", "fc2", "head"]},
    "embedded": {"r": 4, "lora_alpha": 7, "target_modules": ["embed", "fc1", "fc2"]},
    "wide": {"r": 6, "lora_alpha": 7, "target_modules": ["fc1"]},
    "more": {"r": 3, "lora_alpha": 2, "target_modules": ["fc1", "head"]},
}
"""Adapters for `words` that lie in files only."""

ROWS = ["two", BASE, "one"]


@dataclass(frozen=True, eq=False)
class Operation:
    """One row of the table.

    Attributes:
        name: for people and test ids.
        group: the part of the table.
        act: does it, and gives back what is to be compared.
        methods: the public methods and properties of `LoraModel` that it shows.
        case: the model.
        captures: that can do it; the others must refuse.
        peft_says: what peft says instead, as a regular expression; empty where it does the same.
        reference: what is right where peft says something.
        tolerance: of the error.
    """

    name: str
    group: str
    act: Callable[[Side], Seen]
    methods: tuple[str, ...] = ()
    case: Case = WORDS
    captures: tuple[str, ...] = ALL
    peft_says: str = ""
    reference: Callable[[Exact], Seen] | None = None
    tolerance: float = 2e-5


OPERATIONS: list[Operation] = []

READING, LIFE, MERGING, SCALES, FILES, ALGEBRA, ROWS_GROUP, SLOTS, TRAINING = (
    "Reading", "Choosing adapters", "Merging", "Scales", "Files", "Algebra", "Mixed batches", "Slots and hot swap",
    "Training",
)  # fmt: skip
GROUPS = (READING, LIFE, MERGING, SCALES, FILES, ALGEBRA, ROWS_GROUP, SLOTS, TRAINING)


def operation(name: str, group: str, *methods: str, **more: Any) -> Callable[[Callable[[Side], Seen]], Any]:
    """Make a function a row of the table."""

    def add(act: Callable[[Side], Seen]) -> Callable[[Side], Seen]:
        OPERATIONS.append(Operation(name, group, act, methods, **more))
        return act

    return add


NO_SUCH = r"AttributeError: .*has no attribute"


# ---- reading ----


@operation("active_adapters, active_adapter, peft_config", READING, "active_adapters", "active_adapter", "peft_config")
def reading(side: Side) -> Seen:
    configs = {
        name: (config.r, config.lora_alpha, sorted(config.target_modules))
        for name, config in side.model.peft_config.items()
    }
    return {"active": side.model.active_adapters, "first": str(side.model.active_adapter), "configs": configs}


@operation(
    "get_nb_trainable_parameters, print_trainable_parameters", READING, "get_nb_trainable_parameters",
    "print_trainable_parameters",
)  # fmt: skip
def counting(side: Side) -> Seen:
    return {"counts": side.model.get_nb_trainable_parameters()}


@operation("get_layer_status", READING, "get_layer_status")
def layer_status(side: Side) -> Seen:
    before = side.layer_status()
    side.model.set_adapter("two")
    return {"before": before, "after": side.layer_status()}


@operation("get_model_status", READING, "get_model_status")
def model_status(side: Side) -> Seen:
    side.several(["one", "three"])
    return {"status": asdict(side.model.get_model_status())}


@operation("get_base_model", READING, "get_base_model")
def base_model(side: Side) -> Seen:
    return {"outputs": side.outputs(side.model.get_base_model())}


@operation(
    "print_graph, print_readable, verify", READING, "print_graph", "print_readable", "verify", "capture",
    peft_says=NO_SUCH, reference=lambda exact: {"inserted": True, "commented": True, "sound": None},
)  # fmt: skip
def graphs(side: Side) -> Seen:
    commented = "# lora: " in side.model.print_readable(print_output=False)
    return {"inserted": "+ " in side.model.print_graph(), "commented": commented, "sound": side.model.verify()}


# ---- choosing adapters ----


@operation("add_adapter", LIFE, "add_adapter")
def add_adapter(side: Side) -> Seen:
    side.model.add_adapter("four", side.config(r=3, target_modules=["fc1", "head"]))
    factors = side.tensors("four")
    side.model.set_adapter("four")
    return side.seen(factors=factors)


@operation("set_adapter", LIFE, "set_adapter")
def set_adapter(side: Side) -> Seen:
    side.model.set_adapter("two")
    return side.seen()


@operation("set_adapter, several", LIFE, "set_adapter")
def several(side: Side) -> Seen:
    side.several(["three", "one"])
    return side.seen()


@operation("set_adapter, inference_mode=True", LIFE, "set_adapter")
def inference_mode(side: Side) -> Seen:
    side.model.set_adapter("two", inference_mode=True)
    return side.seen()


@operation("set_requires_grad", LIFE, "set_requires_grad")
def set_requires_grad(side: Side) -> Seen:
    side.model.set_requires_grad(["two", "three"])
    side.model.set_requires_grad("one", requires_grad=False)
    return side.seen()


@operation("delete_adapter", LIFE, "delete_adapter")
def delete_adapter(side: Side) -> Seen:
    side.model.delete_adapter("two")
    return side.seen(left=sorted(side.model.peft_config))


@operation(
    "delete_adapter, the active one", LIFE, "delete_adapter", peft_says="KeyError: 'one'",
    reference=lambda exact: {"outputs": exact.outputs({"three": 1.0}), "active": ["three"]},
)  # fmt: skip
def delete_active(side: Side) -> Seen:
    side.model.delete_adapter("one")
    return {"outputs": side.outputs(), "active": side.model.active_adapters}


@operation("disable_adapter", LIFE, "disable_adapter")
def disable_adapter(side: Side) -> Seen:
    with side.model.disable_adapter():
        inside = side.outputs()
    return side.seen(inside=inside)


@operation("disable_adapter_layers, enable_adapter_layers", LIFE, "disable_adapter_layers", "enable_adapter_layers")
def adapter_layers(side: Side) -> Seen:
    side.model.disable_adapter_layers()
    disabled = side.outputs()
    side.model.enable_adapter_layers()
    return side.seen(disabled=disabled)


# ---- merging ----


@operation("merge_adapter", MERGING, "merge_adapter")
def merge_adapter(side: Side) -> Seen:
    side.model.merge_adapter()
    return {"outputs": side.outputs()}


@operation("merge_adapter, several", MERGING, "merge_adapter")
def merge_several(side: Side) -> Seen:
    side.several(["one", "two"])
    side.model.merge_adapter()
    return {"outputs": side.outputs()}


@operation(
    "merge_adapter, some of the active", MERGING, "merge_adapter", peft_says="outputs differ",
    reference=lambda exact: {"outputs": exact.outputs({"one": 1.0, "two": 1.0, "three": 1.0})},
)  # fmt: skip
def merge_some(side: Side) -> Seen:
    side.several(["one", "two", "three"])
    side.model.merge_adapter(["two", "three"])
    return {"outputs": side.outputs()}


@operation("unmerge_adapter", MERGING, "unmerge_adapter")
def unmerge_adapter(side: Side) -> Seen:
    side.model.merge_adapter(["one"])
    side.model.unmerge_adapter()
    return side.seen()


@operation("merge_and_unload", MERGING, "merge_and_unload")
def merge_and_unload(side: Side) -> Seen:
    plain = side.model.merge_and_unload()
    return {"outputs": side.outputs(plain), "weights": dict(plain.state_dict())}


@operation("merge_and_unload, adapter_names", MERGING, "merge_and_unload")
def merge_some_and_unload(side: Side) -> Seen:
    plain = side.model.merge_and_unload(adapter_names=["two", "three"])
    return {"outputs": side.outputs(plain), "weights": dict(plain.state_dict())}


@operation("unload", MERGING, "unload")
def unload(side: Side) -> Seen:
    plain = side.model.unload()
    return {"outputs": side.outputs(plain), "weights": dict(plain.state_dict())}


@operation(
    "unload, while merged", MERGING, "unload", peft_says="outputs differ",
    reference=lambda exact: {"outputs": exact.outputs({}), "weights": dict(exact.base.state_dict())},
)  # fmt: skip
def unload_merged(side: Side) -> Seen:
    side.model.merge_adapter()
    return unload(side)


# ---- scales ----


@operation("set_scale", SCALES, "set_scale")
def set_scale(side: Side) -> Seen:
    side.set_scale("one", 0.25)
    return side.seen()


@operation("scale_adapter, unscale_adapter", SCALES, "scale_adapter", "unscale_adapter")
def scale(side: Side) -> Seen:
    side.several(["two", "three"])
    side.multiply_scale(3.0)
    scaled = side.outputs()
    side.divide_scale(2.0)
    divided = side.outputs()
    side.divide_scale()
    return side.seen(scaled=scaled, divided=divided)


@operation(
    "scale_adapter, an embedding too", SCALES, "scale_adapter", peft_says="outputs differ",
    reference=lambda exact: {"outputs": exact.outputs({"one": 3.0})},
)  # fmt: skip
def scale_embedding(side: Side) -> Seen:
    side.multiply_scale(3.0)
    return {"outputs": side.outputs()}


@operation("rescale_adapter_scale", SCALES)
def rescale(side: Side) -> Seen:
    with side.rescaled(0.5):
        inside = side.outputs()
    return side.seen(inside=inside)


# ---- files ----


def _files(folder: str) -> Seen:
    paths = sorted(Path(folder).rglob("adapter_*"))
    return {"files": [str(path.relative_to(folder)) for path in paths]}


@operation("save_pretrained", FILES, "save_pretrained")
def save_pretrained(side: Side) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        side.model.save_pretrained(folder)
        configs = [json.loads(path.read_text()) for path in sorted(Path(folder).rglob("adapter_config.json"))]
        fields = [(each["r"], each["lora_alpha"], sorted(each["target_modules"])) for each in configs]
        return {**_files(folder), "configs": fields, "tensors": _read(folder, side.model.peft_config)}


def _read(folder: str, names: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {f"{name}: {key}": value for name in names for key, value in load_file(Path(folder, name, WEIGHTS)).items()}


@operation("save_pretrained, selected_adapters", FILES, "save_pretrained")
def save_selected(side: Side) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        side.model.save_pretrained(folder, selected_adapters=["three", "one"])
        return {**_files(folder), "tensors": _read(folder, ["three", "one"])}


@operation(
    "save_pretrained, save_embedding_layers", FILES, "save_pretrained", case=LLAMA, captures=("export", "modules")
)
def save_embeddings(side: Side) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        side.model.save_pretrained(folder, selected_adapters=["one"], save_embedding_layers=True)
        return {"tensors": _read(folder, ["one"])}


@operation("load_adapter", FILES, "load_adapter")
def load_adapter(side: Side) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        side.model.save_pretrained(folder, selected_adapters=["two"])
        side.model.load_adapter(str(Path(folder, "two")), "again")
    before = side.outputs()
    side.model.set_adapter("again")
    return side.seen(before=before)


@operation("create_or_update_model_card", FILES, "create_or_update_model_card")
def model_card(side: Side) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        side.model.create_or_update_model_card(folder)
        card = yaml.safe_load(Path(folder, "README.md").read_text().split("---")[1])
    return {name: card[name] for name in ("library_name", "tags")}


# ---- algebra ----


def _weighted(combination: str) -> None:
    fields: dict[str, Any] = {"combination_type": combination}
    if combination.endswith("svd"):
        fields["svd_rank"] = 3
    if combination.startswith(("ties", "dare", "magnitude")):
        fields["density"] = 0.6

    @operation(f"add_weighted_adapter, {combination}", ALGEBRA, "add_weighted_adapter", tolerance=1e-4)
    def act(side: Side) -> Seen:
        side.model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", **fields)
        side.model.set_adapter("sum")
        config = side.model.peft_config["sum"]
        return side.seen(config=(config.r, config.lora_alpha, sorted(config.target_modules)))


for _each in COMBINATIONS:
    _weighted(_each)


@operation(
    "subtract_adapter", ALGEBRA, "subtract_adapter", peft_says=NO_SUCH,
    reference=lambda exact: {"outputs": exact.outputs({"one": 1.0, "two": -1.0})},
)  # fmt: skip
def subtract(side: Side) -> Seen:
    side.model.subtract_adapter("one", "two", "difference")
    side.model.set_adapter("difference")
    return {"outputs": side.outputs()}


def _best_of_rank_2(exact: Exact) -> Seen:
    weights = {name: value.detach() for name, value in exact.weights({"one": 1.0}).items()}
    for name, value in weights.items():
        plain = exact.base.get_parameter(name).detach()
        u, s, v = torch.linalg.svd(value - plain, full_matrices=False)
        weights[name] = plain + (u[:, :2] * s[:2]) @ v[:2]
    return {"outputs": exact.outputs({}, weights)}


@operation("reduce_rank", ALGEBRA, "reduce_rank", peft_says=NO_SUCH, reference=_best_of_rank_2)
def reduce_rank(side: Side) -> Seen:
    side.model.reduce_rank("one", 2, "small")
    side.model.set_adapter("small")
    return {"outputs": side.outputs()}


@operation(
    "extract_adapter", ALGEBRA, peft_says=NO_SUCH, reference=lambda exact: {"outputs": exact.outputs({"one": 1.0})},
)  # fmt: skip
def extract(side: Side) -> Seen:
    base, tuned = side.setup.case.model(), side.setup.case.model()
    weights = {name: value.detach().float() for name, value in side.setup.exact.weights({"one": 1.0}).items()}
    tuned.load_state_dict({**tuned.state_dict(), **weights})
    with tempfile.TemporaryDirectory() as folder:
        side.library.extract_adapter(base, tuned, Path(folder, "new"), r=4, target_modules=["embed", "fc1", "fc2"])
        side.model.load_adapter(Path(folder, "new"), "extracted")
    side.model.set_adapter("extracted")
    return {"outputs": side.outputs()}


# ---- mixed batches ----


@operation("adapter_names", ROWS_GROUP)
def adapter_names(side: Side) -> Seen:
    return side.seen(rows=side.outputs(adapter_names=ROWS))


def _rows_with_gradients(exact: Exact) -> Seen:
    outputs = exact.rows(ROWS)
    return {"rows": outputs, "gradients": exact.gradients(outputs)}


@operation(
    "adapter_names, in training", ROWS_GROUP, peft_says="ValueError: .*training mode", reference=_rows_with_gradients
)
def adapter_names_trained(side: Side) -> Seen:
    side.model.set_requires_grad(["one", "two"])
    side.model.train()
    outputs = [side.model(**side.setup.case.batch(), adapter_names=ROWS)]
    return {"rows": [out.detach() for out in outputs], "gradients": gradients(side.model, outputs)}


@operation(
    "adapter_rows", ROWS_GROUP, "adapter_rows", peft_says=NO_SUCH,
    reference=lambda exact: {"rows": exact.rows(ROWS), "after": exact.outputs({"one": 1.0})},
)  # fmt: skip
def adapter_rows(side: Side) -> Seen:
    with side.model.adapter_rows(ROWS):
        rows = side.outputs()
    return {"rows": rows, "after": side.outputs()}


def _generated(side: Side, **settings: Any) -> Seen:
    batch = side.setup.case.batch()
    tokens = side.model.generate(
        **batch, adapter_names=ROWS, max_new_tokens=5, do_sample=False, use_cache=True, **settings
    )
    return {"tokens": tokens.tolist()}


@operation("generate, adapter_names", ROWS_GROUP, case=LLAMA, captures=("modules",))
def generate(side: Side) -> Seen:
    return _generated(side)


@operation("generate, adapter_names, 3 beams", ROWS_GROUP, case=LLAMA, captures=("modules",))
def generate_beams(side: Side) -> Seen:
    return _generated(side, num_beams=3)


# ---- slots and hot swap ----


@operation(
    "use_slots, set_adapter", SLOTS, "use_slots", peft_says=NO_SUCH,
    reference=lambda exact: {
        "first": exact.outputs({"one": 1.0}), "second": exact.outputs({"two": 1.0}),
        "both": exact.outputs({"two": 1.0, "three": 1.0}), "none": exact.outputs({}),
        "scaled": exact.outputs({"two": 0.5, "three": 1.0}), "rows": exact.rows(ROWS),
    },
)  # fmt: skip
def use_slots(side: Side) -> Seen:
    side.model.use_slots()
    found = {"first": side.outputs()}
    side.model.set_adapter("two")
    found["second"] = side.outputs()
    side.several(["two", "three"])
    found["both"] = side.outputs()
    with side.model.disable_adapter():
        found["none"] = side.outputs()
    found["rows"] = side.outputs(adapter_names=ROWS)
    side.set_scale("two", 0.5)
    return {**found, "scaled": side.outputs()}


@operation(
    "refresh_slots, leave_slots", SLOTS, "refresh_slots", "leave_slots", peft_says=NO_SUCH,
    reference=lambda exact: {"refreshed": exact.outputs({"one": 2.0}), "left": exact.outputs({"one": 2.0})},
)  # fmt: skip
def refresh_slots(side: Side) -> Seen:
    side.model.use_slots()
    with torch.no_grad():
        for name, parameter in side.model.named_parameters():
            if "_B.one." in name:
                parameter.mul_(2)
    side.model.refresh_slots()
    refreshed = side.outputs()
    side.model.leave_slots()
    return {"refreshed": refreshed, "left": side.outputs()}


@operation("hotswap_adapter", SLOTS, "hotswap_adapter")
def hotswap(side: Side) -> Seen:
    side.model.set_adapter("two")
    side.hotswap(side.setup.folder / "others" / "same", "two")
    return side.seen()


@operation("hotswap_adapter, higher rank and fewer layers", SLOTS, "hotswap_adapter")
def hotswap_wide(side: Side) -> Seen:
    side.hotswap(side.setup.folder / "others" / "wide", "one")
    return {"outputs": side.outputs()}


@operation("hotswap_adapter, the same into slots of rank 8", SLOTS, "hotswap_adapter")
def hotswap_prepared(side: Side) -> Seen:
    side.make_room(8)
    return hotswap_wide(side)


def _swapped(exact: Exact, name: str) -> Seen:
    return {"outputs": exact.of_file(exact.setup.folder / "others" / name, OTHERS[name])}


@operation(
    "hotswap_adapter, an embedding", SLOTS, "hotswap_adapter", peft_says="AttributeError: ",
    reference=lambda exact: _swapped(exact, "embedded"),
)  # fmt: skip
def hotswap_embedding(side: Side) -> Seen:
    side.hotswap(side.setup.folder / "others" / "embedded", "one")
    return {"outputs": side.outputs()}


@operation(
    "hotswap_adapter, other layers", SLOTS, "hotswap_adapter", peft_says="RuntimeError: ",
    reference=lambda exact: _swapped(exact, "more"),
)  # fmt: skip
def hotswap_more(side: Side) -> Seen:
    side.model.set_adapter("three")
    side.hotswap(side.setup.folder / "others" / "more", "three")
    return {"outputs": side.outputs()}


@operation(
    "hotswap_adapter into slots, other layers", SLOTS, "hotswap_adapter", peft_says=NO_SUCH,
    reference=lambda exact: _swapped(exact, "more"),
)  # fmt: skip
def hotswap_into_slots(side: Side) -> Seen:
    side.model.use_slots(target_modules=["head"])
    side.hotswap(side.setup.folder / "others" / "more", "one")
    return {"outputs": side.outputs()}


# ---- training ----


def _steps(side: Side, optimizer: Any) -> Seen:
    """Losses of three steps, and the factors after them."""
    side.model.train()
    losses: list[Tensor] = []
    for _ in range(3):
        loss = (side.model(**side.setup.case.batch()) - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    side.model.eval()
    factors = {name: side.tensors(name) for name in side.model.peft_config}
    return side.seen(losses=losses, factors={f"{n}: {key}": t for n, own in factors.items() for key, t in own.items()})


@operation("AdamW, three steps", TRAINING, tolerance=1e-4)
def adamw(side: Side) -> Seen:
    trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    return _steps(side, torch.optim.AdamW(trained, lr=1e-2))


@operation("AdamW, two adapters at once", TRAINING, tolerance=1e-4)
def adamw_two(side: Side) -> Seen:
    side.several(["one", "two"])
    return adamw(side)


@operation("create_loraplus_optimizer", TRAINING, tolerance=1e-4)
def loraplus(side: Side) -> Seen:
    create = side.optimizers.create_loraplus_optimizer
    return _steps(side, create(side.model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0))


@operation("create_lorafa_optimizer", TRAINING, tolerance=1e-4)
def lorafa(side: Side) -> Seen:
    side.model.set_adapter("two")
    for name in ("three", "one"):  # peft's pairs of factors are wrong as soon as there are two adapters
        side.model.delete_adapter(name)
    with unittest.mock.patch("peft.optimizers.lorafa.is_bf16_available", lambda: False):  # or it rounds to bfloat16
        optimizer = side.optimizers.create_lorafa_optimizer(side.model, r=4, lora_alpha=3, lr=1e-2)
        return _steps(side, optimizer)
