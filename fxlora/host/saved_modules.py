"""`modules_to_save`: modules of which an adapter has a trained copy, as peft's `ModulesToSaveWrapper`.

The copy is at `<module>.modules_to_save.<adapter>`; which one runs is decided where graphs are made. This module finds
the modules, makes copies, and puts them in the originals' places in the end.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fxlora._passes import (
    SAVED,
    NoTargetError,
    SavedModule,
    VerifyError,
    did_you_mean,
    is_inserted,
    resolve,
    tensors_of,
)
from fxlora.config import LoraConfig
from fxlora.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from fxlora.plan import Plan

log = logging.getLogger("fxlora")

TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Names that a task adds to `modules_to_save`; a model need not have all of them."""

_NOT_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


# ---- planning ----


def with_task_heads(config: LoraConfig) -> LoraConfig:
    """The configuration with the heads of its task among `modules_to_save`, as peft adds them."""
    heads = TASK_HEADS.get(config.task_type or "", ())
    names = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    return config.replace(modules_to_save=names) if heads else config


def saved_modules(
    model: nn.Module, config: LoraConfig, adapter: str, branches: Iterable[str]
) -> tuple[SavedModule, ...]:
    """The modules that an adapter trains whole: those whose names end with a name of `modules_to_save`, as in peft.

    With `ensure_weight_tying` also the modules that share a parameter with one of them: their copies share it too.

    Args:
        model: not changed; may be on the meta device.
        config: with the task's heads.
        adapter: the adapter's name.
        branches: names of the sites that get branches.

    Raises:
        NoTargetError: when a name matches no module; the heads of a task may be missing.
        ConfigError: when a module cannot be called, or has a target in it.
    """
    wanted = config.modules_to_save or []
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name and not is_inserted(name)]
    optional = TASK_HEADS.get(config.task_type or "", ())
    for each in wanted:
        if each not in optional and not any(name.endswith(each) for name in names):
            raise NoTargetError(
                f"modules_to_save: no module is called '{each}'.{did_you_mean(each, names)} The names of modules must end so."
            )
    found: dict[int, SavedModule] = {}
    for name in names:
        module = cast(nn.Module, resolve(model, name))
        inside = any(f"{name}.".startswith(f"{saved.module}.") for saved in found.values())
        if not inside and id(module) not in found and any(name.endswith(each) for each in wanted):
            found[id(module)] = _describe(name, module, adapter)
    if config.ensure_weight_tying:
        shared = {id(p) for saved in found.values() for p in _module(model, saved.module).parameters()}
        for name in names:
            module = _module(model, name)
            inside = any(f"{name}.".startswith(f"{saved.module}.") for saved in found.values())
            if (
                not inside
                and id(module) not in found
                and any(id(p) in shared for p in module.parameters(recurse=False))
            ):
                found[id(module)] = _describe(name, module, adapter)
    saved = tuple(found.values())
    _check_targets(saved, branches)
    _warn_of_tied(model, saved)
    return saved


def _module(model: nn.Module, name: str) -> nn.Module:
    return cast(nn.Module, resolve(model, name))


def _describe(name: str, module: nn.Module, adapter: str) -> SavedModule:
    if isinstance(module, _NOT_CALLED):
        raise ConfigError(
            f"modules_to_save: '{name}' is a {type(module).__name__}, which is never called; name the modules in it"
        )
    tensors = {each: tensor for each, tensor in tensors_of(module) if not is_inserted(each)}
    parameters = [each for each, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]
    trained = tuple(each for each in parameters if tensors[each].is_floating_point() or tensors[each].is_complex())
    in_files = tuple(each for each in module.state_dict(keep_vars=True) if each in tensors)
    entries = sum(parameter.numel() for parameter in {id(tensors[each]): tensors[each] for each in trained}.values())
    return SavedModule(name, adapter, trained, in_files, entries)


def _check_targets(saved: Sequence[SavedModule], branches: Iterable[str]) -> None:
    for site in branches:
        for each in saved:
            if f"{site}.".startswith(f"{each.module}."):
                raise ConfigError(
                    f"modules_to_save: '{each.module}' is trained whole, and '{site}' in it is a target; name it once"
                )


