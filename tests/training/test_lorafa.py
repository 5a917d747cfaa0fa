"""LoRA-FA against peft where that is right, and against the definition of the projection everywhere."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer as create_by_peft
from torch import Tensor, nn

from fxlora import AdapterError, ConfigError, LoraConfig, LoraModel, create_lorafa_optimizer, lora_transform
from fxlora._passes import deltas, part_path, part_shapes
from fxlora.training import LoraFA
from tests.training.nets import by_our_names, ours, theirs, train

CONFIG: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules=["fc1", "fc2"])


def test_training_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    model, reference = ours(**CONFIG, modules_to_save=["head"]), theirs(**CONFIG, modules_to_save=["head"])
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = create_lorafa_optimizer(model, 4, 8, 1e-2, 0.1)
    train(model, optimizer, 20)
    train(reference, create_by_peft(reference, 4, 8, 1e-2, 0.1), 20)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = by_our_names(reference)
    assert len(trained) == 4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == (name not in trained), name
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)


def exact_step(model: LoraModel, name: str) -> Tensor:
    """The projected gradient of a linear layer's B, in float64."""
    A = model.get_parameter(f"{name}.lora_A.default.weight").double()
    gradient = model.get_parameter(f"{name}.lora_B.default.weight").grad
    scaling = model._lora.adapters["default"].branches[0].scaling
    assert gradient is not None
    return gradient.double() @ torch.linalg.inv(A @ A.T) / scaling**2


def test_projection_is_more_exact_than_pefts() -> None:
    """peft multiplies in bfloat16 wherever the machine can, also where everything else is float32."""
    errors: list[float] = []
    for make, create in ((ours, create_lorafa_optimizer), (theirs, create_by_peft)):
        model: Any = make(**CONFIG)
        optimizer = create(model, 4, 8, 1e-3)
        train(model, optimizer, 1)
        reference = ours(**CONFIG)
        train(reference, torch.optim.SGD(reference.parameters(), lr=0.0), 1)
        exact = 0.1 * exact_step(reference, "fc2")
        states = [state for state in optimizer.state.values() if state]
        first = [value for state in states for key, value in state.items() if key in ("exp_avg", "exp_avg_B")]
        errors.append(((first[-1] - exact).abs().max() / exact.abs().max()).item())
    assert errors[0] < 1e-5
    if not torch.cuda.is_available():  # where there is a GPU, peft's autocast is for that, and not for this model
        assert errors[1] > 1e-3


class Kinds(nn.Module):
    """A layer of each kind that has factors; experts lie `(E, out, in)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.fc = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.grouped(self.conv(self.embed(tokens).mT).relu()).mT
        x = torch.einsum("bti,eoi->bto", x.tanh(), self.experts) @ self.matrix
        return self.fc(x.tanh())


KINDS = LoraConfig(
    r=2,
    lora_alpha=6,
    target_modules=["embed", "conv", "grouped", "fc"],
    target_parameters=["experts", "matrix"],
    rank_pattern={"conv": 4, "fc": 3},
    alpha_pattern={"fc": 5},
)


def kinds_model(capture: Any = "modules") -> LoraModel:
    torch.manual_seed(0)
    model = lora_transform(
        Kinds().double(), KINDS, capture=capture, example_inputs=(torch.arange(6).reshape(2, 3),)
    ).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_every_kind_makes_the_best_move(capture: str) -> None:
    """The update that AdamW is given equals the weight's own gradient, but for what no move of this branch can make."""
    model = kinds_model(capture)
    optimizer = create_lorafa_optimizer(model)
    weights = {spec.site: model.get_parameter(_weight(spec)) for spec in model._specs()}
    for weight in weights.values():
        weight.requires_grad_()
    model(torch.randint(0, 12, (4, 5))).square().sum().backward()
    kinds: set[str] = set()
    for spec in model._specs():
        kinds.add(spec.kind)
        paths = {part: f"{spec.owner}.{part_path(part, spec.adapter)}" for part in part_shapes(spec)}
        parts = {part: model.get_parameter(path).detach() for part, path in paths.items()}
        (trained,) = [part for part, path in paths.items() if model.get_parameter(path).requires_grad]
        weight, gradient = weights[spec.site].detach(), weights[spec.site].grad
        assert gradient is not None
        move = deltas(spec, weight, {**parts, trained: optimizer._gradient(model.get_parameter(paths[trained]))})[
            "weight"
        ]
        other = deltas(spec, weight, {**parts, trained: torch.randn_like(parts[trained])})["weight"]
        rest = gradient - move
        # a graph has the scale in float32, so that gradients are of another one in the last of these digits
        assert (rest * other).sum().abs() < 1e-7 * rest.norm() * other.norm(), spec.site
        assert rest.norm() < gradient.norm()
    assert kinds == {"embedding", "conv", "parameter", "linear"}


