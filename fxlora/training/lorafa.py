"""LoRA-FA (arXiv:2308.03303): one factor stays as it was drawn, and the other learns from a projected gradient.

With A frozen the update of a weight is `s dB A`, and B's gradient is `g = s G Aᵀ` for the weight's own gradient `G`. Of
all `dB` the one whose update is nearest to `G` is `g (A Aᵀ)⁻¹ / s²`: that is what AdamW gets in place of `g`. Nothing
else differs from AdamW, and the backward pass need not keep the input of A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxlora._passes import CROSS_GROUPS, EXPERTS, KINDS, SCALING, BranchSpec, Scaling, has_factors
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError, ConfigError
from fxlora.model import LoraModel
from fxlora.training.parameters import AdapterParameter, lora_model, of_plan

_foreach = cast(Any, torch)  # its functions on lists of tensors have no types


@dataclass(frozen=True, slots=True, eq=False)
class Partner:
    """The frozen factor of a trained one.

    Attributes:
        frozen: the factor that is not trained.
        is_a: whether that is A.
        scaling: the branch's scale, as it is at each step.
        spec: the branch.
    """

    frozen: nn.Parameter
    is_a: bool
    scaling: Scaling
    spec: BranchSpec

    def frozen_products(self) -> Tensor:
        """The frozen factor of each product of the branch: `(n, r, k)`."""
        view = (_a_products if self.is_a else _b_products)(self.spec, self.frozen.detach())
        return view if self.is_a else view.mT

    def trained_products(self, tensor: Tensor) -> Tensor:
        """A view of a contiguous tensor of the trained factor's shape: `(n, m, r)`."""
        view = (_b_products if self.is_a else _a_products)(self.spec, tensor)
        return view if self.is_a else view.mT


