"""modules_to_save: trained copies of whole modules, compared with peft."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxlora import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    NoTargetError,
    VerifyError,
    explain,
    export_merged,
    lora_transform,
    merge_checkpoint,
)
from tests.faults.snapshots import assert_unchanged, snapshot
from tests.host.nets import Net, X, assert_same_gradients, gradients, net, peft_from, peft_model, train
from tests.zoo import ARCHITECTURES

CAPTURES = ["modules", "symbolic", "export"]
CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["fc1", "fc2"], "modules_to_save": ["head", "classifier"]}


def transform(model: nn.Module, capture: Any, example: Any = X, **config: Any) -> Any:
    return lora_transform(model, LoraConfig(**{**CONFIG, **config}), capture=capture, example_inputs=example)


def pair(capture: str, **config: Any) -> tuple[Any, Any]:
    """Our model and peft's, trained alike."""
    torch.manual_seed(1)
    ours = transform(net(), capture, **config).eval()
    torch.manual_seed(1)
    theirs = peft_model(net(), **{**CONFIG, **config}).eval()
    assert train(ours) == train(theirs)
    return ours, theirs


@pytest.mark.parametrize("capture", CAPTURES)
def test_outputs_and_gradients_are_pefts(capture: str) -> None:
    ours, theirs = pair(capture)
    base = net()
    assert torch.equal(transform(net(), capture)(X), base(X))
    torch.testing.assert_close(ours(X), theirs(X))
    assert not torch.allclose(ours(X), base(X), atol=0.1)
    assert_same_gradients(gradients(ours, X), gradients(theirs, X))
    ours.train(), theirs.train()
    torch.testing.assert_close(ours(X), theirs(X))
    copied = theirs.base_model.model.head.modules_to_save["default"]
    assert torch.equal(ours.get_submodule("head.modules_to_save.default.1").running_mean, copied[1].running_mean)
    assert not torch.equal(copied[1].running_mean, torch.zeros(6))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.verify()


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_original_stays_and_runs_when_adapters_are_disabled(capture: str) -> None:
    ours, _ = pair(capture)
    base, trained = net(), ours(X)
    state = {name: value for name, value in ours.state_dict().items() if "lora_" not in name}
    state = {name: value for name, value in state.items() if ".modules_to_save." not in name}
    assert list(state) == list(base.state_dict())
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in state.items())
    with ours.disable_adapter():
        assert torch.equal(ours(X), base(X))
        ours.verify()
    assert torch.equal(ours(X), trained)
    ours.disable_adapter_layers()
    assert torch.equal(ours(X), base(X))
    ours.enable_adapter_layers()
    assert torch.equal(ours(X), trained)


@pytest.mark.parametrize("capture", CAPTURES)
def test_each_adapter_has_its_own_copies(capture: str) -> None:
    ours, _ = pair(capture)
    first = ours(X)
    ours.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["classifier"]))
    ours.add_adapter("plain", LoraConfig(r=2, target_modules=["fc1"]))
    assert torch.equal(ours(X), first)
    ours.set_adapter("other")
    trainable = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trainable == {f"fc1.lora_{x}.other.weight" for x in "AB"} | {
        f"classifier.modules_to_save.other.{name}" for name in ("weight", "bias")
    }
    assert torch.equal(ours(X), net()(X))  # a copy of the original, not of the first adapter's
    train(ours)
    second = ours(X)
    ours.verify()
    for _ in range(2):
        ours.set_adapter("default")
        assert torch.equal(ours(X), first)
        ours.set_adapter("other")
        assert torch.equal(ours(X), second)
    ours.set_adapter("plain")
    assert torch.equal(ours(X), net()(X))
    ours.set_adapter(["plain", "default"])
    torch.testing.assert_close(ours(X), first)
    before = snapshot(ours)
    with pytest.raises(AdapterError, match="both have a copy of 'classifier'"):
        ours.set_adapter(["default", "other"])
    assert_unchanged(ours, before)
    ours.delete_adapter("default")
    ours.delete_adapter("plain")
    ours.set_adapter("other")
    assert torch.equal(ours(X), second)
    ours.verify()
    ours.delete_adapter("other")
    assert not any("modules_to_save" in name for name in ours.state_dict())
    assert torch.equal(ours(X), net()(X))


