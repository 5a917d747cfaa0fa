"""Gradients for what enters a frozen model, which reentrant gradient checkpointing needs to reach the adapters.

`torch.utils.checkpoint` with `use_reentrant=True` gives a segment no gradient unless one of its inputs requires one. In
a model with frozen embeddings none does: adapters inside of segments stay untrained. A transformed transformers model
takes care of it by itself (`care_for_checkpointing`); `enable_input_require_grads` is for any other model, also for one that
has a transformers model as a part, whose checkpointing is switched on after the transform.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from fxlora._passes import did_you_mean
from fxlora.errors import AdapterError


class InputGrads:
    """The hooks of `enable_input_require_grads`. Also a context manager, which removes them at its end.

    Attributes:
        outputs: names of the modules whose outputs are made to require gradients.
        inputs: names of the modules whose inputs are; `""` is the model itself.
    """

    def __init__(self, outputs: dict[str, RemovableHandle], inputs: dict[str, RemovableHandle]) -> None:
        self.outputs, self.inputs = tuple(outputs), tuple(inputs)
        self._handles = (*outputs.values(), *inputs.values())

    def remove(self) -> None:
        """Take the hooks off the model; a second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def enable_input_require_grads(model: nn.Module, at: str | Iterable[str] | None = None) -> InputGrads:
    """Make what enters the model require gradients, so that reentrant gradient checkpointing trains all adapters.

    By default at the outputs of what `get_input_embeddings` of the model and of models in it returns, and at the inputs
    of modules with a list of blocks that have a `gradient_checkpointing` switch. A model that has neither: at the outputs of its
    embedding layers, and at its own floating-point inputs but masks. Values do not change, and nothing happens under
    `torch.no_grad()`.

    The first adapted layer would be too late: where it is inside of a checkpointed segment, so would the hook be.

    Args:
        model: transformed or not.
        at: names of the modules whose outputs shall require gradients, in place of the default.

    Returns:
        A handle: `remove()` takes the hooks off again.

    Raises:
        AdapterError: when `at` names a module that is not there.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> from fxlora import LoraConfig, enable_input_require_grads, lora_transform
        >>> class Blocks(torch.nn.Sequential):
        ...     def forward(self, x):
        ...         for block in self:
        ...             x = checkpoint(block, x, use_reentrant=True)
        ...         return x
        >>> model = Blocks(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> model = lora_transform(model, LoraConfig(r=2, target_modules=["0", "1"]), capture="modules")
        >>> with enable_input_require_grads(model):
        ...     model(torch.ones(1, 4)).sum().backward()
        >>> all(p.grad is not None for p in model.parameters() if p.requires_grad)
        True
    """
    modules = dict(model.named_modules())
    outputs, inputs = _default_places(model, modules) if at is None else (_named(modules, at), {})
    return InputGrads(
        {name: modules[name].register_forward_hook(_output_requires_grad) for name in outputs},
        {name: modules[name].register_forward_pre_hook(hook, with_kwargs=True) for name, hook in inputs.items()},
    )


def _named(modules: dict[str, nn.Module], at: str | Iterable[str]) -> list[str]:
    chosen = [at] if isinstance(at, str) else list(at)
    for name in chosen:
        if name not in modules:
            raise AdapterError(f"at: the model has no module called '{name}'.{did_you_mean(name, modules)}")
    return chosen