def _warn_of_tied(model: nn.Module, saved: Sequence[SavedModule]) -> None:
    for each in saved:
        inside = {id(tensor): name for name, tensor in tensors_of(cast(nn.Module, resolve(model, each.module)))}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            outside = not any(f"{name}.".startswith(f"{other.module}.") for other in saved) and not is_inserted(name)
            if outside and id(parameter) in inside:
                log.warning(
                    "modules_to_save: '%s.%s' is tied to '%s'; its trained copy is not, so that the two part",
                    each.module,
                    inside[id(parameter)],
                    name,
                )
                break


# ---- copies ----


def attach_copies(model: nn.Module, plan: Plan, values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Register an adapter's copies.

    Args:
        model: the transformed model.
        plan: which modules.
        values: by module, what the copies hold, by name; a copy of the original where there is none.

    Raises:
        ConfigError: when a module has something else under the name of the copies' container.
    """
    first: dict[int, nn.Parameter] = {}
    for saved in plan.saved:
        module = cast(nn.Module, resolve(model, saved.module))
        # a whole graph calls the copy in the original's place, a template from within the original's own call
        copied = copy_of(module, with_hooks=getattr(model, "capture", "modules") != "modules")
        if plan.config.ensure_weight_tying:
            _share(module, copied, first)
        for name, value in values.get(saved.module, {}).items():
            cast(Tensor, resolve(copied, name)).data.copy_(value)
        container = getattr(module, SAVED, None)
        if container is None:
            container = nn.ModuleDict().train(module.training)
            module.add_module(SAVED, container)
        elif not isinstance(container, nn.ModuleDict):
            raise ConfigError(f"modules_to_save: '{saved.module}' has an attribute called '{SAVED}' already")
        container[saved.adapter] = copied


def _share(module: nn.Module, copied: nn.Module, first: dict[int, nn.Parameter]) -> None:
    """Give a copy the parameters of earlier copies where the originals share them, and note those that are new."""
    originals = dict(module.named_modules(remove_duplicate=False))
    for path, each in copied.named_modules(remove_duplicate=False):
        for name, parameter in each._parameters.items():
            original = originals[path]._parameters[name]
            if parameter is not None and original is not None:
                each._parameters[name] = first.setdefault(id(original), parameter)


def copy_of(module: nn.Module, *, with_hooks: bool = False) -> nn.Module:
    """A deep copy of a module without what adapters added to it. Hooks in it are shared, not copied.

    Args:
        module: the original.
        with_hooks: whether to keep the hooks of the module itself, beside those of its children.
    """
    memo: dict[int, Any] = {}
    for each in module.modules():
        memo.update((id(hook), hook) for hook in _hooks(each))
    containers = [each._modules[name] for each in module.modules() for name in each._modules if is_inserted(name)]
    memo.update((id(container), nn.Module()) for container in containers)
    copied = copy.deepcopy(module, memo)
    for each in copied.modules():
        for name in [name for name in each._modules if is_inserted(name)]:
            del each._modules[name]
        each.__class__ = plain_class(each)
    for name, value in vars(copied).items():
        if not with_hooks and _holds_hooks(name, value):
            value.clear()
    return copied


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class before a template generated one for it; for the model itself the one with LoRA's methods."""
    return cast("type[nn.Module]", getattr(type(module), "_site_base", type(module)))


def _hooks(module: nn.Module) -> Iterator[object]:
    for name, value in vars(module).items():
        if _holds_hooks(name, value):
            yield from value.values()


def _holds_hooks(name: str, value: object) -> bool:
    kept = ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks")
    return name.endswith("_hooks") and isinstance(value, dict) and name not in kept


def detach_copies(model: nn.Module, plan: Plan) -> None:
    """Remove an adapter's copies, and their containers that are empty then."""
    for saved in plan.saved:
        module = cast(nn.Module, resolve(model, saved.module))
        container = module._modules.get(SAVED)
        if not isinstance(container, nn.ModuleDict):
            continue
        if saved.adapter in container:
            del container[saved.adapter]
        if not container:
            del module._modules[SAVED]
            if getattr(getattr(type(module), "_signature", None), "redirection", None) is not None:
                module.__class__ = plain_class(module)  # but the class of another adapter's branches stays


def running_copies(plans: Iterable[Plan]) -> tuple[SavedModule, ...]:
    """The copies of some adapters that are to run together.

    Raises:
        AdapterError: when two of them have a copy of one module, or one a copy of a part of it; when one has branches in
            a module of which another has a copy.
    """
    plans = list(plans)
    found: list[SavedModule] = []
    for saved in (each for plan in plans for each in plan.saved):
        for other in found:
            if _overlap(other.module, saved.module):
                raise AdapterError(
                    f"adapters '{other.adapter}' and '{saved.adapter}' both have a copy of '{saved.module}' "
                    "(modules_to_save), and only one can run; use one of the adapters at a time"
                )
        found.append(saved)
    for site, adapter in ((spec.site, plan.adapter) for plan in plans for spec in plan.branches):
        for saved in found:
            if f"{site}.".startswith(f"{saved.module}."):
                raise AdapterError(
                    f"adapter '{saved.adapter}' runs a copy of '{saved.module}' (modules_to_save), in which adapter "
                    f"'{adapter}' would have no effect; use one of the adapters at a time"
                )
    return tuple(found)


def _overlap(a: str, b: str) -> bool:
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def check_copies(model: nn.Module, plans: Iterable[Plan]) -> None:
    """Check that every copy is registered and fits its module, and that no other is there.

    Raises:
        VerifyError: names the module.
    """
    known = {saved.path: saved for plan in plans for saved in plan.saved}
    for name, container in model.named_modules():
        if name.rpartition(".")[2] == SAVED and isinstance(container, nn.ModuleDict):
            for adapter, _ in container.named_children():
                if f"{name}.{adapter}" not in known:
                    raise VerifyError(f"'{name}.{adapter}' is a copy that belongs to no adapter of the plan")
    for saved in known.values():
        try:
            tensors = [dict(tensors_of(cast(nn.Module, resolve(model, path)))) for path in (saved.path, saved.module)]
        except AttributeError as error:
            raise VerifyError(f"'{saved.path}', a trained copy, is gone: {error}") from error
        copied, original = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in tensors)
        for name in saved.tensors:
            if name not in copied or copied[name] != original.get(name, copied[name]):
                raise VerifyError(
                    f"'{saved.path}': '{name}' is {copied.get(name, 'gone')}, the original's {original.get(name)}"
                )


