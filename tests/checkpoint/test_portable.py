"""Portable adapters: the same update for every rule by which readers find a scale, and for peft and fxlora."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxlora import CheckpointError, ConfigError, LoraConfig, check_adapter, lora_transform, make_portable
from fxlora.checkpoint.manifest import MANIFEST_NAME
from fxlora.checkpoint.portable import fold_scales
from fxlora.checkpoint.readers import READERS
from tests.models.checks import error, randomise, run
from tests.oracle import parity
from tests.oracle.cases import CASES, Case, Tokens
from tests.zoo import ARCHITECTURES, MLP, Entry

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LLAMA = next(entry for entry in ARCHITECTURES if entry.name == "llama")
MINIMAL = {
    "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type",
}  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 5, "layers.0.*down_proj": 1.25}},
    "rank_pattern": {"rank_pattern": {"v_proj": 2, "down_proj": 7}},
    "all of them": {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"o_proj": 9, "up_proj": 1}},
    "regular expression": {"target_modules": r".*layers\.1.*(q|v)_proj", "use_rslora": True},
    "layers": {"layers_to_transform": [1], "alpha_pattern": {"q_proj": 3}},
    "excluded": {"exclude_modules": r".*0.*q_proj", "rank_pattern": {"k_proj": 3}},
    "plain": {"lora_alpha": 4},
}


def adapted(entry: Entry = LLAMA, **config: Any) -> Any:
    model = lora_transform(
        entry.model(), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **config})
    )
    randomise(model)
    return model.eval()


def fields(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG).read_text())


# ---- how readers find a scale ----


def match(patterns: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def by_pattern(config: dict[str, Any], name: str, A: Tensor) -> float:
    """peft, and vLLM from 0.32 on."""
    r = match(config.get("rank_pattern", {}), name, config["r"])
    alpha = match(config.get("alpha_pattern", {}), name, config["lora_alpha"])
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def by_config(config: dict[str, Any], name: str, A: Tensor) -> float:
    """vLLM before 0.32, and Olive."""
    r = config["r"]
    return config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)


def by_ratio(config: dict[str, Any], name: str, A: Tensor) -> float:
    """SGLang, which has buffers of rank r."""
    assert A.shape[0] == config["r"]
    return config["lora_alpha"] / config["r"]


def by_tensor(config: dict[str, Any], name: str, A: Tensor) -> float:
    """llama.cpp: one alpha, and the tensor's rank; an alpha of 0 is none."""
    return config["lora_alpha"] / A.shape[0] if config["lora_alpha"] else 1.0


RULES: dict[str, Callable[[dict[str, Any], str, Tensor], float]] = {
    "peft": by_pattern,
    "vLLM before 0.32": by_config,
    "SGLang": by_ratio,
    "llama.cpp": by_tensor,
}


def updates(directory: Path, rule: Callable[[dict[str, Any], str, Tensor], float]) -> dict[str, Tensor]:
    tensors, found = load_file(directory / WEIGHTS), {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = tensors[key.replace("lora_A", "lora_B")]
            found[name] = rule(fields(directory), name, A) * (B.double() @ A.double())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_rule_gives_the_same_update(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapted(**CONFIGS[name]).save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / WEIGHTS)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, tmp_path / "saved" / WEIGHTS)
    report = make_portable(tmp_path / "saved", tmp_path / "portable")
    expected = updates(tmp_path / "saved", by_pattern)
    for rule in RULES.values():
        found = updates(tmp_path / "portable", rule)
        assert found.keys() == expected.keys()
        for layer, update in found.items():
            bound = torch.finfo(dtype).eps * 4 * expected[layer].abs().max()
            torch.testing.assert_close(update, expected[layer], rtol=0, atol=float(bound))
    assert report.largest_rounding <= torch.finfo(dtype).eps / 2
    assert {tensor.dtype for tensor in load_file(tmp_path / "portable" / WEIGHTS).values()} == {dtype}
    wrong = {"rslora", "alpha_pattern", "rank_pattern", "regex_targets"}
    assert not wrong & {finding.feature for finding in report.readers.findings}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "plain"])
