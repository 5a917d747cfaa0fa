"""`doctor` is silent on healthy models and leaves them as they are; its figures, report and command."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from fxlora import (
    LoraConfig,
    doctor,
    lora_transform,
)
from fxlora.cli import cli
from fxlora.inspect.doctor.values import effective_rank
from tests.inspect.doctoring import CAPTURES, Net, X, adamw, fill, lora, train
from tests.zoo import ARCHITECTURES, PLAIN, Entry

# ---- healthy models ----

OTHERS = [
    "deberta-v2",
    "albert",
    "distilbert",
    "dinov2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "mistral",
    "gemma2",
]
HEALTHY = [each for each in ARCHITECTURES if each.name not in [*OTHERS, "llama-mha", "bloom"]]
"""Fourteen families; the others are siblings of one of them."""


@pytest.mark.parametrize("entry", HEALTHY, ids=lambda entry: entry.name)
def test_no_false_alarm(entry: Entry) -> None:
    model = lora(entry.model(), target_modules=entry.targets, lora_dropout=0.1)
    batch, optimizer = entry.batch(), adamw(model)
    assert doctor(model, optimizer=optimizer).codes == ()
    report = doctor(model, batch, optimizer=optimizer)
    assert set(report.codes) <= {"fresh-adapter", "activations-dominate"}, str(report)
    model.train()
    for _ in range(2):
        output = model(**batch)
        torch.stack(
            [each.square().sum() for each in output.values() if isinstance(each, torch.Tensor)]
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for given in (None, batch):
        report = doctor(model, given, optimizer=optimizer)
        assert set(report.codes) <= {"activations-dominate"}, str(report)


PAIRS = [
    (entry, capture)
    for entry, _ in PLAIN
    for capture in CAPTURES
    if capture != "export" or entry.name in ("mlp", "residual", "functional-weight")  # an export takes seconds
]


@pytest.mark.parametrize(("entry", "capture"), PAIRS, ids=[f"{entry.name}-{capture}" for entry, capture in PAIRS])
def test_no_false_alarm_on_plain_models(entry: Entry, capture: str) -> None:
    batch = entry.batch()
    config = LoraConfig(r=2, target_modules=entry.targets)
    model = lora_transform(entry.model(), config, capture=capture, example_inputs=batch)  # pyright: ignore[reportArgumentType]
    report = doctor(model, batch, optimizer=adamw(model))
    assert report.ok, str(report)
    fill(model)
    report = doctor(model, batch)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_dropout": 0.2},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "mica"},
        {"bias": "all"},
        {"target_modules": ["first"], "modules_to_save": ["third"]},
        {"autocast_adapter_dtype": False},
    ],
    ids=str,
)
def test_no_false_alarm_on_configurations(config: dict[str, Any]) -> None:
    model = lora(**config)
    optimizer = adamw(model)
    assert doctor(model, X, optimizer=optimizer).ok
    train(model, optimizer)
    report = doctor(model, X, optimizer=optimizer)
    assert report.ok, str(report)


def test_a_second_adapter_and_inference_are_no_faults() -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["second"]))
    assert doctor(model, X).ok
    model.set_adapter("other", inference_mode=True)
    model.eval()
    fill(model).merge_adapter()
    frozen = lora(inference_mode=True).eval()
    report = doctor(frozen, X)
    assert report.ok and report.codes == ("nothing-trainable",)


def test_adapters_in_slots() -> None:
    model = lora().eval()
    model.use_slots()
    report = doctor(model, X)
    assert report.ok and report.codes == ("slots-not-trained",)


# ---- what surrounds a model, and what is left of the visit ----


def test_wrapped_and_compiled() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.head = lora(Net(lambda x: x.detach())), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inside(x))

    models = [Around(), torch.compile(Around(), backend="eager")]
    if not torch.cuda.is_available():  # where there is one, the model would have to be there
        models.append(nn.DataParallel(Around()))
    for model in models:
        (found,) = doctor(model, X).of_code("no-gradient")  # pyright: ignore[reportArgumentType]
        assert found.places == ("first",)
    with pytest.raises(ValueError, match="several transformed models"):
        doctor(nn.ModuleList([lora(), lora()]))


def test_within_inference_mode() -> None:
    model = lora()
    with torch.inference_mode():
        assert doctor(model, X.clone()).codes == ("fresh-adapter",)


def test_nothing_is_left_behind() -> None:
    class Stateful(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.drop(self.norm(x)))

    model = lora(Stateful(), lora_dropout=0.1)
    model.get_submodule("norm").eval()
    optimizer = adamw(model)
    train(model, optimizer)
    model(X).sum().backward()
    stepped: list[torch.Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(stepped.append)

    def state() -> Any:
        return model.state_dict(), [each.grad for each in model.parameters()], optimizer.state_dict()["state"]

    before = copy.deepcopy(state())
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    random = torch.get_rng_state()
    assert doctor(model, X, optimizer=optimizer).ok
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random) and not stepped
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    model(X).sum().backward()
    assert stepped, "the caller's own hooks are in place again"


# ---- ranks, memory, the report ----


def test_rank() -> None:
    assert effective_rank(torch.ones(8)) == pytest.approx(8)
    assert effective_rank(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1)
    model = fill(lora(r=8))
    one = torch.ones(8, 8)
    for part in ("lora_A", "lora_B"):
        with torch.no_grad():
            model.get_parameter(f"second.{part}.default.weight").copy_(one)
            model.get_parameter(f"first.{part}.default.weight").copy_(torch.eye(8))
    report = doctor(model)
    assert report.ok
    assert report.of_code("rank-unused")[0].places == ("second",)
    assert report.of_code("rank-saturated")[0].places == ("first",)


def test_memory_is_what_is_measured() -> None:
    model = lora()
    optimizer = adamw(model)
    memory = doctor(model, X, optimizer=optimizer, loss=torch.sum).memory
    trained = 3 * (2 * 8 + 8 * 2) * 4
    assert memory is not None
    assert (memory.trained, memory.gradients, memory.optimizer) == (trained, trained, 2 * trained)
    # X, the two tanh, and A x of all three layers
    assert memory.activations == (3 * 4 * 8 + 3 * 4 * 2) * 4
    train(model, optimizer)
    after = doctor(model, optimizer=optimizer).memory
    assert after is not None and after.activations is None
    assert after.optimizer == 2 * trained + 6 * 4, "AdamW's step counts"


def test_report_forms() -> None:
    from rich.console import Console

    report = doctor(lora(Net(lambda x: x.detach())), X)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is False and plain["findings"][0]["places"] == ["first"]
    assert plain["memory"]["activations"] > 0 and plain["examined"] == ["model", "batch"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    for text in (str(report), console.export_text(), report._repr_html_()):
        assert "no-gradient" in text and "detach" in text and "1 error" in text


def test_command(tmp_path: Path) -> None:
    entry = ARCHITECTURES[0]
    base: Any = entry.model()
    base.save_pretrained(tmp_path / "model")
    model = lora(entry.model(), target_modules=entry.targets, lora_alpha=4)
    model.save_pretrained(tmp_path / "adapter")
    run = CliRunner().invoke(cli, ["doctor", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")])
    assert run.exit_code == 0 and "nothing is wrong" in run.output, run.output
    fill(model)
    nn.init.zeros_(model.get_parameter("model.layers.1.mlp.up_proj.lora_B.default.weight"))
    model.save_pretrained(tmp_path / "adapter")
    run = CliRunner().invoke(cli, ["doctor", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter"), "--json"])
    (found,) = json.loads(run.output)["findings"]
    assert run.exit_code == 1 and (found["code"], found["places"]) == ("dead-branch", ["model.layers.1.mlp.up_proj"])
    other: Any = next(each for each in ARCHITECTURES if each.name == "gpt2").model()
    other.save_pretrained(tmp_path / "other")
    run = CliRunner().invoke(cli, ["doctor", str(tmp_path / "other"), "--adapter", str(tmp_path / "adapter")])
    assert run.exit_code == 1 and "does-not-fit" in run.output
    run = CliRunner().invoke(cli, ["doctor", str(tmp_path / "model")])
    assert run.exit_code == 0, run.output