# ---- in the end ----


def put_in_place(model: nn.Module, copies: Mapping[str, nn.Module]) -> None:
    """Give modules the tensors of their copies; modules, hooks and names stay.

    Args:
        model: without adapters.
        copies: by the module's name.
    """
    if unties(model, copies):
        set_untied(getattr(model, "config", None))
    for name, copied in copies.items():
        originals = dict(cast(nn.Module, resolve(model, name)).named_modules(remove_duplicate=False))
        for path, module in copied.named_modules(remove_duplicate=False):
            originals[path]._parameters.update(module._parameters)
            originals[path]._buffers.update(module._buffers)


def unties(model: nn.Module, copies: Mapping[str, nn.Module]) -> bool:
    """Whether the copies of some modules, in their places, part weights that a transformers model declares as tied."""
    declared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}

    def held(name: str) -> object:
        owners = [module for module in copies if name.startswith(f"{module}.")]
        return resolve(copies[owners[0]], name[len(owners[0]) + 1 :]) if owners else None

    return any(held(name) is not held(source) for name, source in declared.items())


def set_untied(config: Any) -> None:
    """Make a transformers configuration say that output and input embeddings are two."""
    parts = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            log.warning("the output layer has other weights than the embeddings: tie_word_embeddings is now False")
            part.tie_word_embeddings = False
