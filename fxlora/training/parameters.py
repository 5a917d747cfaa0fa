"""The parameters of an adapter by what they are to it, and the parameter groups of an optimizer.

Knows the plans of a transformed model, nothing of any optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from fxlora._passes import BIAS_B, KINDS, TOKENS, BranchSpec, did_you_mean, has_factors, part_path, part_shapes
from fxlora._passes import shared_parts as _shared_parts
from fxlora.errors import AdapterError
from fxlora.model import LoraModel
from fxlora.plan import Plan
from fxlora.registered import trainable_names

Role = Literal["A", "B", "bias", "variant", "rows", "copy"]
"""What a parameter is to its adapter: a factor; a bias, of the branch or of the base; what a variant adds (DoRA's
magnitudes); rows of `trainable_token_indices`; a parameter of a copy of `modules_to_save`."""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class AdapterParameter:
    """One parameter of an adapter.

    Attributes:
        name: qualified name in the model.
        adapter: the adapter's name.
        role: see `Role`.
        parameter: the parameter itself.
        trains: whether the adapter trains it; some initialisers freeze a factor.
        spec: the branch that it is a part of; None for a copy and for a bias of the base.
    """

    name: str
    adapter: str
    role: Role
    parameter: nn.Parameter
    trains: bool = True
    spec: BranchSpec | None = None


def adapter_parameters(model: nn.Module, adapter_name: str, *roles: Role) -> dict[str, nn.Parameter]:
    """All that an adapter trains, by qualified name: factors, magnitudes, token rows, copies of modules, biases.

    Whether the adapter is active now makes no difference. What adapters share is given for each of them.

    Args:
        model: a transformed model, also inside of a wrapper or compiled.
        adapter_name: the adapter's name.
        roles: which of `"A"`, `"B"`, `"bias"`, `"variant"`, `"rows"`, `"copy"`; all if none is given.

    Raises:
        AdapterError: for an unknown adapter or role, or a model without adapters.

    Example:
        >>> import torch
        >>> from fxlora import LoraConfig, adapter_parameters, lora_transform
        >>> model = lora_transform(torch.nn.Sequential(torch.nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> list(adapter_parameters(model, "default", "B"))
        ['0.lora_B.default.weight']
    """
    for role in roles:
        if role not in ROLES:
            raise AdapterError(f"a parameter's role is one of {', '.join(ROLES)}, not '{role}'")
    lora = lora_model(model)
    lora._check_known([adapter_name])
    owned = of_plan(lora, lora._lora.adapters[adapter_name])
    return {each.name: each.parameter for each in owned if each.trains and (not roles or each.role in roles)}


def parameter_groups(
    model: nn.Module, options: Mapping[str, Mapping[str, Any]] | None = None, **defaults: Any
) -> list[dict[str, Any]]:
    """Parameter groups for any `torch.optim` optimizer, with options for each adapter, or a part of it.

    Adapters that are named are in the groups whether or not they are active, so that one optimizer serves a training
    that switches between them. Of the others, and of the model, there is what requires gradients now.

    Args:
        model: a transformed model, also inside of a wrapper or compiled.
        options: by adapter (`"default"`), or by adapter and role (`"default.B"`), where the role's options come before
            the adapter's. Roles are those of `adapter_parameters`.
        defaults: options of all groups that do not say otherwise.

    Returns:
        Groups without repetitions: `params`, the options, and as `name` the key, or `"rest"`. None is empty.

    Raises:
        AdapterError: for an unknown adapter or role, or when there is nothing to train.

    Example:
        >>> import torch
        >>> from fxlora import LoraConfig, lora_transform, parameter_groups
        >>> model = lora_transform(torch.nn.Sequential(torch.nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> groups = parameter_groups(model, {"default": {"lr": 1e-4}, "default.B": {"lr": 1e-3}}, weight_decay=0.1)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('default.B', 0.001, 0.1), ('default', 0.0001, 0.1)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    lora, options = lora_model(model), options or {}
    for key, given in options.items():
        _check_key(lora, key)
        if "params" in given:
            raise AdapterError(f"'{key}': the parameters of a group follow from its name; leave 'params' out")
    taken: set[int] = set()
    groups: list[dict[str, Any]] = []

    def add(name: str, parameters: Iterator[nn.Parameter], given: Mapping[str, Any]) -> None:
        new = list({id(each): each for each in parameters if id(each) not in taken}.values())
        taken.update(map(id, new))
        if new:
            groups.append({"params": new, **defaults, **given, "name": name})

    for key in sorted(options, key=lambda key: "." not in key):  # a role comes before its adapter's rest
        adapter, _, role = key.partition(".")
        owned = of_plan(lora, lora._lora.adapters[adapter])
        chosen = (each.parameter for each in owned if each.trains and role in ("", each.role))
        add(key, chosen, {**options.get(adapter, {}), **options[key]})
    add("rest", (parameter for parameter in model.parameters() if parameter.requires_grad), {})
    if not groups:
        raise AdapterError(
            "there is nothing to train: no parameter requires gradients; set_adapter makes an adapter train"
        )
    return groups


def _check_key(model: LoraModel, key: str) -> None:
    adapter, dot, role = key.partition(".")
    model._check_known([adapter])
    if dot and role not in ROLES:
        raise AdapterError(
            f"'{key}': a group is an adapter, or an adapter with one of {', '.join(ROLES)}, such as "
            f"'{adapter}.B'.{did_you_mean(role, ROLES)}"
        )


def lora_model(model: nn.Module) -> LoraModel:
    """The transformed model in what a user holds: itself, or inside of a wrapper such as a compiled or parallel module.

    Raises:
        AdapterError: when there is none, or more than one.
    """
    found = [each for each in model.modules() if isinstance(each, LoraModel)]
    if len(found) != 1:
        raise AdapterError(
            f"{type(model).__name__} has {'several transformed models' if found else 'no adapters'}; "
            f"{'give one of them' if found else 'lora_transform gives it one'}"
        )
    return found[0]


def owned_by(model: LoraModel) -> list[AdapterParameter]:
    """The parameters of all adapters of a model, in the order of the adapters."""
    return [each for plan in model._lora.adapters.values() for each in of_plan(model, plan)]


def of_plan(model: LoraModel, plan: Plan) -> list[AdapterParameter]:
    """The parameters of one adapter, each once: those of its branches, then of copies, then biases of the base."""
    trained = trainable_names([plan])

    def found(name: str, role: Role, spec: BranchSpec | None = None) -> AdapterParameter:
        return AdapterParameter(name, plan.adapter, role, model.get_parameter(name), name in trained, spec)

    every = [
        *(
            found(f"{spec.owner}.{part_path(part, spec.adapter)}", role, spec)
            for spec in plan.branches
            for part, role in _roles(spec)
        ),
        *(found(f"{saved.path}.{name}", "copy") for saved in plan.saved for name in saved.parameters),
        *(found(name, "bias") for name in plan.biases),
    ]
    return list({id(each.parameter): each for each in reversed(every)}.values())[::-1]


def _roles(spec: BranchSpec) -> Iterator[tuple[str, Role]]:
    """The parts of a branch that it does not share, with their roles."""
    known: dict[str, Role] = {BIAS_B: "bias", TOKENS: "rows"}
    if has_factors(spec):
        first, second = KINDS[spec.kind].factor_names
        known |= {first: "A", second: "B"}
    for part in part_shapes(spec):
        if part not in _shared_parts(spec):
            yield part, known.get(part, "variant")