def test_the_original_is_not_portable(name: str, tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    adapted(**CONFIGS[name]).save_pretrained(tmp_path)
    report = check_adapter(tmp_path, ["sglang", "llama.cpp", "onnxruntime"])
    assert not report.ok


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_in_peft_and_here(name: str, tmp_path: Path) -> None:
    model = adapted(**CONFIGS[name])
    model.save_pretrained(tmp_path / "saved")
    make_portable(tmp_path / "saved", tmp_path / "portable")
    expected = run(model, LLAMA.batch())
    theirs = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path / "portable").eval()
    assert error(run(theirs, LLAMA.batch()), expected) < 2e-6
    ours: Any = lora_transform(LLAMA.model(), tmp_path / "portable")
    assert error(run(ours.eval(), LLAMA.batch()), expected) < 2e-6
    assert {spec.scaling for spec in ours._specs()} == {1.0} and len(ours._specs()) == len(model._specs())


@pytest.mark.parametrize("name", CONFIGS)
def test_live_model_and_files_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    model = adapted(**CONFIGS[name])
    model.save_pretrained(tmp_path / "saved")
    for out in ("files", "again"):
        make_portable(tmp_path / "saved", tmp_path / out)
    model.save_pretrained(tmp_path / "live", portable=True)
    for file in (WEIGHTS, CONFIG):
        first = (tmp_path / "files" / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == first == (tmp_path / "live" / file).read_bytes()


def test_only_fields_that_all_readers_know(tmp_path: Path) -> None:
    adapted(**CONFIGS["all of them"]).save_pretrained(tmp_path, portable=True)
    config = fields(tmp_path)
    assert config.keys() == MINIMAL
    assert config["r"] == config["lora_alpha"] == 9 and config["target_modules"] == sorted(PROJECTIONS)
    assert all(tensor.shape[0 if "lora_A" in key else 1] == 9 for key, tensor in load_file(tmp_path / WEIGHTS).items())


def test_targets_are_listed_where_expressions_chose(tmp_path: Path) -> None:
    adapted(**CONFIGS["regular expression"]).save_pretrained(tmp_path, portable=True)
    expected = [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")]
    assert fields(tmp_path)["target_modules"] == expected


def test_powers_of_two_are_exact(tmp_path: Path) -> None:
    adapted(lora_alpha=8, alpha_pattern={"q_proj": 1}).save_pretrained(tmp_path / "saved")
    report = make_portable(tmp_path / "saved", tmp_path / "portable")
    assert report.largest_rounding == 0 and report.rounded_at is None and report.padded == 0
    assert report.folded == report.branches and report.bytes_before == report.bytes_after
    expected, found = (updates(tmp_path / each, by_pattern) for each in ("saved", "portable"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scale_one_leaves_every_bit(tmp_path: Path) -> None:
    adapted(**CONFIGS["plain"]).save_pretrained(tmp_path / "saved")
    report = make_portable(tmp_path / "saved", tmp_path / "portable")
    assert report.folded == 0
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (tmp_path / "portable" / WEIGHTS).read_bytes()


def test_what_filling_up_costs(tmp_path: Path) -> None:
    adapted(rank_pattern={"q_proj": 16}).save_pretrained(tmp_path / "saved")
    report = make_portable(tmp_path / "saved", tmp_path / "portable")
    tensors = load_file(tmp_path / "portable" / WEIGHTS)
    assert report.rank == 16 and report.padded == report.branches * 6 // 7
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors.values()) > 3 * report.bytes_before / 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(min_value=-100, max_value=100, allow_nan=False, width=16), min_size=4, max_size=4),
    st.floats(min_value=1e-3, max_value=64),
    st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_rounded_once(values: list[float], alpha: float, dtype: str) -> None:
    """B' is the number of its dtype that is nearest to the exact product."""
    from fxlora.checkpoint.contents import contents_of
    from fxlora.checkpoint.safetensors_io import Entry

    wanted = getattr(torch, dtype)
    key = "base_model.model.layer.lora_{}.weight"
    tensors = {
        key.format("A"): torch.ones(1, 2).to(wanted),
        key.format("B"): torch.tensor(values).to(wanted).view(4, 1),
    }
    config = {"r": 1, "lora_alpha": alpha, "target_modules": ["layer"]}
    contents = contents_of(Path("here"), config, {name: Entry.of(tensor) for name, tensor in tensors.items()})
    folded = fold_scales(contents, tensors.__getitem__).tensors[key.format("B")]
    for before, after in zip(tensors[key.format("B")].flatten(), folded.flatten(), strict=True):
        # The scale is a float64, and so is its product with an entry: 2^-53 off at most, which the bound allows for.
        exact = Fraction(float(before)) * Fraction(alpha)
        neighbours = [torch.nextafter(after, torch.full_like(after, limit)) for limit in (-math.inf, math.inf)]
        distance = abs(Fraction(float(after)) - exact)
        for other in neighbours:
            if bool(other.isfinite()):
                assert distance <= abs(Fraction(float(other)) - exact) + abs(exact) / 2**50


def test_wider_B(tmp_path: Path) -> None:
    adapted(use_rslora=True, r=8).save_pretrained(tmp_path / "saved")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / "saved" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "saved" / WEIGHTS)
    half = make_portable(tmp_path / "saved", tmp_path / "half")
    wide = make_portable(tmp_path / "saved", tmp_path / "wide", dtype="float32")
    assert 1e-4 < half.largest_rounding < 2**-8 and wide.largest_rounding < 2**-23
    assert half.rounded_at in tensors
    dtypes = {key: tensor.dtype for key, tensor in load_file(tmp_path / "wide" / WEIGHTS).items()}
    assert all(dtype == (torch.float32 if "lora_B" in key else torch.bfloat16) for key, dtype in dtypes.items())


def test_too_large_for_half_precision(tmp_path: Path) -> None:
    adapted(lora_alpha=4000).save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / WEIGHTS)
    save_file({key: (100 * tensor).half() for key, tensor in tensors.items()}, tmp_path / "saved" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"too large for torch.float16; use dtype='float32'"):
        make_portable(tmp_path / "saved", tmp_path / "portable")
    assert not (tmp_path / "portable").exists()
    make_portable(tmp_path / "saved", tmp_path / "portable", dtype="float32")


