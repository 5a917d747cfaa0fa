"""`trainable_token_indices`: rows of embeddings that are trained, as in peft, and the layers that share them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxlora import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    MergeError,
    NoTargetError,
    explain,
    export_merged,
    lora_transform,
)
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.host.tied import (
    BATCH,
    EMBEDDING,
    HEAD,
    PREFIX,
    VOCABULARY,
    WIDTH,
    backward,
    base,
    logits,
    ours,
    quiet,
    randomise,
    theirs,
)

IDS = [30, 2, 7]
ROWS = f"{EMBEDDING}.trainable_tokens_delta.default.weight"
THEIR_ROWS = f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta.default"
CAPTURES = ["modules", "export"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


# ---- against peft ----


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capture", CAPTURES)
def test_a_fresh_adapter_is_the_base(capture: str, dtype: torch.dtype, tied: bool, architecture: str) -> None:
    expected = logits(base(tied, dtype, architecture).requires_grad_(False))
    model = ours(base(tied, dtype, architecture), capture, trainable_token_indices=IDS)
    model.verify()
    assert torch.equal(logits(model), expected)
    assert [spec.site for spec in model._specs() if spec.variant] == [EMBEDDING, *[HEAD] * tied]
    reference = theirs(base(tied, dtype, architecture), trainable_token_indices=IDS)
    rows, expected_rows = model.get_parameter(ROWS), dict(reference.named_parameters())[THEIR_ROWS]
    assert rows.dtype == expected_rows.dtype and torch.equal(rows, expected_rows)
    assert model.get_nb_trainable_parameters() == reference.get_nb_trainable_parameters()


def pair(tied: bool, capture: str = "modules", **fields: Any) -> tuple[Any, Any]:
    """The same random adapter in both libraries."""
    settings = {"trainable_token_indices": IDS, **fields}
    model, reference = ours(base(tied), capture, **settings), theirs(base(tied), **settings)
    generator = torch.Generator().manual_seed(7)
    others = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                others[THEIR_ROWS if name == ROWS else PREFIX + name].copy_(parameter)
    return model, reference


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("capture", CAPTURES)
def test_outputs_and_gradients_are_pefts(capture: str, dora: bool, tied: bool) -> None:
    model, reference = pair(tied, capture, use_dora=dora)
    torch.testing.assert_close(logits(model), logits(reference))
    backward(model)
    backward(reference)
    others = dict(reference.named_parameters())
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == (4 if dora else 3)
    for name, parameter in trained:
        expected = others[THEIR_ROWS if name == ROWS else PREFIX + name].grad
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, expected)


def test_merged_weights_are_pefts(tied: bool) -> None:
    model, reference = pair(tied)
    rows, before = model.get_parameter(ROWS).detach().clone(), logits(model)
    merged = model.merge_and_unload()
    with quiet():
        expected = reference.merge_and_unload()
    weight = merged.get_parameter(f"{EMBEDDING}.weight")
    assert torch.equal(weight[IDS], rows)
    assert torch.equal(weight, expected.get_parameter(f"{EMBEDDING}.weight"))
    assert (merged.get_parameter(f"{HEAD}.weight") is weight) == tied
    torch.testing.assert_close(logits(merged), before)
    assert list(merged.state_dict()) == list(base(tied).state_dict())


@pytest.mark.parametrize("capture", CAPTURES)
def test_files_go_to_peft_and_back(capture: str, tied: bool, tmp_path: Path) -> None:
    model, _ = pair(tied, capture)
    model.save_pretrained(tmp_path / "ours")
    with quiet():
        reference = peft.PeftModel.from_pretrained(base(tied), tmp_path / "ours").eval()
        reference.save_pretrained(tmp_path / "theirs")
    assert torch.equal(dict(reference.named_parameters())[THEIR_ROWS], model.get_parameter(ROWS))
    torch.testing.assert_close(logits(reference), logits(model))
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 3
    assert f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta" in files[0]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    back = lora_transform(base(tied), tmp_path / "theirs", capture=capture, example_inputs=BATCH)  # pyright: ignore[reportArgumentType]
    assert torch.equal(logits(back), logits(model))
    assert back.peft_config["default"].trainable_token_indices == IDS


@pytest.mark.parametrize(
    "indices", [{"embed_tokens": [1, 2], "lm_head": [1, 2]}, {"embed_tokens": [1], "lm_head": [2, 5]}, {"lm_head": [3]}]
)
def test_named_layers_are_trained_as_in_peft(indices: dict[str, list[int]], tied: bool) -> None:
    model, reference = (
        ours(base(tied), trainable_token_indices=indices),
        theirs(base(tied), trainable_token_indices=indices),
    )
    names = {name.partition(".trainable_tokens_delta")[0] for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        name.removeprefix(PREFIX).partition(".token_adapter")[0]
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    assert names - {n for n in names if "lora_" in n} == expected - {n for n in expected if "lora_" in n}
    parameters = dict(reference.named_parameters())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in (EMBEDDING, HEAD):
            theirs_name = f"{PREFIX}{layer}.token_adapter.trainable_tokens_delta.default"
            if theirs_name in parameters:
                parameter = model.get_parameter(f"{layer}.trainable_tokens_delta.default.weight")
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameters[theirs_name].copy_(parameter)
    torch.testing.assert_close(logits(model), logits(reference))


def test_independent_rows_of_a_shared_weight_are_not_merged() -> None:
    model = ours(base(), trainable_token_indices={"embed_tokens": [1], "lm_head": [2, 5]})
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"shared with 'lm_head.weight'"):
        model.merge_adapter()
    assert_unchanged(model, before)


def test_lora_on_a_tied_head_adds_to_the_rows() -> None:
    model, reference = pair(True, target_modules=["lm_head"])
    assert [spec.variant for spec in model._specs() if spec.site == HEAD] == ["", "token_logits"]
    torch.testing.assert_close(logits(model), logits(reference))


# ---- cost and precision ----


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that operators make, views excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in storages:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("capture", CAPTURES)
def test_no_tensor_of_the_weights_size_is_made(capture: str, tied: bool) -> None:
    model, reference = pair(tied, capture)
    for each, found in ((model, False), (reference, True)):
        with Shapes() as seen:
            backward(each)
        assert ((VOCABULARY, WIDTH) in seen.shapes) == found


def test_half_precision_rows_come_out_exactly() -> None:
    model: Any = ours(base(False, torch.bfloat16), trainable_token_indices=IDS)
    rows = model.get_parameter(ROWS)
    with torch.no_grad():
        rows.copy_(torch.randn(rows.shape) * 10.0 ** torch.randint(-6, 6, rows.shape))
    out = model.get_submodule(EMBEDDING)(torch.tensor(IDS))
    assert rows.dtype == torch.float32 and out.dtype == torch.bfloat16
    assert torch.equal(out, rows.to(torch.bfloat16))


def test_a_fold_keeps_bits_that_a_difference_would_lose() -> None:
    model: Any = ours(base(), trainable_token_indices=IDS)
    values = torch.full((len(IDS), WIDTH), 1e-30)
    values[0, 0], values[1] = -0.0, 1e30
    with torch.no_grad():
        model.get_parameter(f"{EMBEDDING}.weight")[IDS] = 1.0
        model.get_parameter(ROWS).copy_(values)
    weight = model.merge_and_unload().get_parameter(f"{EMBEDDING}.weight")[IDS]
    assert torch.equal(weight.view(torch.int32), values.view(torch.int32))


def test_export_of_a_wider_dtype_keeps_the_rows(tmp_path: Path) -> None:
    model: Any = ours(base(True, torch.bfloat16), trainable_token_indices=IDS)
    randomise(model)
    export_merged(model, tmp_path, out_dtype=torch.float32)
    weight = load_file(tmp_path / "model.safetensors")[f"{EMBEDDING}.weight"]
    assert torch.equal(weight[IDS], model.get_parameter(ROWS))


def test_a_merge_of_broken_rows_changes_nothing() -> None:
    model: Any = ours(base(), trainable_token_indices=IDS)
    with torch.no_grad():
        model.get_parameter(ROWS)[1, 1] = float("nan")
    before = model.get_parameter(f"{EMBEDDING}.weight").clone()
    with pytest.raises(MergeError, match=r"'model.embed_tokens': .* NaN .* Adapter default is broken"):
        model.merge_adapter()
    assert torch.equal(model.get_parameter(f"{EMBEDDING}.weight"), before)


# ---- life of an adapter ----


@pytest.mark.parametrize("capture", CAPTURES)
def test_life(capture: str, tied: bool, tmp_path: Path) -> None:
    plain = base(tied)
    expected = logits(plain)
    model: Any = ours(plain, capture, trainable_token_indices=IDS)
    randomise(model)
    adapted = logits(model)
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    model.set_scale("default", 2.0)  # of the factors, as in peft
    model.set_scale("default", 1.0)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(copied), adapted)
    if tied:
        assert copied.get_parameter(ROWS) is copied.get_parameter(ROWS.replace(EMBEDDING, HEAD))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), adapted)
    assert not model.get_parameter(ROWS).requires_grad
    model.delete_adapter("second")
    model.verify()
    stripped = model.unload()
    assert torch.equal(logits(stripped), expected)
    assert list(stripped.state_dict()) == list(base(tied).state_dict())


def test_several_adapters(tied: bool) -> None:
    model: Any = ours(base(tied), trainable_token_indices=IDS)
    for name, ids in (("apart", [1, 9]), ("overlapping", [7])):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ids))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.set_adapter(["default", "apart"])
    randomise(model)
    both = logits(model)
    rows = {
        tuple(ids): model.get_parameter(ROWS.replace("default", name))
        for name, ids in (("default", IDS), ("apart", [1, 9]))
    }
    model.merge_adapter(["apart"])
    torch.testing.assert_close(logits(model), both)
    model.merge_adapter(["default"])
    torch.testing.assert_close(logits(model), both)
    for ids, values in rows.items():
        assert torch.equal(model.get_parameter(f"{EMBEDDING}.weight")[list(ids)], values)
    model.unmerge_adapter()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"'default' trains rows .* 'overlapping' has token 7 too"):
        model.set_adapter(["default", "overlapping"])
    with pytest.raises(AdapterError, match="'lora' has LoRA there"):
        model.set_adapter(["lora", "default"])
    with pytest.raises(AdapterError, match="'overlapping' has token 7 too"):
        model.merge_adapter(["default", "overlapping"])
    with pytest.raises(ConfigError, match=f"'{EMBEDDING}' has LoRA of the same adapter too"):
        model.add_weighted_adapter(["default", "lora"], [1, 1], "sum")
    assert_unchanged(model, before)


@pytest.mark.parametrize("capture", CAPTURES)
def test_compiled(capture: str) -> None:
    model, _ = pair(True, capture)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**BATCH)[0], logits(model))


def test_conversion_keeps_the_ids() -> None:
    model: Any = ours(base(), trainable_token_indices=IDS).to("meta").to_empty(device="cpu")
    table = model.get_submodule(EMBEDDING).lora_token_ids.default.table
    assert table.tolist() == [[2, 7, 30], [1, 2, 0]]


# ---- plain models ----


class Plain(nn.Module):
    """A functional head on the embedding's weight; `extra` reads the weight in a way of its own."""

    def __init__(self, extra: bool = False, **options: Any) -> None:
        super().__init__()
        self.tok = nn.Embedding(10, 4, **options)
        self.mid = nn.Linear(4, 4)
        self.extra = extra

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.mid(self.tok(input_ids)).tanh()
        out = F.linear(h, self.tok.weight)
        return out + self.tok.weight.sum() if self.extra else out


