"""What `explain` predicts, beside what is measured."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import fxlora
from fxlora import LoraConfig, explain, lora_transform, plan
from fxlora.inspect.explain import Explanation, Row
from tests.zoo import ARCHITECTURES, MLP

ENTRIES = {entry.name: entry for entry in ARCHITECTURES}
LINEAR = {"r": 4, "target_modules": "all-linear"}
CONFIGS: dict[str, Any] = {
    "plain": LINEAR,
    "DoRA": {**LINEAR, "use_dora": True},
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "patterns": {**LINEAR, "rank_pattern": {"q_proj": 2}},
}


def file_size(model: nn.Module, config: Any, path: Path) -> tuple[int, int]:
    """(bytes of the adapter's file, trainable parameters)."""
    lora = lora_transform(model, LoraConfig(**config))
    lora.save_pretrained(path)
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    return (path / "adapter_model.safetensors").stat().st_size, trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_file_and_parameters_are_exact(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = ENTRIES["qwen2"].model().to(dtype)
    explained = explain(model, config)
    assert explained.unknown == ""
    assert (explained.adapter_bytes, explained.trainable) == file_size(model, config, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "t5", "bert", "vit"])
def test_file_is_exact_for_other_architectures(name: str, tmp_path: Path) -> None:
    model = ENTRIES[name].model()
    explained = explain(model, LINEAR)
    assert (explained.adapter_bytes, explained.trainable) == file_size(model, LINEAR, tmp_path)


def alive(model: nn.Module, batch: Any) -> int:
    """Bytes of what a real forward leaves for backward."""
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(batch)]
    known = {tensor.untyped_storage()._cdata for tensor in tensors if isinstance(tensor, Tensor)}
    found: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        for output in pytree.tree_leaves(model.train()(**batch)):
            if isinstance(output, Tensor):
                keep(output)
    return sum(storage.nbytes() for number, storage in found.items() if number not in known)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5", "vit"])
def test_activations_are_those_of_a_real_run(name: str) -> None:
    entry = ENTRIES[name]
    model, batch = entry.model(), entry.batch()
    predicted = explain(model, LINEAR, example_inputs=batch).activations
    assert predicted is not None
    full = alive(model.requires_grad_(True), batch)
    frozen = alive(with_gradients_from_sites(copy.deepcopy(model)), batch)
    lora = alive(lora_transform(model, LoraConfig(**LINEAR), capture="modules"), batch)
    measured = {"full": full, "frozen": frozen, "lora": lora}
    assert asdict(predicted) == {name: pytest.approx(size, rel=0.02) for name, size in measured.items()}
    assert predicted.full - predicted.saved_by_freezing + predicted.kept_for_branches == predicted.lora
    assert predicted.frozen < min(predicted.lora, predicted.full)


def with_gradients_from_sites(model: nn.Module) -> nn.Module:
    """The frozen base, through which gradients flow as far as they do to the first of the sites."""
    model.requires_grad_(False)
    for spec in plan(model, LoraConfig(**LINEAR)).branches:
        model.get_submodule(spec.site).register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def test_a_base_before_the_first_site_keeps_nothing() -> None:
    def kept(target: str) -> int:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
        found = explain(model, {"r": 2, "target_modules": [target]}, example_inputs=torch.ones(2, 8)).activations
        assert found is not None
        return found.frozen

    row = 2 * 8 * 4
    assert [kept(f"{i}.0") for i in range(4)] == [4 * row, 3 * row, 2 * row, row], "the results of tanh"


def test_nothing_is_changed_and_meta_will_do() -> None:
    entry = ENTRIES["llama"]
    model, batch = entry.model(), entry.batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real = explain(model, LINEAR, example_inputs=batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("lora" in name for name, _ in model.named_modules())
    meta = {name: value.to("meta") for name, value in batch.items()}
    assert explain(model.to("meta"), LINEAR, example_inputs=meta) == real
    assert "activations kept for backward" in str(real) and "adapter file" in str(real)


class Branching(MLP):
    """Runs with values only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if bool(x.sum() > 0) else -x)


def test_what_cannot_be_predicted_is_said() -> None:
    explained = explain(Branching(), {"target_modules": ["fc1"]}, example_inputs=torch.ones(2, 8))
    assert explained.activations is None and explained.adapter_bytes is not None
    assert "not predicted: DataDependentOutputException" in str(explained)


# ---- why ----


def why(model: nn.Module, config: Any) -> dict[str, Row]:
    return {row.name: row for row in explain(model, config).rows}


class Layers(nn.Module):
    """Six blocks of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        blocks = (nn.ModuleDict({"k_proj": nn.Linear(4, 4), "up": nn.Linear(4, 8)}) for _ in range(6))
        self.body.layers = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.Linear(8, 2))
        self.tokens = nn.Embedding(3, 4)