# ---- every case of the parity table ----

REFUSED = {
    "use_dora": "merge it", "lora_bias": "merge it", "bias": "merge it", "modules_to_save": "merge it",
    "trainable_token_indices": "export_merged", "layer_replication": "export_merged",
}  # fmt: skip
SKIPPED = (
    "aLoRA",
    "BD-LoRA",
    "KaSA",
    "VeLoRA",
    "MonteCLoRA",
    "'eva'",
    "'corda'",
    "'loftq'",
    "'lora_ga'",
    "float64 base",
)
TABLE = [case for case in CASES if not any(word in case.name for word in SKIPPED)]


@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:LSTM with projections", "ignore:.*_flat_weights")
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_table(case: Case, tmp_path: Path) -> None:
    """Whatever plain LoRA can express gives the same outputs here; all else is refused with what to do."""
    model: Any = parity.ours(case, case.captures[-1])
    parity.shift_in_place(model)
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    reasons = [word for field, word in REFUSED.items() if case.settings.get(field, "none") not in (False, None, "none")]
    if str(case.settings.get("init_lora_weights")) in ("pissa", "pissa_niter_4", "olora"):
        reasons.append("convert_to_plain=True")
    if reasons:
        for call in (
            lambda: make_portable(tmp_path / "saved", tmp_path / "out"),
            lambda: model.save_pretrained(tmp_path / "out", portable=True),
        ):
            with pytest.raises(CheckpointError) as caught:
                call()
            assert "has no portable form" in str(caught.value) and reasons[0] in str(caught.value)
            assert not (tmp_path / "out").exists()
        return
    make_portable(tmp_path / "saved", tmp_path / "files")
    model.save_pretrained(tmp_path / "live", portable=True)
    tolerance = max(case.tolerance, 2e-5)
    for directory in ("files", "live"):
        back = parity.our_reading(case, tmp_path / directory, case.captures[-1])
        assert error(parity.run(back, case), parity.run(model, case)) < tolerance
        assert len(back._specs()) == len(model._specs())
    if not case.peft_fails:
        theirs = parity.peft_reading(case, tmp_path / "files")
        assert error(parity.run(theirs, case, copied=False), parity.run(model, case)) < tolerance