@pytest.mark.parametrize("capture", CAPTURES)
def test_merging_leaves_the_copies_and_unloading_puts_them_in_place(capture: str) -> None:
    ours, theirs = pair(capture)
    trained, base = ours(X), net()
    ours.merge_adapter()
    torch.testing.assert_close(ours(X), trained)
    assert ours.head.modules_to_save is not None
    with ours.disable_adapter():
        assert torch.equal(ours(X), base(X))
    ours.unmerge_adapter()
    assert torch.equal(ours(X), trained)
    merged, unloaded = copy.deepcopy(ours).merge_and_unload(), ours.unload()
    reference = {False: copy.deepcopy(theirs).unload(), True: theirs.merge_and_unload()}
    for own, other in ((unloaded, reference[False]), (merged, reference[True])):
        torch.testing.assert_close(own(X), other(X))
        assert list(own.state_dict()) == list(base.state_dict())
        assert all(torch.allclose(v, other.state_dict()[k], atol=1e-6) for k, v in own.state_dict().items())
    if capture == "modules":
        assert type(unloaded.head) is nn.Sequential and type(unloaded.classifier) is nn.Linear


@pytest.mark.parametrize("capture", CAPTURES)
def test_copies_and_pickles_keep_them(capture: str) -> None:
    ours, _ = pair(capture)
    trained = ours(X)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        twin.verify()
        assert torch.equal(twin(X), trained)
        with twin.disable_adapter():
            assert torch.equal(twin(X), net()(X))
        train(twin)
        assert not torch.equal(twin(X), trained)
        assert torch.equal(ours(X), trained)


@pytest.mark.parametrize("capture", CAPTURES)
def test_files_go_to_peft_and_come_back(capture: str, tmp_path: Path) -> None:
    ours, theirs = pair(capture)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and "base_model.model.head.1.num_batches_tracked" in files[0]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    torch.testing.assert_close(peft_from(net(), tmp_path / "ours")(X), ours(X))
    back = lora_transform(net(), tmp_path / "theirs", capture=capture, example_inputs=X).eval()
    assert torch.equal(back(X), ours(X))
    again = transform(net(), capture).eval()
    again.load_adapter(tmp_path / "theirs", "loaded")
    again.set_adapter("loaded")
    assert torch.equal(again(X), ours(X))


def test_copies_have_the_models_dtype(tmp_path: Path) -> None:
    ours = transform(net().bfloat16(), "modules", X.bfloat16())
    train(ours)
    ours.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert file["base_model.model.classifier.weight"].dtype == torch.bfloat16
    assert file["base_model.model.fc1.lora_A.weight"].dtype == torch.float32
    theirs = peft_from(net().bfloat16(), tmp_path)
    copied = theirs.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(copied, ours.classifier.modules_to_save["default"].weight)