def test_what_would_have_matched() -> None:
    rows = why(Layers(), {"target_modules": ["up"]})
    assert rows["body.layers.0.up"].reason == "target_modules: 'up'" and not rows["body.layers.0.up"].nearest
    other = rows["body.layers.0.k_proj"]
    assert (other.reason, other.nearest, other.close) == ("does not end with up", "k_proj", "")
    assert rows["head.0"].nearest == "head.0", "a number alone would match much else"
    for name, row in rows.items():
        assert name in {spec.site for spec in plan(Layers(), LoraConfig(target_modules=[row.nearest or "up"])).branches}
    assert "; k_proj would match" in str(explain(Layers(), {"target_modules": ["up"]}))
    several = why(Layers(), {"target_modules": ["up", "0", "tokens", "layers.1.k_proj"]})
    assert several["body.layers.2.k_proj"].reason == "ends with none of up, 0, tokens and 1 more"


@pytest.mark.parametrize("strict", [True, False])
def test_a_misspelt_target_is_shown_at_the_layer_that_is_meant(strict: bool) -> None:
    config = LoraConfig(target_modules=["k_porj", "up"], strict_targets=strict)
    explained = explain(Layers(), config)
    assert bool(explained.problem) is strict
    rows = {row.name: row for row in explained.rows}
    assert {name for name, row in rows.items() if row.close} == {f"body.layers.{i}.k_proj" for i in range(6)}
    assert rows["body.layers.3.k_proj"].close == "k_porj" and "'k_porj' is close" in str(explained)
    wanted = "'up' matches, but the configuration is refused" if strict else "target_modules: 'up'"
    assert rows["body.layers.0.up"].reason == wanted


def test_a_target_that_matches_elsewhere_is_no_misspelling() -> None:
    rows = why(ENTRIES["llama"].model(), {"target_modules": ["q_proj"]})
    assert not any(row.close for row in rows.values()), "k_proj is not q_proj misspelt"


def test_an_expression_says_how_far_it_matches() -> None:
    rows = why(Layers(), {"target_modules": r"k_proj|.*\.up"})
    assert rows["body.layers.0.up"].reason == r"target_modules: 'k_proj|.*\.up'"
    other = rows["body.layers.1.k_proj"]
    assert other.reason == r"'k_proj|.*\.up' matches 'k_proj' only, not the whole name"
    assert rows["head.0"].reason == r"'k_proj|.*\.up' does not match the name"
    assert other.nearest == r".*\.k_proj" and rows["tokens"].nearest == "tokens"
    for name in ("body.layers.1.k_proj", "tokens", "head.0"):
        found = why(Layers(), {"target_modules": rows[name].nearest})
        assert found[name].matched
    refused = why(Layers(), {"target_modules": r"body\.layers\.0"})
    assert refused["body.layers.0.up"].reason == r"'body\.layers\.0' matches 'body.layers.0' only, not the whole name"
    assert not refused["body.layers.1.up"].matched and "does not match the name" in refused["body.layers.1.up"].reason


def test_a_hostile_expression_takes_no_longer() -> None:
    model = nn.ModuleDict({"a" * 40 + str(i): nn.Linear(2, 2) for i in range(3)} | {"b": nn.Linear(2, 2)})
    start = time.perf_counter()
    with pytest.raises(fxlora.PatternError, match="takes too long"):
        explain(model, {"target_modules": "(a+)+b|b"})
    assert time.perf_counter() - start < 10


