"""`strict=False` and `ignore_mismatched_sizes`: what does not fit is left out and reported; what is broken is still refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxlora import CheckpointError, LoraConfig, NoTargetError, hotswap_adapter, lora_transform
from tests.checkpoint.test_adapter import A1, CONFIG, PREFIX, WEIGHTS, X, filled, make, renamed, same_base
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.host import tied
from tests.zoo import MLP

B1, A2, B2 = (f"{PREFIX}{name}.weight" for name in ("fc1.lora_B", "fc2.lora_A", "fc2.lora_B"))
Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(path: Path, change: Edit) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def configure(path: Path, **fields: Any) -> None:
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**values, **fields}))


def only(*layers: str) -> Tensor:
    """The output of a model whose adapter is on some layers."""
    model = make()
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.partition(".")[0] not in layers:
            parameter.data.zero_()
    return model(X)


def load(path: Path, **options: Any) -> tuple[Any, Any]:
    """(the model, with the new adapter active, what `load_adapter` gave back)."""
    model: Any = lora_transform(same_base(make()), LoraConfig(r=1, target_modules=["fc1"]), example_inputs=X)
    result = model.load_adapter(path, "new", **options)
    model.set_adapter("new")
    return model.eval(), result


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"ignore_mismatched_sizes": True}], ids=str)
def test_a_file_that_fits_is_read_as_ever(
    saved: Path, options: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    model, result = load(saved, **options)
    assert result == ((), (), ()) and warnings(caplog) == []
    assert torch.equal(model(X), only("fc1", "fc2"))


CASES: dict[str, tuple[Edit, tuple[Any, Any, Any], str, list[str]]] = {
    "unknown key": (
        lambda t: t.update({f"{PREFIX}fc3.lora_A.weight": torch.ones(2, 8)}),
        ((), (f"{PREFIX}fc3.lora_A.weight",), ()), "fc1 fc2", ["fc3.lora_A.weight' not used"],
    ),
    "misspelt key": (
        renamed(A1, f"{PREFIX}f1.lora_A.weight"),
        ((A1,), (f"{PREFIX}f1.lora_A.weight", B1), ()), "fc2", [f"lacks '{A1}'", "'fc1' started as in a fresh adapter"],
    ),
    "a layer is missing": (lambda t: (t.pop(A2), t.pop(B2)), ((A2, B2), (), ()), "fc1", [f"lacks '{A2}', '{B2}'"]),
    "a factor is missing": (lambda t: t.pop(B2), ((B2,), (A2,), ()), "fc1", [f"lacks '{B2}', '{A2}' not used"]),
    "another rank": (
        lambda t: t.update({A1: torch.ones(3, 8), B1: torch.ones(16, 3)}),
        ((), (), ((A1, (3, 8), (2, 8)), (B1, (16, 3), (16, 2)))), "fc2", [f"'{A1}', '{B1}' of another shape"],
    ),
    "another width": (
        lambda t: t.update({A1: torch.ones(2, 9)}), ((), (B1,), ((A1, (2, 9), (2, 8)),)), "fc2", [f"'{A1}' of another shape"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_left_out(name: str, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, expected, layers, words = CASES[name]
    edit(saved, change)
    model, result = load(saved, strict=False)
    assert result == expected
    (warning,) = warnings(caplog)
    assert [word for word in [str(saved / WEIGHTS), *words] if word not in warning] == [], warning
    assert torch.equal(model(X), only(*layers.split()))
    model.verify()
    if not expected[0] and not (expected[1] and not expected[2]):  # only shapes differ
        assert load(saved, ignore_mismatched_sizes=True)[1] == expected


@pytest.mark.parametrize("name", CASES)
def test_strict_reading_refuses_it_and_names_the_switch(name: str, saved: Path) -> None:
    edit(saved, CASES[name][0])
    shapes = CASES[name][1][2]
    with pytest.raises(CheckpointError, match=r"ignore_mismatched_sizes=True" if shapes else r"strict=False"):
        load(saved)
    if not shapes:
        with pytest.raises(CheckpointError, match="strict=False"):
            load(saved, ignore_mismatched_sizes=True)


def test_first_adapter(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(saved, lambda t: t.pop(B1))
    model = lora_transform(same_base(make()), saved, example_inputs=X, strict=False)
    assert len(warnings(caplog)) == 1
    assert torch.equal(model(X), only("fc2"))
    edit(saved, lambda t: t.update({B1: torch.ones(16, 5)}))
    model = lora_transform(same_base(make()), saved, example_inputs=X, ignore_mismatched_sizes=True)
    assert torch.equal(model(X), only("fc2"))


def test_missing_layers_are_drawn_as_for_a_fresh_adapter(saved: Path) -> None:
    edit(saved, lambda t: (t.pop(A1), t.pop(B1)))
    model: Any = lora_transform(same_base(make()), saved, example_inputs=X, strict=False, is_trainable=True)
    A, B = (model.get_parameter(f"fc1.{part}.default.weight") for part in ("lora_A", "lora_B"))
    assert A.requires_grad and B.requires_grad
    torch.manual_seed(5)
    again: Any = lora_transform(same_base(make()), saved, example_inputs=X, strict=False)
    torch.manual_seed(5)
    fresh: Any = lora_transform(same_base(make()), LoraConfig(r=2, target_modules=["fc1", "fc2"]), example_inputs=X)
    path = "fc1.lora_A.default.weight"
    assert torch.equal(again.get_parameter(path), fresh.get_parameter(path))


def test_targets_that_the_model_does_not_have(saved: Path) -> None:
    configure(saved, target_modules=["fc1", "fc2", "fc7"])
    with pytest.raises(NoTargetError, match="fc7"):
        load(saved)
    model, result = load(saved, strict=False)
    assert result == ((), (), ()) and torch.equal(model(X), only("fc1", "fc2"))
    configure(saved, target_modules=["fc7"])
    with pytest.raises(NoTargetError, match="fc7"):
        load(saved, strict=False)


BROKEN: dict[str, tuple[Edit, str]] = {
    "NaN": (filled(torch.nan), "NaN"),
    "infinite": (filled(torch.inf), "infinite"),
    "integers": (lambda t: t.update({A1: t[A1].int()}), "I32"),
    "base weight": (lambda t: t.update({f"{PREFIX}fc1.weight": torch.ones(16, 8)}), "of the base model"),
    "twice": (lambda t: t.update({"fc1.lora_A.weight": t[A1].clone()}), "mean the same tensor"),
    "nothing": (lambda t: t.clear(), "none of its tensors fits"),
    "another model": (
        lambda t: [renamed(key, key.replace("fc", "dense"))(t) for key in list(t)], "none of its tensors fits"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_in_any_case(name: str, saved: Path) -> None:
    change, words = BROKEN[name]
    edit(saved, change)
    model = make()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=words):
        model.load_adapter(saved, "new", strict=False, ignore_mismatched_sizes=True)
    assert_unchanged(model, before)
    plain = MLP()
    before = snapshot(plain)
    with pytest.raises(CheckpointError, match=words):
        lora_transform(plain, saved, example_inputs=X, strict=False)
    assert_unchanged(plain, before)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]"], ids=["empty", "bomb", "no object"])
def test_broken_files_are_refused_in_any_case(content: bytes, saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(saved, strict=False)


def test_dora_starts_fresh_with_its_magnitudes(tmp_path: Path) -> None:
    make(use_dora=True).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.pop(f"{PREFIX}fc1.lora_magnitude_vector"))
    model, result = load(tmp_path, strict=False)
    assert result == ((f"{PREFIX}fc1.lora_magnitude_vector",), (A1, B1), ())
    norms = model.get_submodule("fc1").weight.norm(dim=1)
    assert torch.allclose(model.get_parameter("fc1.lora_magnitude_vector.new.weight"), norms)


def test_saved_modules_and_biases(tmp_path: Path) -> None:
    settings = {"target_modules": ["fc1"], "modules_to_save": ["fc2"], "bias": "lora_only"}
    trained = make(**settings)
    trained.get_parameter("fc2.modules_to_save.default.weight").data.add_(1)
    trained.get_parameter("fc1.bias").data.add_(1)
    trained.save_pretrained(tmp_path)
    bias = f"{PREFIX}fc1.base_layer.bias"
    edit(tmp_path, lambda t: (t.pop(bias), t.update({f"{PREFIX}fc2.weight": torch.ones(3, 16)})))
    base = same_base(make())
    model: Any = lora_transform(base, LoraConfig(r=1, target_modules=["fc1"]), example_inputs=X)
    fc2, fc1_bias = model.get_parameter("fc2.weight").clone(), model.get_parameter("fc1.bias").clone()
    with pytest.raises(CheckpointError, match=r"strict=False"):
        model.load_adapter(tmp_path, "new", ignore_mismatched_sizes=True)
    result = model.load_adapter(tmp_path, "new", strict=False)
    assert result == ((bias,), (f"{PREFIX}fc2.bias",), ((f"{PREFIX}fc2.weight", (3, 16), (4, 16)),))
    assert torch.equal(model.get_parameter("fc2.modules_to_save.new.weight"), fc2)
    assert torch.equal(model.get_parameter("fc1.bias"), fc1_bias)
    edit(tmp_path, lambda t: t.update({bias: torch.ones(16)}))
    model.delete_adapter("new")
    assert model.load_adapter(tmp_path, "new", ignore_mismatched_sizes=True).missing_keys == ()
    assert torch.equal(model.get_parameter("fc1.bias"), torch.ones(16))


def test_what_is_tied_starts_fresh_together(tmp_path: Path) -> None:
    """With a factor of one of two layers that share theirs missing, neither takes the others."""
    fields = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    trained = tied.ours(tied.base(), **fields)
    tied.randomise(trained)
    trained.save_pretrained(tmp_path, save_embedding_layers=False)
    missing = f"{PREFIX}{tied.EMBEDDING}.lora_embedding_A"
    edit(tmp_path, lambda t: t.pop(missing))
    model = tied.ours(tied.base(), target_modules=["q_proj"])
    result = model.load_adapter(tmp_path, "new", strict=False)
    assert result.missing_keys == (missing,) and result.mismatched_keys == ()
    unused = [key for key in load_file(tmp_path / WEIGHTS) if tied.EMBEDDING in key or tied.HEAD in key]
    assert result.unexpected_keys == tuple(sorted(unused)) and len(unused) == 3
    model.set_adapter("new")
    assert not model.get_parameter(f"{tied.EMBEDDING}.lora_embedding_A.new.weight").any()
    assert model.get_parameter(f"{tied.EMBEDDING}.lora_embedding_B.new.weight").any()
    model.verify()


def test_ignoring_sizes_is_as_in_peft(saved: Path) -> None:
    edit(saved, lambda t: t.update({A2: torch.ones(3, 16), B2: torch.ones(4, 3)}))
    theirs: Any = peft.get_peft_model(same_base(make()), peft.LoraConfig(r=1, target_modules=["fc1"]))
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        theirs.load_adapter(saved, "new", ignore_mismatched_sizes=True)
    theirs.set_adapter("new")
    model, _ = load(saved, ignore_mismatched_sizes=True)
    assert torch.allclose(model(X), theirs.eval()(X), atol=1e-6)


def test_hot_swap_stays_strict(saved: Path) -> None:
    model = make()
    edit(saved, lambda t: t.pop(A1))
    with pytest.raises(CheckpointError, match="load it with strict=False"):
        hotswap_adapter(model, saved)