TOKENS = torch.tensor([[0, 3, 3], [9, 1, 0]])


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_a_head_that_is_a_function_follows(capture: Any) -> None:
    plain = Plain()
    expected = plain(TOKENS)
    config = LoraConfig(r=2, target_modules=["mid"], trainable_token_indices={"tok": [3, 0]})
    model: Any = lora_transform(plain, config, capture=capture, example_inputs=TOKENS)
    assert torch.equal(model(TOKENS), expected)
    randomise(model)
    out = model(TOKENS)
    reference = copy.deepcopy(plain)
    with torch.no_grad():
        reference.tok.weight[[3, 0]] = model.get_parameter("tok.trainable_tokens_delta.default.weight")
    assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS), out)
    factors = {name: model.get_parameter(f"mid.lora_{name}.default.weight") for name in "AB"}
    with torch.no_grad():
        reference.mid.weight += 4 * factors["B"] @ factors["A"]
    torch.testing.assert_close(out, reference(TOKENS))
    torch.testing.assert_close(model.merge_and_unload()(TOKENS), out)
    assert torch.equal(plain.tok.weight, reference.tok.weight)


def test_other_uses_of_the_weight_are_refused() -> None:
    plain = Plain(extra=True)
    before = snapshot(plain)
    config = LoraConfig(r=2, target_modules=["mid"], trainable_token_indices={"tok": [3]})
    with pytest.raises(CaptureError, match="uses the weight of 'tok' also in 'sum"):
        lora_transform(plain, config, capture="symbolic")
    assert_unchanged(plain, before)


