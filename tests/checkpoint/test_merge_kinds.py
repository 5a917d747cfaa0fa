"""Every kind and variant that adapter files can hold: the fold of files is that of the live model, byte for byte, and
that of peft up to its roundings."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxlora import CheckpointError, ConfigError, LoraConfig, MergeError, export_merged, lora_transform, merge_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*LSTM with projections.*oneDNN")

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


class Experts(nn.Module):
    def __init__(self, *, transposed: bool = False, hidden: int = 6, inner: int = 5) -> None:
        super().__init__()
        sizes = (
            ((3, hidden, 2 * inner), (3, inner, hidden)) if transposed else ((3, 2 * inner, hidden), (3, hidden, inner))
        )
        self.is_transposed = transposed
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(size) / 3) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        a, b = (x[None] @ up).chunk(2, -1)
        return (a * b @ down).sum(0)


class Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(5, 6) / 3), nn.Parameter(torch.randn(4, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.w), self.v)


class Attention(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True, **sizes)
        self.other = sizes.get("kdim", 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x[None]
        other = x[..., : self.other]
        return self.mha(x, other, other, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, proj_size=3)
        self.cell = nn.GRUCell(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0].sum(-1, keepdim=True) + self.cell(x)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(6, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, x)


class Holder(nn.Module):
    """One module with a name of its own, since peft takes no parameter of the root."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


FLOATS = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))


def images(dims: int) -> Tensor:
    return torch.randn(2, 4, *[5] * dims, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """A model, what is adapted in it, and whether peft can too."""

    model: Any
    x: Tensor = field(default_factory=lambda: FLOATS)
    config: dict[str, Any] = field(default_factory=dict)
    peft: bool = True
    changed: int = 1


def targets(*names: str, **config: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **config}


def bare(*names: str, **config: Any) -> dict[str, Any]:
    return {"target_modules": [], "target_parameters": list(names), **config}


_CONVS = {dims: partial(cls, 4, 6, 3, padding=1) for dims, cls in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)}

CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(6, 5), config=targets("inner", "head"), changed=2),
    "linear DoRA": Case(lambda: nn.Linear(6, 5), config=targets("inner", use_dora=True)),
    "linear bias": Case(lambda: nn.Linear(6, 5), config=targets("inner", lora_bias=True), changed=2),
    "rsLoRA and patterns": Case(
        lambda: nn.Linear(6, 5),
        config=targets("inner", "head", use_rslora=True, rank_pattern={"head": 3}, alpha_pattern={"inner": 5}), changed=2,
    ),
    "Conv1D": Case(lambda: Conv1D(5, 6), config=targets("inner", fan_in_fan_out=True)),
    "Conv1D DoRA": Case(lambda: Conv1D(5, 6), config=targets("inner", fan_in_fan_out=True, use_dora=True)),
    "square Conv1D DoRA": Case(lambda: Conv1D(6, 6), config=targets("inner", fan_in_fan_out=True, use_dora=True)),
    "embedding": Case(lambda: nn.Embedding(9, 5), torch.arange(9), targets("inner", "head"), changed=2),
    "square embedding": Case(lambda: nn.Embedding(6, 6), torch.arange(6), targets("inner")),
    "embedding DoRA": Case(lambda: nn.Embedding(9, 5), torch.arange(9), targets("inner", "head", use_dora=True), changed=2),
    **{f"conv{dims}d": Case(_CONVS[dims], images(dims), targets("inner")) for dims in _CONVS},
    **{f"conv{dims}d DoRA": Case(_CONVS[dims], images(dims), targets("inner", use_dora=True)) for dims in _CONVS},
    **{f"conv{dims}d bias": Case(_CONVS[dims], images(dims), targets("inner", lora_bias=True), changed=2) for dims in _CONVS},
    "conv2d 1x1": Case(lambda: nn.Conv2d(4, 4, 1), images(2), targets("inner")),
    "transposed convolution": Case(lambda: nn.ConvTranspose2d(4, 6, 3, padding=1), images(2), targets("inner"), peft=False),
    "bilinear": Case(Pairs, config=targets("both"), peft=False),
    "one matrix": Case(Parameters, config=bare("inner.w")),
    "two matrices": Case(Parameters, config=bare("inner.v", "inner.w", rank_pattern={"inner.v": 3}), changed=2),
    "experts": Case(Experts, config=bare("gate_up_proj", "down_proj", alpha_pattern={".*gate_up_proj": 3}), changed=2),
    "one of the experts": Case(Experts, config=bare("inner.down_proj")),
    "transposed experts": Case(lambda: Experts(transposed=True), config=bare("gate_up_proj", "down_proj"), changed=2),
    "half square experts": Case(lambda: Experts(inner=3), config=bare("gate_up_proj", "down_proj"), changed=2),
    "half square transposed experts": Case(
        lambda: Experts(inner=3, transposed=True), config=bare("gate_up_proj", "down_proj"), changed=2
    ),
    "attention": Case(Attention, config=targets("mha"), changed=2),
    "attention and patterns": Case(Attention, config=targets("mha", rank_pattern={"mha": 3}, alpha_pattern={"mha": 5}), changed=2),
    "separate projections": Case(lambda: Attention(kdim=4, vdim=4), config=targets("mha"), changed=4, peft=False),
    "equal separate projections": Case(lambda: Attention(kdim=5, vdim=5), config=targets("mha"), changed=4, peft=False),
    "recurrent": Case(Recurrent, config=targets("lstm", "cell"), changed=14, peft=False),
}  # fmt: skip