def test_what_is_left_out_names_the_rule() -> None:
    config = {"target_modules": ["k_proj", "0"], "exclude_modules": ["layers.1.k_proj"], "modules_to_save": ["head"]}
    rows = why(Layers(), config)
    excluded = rows["body.layers.1.k_proj"]
    assert (excluded.reason, excluded.nearest) == ("left out by exclude_modules: 'layers.1.k_proj'", "")
    assert rows["head.0"].reason == "left out by modules_to_save: 'head'"


def test_other_layers_are_counted_together() -> None:
    config = {"target_modules": ["k_proj", "0"], "layers_to_transform": [0, 3]}
    explained = explain(Layers(), config)
    rows = {row.name: row for row in explained.rows}
    other = rows["body.layers.4.k_proj"]
    assert other.reason == "'k_proj' matches, but layer 4 is not in layers_to_transform (0, 3)" and other.layer == 4
    assert rows["head.0"].reason == "'0' matches, but it is in no numbered layer (layers_to_transform: 0, 3)"
    groups = {group.pattern: group for group in explained.groups() if not group.row.matched}
    assert groups["body.layers.*.k_proj"].count == 4
    assert groups["body.layers.*.k_proj"].reason == (
        "'k_proj' matches, but layers 1, 2, 4, 5 are not in layers_to_transform (0, 3)"
    )


def test_special_targets_say_what_they_take() -> None:
    model = ENTRIES["llama"].model()
    rows = why(model, {"target_modules": "all-linear"})
    assert rows["lm_head"].reason == "'all-linear' leaves the output layer out"
    assert rows["model.embed_tokens"].reason == "'all-linear' takes linear layers only"
    assert rows["model.layers.0.self_attn.q_proj"].reason == "target_modules: 'all-linear'"
    rows = why(model, {})
    assert rows["model.layers.0.self_attn.q_proj"].reason == "default target 'q_proj'"
    assert rows["lm_head"].reason == "ends with none of q_proj, v_proj (the model's defaults)"
    rows = why(model, {"target_parameters": ["q_proj.weight"]})
    assert rows["lm_head"].reason == "target_modules is empty"
    assert rows["model.layers.0.self_attn.q_proj.weight"].reason == "target_parameters"


def test_layers_inside_of_an_attention_are_matched_with_it() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "other": nn.Linear(4, 4)})
    rows = why(model, {"target_modules": ["attention"]})
    assert rows["attention.out_proj"].matched and rows["attention.out_proj"].reason == "named as a target"
    assert rows["attention.in_proj_weight"].reason == "named as a target" and not rows["other"].matched