class LoraFA(Optimizer):
    """AdamW that projects the gradients of factors whose partner is frozen; made by `create_lorafa_optimizer`.

    `state_dict()` holds what AdamW's does: partners and scales come from the model. A partner that changes, such as by
    loading weights, is noticed.

    Args:
        params: parameters, or parameter groups.
        partners: the frozen partner of each trained factor; other parameters are trained as they are.
        lr: learning rate.
        betas: coefficients of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        correct_bias: whether to correct the averages for their start at zero.

    Raises:
        ConfigError: for a value that cannot work.
    """

    def __init__(
        self,
        params: Iterable[Any],
        partners: Mapping[nn.Parameter, Partner],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a finite number that is not negative, not {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas must be at least 0 and less than 1, not {betas!r}")
        self._partners = dict(partners)
        self._inverses: dict[nn.Parameter, tuple[tuple[int, int], Tensor]] = {}
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step.setdefault(self._next_step(parameter), []).append(parameter)
            for step, parameters in by_step.items():
                self._adamw(group, step, parameters, [self._gradient(parameter) for parameter in parameters])
        return loss

    def _next_step(self, parameter: nn.Parameter) -> int:
        state = self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        return int(state["step"])

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient, projected if the parameter has a partner."""
        gradient = cast(Tensor, parameter.grad)
        partner = self._partners.get(parameter)
        if partner is None or partner.scaling.value == 0:  # a branch that is scaled away has no gradient
            return gradient
        inverse = self._inverse(parameter, partner)
        products = partner.trained_products(gradient.contiguous()).to(inverse.dtype)
        projected = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        partner.trained_products(projected).copy_(products @ (inverse / partner.scaling.value**2))
        return projected

    def _inverse(self, parameter: nn.Parameter, partner: Partner) -> Tensor:
        """`(A Aᵀ)⁻¹`, `(n, r, r)`, or its pseudo-inverse: made once in float64, as long as A has the same values."""
        version = (partner.frozen._version, partner.frozen.data_ptr())
        known = self._inverses.get(parameter)
        if known is not None and known[0] == version:
            return known[1]
        factor = partner.frozen_products().cpu().double()
        tolerance = factor.shape[1] * torch.finfo(torch.float32).eps
        inverse = torch.linalg.pinv(factor @ factor.mT, rtol=tolerance, hermitian=True)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._inverses[parameter] = version, inverse.to(parameter.device, dtype)
        return self._inverses[parameter][1]

    def _adamw(self, group: dict[str, Any], step: int, parameters: list[Any], gradients: list[Any]) -> None:
        """One step of AdamW (arXiv:1711.05101) on parameters that have made equally many; weights decay last."""
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        beta1, beta2 = group["betas"]
        rate = float(group["lr"])
        step_size = rate
        if group["correct_bias"]:
            step_size *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
        _foreach._foreach_mul_(first, beta1)
        _foreach._foreach_add_(first, gradients, alpha=1 - beta1)
        _foreach._foreach_mul_(second, beta2)
        _foreach._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        denominators = _foreach._foreach_sqrt(second)
        _foreach._foreach_add_(denominators, group["eps"])
        _foreach._foreach_addcdiv_(parameters, first, denominators, value=-step_size)
        if group["weight_decay"]:
            _foreach._foreach_add_(parameters, parameters, alpha=-rate * group["weight_decay"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_partners": self._partners}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._inverses = {}


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFA:
    """Freeze one factor of each branch of the active adapters, and make the optimizer that trains the rest.

    The frozen factor is the one that starts at random: A, but B of an embedding layer, whose A starts at zero (with A
    frozen it would never learn). Ranks and scales are those of each branch, as `rank_pattern`, `alpha_pattern` and
    `set_scale` make them. `set_adapter` makes all factors trainable again: call this after it.

    Args:
        model: a transformed model, also inside of a wrapper or compiled.
        r: not needed; if given, it must be what the configurations of the active adapters say.
        lora_alpha: likewise.
        lr: learning rate.
        weight_decay: decoupled weight decay, of all that is trained.
        use_rslora: likewise.

    Raises:
        AdapterError: for a model without active adapters, one whose frozen factor is zero, or when nothing requires
            gradients.
        ConfigError: when a value contradicts a configuration.

    Example:
        >>> import torch
        >>> from fxlora import LoraConfig, create_lorafa_optimizer, lora_transform
        >>> model = lora_transform(torch.nn.Sequential(torch.nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_lorafa_optimizer(model, lr=1e-3)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.lora_B.default.weight']
    """
    lora = lora_model(model)
    for adapter in lora.active_adapters:
        _check_agrees(lora.peft_config[adapter], adapter, r=r, lora_alpha=lora_alpha, use_rslora=use_rslora)
    partners = _partners(lora)
    frozen = {partner.frozen for partner in partners.values()}
    trained = [each for each in model.parameters() if each.requires_grad and each not in frozen]
    if not trained:
        raise AdapterError(
            "there is nothing to train: no parameter requires gradients; set_adapter makes an adapter train"
        )
    optimizer = LoraFA(trained, partners, lr=lr, weight_decay=weight_decay)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return optimizer


def _check_agrees(config: LoraConfig, adapter: str, **given: object) -> None:
    for name, value in given.items():
        configured = getattr(config, name)
        if value is not None and value != configured:
            raise ConfigError(
                f"{name}={value!r} contradicts adapter '{adapter}', which has {name}={configured!r}; leave it out, since "
                "each branch's own is used"
            )


def _partners(model: LoraModel) -> dict[nn.Parameter, Partner]:
    found: dict[nn.Parameter, Partner] = {}
    for adapter in model.active_adapters:
        branches: dict[str, dict[str, AdapterParameter]] = {}
        for each in of_plan(model, model._lora.adapters[adapter]):
            if each.spec is not None and has_factors(each.spec) and each.role in ("A", "B"):
                branches.setdefault(each.spec.site, {})[each.role] = each
        for site, roles in branches.items():
            spec = cast(BranchSpec, roles["A"].spec)
            is_a = spec.kind != "embedding" and KINDS[spec.kind].factor_names[1] not in spec.frozen
            frozen, trained = (roles[role].parameter for role in ("AB" if is_a else "BA"))
            if not frozen.is_meta and not frozen.any():
                raise AdapterError(
                    f"'{site}': LoRA-FA would freeze {'A' if is_a else 'B'} of adapter '{adapter}', which is zero, so that "
                    "the branch could never learn; train both factors with another optimizer"
                )
            scaling = cast(Scaling, model.get_submodule(f"{spec.owner}.{SCALING}.{adapter}"))
            found[trained] = Partner(frozen, is_a, scaling, spec)
    return found


# ---- the products of each kind ----


def _a_products(spec: BranchSpec, A: Tensor) -> Tensor:
    """A of each product: `(n, r, k)`. A kind that is not named here has one, with A `(r, k, …)`."""
    return A.reshape(_products(spec), -1, A[0].numel())


def _b_products(spec: BranchSpec, B: Tensor) -> Tensor:
    """B of each product: `(n, m, r)`, with B `(m, r, 1, …)`; the columns of experts alternate, and groups have rows."""
    n = _products(spec)
    if spec.option(CROSS_GROUPS):
        return B.reshape(n, B.shape[0] // n, -1)
    return B.reshape(B.shape[0], -1, n).permute(2, 0, 1)


def _products(spec: BranchSpec) -> int:
    """How many products `B A` the update of a branch is made of: one for each expert, or group across groups."""
    return spec.option("groups") if spec.option(CROSS_GROUPS) else spec.option(EXPERTS, 1)