def _weight(spec: Any) -> str:
    return spec.site if spec.is_parameter else f"{spec.site}.weight"


def test_convolutions_across_groups() -> None:
    """peft's factors of a grouped convolution, which no weight can hold: B of each group multiplies A of that group."""
    from fxlora._passes import CROSS_GROUPS, BranchSpec, Scaling
    from fxlora.training.lorafa import Partner

    options = (("groups", 2), ("kernel_size", (3,)), (CROSS_GROUPS, True))
    spec = BranchSpec("conv", "default", "conv", 6, 8, False, 4, 0.5, options=options)
    A, B, gradient = torch.randn(4, 6, 3), torch.randn(8, 2, 1), torch.randn(8, 2, 1)
    partner = Partner(nn.Parameter(A), True, Scaling(0.5), spec)
    parameter = nn.Parameter(B)
    parameter.grad = gradient
    found = LoraFA([parameter], {parameter: partner})._gradient(parameter)
    for group in range(2):
        a = A[2 * group : 2 * group + 2].flatten(1)
        rows = slice(4 * group, 4 * group + 4)
        expected = gradient[rows].flatten(1) @ torch.linalg.inv(a @ a.T) / 0.25
        torch.testing.assert_close(found[rows].flatten(1), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_learn() -> None:
    """A of an embedding starts at zero. peft does not train it, and B has no gradient then: the layer stays as it is."""
    config: dict[str, Any] = dict(r=4, target_modules=["embed"])
    model, reference = ours(**config), theirs(**config)
    before = train(model, torch.optim.SGD(model.parameters(), lr=0.0), 1)
    assert train(model, create_lorafa_optimizer(model, lr=1e-2), 30) < before
    assert model.get_parameter("embed.lora_embedding_A.default.weight").any()
    train(reference, create_by_peft(reference, 4, 8, 1e-2), 30)
    assert not by_our_names(reference)["embed.lora_embedding_A.default.weight"].any()


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}])
def test_what_variants_add_is_trained_too(more: dict[str, Any]) -> None:
    model = ours(**CONFIG | {"target_modules": ["fc1"]} | more)
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    start = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    train(model, optimizer)
    assert len(start) == 2
    for name, before in start.items():
        assert not torch.equal(model.get_parameter(name), before), name


def test_peft_leaves_magnitudes_as_they_are() -> None:
    """It pairs A and B by their order among all names with "lora" in them: a third part of a layer waits for a fourth."""
    model = theirs(**CONFIG | {"target_modules": ["fc1"]}, use_dora=True)
    magnitude = by_our_names(model)["fc1.lora_magnitude_vector.default.weight"]
    before = magnitude.detach().clone()
    train(model, create_by_peft(model, 4, 8, 1e-2))
    assert magnitude.requires_grad and torch.equal(magnitude, before)


def test_second_adapter() -> None:
    """Only active adapters are touched. peft's pairs are wrong as soon as there are two, and it fails."""
    model = ours(**CONFIG)
    model.add_adapter("other", dict(r=2, lora_alpha=10, target_modules=["fc1"]))
    model.set_adapter("other")
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["fc1.lora_B.other.weight"]
    alone = ours(r=2, lora_alpha=10, target_modules=["fc1"])
    with torch.no_grad():
        alone.get_parameter("fc1.lora_A.default.weight").copy_(before["fc1.lora_A.other.weight"])
    train(alone, create_lorafa_optimizer(alone, lr=1e-2))
    assert torch.equal(alone.get_parameter("fc1.lora_B.default.weight"), model.get_parameter("fc1.lora_B.other.weight"))

    import peft

    reference: Any = theirs(**CONFIG)
    reference.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=10, target_modules=["fc1"]))
    reference.set_adapter("other")
    with pytest.raises((TypeError, RuntimeError)):
        train(reference, create_by_peft(reference, 2, 10, 1e-2))