def _default_places(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[list[str], dict[str, _InputsRequireGrad]]:
    """The modules to hook by their outputs, and by their inputs with these hooks."""
    embeddings = _input_embeddings(modules)
    owners = _owners_of_switches(modules)
    if not embeddings and not owners:
        layers = [name for name, module in modules.items() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
        return layers, {"": _InputsRequireGrad(_positional(model))}
    inputs: dict[str, _InputsRequireGrad] = {}
    for owner in owners:
        embeds = any(f".{name}".startswith(f".{owner}." if owner else ".") for name in embeddings)
        inputs[owner] = _InputsRequireGrad(_positional(modules[owner]), only_embedded=embeds)
    return embeddings, inputs


def _input_embeddings(modules: dict[str, nn.Module]) -> list[str]:
    """What the models in a model call their input embeddings."""
    found: list[nn.Module] = []
    for module in modules.values():
        get = getattr(module, "get_input_embeddings", None)
        try:
            each = get() if callable(get) else None
        except (NotImplementedError, AttributeError):  # a model without tokens says so in either way
            continue
        if isinstance(each, nn.Module):
            found.append(each)
    return [name for name, module in modules.items() if module in found]


def _owners_of_switches(modules: dict[str, nn.Module]) -> list[str]:
    """The modules with a list of blocks that can be checkpointed, but for those that care for their inputs themselves."""
    owners: dict[str, None] = {}
    for name, module in modules.items():
        if isinstance(getattr(module, "gradient_checkpointing", None), bool):
            owner = name.rpartition(".")[0]
            while owner and isinstance(modules[owner], (nn.ModuleList, nn.ModuleDict)):
                owner = owner.rpartition(".")[0]
            listed = owner != name.rpartition(".")[0]
            if listed and not hasattr(modules[owner], "_requires_grad"):  # wav2vec2's convolutions: they want a leaf
                owners[owner] = None
    return list(owners)


def _positional(module: nn.Module) -> tuple[str, ...]:
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class _InputsRequireGrad:
    """A forward pre-hook: the floating-point tensors among the inputs require gradients, but for masks.

    Attributes:
        positional: names of the inputs that can be given by position.
        only_embedded: whether the module embeds tokens itself, so that only what is embedded already is meant.
    """

    positional: tuple[str, ...]
    only_embedded: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        if not torch.is_grad_enabled():
            return None
        names = (*self.positional, *("" for _ in args[len(self.positional) :]))
        changed = [self._changed(name, value) for name, value in zip(names, args, strict=False)]
        return tuple(changed), {name: self._changed(name, value) for name, value in kwargs.items()}

    def _changed(self, name: str, value: Any) -> Any:
        embedded = name == "hidden_states" or name.endswith("embeds")
        chosen = embedded if self.only_embedded else "mask" not in name
        return _requiring_grad(value) if chosen and isinstance(value, Tensor) else value


def _output_requires_grad(module: nn.Module, args: object, output: object) -> object:
    del module, args
    return pytree.tree_map_only(Tensor, _requiring_grad, output) if torch.is_grad_enabled() else output


def _requiring_grad(tensor: Tensor) -> Tensor:
    """The tensor, or if it is frozen a copy that requires gradients.

    A copy, since the tensor may be the caller's, or a frozen parameter; no leaf, since models write into embeddings.
    """
    if tensor.requires_grad or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.detach().requires_grad_().clone()


# ---- models that switch checkpointing on by themselves ----

_CARE = "_lora_input_grads"
"""Attribute in which a transformed model keeps the handle of the hooks that it added by itself."""

SWITCH = "_set_gradient_checkpointing"
"""The method through which models of transformers and diffusers switch checkpointing on and off."""


def care_for_checkpointing(model: nn.Module) -> None:
    """Add the hooks if some module of the model uses reentrant checkpointing, and take them off if none does."""
    wanted = checkpoints_reentrantly(model)
    current = cast("InputGrads | None", model.__dict__.get(_CARE))
    if wanted and current is None:
        model.__dict__[_CARE] = enable_input_require_grads(model)
    if not wanted:
        end_care(model)


def end_care(model: nn.Module) -> None:
    """Take off the hooks that `care_for_checkpointing` added."""
    current = cast("InputGrads | None", model.__dict__.pop(_CARE, None))
    if current is not None:
        current.remove()


def caring_switch(switch: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `_set_gradient_checkpointing` that also cares for the gradients of its inputs."""

    @functools.wraps(switch)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = switch(self, *args, **kwargs)
        care_for_checkpointing(self)
        return result

    return run


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether some module of a model checkpoints, unless it is known to do so without reentrance."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if not isinstance(function, functools.partial) or function.keywords.get("use_reentrant") is not False:
                return True
    return False
