"""Faults of what is trained: targets, frozen parameters, optimizers, and gradients that are cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxlora import parameter_groups
from tests.faults.seeded.set_ups import Attention, Case, switch_checkpointing_on
from tests.faults.seeded.tools import fault

# ---- targets ----


@fault("a target is misspelt", "explain", "Did you mean", anew=True)
@fault("a target is misspelt", "loading", "Did you mean", anew=True)
def misspelt_target(case: Case) -> str:
    right = case.config["target_modules"][1]
    case.config["target_modules"] = [case.config["target_modules"][0], f"{right}s"]
    case.attempt = case.again
    return f"{right}s"


@fault("no target is given", "loading", "Please specify `target_modules`", captures=["modules", "symbolic"])
def no_targets(case: Case) -> tuple[str, ...]:
    del case.config["target_modules"]
    case.attempt = lambda: case.again(_Unknown())
    return ()


class _Unknown(nn.Sequential):
    """A model of which nobody knows what its targets are."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


@fault("all adapters were deleted", "doctor", "no-adapter", also=["nothing-trainable"])
def no_adapter(case: Case) -> tuple[str, ...]:
    case.model.delete_adapter("default")
    return ()


# ---- what requires gradients ----


@fault("everything is trainable", "doctor", "everything-trainable")
def everything_trainable(case: Case) -> list[str]:
    case.model.requires_grad_(True)
    return [name for name, _ in case.model.named_parameters() if "lora_" not in name]


@fault("one weight of the base is trainable", "doctor", "base-trainable")
def base_weight_trainable(case: Case) -> str:
    case.model.get_parameter(f"{case.site}.weight").requires_grad_(True)
    return f"{case.site}.weight"


@fault("one factor is frozen", "doctor", "frozen-adapter")
def frozen_factor(case: Case) -> str:
    case.factor("B").requires_grad_(False)
    return f"{case.site}.lora_B.default.weight"


@fault("all is frozen after the transform", "doctor", "nothing-trainable", also=["frozen-adapter"])
def all_frozen(case: Case) -> str:
    case.model.train().requires_grad_(False)
    return "default"


@fault("another adapter is active than the one that is trained", "doctor", "idle-adapter", also=["frozen-adapter"])
def another_adapter(case: Case) -> list[str]:
    case.model.add_adapter("other", {**case.config, "target_modules": [case.site]})
    case.model.set_adapter("other", inference_mode=True)
    for part in ("A", "B"):
        case.factor(part).requires_grad_(True)
    return [f"{case.site}.lora_{part}.default.weight" for part in ("A", "B")]


# ---- optimizers ----


@fault(
    "the optimizer was made before the transform", "doctor", "not-in-optimizer", also=["frozen-in-optimizer"], anew=True
)
def optimizer_before_the_transform(case: Case) -> list[str]:
    base = case.host.model()
    case.optimizer = torch.optim.AdamW(base.parameters())
    case.again(base)
    return _factors(case, *case.sites)


@fault("one layer's factors are not in the optimizer", "doctor", "not-in-optimizer")
def factors_left_out(case: Case) -> list[str]:
    names = _factors(case, case.site)
    kept = [each for name, each in case.model.named_parameters() if each.requires_grad and name not in names]
    case.optimizer = torch.optim.AdamW(kept)
    return names


@fault("the optimizer is another model's", "doctor", "stale-in-optimizer", also=["not-in-optimizer"])
def optimizer_of_another_model(case: Case) -> list[str]:
    case.optimizer = torch.optim.AdamW(parameter_groups(case.reference))
    return sorted(
        {f"tensor of shape {tuple(case.model.get_parameter(name).shape)}" for name in _factors(case, *case.sites)}
    )


# ---- gradients ----


@fault("the user's forward detaches", "doctor", "no-gradient", anew=True)
def detached(case: Case) -> list[str]:
    return _between(case, lambda x: x.detach())


@fault(
    "the user's forward runs a part under no_grad", "doctor", "no-gradient", captures=["modules", "export"], anew=True
)
def without_gradients(case: Case) -> list[str]:
    def normalised(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x / x.norm(dim=-1, keepdim=True)

    return _between(case, normalised)


@fault("the user's forward takes an argmax", "doctor", "no-gradient", anew=True)
def argmax(case: Case) -> list[str]:
    return _between(case, lambda x: torch.zeros_like(x).scatter(-1, x.argmax(-1, keepdim=True), 1.0))


@fault("the user's forward goes through numpy", "doctor", "no-gradient", captures=["modules"])
def through_numpy(case: Case) -> list[str]:
    return _between(case, lambda x: torch.from_numpy(x.detach().numpy().copy()))


@fault("the user's forward weighs gradients with zero", "doctor", "zero-gradient", anew=True)
def gradient_times_zero(case: Case) -> list[str]:
    return _between(case, lambda x: x.detach() + 0.0 * x, filled=True)


class _Head(nn.Module):
    """A head of the user's own on a model of which it uses the features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model
        self.register_buffer("weight", torch.ones(()))

    def forward(self, **batch: Any) -> Tensor:
        with torch.no_grad():
            output = self.backbone(**batch)
        features = output if isinstance(output, Tensor) else output[0]
        return (features * self.weight).mean().requires_grad_()


@fault("the user's head calls the model under no_grad", "doctor", "no-gradient")
def head_without_gradients(case: Case) -> list[str]:
    case.whole = _Head(case.model)
    return case.sites


class _Checkpointed(nn.Module):
    """Blocks under reentrant checkpointing, as in many training scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Any:
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=True)  # pyright: ignore[reportAssignmentType]
        return x


@fault("reentrant checkpointing without gradients of inputs", "doctor", "no-gradient", captures=["modules"])
def checkpointing(case: Case) -> list[str]:
    if case.host.name == "plain":
        case.again(_Checkpointed())
        return case.sites
    model: Any = case.model
    switch_checkpointing_on(model, use_reentrant=True)
    for module in model.modules():  # what a script that turns hooks off does
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return case.sites


@fault("a target does not run on the batch", "doctor", "not-run", captures=["modules"])
def not_run(case: Case) -> str:
    base = case.host.model()
    base.add_module("spare", nn.Linear(8, 8))
    case.again(base, target_modules=[*case.config["target_modules"], "spare"])
    return "spare"


def _between(case: Case, between: Any, *, filled: bool = False) -> list[str]:
    """Make the model anew, with something between its blocks; the layers before it get no gradient."""
    factors = {name: each for name, each in case.model.named_parameters() if "lora_" in name}
    case.again(case.host.model(between))
    if filled:
        with torch.no_grad():
            for name, each in factors.items():
                case.model.get_parameter(name).copy_(each)
    return [site for site in case.sites if site.startswith(f"{case.host.before}.")]


def _factors(case: Case, *sites: str) -> list[str]:
    return [f"{site}.lora_{part}.default.weight" for site in sites for part in ("A", "B")]
