"""Quantized bases: decoded exactly where that is asked for and the format is known, else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import CheckpointError, ConfigError, LoraConfig, MergeError, lora_transform, merge_checkpoint
from fxlora.checkpoint import merge_steps
from fxlora.checkpoint.merge_plan import plan_merge
from fxlora.checkpoint.quantized import FourBits, Scaled
from fxlora.checkpoint.safetensors_io import Entry
from fxlora.checkpoint.sources import Source

WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, vocab_size=48
    )
    return transformers.LlamaForCausalLM(config).eval().bfloat16()


def is_linear(name: str) -> bool:
    return "_proj" in name


# ---- formats, written here; each gives the tensors and the exact weight ----


def blocks(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """float8 with one scale for 8 x 8 entries; the last blocks of 20 rows or columns are smaller."""
    rows, columns = (torch.arange(size) // 8 for size in weight.shape)
    scale = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) / 50 + 0.01
    of_entries = scale[rows][:, columns]
    numbers = (weight.float() / of_entries).clamp(-400, 400).to(torch.float8_e4m3fn)
    return {name: numbers, f"{name}_scale_inv": scale}, numbers.double() * of_entries.double()


def of_tensor(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = torch.tensor(0.0123)
    numbers = (weight.float() / scale).to(torch.float8_e4m3fn)
    extra = {name.replace("weight", "input_scale"): torch.tensor(0.5)}
    return {name: numbers, f"{name}_scale": scale, **extra}, numbers.double() * scale.double()


def of_rows(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = torch.rand(weight.shape[0], 1).bfloat16() / 50 + 0.01
    numbers = (weight.float() / scale.float()).to(torch.float8_e5m2)
    return {name: numbers, f"{name}_scale": scale}, numbers.double() * scale.double()


def powers(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """Scales that are powers of two, one byte each."""
    scale = torch.full((weight.shape[0], 1), 2.0**-6).to(torch.float8_e8m0fnu)
    numbers = (weight.float() * 2**6).to(torch.float8_e4m3fn)
    return {name: numbers, f"{name}_scale": scale}, numbers.double() * 2.0**-6


def int8_of_rows(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = torch.rand(weight.shape[0], 1) / 50 + 0.01
    numbers = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return {name: numbers, f"{name}_scale": scale}, numbers.double() * scale.double()


def llm_int8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    codes = weight.float().abs().amax(1)
    numbers = (weight.float() / codes[:, None] * 127).round().to(torch.int8)
    module = name.removesuffix("weight")
    tensors = {name: numbers, f"{module}SCB": codes, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, numbers.double() * codes.double()[:, None] / 127


NF4 = torch.linspace(-1, 1, 16)


def four_bits(name: str, weight: Tensor, *, nested: bool = False) -> tuple[Tensors, Tensor]:
    """16 entries in a block, 4 absmax in an outer one."""
    flat = weight.float().flatten()
    absmax = flat.view(-1, 16).abs().amax(1) if flat.numel() % 16 == 0 else pytest.fail("sizes")
    values: dict[str, Any] = {"quant_type": "nf4", "blocksize": 16, "dtype": "bfloat16", "shape": list(weight.shape)}
    tensors: Tensors = {f"{name}.quant_map": NF4}
    if nested:
        offset, outer = float(absmax.mean()), torch.linspace(-1, 1, 256)
        scales = torch.stack([part.max() for part in (absmax - offset).abs().split(4)])
        of_absmax = scales.repeat_interleave(4)[: absmax.numel()]
        codes = ((absmax - offset) / of_absmax)[:, None].sub(outer).abs().argmin(1)
        values.update(nested_blocksize=4, nested_dtype="float32", nested_offset=offset)
        tensors.update({f"{name}.absmax": codes.to(torch.uint8), f"{name}.nested_absmax": scales})
        tensors[f"{name}.nested_quant_map"] = outer
        absmax = outer[codes] * of_absmax + torch.tensor(offset, dtype=torch.float32)
    else:
        tensors[f"{name}.absmax"] = absmax
    codes = (flat.view(-1, 16) / absmax[:, None]).flatten()[:, None].sub(NF4).abs().argmin(1)
    tensors[name] = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None]
    text = json.dumps(values).encode()
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    exact = NF4[codes].double() * absmax.double().repeat_interleave(16)
    return tensors, exact.view(weight.shape)


def nested_four_bits(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    return four_bits(name, weight, nested=True)


FORMATS: dict[str, tuple[Callable[[str, Tensor], tuple[Tensors, Tensor]], dict[str, Any], str]] = {
    "blocks": (blocks, {"quant_method": "fp8", "weight_block_size": [8, 8]}, "fp8 float8"),
    "tensor": (of_tensor, {"quant_method": "modelopt"}, "modelopt float8"),
    "rows": (of_rows, {"quant_method": "compressed-tensors"}, "compressed-tensors float8"),
    "powers": (powers, {"quant_method": "compressed-tensors"}, "compressed-tensors float8"),
    "int8": (int8_of_rows, {"quant_method": "compressed-tensors"}, "compressed-tensors int8"),
    "LLM.int8": (llm_int8, {"quant_method": "bitsandbytes"}, "bitsandbytes int8"),
    "4 bits": (four_bits, {"quant_method": "bitsandbytes"}, "bitsandbytes nf4"),
    "nested": (nested_four_bits, {"quant_method": "bitsandbytes"}, "bitsandbytes nf4"),
}


def quantized(path: Path, name: str, *, which: Callable[[str], bool] = is_linear) -> tuple[Path, Path]:
    """(the quantized base, one of the same weights in float64)."""
    function, method, _ = FORMATS[name]
    llama().save_pretrained(path / "base")
    llama().save_pretrained(path / "exact")
    tensors, exact = load_file(path / "base" / WEIGHTS), {}
    torch.manual_seed(5)
    for key, value in list(tensors.items()):
        exact[key] = value
        if which(key):
            found, exact[key] = function(key, tensors.pop(key))
            tensors.update(found)
    save_file(
        {key: value.clone() for key, value in tensors.items()}, path / "base" / WEIGHTS, metadata={"format": "pt"}
    )
    save_file({key: value.contiguous() for key, value in exact.items()}, path / "exact" / WEIGHTS)
    config = json.loads((path / "base" / "config.json").read_text())
    (path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    return path / "base", path / "exact"


def adapter(path: Path, **options: Any) -> Path:
    model = lora_transform(
        llama(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj", "down_proj"], **options})
    )
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_decoded_and_rounded_once(name: str, out_dtype: torch.dtype | None, tmp_path: Path) -> None:
    """As the merge into a base that has the exact products in float64."""
    base, exact = quantized(tmp_path, name)
    factors = adapter(tmp_path / "adapter")
    (base / "hf_quant_config.json").write_text("{}")
    report = merge_checkpoint(base, factors, tmp_path / "out", dequantize=True, out_dtype=out_dtype)
    assert len(report.merged) == 6
    merge_checkpoint(exact, factors, tmp_path / "expected", out_dtype=out_dtype or torch.bfloat16)
    found, expected = (load_file(tmp_path / each / WEIGHTS) for each in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert {value.dtype for value in found.values()} == {out_dtype or torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(out_dtype or torch.bfloat16).removeprefix("torch.")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    result = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, found[key]) for key, value in result.state_dict().items())


def test_variants_see_the_decoded_weight(tmp_path: Path) -> None:
    base, exact = quantized(tmp_path, "blocks")
    factors = adapter(tmp_path / "adapter", use_dora=True)
    merge_checkpoint(base, factors, tmp_path / "out", dequantize=True)
    merge_checkpoint(exact, factors, tmp_path / "expected", out_dtype=torch.bfloat16)
    found, expected = (load_file(tmp_path / each / WEIGHTS) for each in ("out", "expected"))
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_of_any_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = quantized(tmp_path, name)
    factors = adapter(tmp_path / "adapter")
    merge_checkpoint(base, factors, tmp_path / "whole", dequantize=True)
    monkeypatch.setattr(merge_steps, "BLOCK", 60)
    merge_checkpoint(base, factors, tmp_path / "pieces", dequantize=True)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "pieces" / WEIGHTS).read_bytes()


def test_scales_in_other_shards(tmp_path: Path) -> None:
    base, _ = quantized(tmp_path, "blocks")
    factors = adapter(tmp_path / "adapter")
    merge_checkpoint(base, factors, tmp_path / "one", dequantize=True)
    tensors = load_file(base / WEIGHTS)
    (base / WEIGHTS).unlink()
    shards = {"model-00001-of-00002.safetensors": False, "model-00002-of-00002.safetensors": True}
    for shard, of_scales in shards.items():
        save_file({k: v for k, v in tensors.items() if ("scale" in k) == of_scales}, base / shard)
    weight_map = {k: list(shards)["scale" in k] for k in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    merge_checkpoint(base, factors, tmp_path / "two", dequantize=True)
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00002.safetensors"}
    one, two = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / "model-00001-of-00002.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "two" / "model-00002-of-00002.safetensors").exists()


def test_experts_one_by_one(tmp_path: Path) -> None:
    """float8 experts in files, and an adapter of the parameter that a model makes of them."""

    def moe() -> Any:
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, num_experts=3, num_experts_per_tok=2, vocab_size=48,
        )  # fmt: skip
        return transformers.Qwen3MoeForCausalLM(config).bfloat16()

    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = lora_transform(moe(), LoraConfig(r=2, target_modules=[], target_parameters=names))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    moe().save_pretrained(tmp_path / "base")
    moe().save_pretrained(tmp_path / "exact")
    tensors, exact = load_file(tmp_path / "base" / WEIGHTS), {}
    for key, value in list(tensors.items()):
        exact[key] = value
        if "experts" in key:
            found, exact[key] = blocks(key, tensors.pop(key))
            tensors.update(found)
    save_file(tensors, tmp_path / "base" / WEIGHTS)
    save_file(exact, tmp_path / "exact" / WEIGHTS)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        MergeError, match=r"experts\.\d\.\w+\.weight' is quantized \(fp8 float8\).*pass dequantize=True"
    ):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dequantize=True)
    assert len(report.merged) == 9
    merge_checkpoint(tmp_path / "exact", tmp_path / "adapter", tmp_path / "expected", out_dtype=torch.bfloat16)
    found, expected = (load_file(tmp_path / each / WEIGHTS) for each in ("out", "expected"))
    assert all(torch.equal(found[key], expected[key]) for key in expected) and found.keys() == expected.keys()


# ---- refused ----


@pytest.mark.parametrize("name", FORMATS)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    """Also where only some of the targets are quantized."""
    base, _ = quantized(tmp_path, name, which=lambda key: "layers.1" in key and "down_proj" in key)
    with pytest.raises(
        MergeError, match=rf"down_proj\.weight' is quantized \({FORMATS[name][2]}\).*pass dequantize=True"
    ):
        merge_checkpoint(base, adapter(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def marked(*ends: str) -> Callable[[Tensors, str], None]:
    def change(tensors: Tensors, name: str) -> None:
        del tensors[name]
        tensors.update({name.removesuffix("weight") + end: torch.zeros(2, 2, dtype=torch.int32) for end in ends})

    return change


def with_zero_points(tensors: Tensors, name: str) -> None:
    tensors.update(int8_of_rows(name, tensors[name])[0])
    tensors[f"{name}_zero_point"] = torch.zeros(tensors[name].shape[0], 1, dtype=torch.int8)


def two_scales(tensors: Tensors, name: str) -> None:
    tensors.update(of_tensor(name, tensors[name])[0])
    tensors[f"{name}_scale_2"] = torch.tensor(1.0)


def unknown_grid(tensors: Tensors, name: str) -> None:
    tensors.update(of_tensor(name, tensors[name])[0])
    tensors[f"{name}_scale"] = torch.ones(2, 2)


def rows_in_another_order(tensors: Tensors, name: str) -> None:
    tensors.update(llm_int8(name, tensors[name])[0])
    tensors[name.replace("weight", "weight_format")] = torch.tensor(2, dtype=torch.uint8)


def without_scales(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


UNKNOWN: dict[str, tuple[Callable[[Tensors, str], None], str, str]] = {
    "GPTQ": (marked("qweight", "qzeros", "scales", "g_idx"), "gptq", "GPTQ"),
    "AWQ": (marked("qweight", "qzeros", "scales"), "awq", "AWQ"),
    "GPTQ or AWQ": (marked("qweight", "qzeros", "scales"), "", "GPTQ or AWQ"),
    "packed": (
        marked("weight_packed", "weight_scale", "weight_shape"),
        "compressed-tensors",
        "compressed-tensors .packed",
    ),
    "torchao": (marked("weight_qdata", "weight_scale"), "torchao", "torchao"),
    "HQQ": (marked("W_q", "meta"), "hqq", "HQQ"),
    "AQLM": (marked("codes", "codebooks", "scales"), "aqlm", "AQLM"),
    "quanto": (marked("weight._data", "weight._scale"), "quanto", "quanto"),
    "zero points": (with_zero_points, "compressed-tensors", "compressed-tensors int8"),
    "two scales": (two_scales, "modelopt", "modelopt float8"),
    "unknown grid": (unknown_grid, "fp8", "fp8 float8"),
    "row order": (rows_in_another_order, "bitsandbytes", "bitsandbytes int8"),
    "no scales": (without_scales, "", "F8_E4M3 without scales that are known"),
}


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_formats_that_are_not_decoded(name: str, dequantize: bool, tmp_path: Path) -> None:
    change, method, words = UNKNOWN[name]
    llama().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    weight = "model.layers.0.self_attn.q_proj.weight"
    change(tensors, weight)
    save_file(tensors, tmp_path / "base" / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match=rf"'{weight}' is quantized \({words}.*base that it was quantized from"):
        merge_checkpoint(tmp_path / "base", adapter(tmp_path / "adapter"), tmp_path / "out", dequantize=dequantize)
    assert not (tmp_path / "out").exists()


def test_other_dtypes_would_break_scales(tmp_path: Path) -> None:
    base, _ = quantized(tmp_path, "blocks", which=lambda key: "k_proj" in key)
    factors = adapter(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="`out_dtype` is torch.float32, and quantized weights.*dequantize=True"):
        merge_checkpoint(base, factors, tmp_path / "out", out_dtype=torch.float32)
    assert not (tmp_path / "out").exists()
    merge_checkpoint(base, factors, tmp_path / "out")  # the targets are not quantized
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(
        torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before if "k_proj" in key
    )
    assert (base / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_a_plain_base_is_as_without(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    factors = adapter(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", factors, tmp_path / "one")
    merge_checkpoint(tmp_path / "base", factors, tmp_path / "two", dequantize=True)
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_broken_description(tmp_path: Path) -> None:
    base, _ = quantized(tmp_path, "4 bits", which=lambda key: "layers.0.self_attn.q_proj" in key)
    tensors = load_file(base / WEIGHTS)
    name = next(key for key in tensors if "quant_state" in key)
    text = bytes(tensors[name].tolist())
    for broken in (b"\xff{", b"[]", text.replace(b"[16, 16]", b"[16, 17]"), text.replace(b'"blocksize"', b'"b"')):
        tensors[name] = torch.tensor(list(broken), dtype=torch.uint8)
        save_file(tensors, base / WEIGHTS)
        with pytest.raises(CheckpointError, match="does not describe a weight of bitsandbytes nf4"):
            merge_checkpoint(base, adapter(tmp_path / "adapter"), tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()


# ---- against the libraries ----


def in_memory(tensors: Tensors) -> tuple[dict[str, Source], Callable[[Source, int, int], Tensor]]:
    sources = {name: Source(Path(), name, Entry.of(tensor), 0) for name, tensor in tensors.items()}
    return (
        sources,
        lambda source, start, stop: (
            tensors[source.name][start:stop] if tensors[source.name].dim() else tensors[source.name][None]
        ),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_are_those_of_the_whole(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    block = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 10))
    grid = -(-rows // block[0]), -(-columns // block[1])
    count = -(-rows * columns // block[0])
    tensors = {
        "q": torch.randint(-100, 100, (rows, columns), dtype=torch.int8),
        "s": torch.rand(grid),
        "packed": torch.randint(0, 255, (-(-rows * columns // 2), 1), dtype=torch.uint8),
        "absmax": torch.randint(0, 255, (count,), dtype=torch.uint8),
        "map": NF4,
        "outer": torch.rand(-(-count // block[1])),
        "outer map": torch.rand(256),
    }
    sources, read = in_memory(tensors)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    for name, decoder in (
        ("q", Scaled((rows, columns), sources["s"], block)),
        ("packed", FourBits((rows, columns), block[0], sources["absmax"], sources["map"])),
        (
            "packed",
            FourBits(
                (rows, columns), block[0], sources["absmax"], sources["map"], sources["outer"], sources["outer map"],
                block[1], 0.5,
            ),
        ),
    ):  # fmt: skip
        whole = decoder.rows(sources[name], read, 0, rows)
        assert whole.shape == (rows, columns) and whole.dtype == torch.float64
        assert torch.equal(decoder.rows(sources[name], read, start, stop), whole[start:stop])


PACKED = {
    "nf4": "4466a96183887bb6329a936da568cca4575897997a679e325ab866966acf33d55bcc2f5915553c6b7a47b5c96f17337ad2990168879994b36077b93745e58cbd",
    "fp4": "cc9e76ea6c661449cd676de57e91457fe1e16166979162dde7419e6ee753dc5ef455d3e6afeec59497c84e46e3a9cc172d66bae661666c4c9b9946c9fe2e1545",
}
MAPS = {
    "nf4": "000080bfb13932bf306b06bfa032cabe4da291be3f353dbe7178babd00000000fffaa23de3ca243edd047c3e3a03ad3eb8a4e13eab07103fb313393f0000803f",
    "fp4": "00000000abaaaa3babaa2a3f0000803fabaaaa3e0000003fabaa2a3e0000803e00000000abaaaabbabaa2abf000080bfabaaaabe000000bfabaa2abe000080be",
}
DECODED = {
    "nf4": "78bf78bf9fbe9fbe573f0c3f9fbe18c08b3eacbf8b3e8b3e0000933f933f9fbeacbfe5bf0c3f573f0c3facbf9fbef53f573f21bf9fbe8b3ec03fc03f573f78bf"
    "21bf000021bf8b3e0c3f00000c3f0c3f0000573f9fbe00000c3f1e40acbfe5bf21bf573f933f8b3e9fbe9fbe0c3f9fbe9fbe573fc03f5a40acbfacbff53f21bf"
    "f7be623f933f933fafbf2740f7bed73ee9bff7bef7bef7be84bf933f73be623f0000243f3ebf0000623ff7be933fd73e73be2740e9bf000084bf84bf0000243f"
    "bc3fafbfd73ed73e27c0e9bf73be553e553e0000d73ed73ed73e3ebf623f84bf73be27c000000000623fd73e84bf00003ebff7bef13ff7be553e933f623fbc3f",
    "fp4": "91bf91bf91bc11bf5a3f113f11bf11c0113f91bf113f113f913c913f913f91bc91bfdabf113f5a3f113fdabf11bfda3f5a3f11bf91bc913c913fda3f5a3f5abf"
    "11bf913c11bf913c113f913c113f113f91bc5a3f91bc913c113f1140dabfdabf11bf5a3f913f913c91bc11bf113f11bf11bf5a3fda3f5a40dabf91bfda3f11bf"
    "27bf5f3fa73fa73fa7bf2740dfbedf3edfbf27bfdfbedfbe5fbfa73f5fbc5f3f5fbc273f5fbf00005f3fdfbe5f3fdf3edfbe2740dfbf5fbc5fbf5fbf5f3c273f"
    "df3fa7bfdf3edf3e27c0dfbfdfbedf3edf3e5f3cdf3edf3edf3e5fbf5f3f5fbf5fbc27c05fbc5fbc5f3fdf3e5fbf5fbc27bfdfbedf3fdfbe5f3ca73f5f3fa73f",
}
"""What bitsandbytes 0.50.2 made of `torch.manual_seed(0); torch.randn(2, 64).bfloat16()` and decoded again; fp4 nested."""


def from_hex(text: str, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(kind: str) -> None:
    tensors = {"packed": from_hex(PACKED[kind], torch.uint8)[:, None], "map": from_hex(MAPS[kind], torch.float32)}
    if kind == "nf4":
        tensors["absmax"] = from_hex("00005a4000002740", torch.float32)
        sources, read = in_memory(tensors)
        decoder = FourBits((2, 64), 64, sources["absmax"], sources["map"])
    else:
        tensors["absmax"] = torch.tensor([255, 0], dtype=torch.uint8)
        tensors["outer map"] = torch.zeros(256)
        tensors["outer map"][0], tensors["outer map"][255] = (
            float.fromhex("-0x1.fc66660000000p-1"),
            float.fromhex("0x1p+0"),
        )
        tensors["outer"] = from_hex("0000cc3e", torch.float32)
        sources, read = in_memory(tensors)
        names = ("absmax", "map", "outer", "outer map")
        decoder = FourBits((2, 64), 64, *(sources[name] for name in names), 256, 3.0078125)
    found = decoder.rows(sources["packed"], read, 0, 2).bfloat16()
    assert torch.equal(found, from_hex(DECODED[kind], torch.bfloat16).view(2, 64))


def test_int8_is_that_of_bitsandbytes() -> None:
    """Which multiplies in float32: the last bit may differ."""
    numbers = from_hex("bcbaf1e6332aed81e42e3740b77fe911", torch.int8).view(2, 8)
    tensors = {"q": numbers, "SCB": from_hex("0000074000002440", torch.float32)}
    expected = from_hex(
        "229190bfa3d194bf3c1e7fbe341addbeb3d9583f2a95323f2693a1be000007c0"
        "42a110bf369b6d3f180c8e3f954aa53f1289bcbf00002440369bedbe3e9faf3e",
        torch.float32,
    ).view(2, 8)
    sources, read = in_memory(tensors)
    found = Scaled((2, 8), sources["SCB"], (1, 8), 127.0).rows(sources["q"], read, 0, 2)
    torch.testing.assert_close(found.float(), expected, rtol=2.0**-23, atol=0)


def test_blocks_are_those_of_transformers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, exact = blocks("w", torch.randn(32, 24))
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["w"], tensors["w_scale_inv"], torch.float32)
    assert torch.equal(theirs, exact.float())


def test_a_plan_says_what_is_decoded(tmp_path: Path) -> None:
    base, _ = quantized(tmp_path, "blocks")
    plan = plan_merge(base, [], dequantize=True)
    decoded = [output for output in plan.outputs if output.source.decoder is not None]
    assert len(decoded) == 14 and all(output.entry.dtype == "BF16" for output in decoded)
    assert not any("scale" in output.name for output in plan.outputs)
    value = decoded[0].source.decoder
    assert value is not None and value.shape == decoded[0].entry.shape


def test_modules_that_take_a_quantized_ones_place(tmp_path: Path) -> None:
    base, exact = quantized(tmp_path, "nested")
    factors = adapter(tmp_path / "adapter", modules_to_save=["k_proj"])
    merge_checkpoint(base, factors, tmp_path / "out", dequantize=True)
    merge_checkpoint(exact, factors, tmp_path / "expected", out_dtype=torch.bfloat16)
    found, expected = (load_file(tmp_path / each / WEIGHTS) for each in ("out", "expected"))
    assert all(torch.equal(found[key], expected[key]) for key in found)
