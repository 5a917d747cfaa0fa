"""Faults of numbers, scales, dtypes, merges, ties and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import LoraConfig, lora_transform
from tests.faults.seeded.set_ups import Case
from tests.faults.seeded.tools import fault

# ---- factors ----


@fault("B stays zero in one layer while the others are trained", "doctor", "dead-branch")
def dead_adapter(case: Case) -> str:
    nn.init.zeros_(case.factor("B"))
    return case.site


@fault("A and B of one layer are zero", "doctor", "stuck-branch", also=["zero-gradient"])
def stuck_branch(case: Case) -> str:
    for part in ("A", "B"):
        nn.init.zeros_(case.factor(part))
    return case.site


@fault("one entry of a factor is NaN", "doctor", "not-finite", also=["gradient-not-finite"])
def nan_in_a_factor(case: Case) -> str:
    with torch.no_grad():
        case.factor("A")[1, 2] = torch.nan
    return f"{case.site}.lora_A.default.weight"


@fault("one entry of a factor is NaN", "compare", "output")
def nan_in_b(case: Case) -> str:
    with torch.no_grad():
        case.factor("B")[1, 2] = torch.nan
    return case.site


@fault("one layer uses its whole rank", "doctor", "rank-saturated", hosts=["llama", "vit", "t5"], anew=True)
def saturated_rank(case: Case) -> str:
    case.again(r=8)
    with torch.no_grad():
        for site in case.sites:
            A, B = (case.factor(part, site) for part in ("A", "B"))
            B.copy_(torch.eye(*B.shape))
            A.copy_(torch.eye(*A.shape) * (1.0 if site == case.site else 0.5 ** torch.arange(8.0)[:, None]))
    return case.site


@fault("the factors of two layers are swapped", "compare", "output")
def swapped_factors(case: Case) -> str:
    for part in ("A", "B"):
        one, other = case.factor(part), case.factor(part, case.host.sibling)
        one.data, other.data = other.data.clone(), one.data.clone()
    return case.site


# ---- scales ----


@fault("the scale of one layer was changed by hand", "doctor", "broken-graph")
@fault("the scale of one layer was changed by hand", "verify", "the configuration's")
@fault("the scale of one layer was changed by hand", "compare", "output")
def scale_of_one_layer(case: Case) -> str:
    scaling: Any = case.model.get_submodule(f"{case.site}.lora_scaling.default")
    scaling.value = 2 * scaling.value
    return case.site


@fault("the scale is another than the configuration's", "doctor", "scale-not-saved")
def scale_of_the_adapter(case: Case) -> list[str]:
    case.model.scale_adapter(1.5)
    return case.sites


@fault("the scale is zero", "doctor", "scale-zero", also=["scale-not-saved"])
def scale_zero(case: Case) -> list[str]:
    case.model.set_scale("default", 0.0)
    return case.sites


# ---- dtypes ----


@fault("factors were cast to float16", "doctor", "float16-factors", also=["narrow-factors"])
def float16_adapter(case: Case) -> list[str]:
    names = [f"{case.site}.lora_{part}.default.weight" for part in ("A", "B")]
    for part in ("A", "B"):
        case.factor(part).data = case.factor(part).data.half()
    return names


@fault("factors were cast to bfloat16", "doctor", "narrow-factors")
def bfloat16_adapter(case: Case) -> list[str]:
    names = [f"{case.site}.lora_{part}.default.weight" for part in ("A", "B")]
    for part in ("A", "B"):
        case.factor(part).data = case.factor(part).data.bfloat16()
    return names


@fault("one factor was cast to float64", "doctor", "mixed-dtypes")
def one_factor_cast(case: Case) -> str:
    case.factor("A").data = case.factor("A").data.double()
    return case.site


@fault("one layer of the base was cast to bfloat16 and back", "compare", "output")
def base_weight_rounded(case: Case) -> str:
    weight = case.model.get_parameter(f"{case.site}.weight")
    weight.data = weight.data.bfloat16().float()
    return case.site


# ---- merges ----


@fault("a base weight changed after the merge", "doctor", "stale-merge", also=["idle-adapter"])
def base_changed_after_merge(case: Case) -> str:
    case.model.merge_adapter()
    with torch.no_grad():
        case.model.get_parameter(f"{case.site}.weight").add_(0.1)
    return f"{case.site}.weight"


@fault("the adapter changed after the merge", "doctor", "stale-merge", also=["idle-adapter"])
def adapter_changed_after_merge(case: Case) -> str:
    case.model.merge_adapter()
    with torch.no_grad():
        case.factor("B").mul_(1.5)
    return f"{case.site}.weight"


@fault("the model is trained on while merged", "doctor", "idle-adapter")
def trained_while_merged(case: Case) -> list[str]:
    case.model.merge_adapter()
    return [f"{site}.lora_{part}.default.weight" for site in case.sites for part in ("A", "B")]


@fault("a merged weight is not W + s·BA", "compare", "output")
def wrong_merge(case: Case) -> str:
    weight = case.model.get_parameter(f"{case.site}.weight")
    A, B = case.factor("A").detach(), case.factor("B").detach()
    merged: Any = case.model.merge_and_unload()
    with torch.no_grad():
        weight.add_(B @ A, alpha=-1.0)  # alpha / r is 2: one of the two is gone
    case.model = merged
    return case.site


# ---- ties ----


@fault("the tied output layer is a target", "doctor", "tied-weight", hosts=["llama", "t5"], captures=["modules"])
def tied_head(case: Case) -> str:
    base: Any = case.host.model()
    base.lm_head.weight = base.get_input_embeddings().weight
    case.again(base, target_modules=["lm_head"])
    return "lm_head"


class TiedByFunction(nn.Module):
    """A language model whose head reads the weight of the embedding, without a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.block(self.embed(x)).tanh(), self.embed.weight)