def test_other_uses_are_refused_for_a_further_adapter_too() -> None:
    model: Any = lora_transform(Plain(extra=True), {"r": 2, "target_modules": ["mid"]}, capture="symbolic")
    before = snapshot(model)
    with pytest.raises(CaptureError, match="uses the weight of 'tok' also in 'sum"):
        model.add_adapter("tokens", {"target_modules": ["mid"], "trainable_token_indices": {"tok": [3]}})
    assert_unchanged(model, before)


def test_explain_says_why() -> None:
    rows = {
        row.name: row for row in explain(base(), {"target_modules": ["q_proj"], "trainable_token_indices": IDS}).rows
    }
    assert (rows[EMBEDDING].reason, rows[EMBEDDING].parameters) == ("3 trainable tokens", 3 * WIDTH)
    assert (rows[HEAD].reason, rows[HEAD].parameters) == (f"shares its weight with {EMBEDDING}", 0)


def test_a_row_for_padding_is_not_trained_by_lookups() -> None:
    model: Any = lora_transform(
        nn.Sequential(nn.Embedding(10, 4, padding_idx=3)),
        {"target_modules": [], "trainable_token_indices": {"0": [5, 3]}},
    )
    model(torch.tensor([3, 5, 5], dtype=torch.int32)).sum().backward()
    grad = model.get_parameter("0.trainable_tokens_delta.default.weight").grad
    assert torch.equal(grad, torch.tensor([[2.0] * 4, [0.0] * 4]))