def test_steps_are_counted_for_each_parameter() -> None:
    model = ours(**CONFIG)
    model.add_adapter("other", CONFIG)
    model.set_adapter(["default", "other"])
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    train(model, optimizer, 2)
    model.set_adapter("other")
    train(model, optimizer, 3)
    steps = {name: optimizer.state[p].get("step") for name, p in model.named_parameters() if p in optimizer.state}
    assert {name: step for name, step in steps.items() if "lora_B" in name} == {
        f"{layer}.lora_B.{adapter}.weight": step
        for layer in ("fc1", "fc2")
        for adapter, step in (("default", 2), ("other", 5))
    }


def test_resuming() -> None:
    whole, halves = ours(**CONFIG), ours(**CONFIG)
    train(whole, create_lorafa_optimizer(whole, lr=1e-2), 6)
    first = create_lorafa_optimizer(halves, lr=1e-2)
    train(halves, first, 3)
    second = create_lorafa_optimizer(halves, lr=1e-2)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    train(halves, second, 3, first=3)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, halves.get_parameter(name)), name


def test_copies_of_model_and_optimizer_go_on() -> None:
    model = ours(**CONFIG)
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    train(model, optimizer, 2)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, 2, first=2)
    for twin, its_optimizer in twins:
        train(twin, its_optimizer, 2, first=2)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, twin.get_parameter(name)), name


def test_changes_of_the_adapter_are_noticed() -> None:
    model = ours(**CONFIG)
    optimizer = create_lorafa_optimizer(model)
    B, A = (model.get_parameter(f"fc1.lora_{part}.default.weight") for part in "BA")
    B.grad = torch.randn_like(B)
    first = optimizer._gradient(B)
    with torch.no_grad():
        A.mul_(2)
    torch.testing.assert_close(optimizer._gradient(B), first / 4)
    model.set_scale("default", 3.0)
    torch.testing.assert_close(optimizer._gradient(B), first / 36)
    model.set_scale("default", 0.0)
    assert optimizer._gradient(B) is B.grad


def test_rank_above_the_input() -> None:
    """A Aᵀ is singular then, and its pseudo-inverse takes its place."""
    model = ours(r=24, target_modules=["fc1"])
    before = train(model, torch.optim.SGD(model.parameters(), lr=0.0), 1)
    assert train(model, create_lorafa_optimizer(model, lr=1e-2), 30) < before


def test_half_precision_factors() -> None:
    model = ours(**CONFIG).bfloat16()
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    train(model, optimizer)
    B = model.get_parameter("fc1.lora_B.default.weight")
    assert B.dtype == torch.bfloat16 and B.any() and B.isfinite().all()


def test_closure_has_gradients() -> None:
    model = ours(**CONFIG)
    optimizer = create_lorafa_optimizer(model)
    tokens = torch.zeros(2, 3, dtype=torch.long)

    def closure() -> float:
        loss = model(tokens).square().sum()
        loss.backward()
        return loss.item()

    assert (optimizer.step(closure) or 0) > 0
    assert model.get_parameter("fc1.lora_B.default.weight").any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(r=8), "r=8 contradicts adapter 'default', which has r=4"),
        (dict(lora_alpha=4), "lora_alpha=4 contradicts"),
        (dict(use_rslora=True), "use_rslora=True contradicts"),
        (dict(lr=-1.0), "lr must be a finite number"),
        (dict(weight_decay=float("nan")), "weight_decay must be"),
    ],
)
def test_refusals_change_nothing(given: dict[str, Any], message: str) -> None:
    model = ours(**CONFIG)
    with pytest.raises(ConfigError, match=message):
        create_lorafa_optimizer(model, **given)
    assert model.get_parameter("fc1.lora_A.default.weight").requires_grad


def test_a_zero_factor_is_not_frozen() -> None:
    model = ours(**CONFIG)
    nn.init.zeros_(model.get_parameter("fc2.lora_A.default.weight"))
    with pytest.raises(AdapterError, match="'fc2': LoRA-FA would freeze A of adapter 'default', which is zero"):
        create_lorafa_optimizer(model)
    assert model.get_parameter("fc1.lora_A.default.weight").requires_grad


def test_betas() -> None:
    with pytest.raises(ConfigError, match="betas must be at least 0 and less than 1"):
        LoraFA([nn.Parameter(torch.ones(1))], {}, betas=(0.9, 1.0))


def test_nothing_to_train() -> None:
    with pytest.raises(AdapterError, match="nothing to train"):
        create_lorafa_optimizer(ours(**CONFIG, inference_mode=True))