def plain(case: Case, dtype: torch.dtype = torch.float32) -> Holder:
    torch.manual_seed(0)
    model = Holder(case.model())
    with torch.no_grad():
        model(case.x)
        model.head = nn.Linear(model.head.in_features, 2)
    return model.eval().to(dtype)


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(noise + parameter if "magnitude" in name else noise)
    return model.eval()


def adapted(case: Case, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    settings = {"r": 2, **case.config, **config}
    return randomised(lora_transform(plain(case, dtype), LoraConfig(**settings), capture="modules"))


def saved_base(case: Case, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    path.mkdir()
    save_file(plain(case, dtype).state_dict(), path / WEIGHTS, metadata={"format": "pt"})
    return path


def edited(path: Path, edit: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_files_and_live_model_agree(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    base = saved_base(case, tmp_path / "base", dtype)
    ours = adapted(case, dtype)
    ours.save_pretrained(tmp_path / "adapter")
    export_merged(ours, tmp_path / "live")
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert len(report.merged) == case.changed
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "files" / WEIGHTS)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(report.merged)
    assert (tmp_path / "live" / WEIGHTS).read_bytes() == (tmp_path / "files" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.peft])
def test_pefts_files_and_peft_agree(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = saved_base(case, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid shape.*")  # of lora_B.bias, which peft itself made
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*")  # those of parameters do
        theirs = randomised(peft.get_peft_model(plain(case), peft.LoraConfig(**{"r": 2, **case.config})))
        theirs.save_pretrained(tmp_path / "adapter")
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "files")
    assert len(report.merged) == case.changed
    start = plain(case).state_dict()
    expected, found = theirs.merge_and_unload().state_dict(), load_file(tmp_path / "files" / WEIGHTS)
    assert found.keys() == expected.keys()
    for key in found:
        if "out_proj.weight" in key:  # peft adds this update twice
            expected[key] = (start[key] + expected[key]) / 2
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5)
        assert (key in report.merged) == bool((found[key] - start[key]).abs().max() > 0.01)


def test_several_adapters_on_one_weight_are_summed_before_the_rounding(tmp_path: Path) -> None:
    """Plain, DoRA and a branch with a bias: each from the original weight, in any order, rounded once."""
    case = CASES["linear"]
    base = saved_base(case, tmp_path / "base", torch.bfloat16)
    ours = adapted(case, torch.bfloat16)
    ours.add_adapter("dora", LoraConfig(r=3, target_modules=["inner"], use_dora=True))
    ours.add_adapter("bias", LoraConfig(r=2, target_modules=["inner"], lora_bias=True))
    randomised(ours).save_pretrained(tmp_path / "adapter")
    paths = [tmp_path / "adapter", tmp_path / "adapter" / "dora", tmp_path / "adapter" / "bias"]
    merge_checkpoint(base, paths, tmp_path / "one")
    merge_checkpoint(base, paths[::-1], tmp_path / "two")
    ours.set_adapter(["default", "dora", "bias"])
    export_merged(ours, tmp_path / "live")
    found = load_file(tmp_path / "one" / WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(tmp_path / "two" / WEIGHTS).items())
    # in float64 the order of a sum matters in the last bit, which the rounding to bfloat16 does not see here
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(tmp_path / "live" / WEIGHTS).items())


def test_a_weight_scales_the_whole_update(tmp_path: Path) -> None:
    """Also where the update is not linear in the scaling."""
    case = CASES["linear DoRA"]
    base = saved_base(case, tmp_path / "base")
    adapted(case).save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "whole")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "half", weights=[0.5])
    start, whole, half = (
        load_file(path / WEIGHTS)["inner.weight"] for path in (base, tmp_path / "whole", tmp_path / "half")
    )
    torch.testing.assert_close(half - start, (whole - start) / 2)