def test_a_merged_checkpoint_has_the_trained_modules(tmp_path: Path) -> None:
    ours, _ = pair("modules")
    export_merged(ours, tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    plain = net()
    plain.load_state_dict(file)
    torch.testing.assert_close(plain(X), ours(X))
    merged = ours.merge_and_unload().state_dict()
    assert file.keys() == merged.keys() and all(torch.equal(file[key], merged[key]) for key in file)


class Head(nn.Module):
    """Takes whatever it is given, as many heads of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        return self.dense(args[0]) * self.scale * kwargs.get("factor", 1.0)


class Peculiar(nn.Module):
    """Calls its head with keywords, and reads a parameter and a child of it without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(self.fc1(x), factor=2.0)
        return F.linear(h, self.head.dense.weight) + self.head.scale


@pytest.mark.parametrize("capture", CAPTURES)
def test_any_signature_and_reads_without_a_call(capture: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Peculiar()

    config: dict[str, Any] = {"target_modules": ["fc1"], "modules_to_save": ["head"]}
    ours, theirs = transform(make(), capture, **config), peft_model(make(), r=2, **config)
    assert train(ours) >= {"head.modules_to_save.default.scale", "head.modules_to_save.default.dense.weight"}
    train(theirs)
    ours.fc1.lora_A.default.weight.data.copy_(theirs.base_model.model.fc1.lora_A["default"].weight)
    torch.testing.assert_close(ours(X), theirs(X))
    assert_same_gradients(gradients(ours, X), gradients(theirs, X))
    with ours.disable_adapter():
        assert torch.equal(ours(X), make()(X))
    named = dict(ours.named_modules())
    assert all(ours.get_submodule(name) is module for name, module in named.items())
    assert all(ours.get_parameter(name) is parameter for name, parameter in ours.named_parameters())


def test_hooks_run_once() -> None:
    model, calls = net(), []
    model.classifier.register_forward_hook(lambda *_: calls.append("classifier"))
    model.head[0].register_forward_pre_hook(lambda *_: calls.append("head.0"))
    ours = transform(model, "modules", None)
    ours(X)
    assert sorted(calls) == ["classifier", "head.0"]
    with ours.disable_adapter():
        ours(X)
    assert sorted(calls) == ["classifier", "classifier", "head.0", "head.0"]


def test_hooks_of_a_layer_in_a_whole_graph_run_once() -> None:
    model, calls = net(), []
    model.head[1].register_forward_hook(lambda *_: calls.append("norm"))
    ours = transform(model, "symbolic", None, modules_to_save=["head.1"])
    ours(X)
    with ours.disable_adapter():
        ours(X)
    assert calls == ["norm", "norm"]


def test_explain_counts_what_is_trained() -> None:
    explained = explain(net(), LoraConfig(**CONFIG, bias="all"))
    ours = transform(net(), "modules", bias="all")
    assert explained.trainable == ours.get_nb_trainable_parameters()[0]
    assert explained.trainable_percent == pytest.approx(
        100 * explained.trainable / ours.get_nb_trainable_parameters()[1]
    )
    assert "'classifier' is trained whole, as a copy: 21 parameters" in str(explained)
    assert "biases of the base are trained in place: 16 parameters" in str(explained)
    assert explained.to_dict()["modules_to_save"] == {"head": 54, "classifier": 21}


def test_a_sequence_is_read_as_what_it_was() -> None:
    ours = transform(net(), "modules")
    copied = ours.head.modules_to_save["default"]
    assert list(ours.head) == list(copied) and len(ours.head) == 3 and ours.head[-1] is copied[2]
    with ours.disable_adapter():
        assert [type(each).__name__ for each in ours.head] == ["Linear", "BatchNorm1d", "GELU"]
        assert ours.head[0] is not copied[0] and len(ours.head[1:]) == 2


def broken(*_: object) -> None:
    raise RuntimeError("broken")


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_a_copy_that_goes_leaves_the_branches_of_other_adapters(capture: str) -> None:
    ours: Any = lora_transform(net(), LoraConfig(r=2, target_modules=["head.0", "classifier"]), capture=capture)
    train(ours)
    expected = ours(X)
    ours.add_adapter("saves", LoraConfig(**CONFIG))
    ours.delete_adapter("saves")
    ours.verify()
    assert torch.equal(ours(X), expected)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(type(ours), "_render", broken)
        ours.add_adapter("saves", LoraConfig(**CONFIG))
    ours.verify()
    assert torch.equal(ours(X), expected)


def test_an_adapter_may_target_what_another_one_saves() -> None:
    ours = transform(net(), "modules")
    ours.add_adapter("inside", LoraConfig(r=2, target_modules=["head.0", "classifier"]))
    train(ours)
    first = ours(X)
    ours.set_adapter("inside")
    assert torch.equal(ours(X), net()(X))
    with pytest.raises(AdapterError, match="in which adapter 'inside' would have no effect"):
        ours.set_adapter(["default", "inside"])
    ours.add_adapter("later", LoraConfig(**CONFIG))  # its copy has nothing of the adapter inside
    assert "lora" not in "".join(ours.head.modules_to_save["later"].state_dict())
    train(ours)
    ours.verify()
    ours.set_adapter("default")
    assert torch.equal(ours(X), first)
    ours.set_adapter("later")
    assert torch.equal(ours(X), net()(X))


@pytest.mark.parametrize(
    ("task", "name", "heads"),
    [("SEQ_CLS", "classifier", ["classifier", "score"]), ("QUESTION_ANS", "qa_outputs", ["qa_outputs"])],
)
def test_a_task_adds_its_head(task: str, name: str, heads: list[str], tmp_path: Path) -> None:
    from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

    sizes = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)

    def make() -> Any:
        torch.manual_seed(0)
        cls = BertForSequenceClassification if task == "SEQ_CLS" else BertForQuestionAnswering
        return cls(sizes).eval()

    ids = torch.arange(6)[None]
    config = {"r": 2, "target_modules": ["query"], "task_type": task}
    torch.manual_seed(1)
    ours = lora_transform(make(), LoraConfig(**config)).eval()
    torch.manual_seed(1)
    theirs = peft_model(make(), **config).eval()
    assert ours.peft_config["default"].modules_to_save == heads
    assert train(ours) == train(theirs) and f"{name}.modules_to_save.default.weight" in train(ours)
    train(theirs)
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0])
    theirs.save_pretrained(tmp_path)
    back = lora_transform(make(), tmp_path).eval()
    assert torch.equal(back(ids)[0], ours(ids)[0])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == heads