# ---- blocks ----


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_blocks_add_up(config: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = ENTRIES["qwen2"].model()
    explained = explain(model, config)
    layers, rest = explained.blocks
    assert (layers.pattern, layers.count, rest.pattern, rest.count) == ("model.layers.*", 2, "", 0)
    assert layers.base_parameters == sum(p.numel() for p in model.get_submodule("model.layers").parameters())
    assert layers.base_parameters + rest.base_parameters == explained.base_parameters
    assert layers.trainable + rest.trainable == explained.trainable
    file_size(model, config, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    inside = sum(tensor.nbytes for name, tensor in stored.items() if ".layers." in name)
    assert layers.adapter_bytes == inside
    assert rest.adapter_bytes == sum(tensor.nbytes for tensor in stored.values()) - inside


def test_flops_of_blocks_are_those_of_a_run() -> None:
    model, batch = ENTRIES["llama"].model().eval(), ENTRIES["llama"].batch()
    explained, positions = explain(model, LINEAR), batch["input_ids"].numel()
    counts: list[int] = []
    for make in (lambda: model, lambda: lora_transform(model, LoraConfig(**LINEAR), capture="modules").eval()):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            make()(**batch)
        counts.append(counter.get_total_flops())
    assert sum(block.flops for block in explained.blocks) * positions == counts[1] - counts[0]


def test_blocks_are_shown_where_there_are_some() -> None:
    assert "model.layers.*       2" in str(explain(ENTRIES["llama"].model(), LINEAR))
    small = explain(MLP(), {"target_modules": ["fc1"]})
    assert small.block_table() == [] and [block.pattern for block in small.blocks] == [""]
    two = explain(ENTRIES["t5"].model(), LINEAR).blocks
    assert [block.pattern for block in two] == ["encoder.block.*", "decoder.block.*", ""]


# ---- merging ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIGS["plain"], CONFIGS["embeddings"]], ids=["plain", "embeddings"])
def test_merging_files_moves_what_was_predicted(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model: Any = ENTRIES["qwen2"].model().to(dtype)
    cost = explain(model, config).merge
    assert cost is not None
    model.save_pretrained(tmp_path / "base")
    file_size(model, config, tmp_path / "adapter")
    report = fxlora.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert sum(base[name].nbytes for name in report.merged) == cost.read_bytes == cost.written_bytes
    assert cost.copied_bytes == report.bytes - cost.written_bytes


def test_modules_that_were_trained_whole_are_written_too() -> None:
    model = ENTRIES["qwen2"].model()
    plain, whole = (
        explain(model, {"target_modules": ["q_proj"], **each}).merge for each in ({}, {"modules_to_save": ["lm_head"]})
    )
    assert plain is not None and whole is not None
    head = model.get_parameter("lm_head.weight").nbytes
    assert whole.written_bytes - whole.read_bytes == plain.copied_bytes - whole.copied_bytes == head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [8, 64])
def test_memory_of_a_merge_is_about_what_was_predicted(r: int, dtype: torch.dtype) -> None:
    """What is kept exactly, the peak within a tenth."""
    model = nn.Sequential(*(nn.Linear(1536, 1536, dtype=dtype) for _ in range(3)))
    config = {"r": r, "target_modules": ["0", "1", "2"], "init_lora_weights": False}
    cost = explain(model, config).merge
    lora = lora_transform(model, LoraConfig(**config))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        lora.merge_adapter()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    assert cost is not None and cost.kept_bytes == sum(each.nbytes for each in lora._lora.originals.values())
    assert cost.peak_bytes == pytest.approx(peak, rel=0.1)


def test_flops_of_a_merge() -> None:
    """One product for each weight, and those of the rows of which the rounding is measured."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Conv2d(64, 64, 3), nn.Embedding(512, 256))
    config = {"r": 8, "target_modules": ["0", "1", "2"], "init_lora_weights": False}
    cost = explain(model, config).merge
    lora = lora_transform(model, LoraConfig(**config), capture="modules")
    with FlopCounterMode(display=False) as counter:
        lora.merge_adapter()
    sampled = 3 * 2 * 8 * 2**16
    assert cost is not None and cost.flops <= counter.get_total_flops() <= cost.flops + 2 * sampled


def test_what_cannot_be_merged_has_no_cost() -> None:
    assert explain(MLP(), {"target_modules": ["fc1"], "call_sites": {"fc1": [0]}}).merge is None
    refused = explain(MLP(), {"target_modules": ["nothing"]})
    assert refused.problem and refused.merge is None and "merge" not in str(refused)


def test_all_of_it_is_data() -> None:
    explained = explain(ENTRIES["llama"].model(), LINEAR, example_inputs=ENTRIES["llama"].batch())
    assert isinstance(explained, Explanation)
    figures = json.loads(json.dumps(explained.to_dict(), allow_nan=False))
    assert figures["merge"]["read_bytes"] > 0 and figures["blocks"][0]["pattern"] == "model.layers.*"
    assert figures["activation_bytes"].keys() == {"full", "frozen", "lora"}
    assert figures["sites"][-1]["nearest"] == "lm_head"


@pytest.mark.gpu
def test_activations_on_the_gpu() -> None:
    """Within a tenth of what the allocator counts."""
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=1000)).cuda()
    batch = {"input_ids": torch.randint(0, 1000, (4, 256), device="cuda")}
    predicted = explain(model, LINEAR, example_inputs=batch).activations
    assert predicted is not None
    measured: list[int] = []
    for make in (lambda: model.requires_grad_(True), lambda: lora_transform(model, LoraConfig(**LINEAR))):
        each = make().train()
        each(**batch)
        before = torch.cuda.memory_allocated()
        output = each(**batch)
        measured.append(torch.cuda.memory_allocated() - before)
        del output
    assert [predicted.full, predicted.lora] == pytest.approx(measured, rel=0.1)