# ---- experts and groups: other layouts ----

EXPERTS = [case for case in CASES if case.name in ("experts (E, in, out), two parameters", "experts, two parameters")]


@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: case.name)
def test_experts_of_several_ranks(case: Case, tmp_path: Path) -> None:
    """The file does not say which of two parameters of a module a branch is for; the live model knows."""
    config = LoraConfig(**{**case.settings, "rank_pattern": {"layer.second": 3}, "alpha_pattern": {"layer.first": 5}})
    model: Any = lora_transform(case.model(), config, capture="symbolic").eval()
    parity.shift_in_place(model)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"the file does not say which.*save_pretrained\(…, portable=True\)"):
        make_portable(tmp_path / "saved", tmp_path / "files")
    model.save_pretrained(tmp_path / "live", portable=True)
    assert fields(tmp_path / "live")["r"] == 4 and fields(tmp_path / "live")["target_parameters"]
    back = parity.our_reading(case, tmp_path / "live", "symbolic")
    assert error(parity.run(back, case), parity.run(model, case)) < 1e-5
    theirs = parity.peft_reading(case, tmp_path / "live")
    assert error(parity.run(theirs, case, copied=False), parity.run(model, case)) < 1e-5


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("ranks", [{"2": 3}, {"0": 1, "2": 2}])
def test_groups_of_several_ranks(ranks: dict[str, int], tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = torch.nn.Conv1d(4, 6, 3), torch.nn.ReLU(), torch.nn.Conv1d(6, 6, 3, groups=3)
        return torch.nn.Sequential(*layers).eval()

    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], rank_pattern=ranks)
    model: Any = lora_transform(make(), config)
    randomise(model)
    model.save_pretrained(tmp_path / "saved")
    report = make_portable(tmp_path / "saved", tmp_path / "portable")
    assert report.rank % 3 == 0
    x = torch.randn(2, 4, 9)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(lora_transform(make(), tmp_path / "portable")(x), expected)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(make(), tmp_path / "portable")(x), expected)


def test_compact_groups_are_refused(tmp_path: Path) -> None:
    model: Any = lora_transform(
        torch.nn.Sequential(torch.nn.Conv1d(32, 32, 3, groups=32)), LoraConfig(target_modules=["0"])
    )
    with pytest.raises(CheckpointError, match=r"'0' has more than 16 groups.*export_merged"):
        model.save_pretrained(tmp_path / "out", portable=True)
    assert not (tmp_path / "out").exists()


# ---- what is in the files beside ----


def test_embedding_weights_of_the_base(tmp_path: Path) -> None:
    """peft writes them where embeddings are targets; they say nothing if they are the base's own."""
    model: Any = adapted(target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj"], use_rslora=True)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(
        CheckpointError, match=r"weights of the base inside .*lm_head.* and 1 more.*--drop-base-weights"
    ):
        make_portable(tmp_path / "saved", tmp_path / "portable")
    report = make_portable(tmp_path / "saved", tmp_path / "portable", drop_base_weights=True)
    assert [key.rpartition("model.")[2] for key in report.dropped] == [
        "lm_head.base_layer.weight",
        "embed_tokens.base_layer.weight",
    ]
    assert "left out: base_model.model.lm_head.base_layer.weight" in str(report)
    model.save_pretrained(tmp_path / "live", portable=True)
    assert (tmp_path / "live" / WEIGHTS).read_bytes() == (tmp_path / "portable" / WEIGHTS).read_bytes()
    back: Any = lora_transform(LLAMA.model(), tmp_path / "portable").eval()
    assert error(run(back, LLAMA.batch()), run(model, LLAMA.batch())) < 2e-6
    with pytest.raises(CheckpointError, match="save_embedding_layers=False when saving"):
        model.save_pretrained(tmp_path / "live", portable=True, save_embedding_layers=True)