# ---- what files cannot tell ----

AMBIGUOUS: dict[str, tuple[Case, str]] = {
    "square experts": (
        Case(lambda: nn.ParameterDict({"w": torch.randn(3, 6, 6)}), config=bare("inner.w")),
        r"'inner\.w' is square.*is_transposed.*export_merged",
    ),
    "square experts beside a matrix": (
        Case(lambda: nn.ParameterDict({"w": torch.randn(3, 6, 6), "v": torch.randn(5, 6)}), config=bare("inner.w", "inner.v")),
        r"'inner\.w' is square.*is_transposed.*export_merged",
    ),
    "parameters of one shape": (
        Case(lambda: nn.ParameterDict({"w": torch.randn(5, 6), "v": torch.randn(5, 6)}), config=bare("inner.w", "inner.v")),
        r"which factors of 'inner' are for which of .*export_merged",
    ),
}  # fmt: skip


def saved_factors(path: Path, config: LoraConfig, shapes: dict[str, tuple[int, ...]]) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(config.to_json())
    save_file({f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}, path / ADAPTER)
    return path


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_shapes_are_refused(name: str, tmp_path: Path) -> None:
    case, words = AMBIGUOUS[name]
    module = case.model()
    (tmp_path / "base").mkdir()
    save_file({f"inner.{key}": value.detach().clone() for key, value in module.items()}, tmp_path / "base" / WEIGHTS)
    shapes: dict[str, tuple[int, ...]] = {}
    for depth, value in enumerate(module.values()):
        experts = len(value) if value.dim() == 3 else 1
        prefix = "inner." + "base_layer." * depth
        shapes[f"{prefix}lora_A.weight"] = (2 * experts, value.shape[-1])
        shapes[f"{prefix}lora_B.weight"] = (value.shape[-2], 2 * experts)
    adapter = saved_factors(tmp_path / "adapter", LoraConfig(**{"r": 2, **case.config}), shapes)
    with pytest.raises(MergeError, match=words):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_that_do_not_fit(tmp_path: Path) -> None:
    case = CASES["two matrices"]
    base = saved_base(case, tmp_path / "base")
    adapted(case).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"inner.v": 3', '"inner.v": 4'))
    with pytest.raises(CheckpointError, match=r"factors of 'inner' fit its parameters in no order.*another rank"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    config.write_text(text.replace('"inner.v",', ""))
    with pytest.raises(CheckpointError, match=r"'inner' has the factors of 2 parameters, and 1 of the base's"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


def test_a_bias_that_the_base_lacks(tmp_path: Path) -> None:
    case = CASES["linear bias"]
    base = saved_base(case, tmp_path / "base")
    edited(base / WEIGHTS, lambda tensors: tensors.pop("inner.bias"))
    adapted(case).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"'inner.weight': the adapter has a bias.*no 'inner.bias'"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("linear DoRA", "lora_magnitude_vector", "lacks '.*inner.lora_magnitude_vector': use_dora"),
        ("linear bias", "lora_B.bias", "lacks '.*inner.lora_B.bias': lora_bias"),
        ("embedding", "lora_embedding_B", "'inner' has no lora_embedding_B"),
    ],
)
def test_missing_parts(name: str, part: str, words: str, tmp_path: Path) -> None:
    base = saved_base(CASES[name], tmp_path / "base")
    adapted(CASES[name]).save_pretrained(tmp_path / "adapter")
    edited(tmp_path / "adapter" / ADAPTER, lambda tensors: tensors.pop(f"base_model.model.inner.{part}"))
    with pytest.raises(CheckpointError, match=words):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


# ---- tensors of the base in an adapter ----