def test_a_linear_layer_keeps_its_bias() -> None:
    plain = nn.Sequential(nn.Linear(4, 6))
    x = torch.randn(3, 4)
    model: Any = lora_transform(plain, {"target_modules": [], "trainable_token_indices": {"0": [5, 1]}})
    rows = model.get_parameter("0.trainable_tokens_delta.default.weight")
    with torch.no_grad():
        rows.normal_()
    weight = plain[0].weight.detach().clone()
    weight[[5, 1]] = rows.detach()
    torch.testing.assert_close(model(x), F.linear(x, weight, plain[0].bias))


# ---- mistakes ----

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such layer": ({"trainable_token_indices": {"embed_token": [1]}}, NoTargetError, "Did you mean 'embed_tokens' or 'model.embed_tokens'"),
    "negative": ({"trainable_token_indices": [1, -1]}, ConfigError, "-1 is no token; ids are integers from 0 on"),
    "beyond the vocabulary": ({"trainable_token_indices": [VOCABULARY]}, ConfigError, "40 is no token; ids are integers from 0 to 39"),
    "no number": ({"trainable_token_indices": ["a"]}, ConfigError, "'a' is no token"),
    "twice": ({"trainable_token_indices": [4, 4]}, ConfigError, "4 is there twice"),
    "none": ({"trainable_token_indices": []}, ConfigError, "is empty"),
    "no list": ({"trainable_token_indices": {"embed_tokens": 3}}, ConfigError, "should be a list of ids"),
    "no rows": ({"trainable_token_indices": {"norm": [1]}}, NoTargetError, "no layer is called 'norm'"),
    "LoRA there too": (
        {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
        ConfigError,
        "has LoRA of the same adapter too",
    ),
    "other ids at the tied head": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        ConfigError,
        "share one weight and have different ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_leave_the_model_alone(name: str) -> None:
    fields, error, message = BAD[name]
    model = base()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        ours(model, **fields)
    assert_unchanged(model, before)


def test_rows_with_a_limited_norm_are_refused() -> None:
    with pytest.raises(ConfigError, match="has max_norm"):
        lora_transform(Plain(max_norm=1.0), {"target_modules": ["mid"], "trainable_token_indices": {"tok": [1]}})


def test_files_for_another_number_of_tokens_are_refused(tmp_path: Path) -> None:
    model: Any = ours(base(), trainable_token_indices=IDS)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace("    30,\n", ""))
    with pytest.raises(CheckpointError, match="has shape"):
        lora_transform(base(), tmp_path)
