"""`doctor` on models that are broken in one way each: it names the fault and the place. On healthy ones it is silent."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxlora import (
    DoctorReport,
    LoraConfig,
    LoraModel,
    doctor,
    enable_input_require_grads,
    lora_transform,
    parameter_groups,
)
from fxlora.cli import cli
from fxlora.inspect.doctor.values import effective_rank
from tests.zoo import ARCHITECTURES, PLAIN, Entry

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
CAPTURES = ["modules", "symbolic", "export"]


class Net(nn.Module):
    """Three layers, with something done between the first two."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(self.between(self.first(x)))))


def lora(model: nn.Module | None = None, capture: Any = "modules", **config: Any) -> LoraModel:
    chosen: dict[str, Any] = {"r": 2, "target_modules": ["first", "second", "third"], **config}
    example = X if capture == "export" else None
    return lora_transform(model or Net(), LoraConfig(**chosen), capture=capture, example_inputs=example)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def fill(model: LoraModel) -> LoraModel:
    """Factors as after training."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model), lr=1e-2)


# ---- faults without a batch ----


def _plain() -> DoctorReport:
    return doctor(Net())


def _no_adapter() -> DoctorReport:
    model = lora()
    model.delete_adapter("default")
    return doctor(model)


def _everything_trainable() -> DoctorReport:
    model = lora()
    model.requires_grad_(True)
    return doctor(model)


def _part_of_the_base_trainable() -> DoctorReport:
    model = lora()
    model.get_parameter("second.bias").requires_grad_(True)
    return doctor(model)


def _nothing_trainable() -> DoctorReport:
    model = lora().train()
    model.requires_grad_(False)
    return doctor(model)


def _one_factor_frozen() -> DoctorReport:
    model = lora()
    model.get_parameter("second.lora_B.default.weight").requires_grad_(False)
    return doctor(model)


def _optimizer_before_the_transform() -> DoctorReport:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    return doctor(lora(model), optimizer=optimizer)


def _optimizer_of_another_model() -> DoctorReport:
    return doctor(lora(), optimizer=adamw(lora()))


def _optimizer_with_frozen_parameters() -> DoctorReport:
    model = lora()
    return doctor(model, optimizer=torch.optim.AdamW(model.parameters()))


def _branch_left_out_of_training() -> DoctorReport:
    model = lora()
    held = [each for name, each in model.named_parameters() if each.requires_grad and "second" not in name]
    optimizer = torch.optim.AdamW(held, lr=1e-2)
    train(model, optimizer)
    return doctor(model, optimizer=optimizer)


def _both_factors_zero() -> DoctorReport:
    model = lora()
    nn.init.zeros_(model.get_parameter("third.lora_A.default.weight"))
    return doctor(model)


def _tied() -> DoctorReport:
    model = Net()
    model.third.weight = model.first.weight
    return doctor(lora(model, target_modules=["first"]))


def _float16() -> DoctorReport:
    return doctor(lora(Net().half(), autocast_adapter_dtype=False))


def _narrow() -> DoctorReport:
    model = lora()
    for part in ("lora_A", "lora_B"):
        model.get_submodule(f"first.{part}.default").bfloat16()
    return doctor(model)


def _one_factor_converted() -> DoctorReport:
    model = lora(Net().bfloat16(), autocast_adapter_dtype=False)
    model.get_submodule("second.lora_A.default").float()
    return doctor(model)


def _not_finite() -> DoctorReport:
    model = lora()
    with torch.no_grad():
        model.get_parameter("first.lora_A.default.weight")[0, 0] = torch.nan
    return doctor(model)


def _gradient_not_finite() -> DoctorReport:
    model = lora()
    parameter = model.get_parameter("first.lora_B.default.weight")
    parameter.grad = torch.full_like(parameter, torch.inf)
    return doctor(model)


def _no_scale() -> DoctorReport:
    model = lora()
    model.set_scale("default", 0.0)
    return doctor(model)


def _large_scale() -> DoctorReport:
    return doctor(lora(lora_alpha=1000))


def _scale_changed_by_hand() -> DoctorReport:
    model = lora()
    model.get_buffer("first.lora_scaling.default.scale").fill_(7.0)
    return doctor(model)


def _transposed() -> DoctorReport:
    model = lora()
    model.get_submodule("second.lora_B.default").weight = nn.Parameter(torch.zeros(2, 8))
    return doctor(model)


def _replaced_layer() -> DoctorReport:
    model = lora()
    model.second = nn.Linear(8, 8)
    return doctor(model)


def _orphan() -> DoctorReport:
    model = lora()
    model.get_submodule("third.lora_A")["forgotten"] = nn.Linear(8, 2, bias=False)  # pyright: ignore[reportIndexIssue]
    return doctor(model)


def _stale_merge() -> DoctorReport:
    model = fill(lora())
    model.merge_adapter()
    with torch.no_grad():
        model.get_parameter("second.weight").add_(1.0)
    return doctor(model)


def _trained_while_merged() -> DoctorReport:
    model = lora()
    model.merge_adapter()
    return doctor(model)


def _disabled() -> DoctorReport:
    model = lora()
    model.disable_adapter_layers()
    return doctor(model)


def _dropout_in_evaluation() -> DoctorReport:
    model = lora(lora_dropout=0.1).eval()
    model.get_submodule("first.lora_dropout").train()
    return doctor(model)


STATIC: list[tuple[Callable[[], DoctorReport], str, str]] = [
    (_plain, "not-transformed", ""),
    (_plain, "everything-trainable", "first.weight"),
    (_no_adapter, "no-adapter", ""),
    (_everything_trainable, "everything-trainable", "second.weight"),
    (_part_of_the_base_trainable, "base-trainable", "second.bias"),
    (_nothing_trainable, "nothing-trainable", "default"),
    (_one_factor_frozen, "frozen-adapter", "second.lora_B.default.weight"),
    (_optimizer_before_the_transform, "not-in-optimizer", "first.lora_A.default.weight"),
    (_optimizer_before_the_transform, "frozen-in-optimizer", "first.weight"),
    (_optimizer_of_another_model, "stale-in-optimizer", "tensor of shape (2, 8)"),
    (_optimizer_with_frozen_parameters, "frozen-in-optimizer", "third.bias"),
    (_branch_left_out_of_training, "dead-branch", "second"),
    (_branch_left_out_of_training, "not-in-optimizer", "second.lora_B.default.weight"),
    (_both_factors_zero, "stuck-branch", "third"),
    (_tied, "tied-weight", "first"),
    (_float16, "float16-factors", "first.lora_A.default.weight"),
    (_narrow, "narrow-factors", "first.lora_A.default.weight"),
    (_one_factor_converted, "mixed-dtypes", "second"),
    (_not_finite, "not-finite", "first.lora_A.default.weight"),
    (_gradient_not_finite, "gradient-not-finite", "first.lora_B.default.weight"),
    (_no_scale, "scale-zero", "first"),
    (_large_scale, "scale-large", "first"),
    (_scale_changed_by_hand, "broken-graph", "first"),
    (_transposed, "broken-graph", "second"),
    (_replaced_layer, "missing-parameter", "second.lora_A.default.weight"),
    (_orphan, "orphan-branch", "third.lora_A.forgotten"),
    (_stale_merge, "stale-merge", "second.weight"),
    (_trained_while_merged, "idle-adapter", "first.lora_A.default.weight"),
    (_disabled, "adapters-disabled", "default"),
    (_dropout_in_evaluation, "dropout-in-evaluation", "first.lora_dropout.default"),
]


@pytest.mark.parametrize(("fault", "code", "place"), STATIC, ids=[f"{f.__name__}-{code}" for f, code, _ in STATIC])
def test_faults_without_a_batch(fault: Callable[[], DoctorReport], code: str, place: str) -> None:
    report = fault()
    assert code in report.codes, str(report)
    assert not report.ok
    (found,) = report.of_code(code)
    assert place in found.places if place else not found.places
    assert found.what and found.why and found.remedy


def test_a_finding_is_only_where_the_fault_is() -> None:
    assert _branch_left_out_of_training().of_code("dead-branch")[0].places == ("second",)
    assert _stale_merge().of_code("stale-merge")[0].places == ("second.weight",)
    assert _part_of_the_base_trainable().codes == ("base-trainable",)
    assert _narrow().of_code("narrow-factors")[0].where == "first.lora_A.default.weight, first.lora_B.default.weight"


# ---- gradients that are cut ----


def _no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.tanh(x)


CUTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "detach": (lambda x: x.detach(), "'detach", "detach()"),
    "data": (lambda x: x.data * 1, "'data'", ".data"),
    "argmax": (lambda x: nn.functional.one_hot(x.argmax(-1), 8).float(), "argmax", "integers"),
    "no_grad": (_no_grad, "'torch.no_grad()'", "no_grad"),
    "python": (lambda x: torch.tensor(x.tolist()), "'tolist'", "leaves torch"),
}


@pytest.mark.parametrize("name", CUTS)
def test_where_a_gradient_is_cut(name: str) -> None:
    between, operation, why = CUTS[name]
    report = doctor(lora(Net(between)), X)
    (found,) = report.of_code("no-gradient")
    assert found.places == ("first",), str(report)
    assert operation in found.what and why in found.why
    assert "test_doctor.py:" in found.what


class Rounding(torch.autograd.Function):
    """An operator without a derivative, of which torch's functions show nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.round()
        ctx.mark_non_differentiable(out)
        return out


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Rounding.apply(x)  # pyright: ignore[reportReturnType]


