"""What the benchmarks of speed rest on: words of variants, ratios of the same round, goals, rows that fail, loss curves."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    cpu_shapes,
    curve_table,
    gradient_errors,
    loss_curves,
    model_shapes,
    peers,
    performance,
    report,
    turns,
)
from benchmarks.isolated import Isolated, VariantFailed
from benchmarks.run_settings import Settings
from benchmarks.step_table import Row, lines, summarised
from benchmarks.variants import DTYPES, Adapter, Variant, parse_all


def step_settings() -> Settings:
    return Settings(
        shape="llama-3-8b", device="cuda", dtype="bfloat16", layers=4, shrink=1, tokens=(4, 2048), rank=16, steps=20,
        threads=1, rounds=2,
    )  # fmt: skip


def row(words: str, *rounds: float, peak: int = 2**30) -> Row:
    return Row(Variant.parse(words), [[seconds] * 3 for seconds in rounds], peak)


def test_words_make_a_variant_in_any_order_and_print_as_it():
    variant = Variant.parse("peft dropout bf16 eager")
    assert variant == Variant("peft", "bf16", dropout=True, eager=True)
    assert (str(variant), variant.label) == ("peft bf16 dropout eager", "peft bf16 dropout")
    assert Variant.parse("frozen").dtype == "" and Variant.parse("fxlora").dtype == "fp32"


@pytest.mark.parametrize("words", ["pefd", "peft bfloat16"])
def test_an_unknown_word_is_named(words: str):
    with pytest.raises(ValueError, match=f"'{words.split()[-1]}' in variant"):
        Variant.parse(words)


def test_every_mode_starts_with_its_floor():
    found = [str(each) for each in parse_all(["peft", "frozen", "fxlora eager"], ["compiled", "eager"])]
    assert found == ["frozen", "peft fp32", "frozen eager", "peft fp32 eager", "fxlora fp32 eager"]


def test_settings_of_an_adapter_are_the_variants():
    settings = Adapter(8, ("q_proj",)).settings(Variant.parse("peft dropout dora"))
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"], settings["use_dora"]) == (8, 16, 0.1, True)


def test_ratios_are_of_the_same_round():
    # The machine is twice as slow in the second round; the ratio does not see it.
    rows = [row("frozen", 1.0, 2.0), row("fxlora", 1.04, 2.08), row("peft", 1.2, 2.4), row("peft bf16", 1.1, 2.2)]
    frozen, ours, *_ = summarised(rows, with_goals=True)
    assert frozen["over"] == 1.0 and ours["over_by_round"] == pytest.approx([1.04, 1.04])
    assert ours["over_peft"] == pytest.approx(1.04 / 1.1), "the fastest of peft's"
    assert ours["goal"] == 1.05 and "goal" not in frozen


def test_goals_are_said_to_be_met_or_missed():
    rows = [row("frozen", 1.0), row("fxlora", 1.04), row("fxlora dropout", 1.09, peak=2**31), row("fxlora dora", 1.2)]
    text = lines(summarised(rows, with_goals=True))
    assert "≤ 1.05 met" in text[-3]
    assert "1.048 × without: ≤ 1.02 MISSED" in text[-2] and "≤ 1.08 MISSED" in text[-2]
    assert "≤ 1.10 MISSED" in text[-1]
    assert not any("≤" in line for line in lines(summarised(rows, with_goals=False)))


def test_a_variant_that_fails_is_a_row_with_the_reason():
    rows = [row("frozen", 1.0), Row(Variant.parse("peft"), reason="out of memory"), row("fxlora", 1.0)]
    summaries = summarised(rows, with_goals=True)
    assert "| peft fp32 | out of memory |" in lines(summaries)[-2]
    assert "over_peft" not in summaries[-1]


class Fragile:
    def add(self, a: int, b: int) -> int:
        return a + b

    def refuse(self) -> None:
        raise ValueError("no such thing\nand more")

    def die(self) -> None:
        os._exit(7)


def refuse() -> None:
    raise ModuleNotFoundError("not installed")


def test_an_isolated_object_answers_refuses_and_dies_alone():
    fragile, missing = Isolated(Fragile), Isolated(refuse)
    assert fragile.call("add", 1, 2) == 3
    with pytest.raises(VariantFailed, match="^no such thing$"):
        fragile.call("refuse")
    assert fragile.call("add", 2, 2) == 4
    with pytest.raises(VariantFailed, match="ended with code 7"):
        fragile.call("die")
    with pytest.raises(VariantFailed, match="^not installed$"):
        missing.call("add", 1, 2)
    missing.close()


class Logged:
    """In the place of `Isolated`: notes what is asked of which variant."""

    asked: list[tuple[str, str]]

    def __init__(self, factory: Any, variant: Variant, settings: Settings) -> None:
        self.name = variant.name

    def call(self, method: str, *args: Any) -> Any:
        self.asked.append((method, self.name))
        return {"warm_up": 1.0, "peak": 1, "measure": [1.0], "profile": f"kernels of {self.name}"}[method]

    def close(self) -> None:
        pass

    release = close


def test_variants_take_turns_back_and_forth_and_are_profiled_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turns, "Isolated", Logged)
    monkeypatch.setattr(Logged, "asked", asked := [], raising=False)
    variants = [Variant.parse("frozen"), Variant.parse("peft")]
    rows = turns.measured(variants, turns.Timed, step_settings(), profiles=tmp_path / "new" / "folder")
    assert [name for method, name in asked if method == "measure"] == ["frozen", "peft", "peft", "frozen"]
    assert [each.rounds for each in rows] == [[[1.0], [1.0]]] * 2
    assert (tmp_path / "new" / "folder" / "peft_fp32.txt").read_text() == "kernels of peft"


def test_attention_and_swiglu_call_a_peers_functions_and_compute_the_same():
    from transformers import LlamaConfig, LlamaModel
    from transformers.models.llama import modeling_llama

    attention, block = modeling_llama.LlamaAttention, modeling_llama.LlamaMLP
    before = [(attention, attention.forward), (block, block.forward)]
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=8)
    model = LlamaModel(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    calls: list[str] = []

    def qkv(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append("qkv")
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def o(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append("o")
        return self.o_proj(x)

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append("mlp")
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    x = torch.tensor([[1, 2, 3]])
    expected = model(x).last_hidden_state
    try:
        assert torch.equal(peers.with_kernels(model, qkv, o, mlp)(x).last_hidden_state, expected)
    finally:
        for kind, forward in before:
            kind.forward = forward
        del attention.apply_qkv, attention.apply_o
    assert calls == ["qkv", "o", "mlp"]


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for peer in peers.PEERS.values():
        with pytest.raises(ModuleNotFoundError, match="not installed: benchmarks/peers.py says how"):
            peer(None, {"use_dora": False})


def curve(words: str, losses: list[float], adapter: str = "same") -> curve_table.Run:
    return curve_table.Run(words, losses, [1.0] * len(losses), adapter)


def test_curves_are_compared_with_the_first_and_put_over_the_largest_yardstick():
    found = [curve("a", [3.0, 2.0]), curve("a reordered", [3.0, 2.5]), curve("a autocast", [3.0, 1.0])]
    found += [curve("b", [3.5, 3.0]), curve_table.Run("c", reason="out of memory")]
    curve_table.compare(found)
    assert (found[3].largest, found[3].mean, found[3].reference) == (1.0, 0.75, "a")
    text = curve_table.lines(found, 2)
    assert "| 2.0000 |  |  |  |  | 1.0 | 1.000 |" in text[3], "the reference has no differences"
    assert "| 1.0000 | -1.0e+00 | 1.0e+00 | 5.0e-01 |  |" in text[5], "a yardstick is not put over itself"
    assert "| 3.0000 | +1.0e+00 | 1.0e+00 | 7.5e-01 | 1.50 |" in text[6] and "| c | out of memory |" in text[7]


@pytest.mark.parametrize(("steps", "mean"), [(8, 1.5), (7, 1.0), (2, 1.0)])
def test_the_last_quarter_has_at_least_one_step(steps: int, mean: float):
    assert curve("a", [float(loss) for loss in range(steps, 0, -1)]).last_quarter == mean


def test_curves_from_different_adapters_are_not_compared():
    found = [curve("a", [1.0]), curve("b", [1.0], "another"), curve("c", [2.0])]
    curve_table.compare(found)
    assert (found[1].reason, found[1].reference) == ("did not start from the same adapter as 'a'", "")
    assert "ms" not in curve_table.summarised(found)[1] and found[2].mean == 1.0


def test_autocast_is_a_yardstick_only_on_a_16_bit_base():
    half, single = (fine_tune_settings(dtype=dtype) for dtype in ("bfloat16", "float32"))
    words = loss_curves.words_of("plain", half)
    assert words[1:3] == ["peft fp32 eager reordered", "peft fp32 eager autocast"]
    assert loss_curves.words_of("plain", single) == [each for each in words if "autocast" not in each]
    assert loss_curves.words_of("dropout", half) == loss_curves.words_of("dropout", single)
    assert all("eager" in each for each in loss_curves.words_of("plain", half, eager=True))


SMALL: dict[str, Any] = dict(
    shape="llama-3.2-1b", device="cpu", dtype="bfloat16", layers=1, shrink=16, tokens=(2, 16), rank=4, steps=3, threads=1
)  # fmt: skip


def fine_tune_settings(**changes: Any) -> loss_curves.Settings:
    return loss_curves.Settings(**(SMALL | {"rate": 1e-2} | changes))


def test_peft_under_autocast_computes_what_the_canonical_graph_does():
    words = ("peft fp32 eager", "peft fp32 eager autocast", "fxlora fp32 canonical eager")
    found = [loss_curves.FineTune(each, fine_tune_settings()).run() for each in words]
    losses, times, adapters = zip(*found, strict=True)
    assert losses[1] == losses[2] != losses[0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-2), "only roundings differ"
    assert len(set(adapters)) == 1 and [len(each) for each in times] == [3] * 3


def test_autocast_does_not_change_the_16_bit_base():
    model = model_shapes.build("llama-3.2-1b", 2, 16, "cpu", torch.bfloat16, head=True)
    tokens = torch.arange(64).view(2, 32)
    plain = model(input_ids=tokens, labels=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(input_ids=tokens, labels=tokens)
    assert torch.equal(cast.logits, plain.logits) and torch.equal(cast.loss, plain.loss)
    assert cast.loss.dtype == torch.float32


class Trained:
    """In the place of `Isolated`: the second run fails, and the benchmark is cut off in the fourth."""

    made = 0

    def __init__(self, factory: Any, words: str, settings: loss_curves.Settings) -> None:
        Trained.made += 1
        self.number = Trained.made

    def call(self, method: str, timeout: float) -> tuple[list[float], list[float], str]:
        if self.number == 2:
            raise VariantFailed("out of memory")
        if self.number == 4:
            raise KeyboardInterrupt
        return [3.0, 2.0 + self.number], [1.0, 1.0], "same"

    def close(self) -> None:
        pass


def test_fine_tunes_that_are_cut_off_leave_the_runs_that_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "curves.json"
    monkeypatch.setattr(loss_curves, "Isolated", Trained)
    monkeypatch.setattr(Trained, "made", 0)
    monkeypatch.setattr("sys.argv", ["loss_curves", "--device", "cpu", "--steps", "2", "--json", str(file)])
    with pytest.raises(KeyboardInterrupt):
        loss_curves.main()
    rows = json.loads(file.read_text())["rows"]
    assert [each["run"] for each in rows] == list(loss_curves.PLAIN[:2]) + [loss_curves.PLAIN[3]]
    assert [each["reason"] for each in rows] == ["", "out of memory", ""]
    assert (rows[2]["reference"], rows[2]["mean"], rows[2]["last_quarter"]) == ("peft fp32 eager", 1.0, 5.0)
    assert f"| {loss_curves.PLAIN[3]} | 3.0000 | 5.0000 |" in performance.page([file])


def one_step(words: str, dtype: str) -> gradient_errors.OneStep:
    return gradient_errors.OneStep(words, gradient_errors.Settings(**(SMALL | {"steps": 2})), dtype)


def test_errors_of_gradients_are_those_of_the_dtype_and_a_wrong_one_is_seen(tmp_path: Path):
    one_step("peft fp32 eager", "float32").write(tmp_path / "exact.pt")
    same = one_step("fxlora fp32 eager", "float32").compared(tmp_path / "exact.pt")
    assert same["worst"] < 1e-5 and abs(same["loss_error"]) < 1e-5
    rounded = [
        one_step(each, "bfloat16").compared(tmp_path / "exact.pt")["error"] for each in ("peft eager", "fxlora eager")
    ]
    assert all(1e-3 < error < 5e-2 for error in rounded) and rounded[1] < 2 * rounded[0]
    loss, gradients = torch.load(tmp_path / "exact.pt")
    name = "model.layers.0.self_attn.q_proj.lora_B.default.weight"
    torch.save((loss, gradients | {name: 2 * gradients[name]}), tmp_path / "wrong.pt")
    found = one_step("fxlora fp32 eager", "float32").compared(tmp_path / "wrong.pt")
    assert (found["worst_name"], found["worst"]) == (name, pytest.approx(0.5, rel=1e-4))
    assert found["median"] < 1e-5 < found["error"]
    torch.save((loss, gradients | {"else": gradients[name]}), tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="other factors are trained: .'else'"):
        one_step("fxlora fp32 eager", "float32").compared(tmp_path / "wrong.pt")


def test_the_page_has_errors_of_gradients_and_reasons(tmp_path: Path):
    rows = [
        gradient_errors.Row(
            "peft", loss=7.0, loss_error=-1e-3, error=0.01, median=0.02, worst=0.03, worst_name="q.lora_A"
        ),
        gradient_errors.Row("fxlora", "out of memory"),
    ]
    about = report.Environment("a machine", {"torch": "2.11"}, "2026-01-02")
    report.save(tmp_path / "a.json", "gradient_errors", about, fine_tune_settings(), [asdict(each) for each in rows])
    text = performance.page([tmp_path / "a.json"])
    assert "| peft | 7.00000 | -1.0e-03 | 1.00e-02 | 2.00e-02 | 3.00e-02 | q.lora_A |" in text
    assert "| fxlora | out of memory |" in text


def test_the_page_has_the_tables_of_the_files_and_where_they_come_from(tmp_path: Path):
    about = report.Environment("a machine", {"torch": "2.11"}, "2026-01-02")
    settings = step_settings()
    assert settings.is_reference
    steps = summarised([row("frozen", 1.0), row("fxlora", 1.04)], settings.is_reference)
    report.save(tmp_path / "train_step-a.json", "train_step", about, settings, steps)
    curves = [curve("a", [3.0, 2.0]), curve("b", [3.0, 2.5])]
    curve_table.compare(curves)
    sizes = fine_tune_settings(steps=2)
    report.save(tmp_path / "curves.json", "loss_curves", about, sizes, [asdict(run) for run in curves])
    (tmp_path / "other.json").write_text("[]")
    text = performance.page(list(tmp_path.glob("*.json")))
    assert "## A training step" in text and "## A whole fine-tune" in text and "## Inference" not in text
    assert f"**{settings}.** a machine, torch 2.11, 2026-01-02 (`train_step-a.json`)" in text
    assert "| fxlora fp32 | 1040.00 | 1.040 | 1.040–1.040 | ≤ 1.05 met | 1.00 GiB | 1.000 | ≤ 1.08 met |" in text
    assert "| b | 3.0000 | 2.5000 | 2.5000 | +5.0e-01 | 5.0e-01 | 2.5e-01 |" in text


def test_layers_on_a_cpu_are_compared_with_factors_of_the_same_dtype_and_the_faster_of_each():
    times = {"fxlora fp32": [1.0, 2.0], "peft fp32": [2.0, 4.0], "fxlora bf16": [1.5, 3.0], "peft bf16": [1.25, 2.5]}
    assert cpu_shapes.ratios(times) == {"fp32": 0.5, "bf16": 1.2, "best": 0.8}
    assert cpu_shapes.ratios({"fxlora fp32": [3.0], "peft fp32": [2.0]}) == {"fp32": 1.5, "best": 1.5}


@pytest.mark.parametrize(("dtype", "names"), [(torch.float32, {"fp32"}), (torch.bfloat16, {"fp32", "bf16"})])
def test_variants_on_a_cpu_have_factors_of_their_dtype_on_the_same_weights(dtype: torch.dtype, names: set[str]):
    layers = dict(cpu_shapes.variants(lambda: cpu_shapes.Layer(8, 6), dtype, 2, 0.0, False))
    assert set(layers) == {f"{library} {name}" for library in ("fxlora", "peft") for name in names}
    x = torch.ones(3, 8, dtype=dtype, requires_grad=True)
    for name, layer in layers.items():
        trained = {each.dtype for each in layer.parameters() if each.requires_grad}
        assert trained == {DTYPES[name.split()[1]]}
        cpu_shapes.stepper(layer, x, None)()
    assert (
        len({each.data_ptr() for layer in layers.values() for each in layer.parameters() if each.shape == (6, 8)}) == 1
    )


def test_the_page_lists_layers_on_a_cpu_that_are_slower(tmp_path: Path):
    setting = {"what": "8 -> 6", "tokens": 1, "r": 2, "dropout": 0.1, "way": "eager", "dtype": "bfloat16"}
    found = [{"fp32": 0.9, "bf16": 1.2, "best": 1.01}, {"fp32": 0.8, "bf16": 0.9, "best": 1.0}]
    rows = [{**setting, "ratios": ratios} for ratios in found]
    page = {"machine": "a machine", "setting": "one run", "rows": rows}
    (tmp_path / "cpu_shapes-a.json").write_text(json.dumps(page), encoding="utf-8")
    text = performance.page([tmp_path / "cpu_shapes-a.json"])
    assert "| eager | bfloat16 | bf16 | 2 | 1.050 | 1 |" in text
    assert text.rstrip().endswith("| 8 -> 6 | 1 | 2 | 0.1 | eager | bfloat16 | 0.900 | 1.200 | 1.010 |")