@pytest.mark.usefixtures("any_config")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_an_adapter_that_changed_its_base(init: str, tmp_path: Path) -> None:
    """Its factors are for the changed weights, which the base does not have."""
    base = saved_base(CASES["linear"], tmp_path / "base")
    adapted(CASES["linear"]).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{init}"'))
    with pytest.raises(CheckpointError, match=rf"'{init}' changed the base.*path_initial_model_for_weight_conversion"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


@pytest.fixture
def any_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets configurations through that models do not take yet."""
    monkeypatch.setattr(LoraConfig, "validate", lambda self: None)


def trained(path: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """peft's adapter of the model of "linear", whose base tensors were trained too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid shape.*")
        torch.manual_seed(3)
        settings: dict[str, Any] = {"r": 2, "target_modules": ["inner"], **config}
        theirs: Any = peft.get_peft_model(plain(CASES["linear"], dtype), peft.LoraConfig(**settings))
        randomised(theirs)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5)
        theirs.save_pretrained(path)
    return theirs


@pytest.mark.usefixtures("any_config")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"bias": "all"}, {"inner.weight", "inner.bias", "head.bias"}),
        ({"bias": "lora_only"}, {"inner.weight", "inner.bias"}),
        ({"bias": "lora_only", "lora_bias": True}, {"inner.weight", "inner.bias"}),
        ({"modules_to_save": ["head"]}, {"inner.weight", "head.weight", "head.bias"}),
    ],
    ids=["all", "lora_only", "lora_bias", "modules_to_save"],
)
def test_trained_tensors_replace_the_bases(
    config: dict[str, Any], changed: set[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = saved_base(CASES["linear"], tmp_path / "base", dtype)
    merged = trained(tmp_path / "adapter", dtype, **config).merge_and_unload().state_dict()
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert set(report.merged) == changed
    found, before = load_file(tmp_path / "out" / WEIGHTS), load_file(base / WEIGHTS)
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for name in found:
        if name in changed and name in ("inner.weight", "inner.bias"):
            torch.testing.assert_close(found[name], merged[name], **tolerance)
        else:
            assert torch.equal(found[name], merged[name])
        assert found[name].dtype == dtype and torch.equal(found[name], before[name]) == (name not in changed)


@pytest.mark.usefixtures("any_config")
def test_replacements_that_cannot_be(tmp_path: Path) -> None:
    base, out = saved_base(CASES["linear"], tmp_path / "base"), tmp_path / "out"
    trained(tmp_path / "head", modules_to_save=["head"])
    trained(tmp_path / "bias", bias="all")
    edited(tmp_path / "bias" / ADAPTER, lambda t: t["base_model.model.head.bias"].mul_(2))
    trained(tmp_path / "lora", target_modules=["head"])
    for paths, weights, error, words in (
        (["head"], [0.5], ConfigError, r"`weights` has 0.5 for .*head, which replaces 'head\.\w+'"),
        (["head", "bias"], None, MergeError, "'head.bias' is replaced by .*bias and by .*head; merge one"),
        (["head", "lora"], None, MergeError, "'head.weight' is replaced by .*head .*changed by another adapter"),
    ):
        with pytest.raises(error, match=words):
            merge_checkpoint(base, [tmp_path / path for path in paths], out, weights=weights)
    edited(tmp_path / "head" / ADAPTER, lambda t: t.update({"base_model.model.head.weight": torch.ones(3, 5)}))
    with pytest.raises(CheckpointError, match=r"head\.weight' is torch.float32 of shape \(3, 5\).*shape \(2, 5\)"):
        merge_checkpoint(base, tmp_path / "head", out)
    assert not out.exists()


@pytest.mark.parametrize("key", ["inner.base_layer.weight", "inner.base_layer.bias", "head.weight"])
def test_a_base_tensor_that_nothing_trained(key: str, tmp_path: Path) -> None:
    """Equal to the base's it says nothing; else the adapter was trained on another base."""
    case = CASES["linear"]
    base = saved_base(case, tmp_path / "base")
    adapted(case).save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    expected = (tmp_path / "out" / WEIGHTS).read_bytes()
    value = load_file(base / WEIGHTS)[key.replace("base_layer.", "")]
    edited(tmp_path / "adapter" / ADAPTER, lambda tensors: tensors.update({f"base_model.model.{key}": value}))
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == expected
    edited(tmp_path / "adapter" / ADAPTER, lambda tensors: tensors[f"base_model.model.{key}"].view(-1)[0].mul_(2))
    with pytest.raises(CheckpointError, match=re.escape(key) + ".*differs from this base's.*put it into the base"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "no")