class Straight(torch.autograd.Function):
    """A rounding with a derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


def test_functions_of_ones_own() -> None:
    (found,) = doctor(lora(Net(Rounded())), X).of_code("no-gradient")
    assert found.places == ("first",) and "'Rounding' in 'between'" in found.what
    assert doctor(lora(Net(Straight.apply)), X).ok  # pyright: ignore[reportArgumentType]
    (found,) = doctor(lora(Net(lambda x: Straight.apply(x.detach()))), X).of_code("no-gradient")  # pyright: ignore[reportArgumentType, reportUnknownLambdaType]
    assert found.places == ("first",) and "'detach" in found.what


def _into_a_buffer(x: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros_like(x)
    with torch.no_grad():
        buffer[:] = x
    return buffer


def test_writing_into_a_buffer() -> None:
    (found,) = doctor(lora(Net(_into_a_buffer)), X).of_code("no-gradient")
    assert found.places == ("first",) and "'torch.no_grad()'" in found.what


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_detach_in_any_capture(capture: str) -> None:
    (found,) = doctor(lora(Net(lambda x: x.detach()), capture), X).of_code("no-gradient")
    assert found.places == ("first",) and "'detach" in found.what


class Inner(nn.Module):
    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.layer, self.mode = nn.Linear(8, 8), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.mode():
            x = self.layer(x)
        return x.clone()


class Outer(nn.Module):
    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.start, self.inner, self.end = nn.Linear(8, 8), Inner(mode), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.inner(self.start(x)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_module_that_switches_gradients_off_is_named(mode: Callable[[], Any]) -> None:
    model = lora(Outer(mode), target_modules=["start", "layer", "end"])
    (found,) = doctor(model, X).of_code("no-gradient")
    assert found.places == ("start", "inner.layer")
    assert "in 'inner'" in found.what and mode.__name__ in found.why


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Net(), Net()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)  # pyright: ignore[reportAssignmentType]
        return x


def test_checkpointing_without_gradients_of_inputs() -> None:
    model = lora(Checkpointed())
    (found,) = doctor(model, X).of_code("no-gradient")
    assert "reentrant" in found.why and "enable_input_require_grads" in found.remedy
    assert found.where.startswith("blocks.*.first (2)") and len(found.places) == 6
    with enable_input_require_grads(model):
        assert doctor(model, X).ok


def test_a_layer_that_the_loss_does_not_use() -> None:
    class Two(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return self.first(x), self.second(x), self.third(x)

    model = lora(Two())
    assert doctor(model, X).ok
    (found,) = doctor(model, X, loss=lambda output: (output[0] * output[2]).sum()).of_code("no-gradient")
    assert found.places == ("second",) and "does not depend" in found.what


def test_a_layer_that_is_bypassed() -> None:
    entry = next(each for each, _ in PLAIN if each.name == "functional-weight")
    model = lora(entry.model(), target_modules=entry.targets)
    report = doctor(model, entry.batch())
    (found,) = report.of_code("weight-read-elsewhere")
    assert found.places == ("proj",) and "'linear' in the model's own forward" in found.what
    assert "not-run" not in report.codes


def test_zero_gradients() -> None:
    report = doctor(fill(lora(Net(lambda x: x * 0.0))), X)
    assert report.of_code("zero-gradient")[0].places == ("first", "second")
    fresh = doctor(lora(), X)
    assert fresh.ok and fresh.of_code("fresh-adapter")[0].places == ("first", "second", "third")


def test_a_gradient_that_is_not_finite() -> None:
    (found,) = doctor(fill(lora()), X, loss=lambda y: (y * torch.inf).sum()).of_code("gradient-not-finite")
    assert "third.lora_B.default.weight" in found.places


def test_a_batch_that_the_model_does_not_take() -> None:
    (found,) = doctor(lora(), torch.randn(4, 7)).of_code("batch-fails")
    assert "RuntimeError" in found.what
    with pytest.raises(ValueError, match="batch must be a tensor"):
        doctor(lora(), 3)


def test_a_trained_copy_without_gradient() -> None:
    class Head(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + self.third(x).detach()

    model = lora(Head(), target_modules=["first"], modules_to_save=["third"])
    report = doctor(model, X)
    assert report.of_code("no-gradient")[0].places == ("third",)
    assert report.of_code("whole-modules-trained")[0].places == ("third",)


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