def test_converted_to_plain_and_portable(tmp_path: Path) -> None:
    entry = LLAMA
    model = adapted(init_lora_weights="pissa", target_modules=["q_proj", "v_proj"])
    expected = run(model, entry.batch())
    model.save_pretrained(tmp_path, portable=True, convert_to_plain=True)
    assert fields(tmp_path)["r"] == 8 and fields(tmp_path)["init_lora_weights"] is True
    theirs = peft.PeftModel.from_pretrained(entry.model(), tmp_path).eval()
    assert error(run(theirs, entry.batch()), expected) < 1e-5


def test_several_adapters(tmp_path: Path) -> None:
    model: Any = lora_transform(MLP().eval(), LoraConfig(r=2, lora_alpha=5, target_modules=["fc1"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["fc2"], use_rslora=True))
    randomise(model)
    model.save_pretrained(tmp_path, portable=True)
    for directory, r in ((tmp_path, 2), (tmp_path / "other", 3)):
        assert fields(directory)["r"] == fields(directory)["lora_alpha"] == r


def test_other_files_come_along(tmp_path: Path) -> None:
    adapted(use_rslora=True).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    (tmp_path / "saved" / "optimizer.pt").write_bytes(b"large")
    (tmp_path / "portable").mkdir()
    (tmp_path / "portable" / "notes.txt").write_text("stays")
    make_portable(tmp_path / "saved", tmp_path / "portable")
    names = sorted(path.name for path in (tmp_path / "portable").iterdir())
    assert names == [MANIFEST_NAME, CONFIG, WEIGHTS, "notes.txt", "tokenizer.json"]


# ---- mistakes ----


def test_onto_itself(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="is the adapter itself"):
        make_portable(tmp_path, tmp_path / "." / ".." / tmp_path.name)
    assert (tmp_path / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, "the configuration says rank 5; correct r or rank_pattern"),
        ({"new_field": {"a": 1}}, r"fields of a newer peft \(new_field\) has no portable form"),
        ({"alora_invocation_tokens": [1]}, "plain LoRA is active on all tokens"),
        ({"use_qalora": True}, r"QALoRA.*\(use_qalora\)"),
        ({"call_sites": {"q_proj": [0]}}, "no other program has single calls"),
        ({"lora_alpha": "8"}, r"adapter_config.json: `lora_alpha` should be a finite number"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA is understood"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / CONFIG).write_text(json.dumps({**fields(tmp_path / "saved"), **change}))
    with pytest.raises(CheckpointError, match=message):
        make_portable(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_factors(tmp_path: Path) -> None:
    model = adapted()
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="NaN or infinite entries, so the adapter is broken"):
        model.save_pretrained(tmp_path / "out", portable=True)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="has NaN entries"):
        make_portable(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_fold(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=[], trainable_token_indices={"embed": [1, 2]})
    model: Any = lora_transform(Tokens(), config)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="holds no LoRA factors"):
        make_portable(tmp_path / "saved", tmp_path / "out")


def test_dtype_is_checked(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="`dtype` should be one of float64, float32, float16, bfloat16"):
        make_portable(tmp_path / "saved", tmp_path / "out", dtype="int8")


def test_report_says_who_still_cannot(tmp_path: Path) -> None:
    adapted(target_modules=["q_proj"], use_rslora=True).save_pretrained(tmp_path / "saved")
    report = make_portable(tmp_path / "saved", tmp_path / "portable")
    assert "not read as it should be by: sglang, torchtune" in str(report)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["rank"] == 4 and values["readers"]["readers"] == list(READERS)