@pytest.mark.parametrize("capture", ["modules", "export"])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_layer_gets_a_copy_of_its_own(
    capture: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    entry = next(each for each in ARCHITECTURES if each.name == "llama")

    def make() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
            tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    batch = entry.batch()
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": [name], "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING, logger="fxlora"):
        ours = lora_transform(make(), LoraConfig(**config), capture=capture, example_inputs=batch).eval()
    assert "its trained copy is not" in caplog.text
    torch.manual_seed(1)
    theirs = peft_model(make(), **config).eval()
    assert train(ours) == train(theirs)
    trained = ours(**batch)[0]
    torch.testing.assert_close(trained, theirs(**batch)[0])
    assert_same_gradients(gradients(ours, **batch), gradients(theirs, **batch))
    with ours.disable_adapter():
        assert torch.equal(ours(**batch)[0], make()(**batch)[0])
    if capture == "modules":
        export_merged(ours, tmp_path / "merged")
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(loaded(**batch)[0], trained)
        merged = ours.merge_and_unload()
        assert merged.config.tie_word_embeddings is False
        merged.save_pretrained(tmp_path / "saved")
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(loaded(**batch)[0], trained)


def test_add_weighted_adapter() -> None:
    ours, _ = pair("modules")
    trained = ours(X)
    ours.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
    ours.set_adapter("same")
    torch.testing.assert_close(ours(X), trained)
    ours.verify()
    ours.add_adapter("other", LoraConfig(**CONFIG))
    before = snapshot(ours)
    with pytest.raises(AdapterError, match="both have a copy"):
        ours.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")
    assert_unchanged(ours, before)


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    ours = transform(model, "modules", None)
    assert ours.classifier.modules_to_save["default"].weight.is_meta


def test_compiled_it_is_one_graph() -> None:
    ours, _ = pair("modules")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), ours(X))
    with ours.disable_adapter():
        torch.testing.assert_close(compiled(X), net()(X))


# ---- mistakes ----


def _with_list(model: Net) -> None:
    model.head = nn.ModuleList(model.head)  # type: ignore[assignment]


def _with_own_forward(model: Net) -> None:
    model.classifier.forward = model.classifier.forward  # type: ignore[method-assign]