@fault(
    "a head reads an adapted weight itself", "doctor", "weight-read-elsewhere", hosts=["plain"], captures=["modules"]
)
@fault(
    "a head reads an adapted weight itself", "doctor", "tied-weight", hosts=["plain"], captures=["symbolic", "export"]
)
def head_by_function(case: Case) -> str:
    torch.manual_seed(0)
    case.batch = {"x": torch.randint(16, (3, 5))}
    config = LoraConfig(r=4, target_modules=["embed"])
    capture: Any = case.capture
    example = case.batch if capture == "export" else None
    case.model = lora_transform(TiedByFunction(), config, capture=capture, example_inputs=example)
    return "embed"


# ---- layers that change after the transform ----


@fault("the host replaced a layer", "doctor", "missing-parameter", also=["base-trainable"])
def replaced_layer(case: Case) -> list[str]:
    site = vanished_layer(case)
    return [f"{site}.lora_{part}.default.weight" for part in ("A", "B")]


@fault("the host replaced a layer", "verify", "")
def vanished_layer(case: Case) -> str:
    parent, _, name = case.site.rpartition(".")
    out_features, in_features = case.model.get_parameter(f"{case.site}.weight").shape
    setattr(case.model.get_submodule(parent), name, nn.Linear(in_features, out_features))
    return case.site


@fault("a part of a branch was left behind by hand", "doctor", "orphan-branch", also=["not-run"])
def part_left_behind(case: Case) -> str:
    return f"{left_behind(case)}.lora_A.forgotten"


@fault("a part of a branch was left behind by hand", "verify", "belongs to no adapter")
def left_behind(case: Case) -> str:
    holder: Any = case.model.get_submodule(f"{case.site}.lora_A")
    holder["forgotten"] = nn.Linear(8, 2, bias=False)
    return case.site


@fault("the factor was replaced by one of another shape", "doctor", "broken-graph", also=["batch-fails"])
@fault("the factor was replaced by one of another shape", "verify", "has shape")
def transposed_factor(case: Case) -> str:
    holder: Any = case.model.get_submodule(f"{case.site}.lora_B.default")
    holder.weight = nn.Parameter(holder.weight.detach().t().contiguous())
    return case.site


@fault("dropout stayed on in evaluation", "doctor", "dropout-in-evaluation", captures=["modules", "symbolic"])
def dropout_in_evaluation(case: Case) -> str:
    case.again(lora_dropout=0.1)
    case.model.eval()
    case.model.get_submodule(f"{case.site}.lora_dropout").train()
    return f"{case.site}.lora_dropout.default"


# ---- files ----


@fault("a file has an A of another shape", "loading", "shape")
def file_with_another_shape(case: Case) -> str:
    def change(tensors: dict[str, Tensor], key: str) -> None:
        tensors[key] = torch.zeros(7, tensors[key].shape[1])

    return _loads_changed(case, change)


@fault("a file has a key of another model", "loading", "")
def file_with_another_key(case: Case) -> str:
    def change(tensors: dict[str, Tensor], key: str) -> None:
        tensors[key.replace(".lora_A", "_renamed.lora_A")] = tensors.pop(key)

    return _loads_changed(case, change, named=lambda key: key.replace(".lora_A", "_renamed.lora_A"))


@fault("a file has a NaN", "loading", "NaN")
@fault("a file has a NaN", "check_files", "NaN", also=["differs"])
def file_with_nan(case: Case) -> str:
    def change(tensors: dict[str, Tensor], key: str) -> None:
        tensors[key][0, 0] = torch.nan

    return _loads_changed(case, change)


@fault("the adapter is another architecture's", "loading", "")
def another_models_adapter(case: Case) -> str:
    other = Case.of("vit" if case.host.name == "t5" else "t5", "modules")
    directory = _directory(case)
    other.model.save_pretrained(directory)
    case.attempt = lambda: case.model.load_adapter(directory, "other")
    return other.config["target_modules"][0]


@fault("a bit of a file flipped", "check_files", "differs")
def flipped_bit(case: Case) -> str:
    directory = _directory(case)
    case.model.save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    return file.name


def _directory(case: Case) -> Path:
    assert case.directory is not None
    return case.directory


def _loads_changed(case: Case, change: Any, named: Any = None) -> str:
    directory = _directory(case)
    case.model.save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = (each for each in tensors if each.endswith(f"{case.site}.lora_A.weight"))
    change(tensors, key)
    save_file(tensors, file, {"format": "pt"})
    case.attempt = lambda: case.model.load_adapter(directory, "other")
    return named(key) if named else key