MISTAKES: dict[str, tuple[dict[str, Any], Any, type[Exception], str]] = {
    "misspelt": (
        {"modules_to_save": ["classifer"]},
        None,
        NoTargetError,
        "no module is called 'classifer'. Did you mean",
    ),
    "a string": ({"modules_to_save": "head"}, None, ConfigError, "should be a list of names"),
    "a list of modules": ({}, _with_list, ConfigError, "'head' is a ModuleList, which is never called"),
    "a target": ({"modules_to_save": ["c1"]}, None, ConfigError, "'fc1' is trained whole, and 'fc1' in it is a target"),
    "a parameter of it is a target": (
        {"target_parameters": ["classifier.weight"], "target_modules": [], "r": 2},
        None,
        ConfigError,
        "'classifier.weight' in it is a target",
    ),
    "an offload hook": ({}, _with_own_forward, CaptureError, "'classifier': its forward was replaced"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_changes_nothing(name: str) -> None:
    config, prepare, error, text = MISTAKES[name]
    model = net()
    if prepare:
        prepare(model)
    before = snapshot(model)
    with pytest.raises(error) as caught:
        transform(model, "modules", None, **config)
    assert text in str(caught.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_a_module_that_the_graph_does_not_use(capture: str) -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    model = Unused()
    before = snapshot(model)
    with pytest.raises(Exception, match="never uses 'spare'"):
        transform(model, capture, modules_to_save=["spare"])
    assert_unchanged(model, before)


def _broken_files(tmp_path: Path) -> Iterable[tuple[str, dict[str, Tensor]]]:
    ours, _ = pair("modules")
    ours.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.classifier.weight"
    yield "lacks 'base_model.model.classifier.weight'", {k: v for k, v in file.items() if k != key}
    yield "has shape (3, 5)", {**file, key: torch.zeros(3, 5)}
    yield "NaN", {**file, key: torch.full((3, 6), torch.nan)}
    yield "belongs to no target", {**file, "base_model.model.classifier.wieght": torch.zeros(3, 6)}
    yield "is F32", {**file, "base_model.model.head.1.num_batches_tracked": torch.tensor(1.0)}


def test_broken_files_change_nothing(tmp_path: Path) -> None:
    for text, tensors in _broken_files(tmp_path):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        model = transform(net(), "modules")
        before = snapshot(model)
        with pytest.raises(CheckpointError) as caught:
            model.load_adapter(tmp_path, "loaded")
        assert text in str(caught.value)
        assert_unchanged(model, before)


@pytest.mark.parametrize("capture", CAPTURES)
def test_verify_names_what_is_wrong(capture: str) -> None:
    ours = transform(net(), capture)
    ours.classifier.modules_to_save["stranger"] = nn.Linear(6, 3)
    with pytest.raises(
        VerifyError, match=r"'classifier.modules_to_save.stranger' is a copy that belongs to no adapter"
    ):
        ours.verify()
    del ours.classifier.modules_to_save["stranger"]
    ours.verify()
    ours.classifier.modules_to_save["default"] = nn.Linear(6, 4)
    with pytest.raises(VerifyError, match=r"'classifier.modules_to_save.default': 'weight' is \(4, 6\)"):
        ours.verify()


def test_verify_notices_a_replaced_module() -> None:
    ours = transform(net(), "modules")
    container = ours.classifier.modules_to_save
    ours.classifier = nn.Linear(6, 3)
    ours.classifier.modules_to_save = container
    with pytest.raises(VerifyError, match="'classifier' is a Linear that does not run the copy of 'default'"):
        ours.verify()


def test_merging_files_puts_the_trained_copy_in_place(tmp_path: Path) -> None:
    entry = next(each for each in ARCHITECTURES if each.name == "llama")
    model = entry.model()
    model.save_pretrained(tmp_path / "base")
    ours = lora_transform(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    ours.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], ours.get_parameter("lm_head.modules_to_save.default.weight"))
