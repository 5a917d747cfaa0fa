"""Giving layers that share their weight with others a weight of their own, before a merge changes it.

Called by `merge_and_unload` and `export_merged`, for `tied="untie"`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager

from torch import nn

from fxlora._passes import BranchSpec, MergeError, Region, Tied, base_weight, parameter_at, shared_weights
from fxlora.errors import ConfigError

TIED: tuple[Tied, ...] = ("refuse", "untie", "both")


def check_tied(tied: str, allowed: tuple[Tied, ...] = TIED) -> None:
    """Refuse another value of `tied` than those that a call has.

    Raises:
        ConfigError: with what can be done.
    """
    if tied in allowed:
        return
    if tied in TIED:
        raise ConfigError(
            f"tied={tied!r} cannot be undone by unmerge_adapter; use merge_and_unload or export_merged, or tied='both'"
        )
    raise ConfigError(f"`tied` should be one of {', '.join(map(repr, allowed))}, not {tied!r}")


@contextmanager
def weights_of_their_own(region: Region, specs: Iterable[BranchSpec], tied: Tied) -> Generator[None]:
    """With `tied="untie"`, copy the weights that sites share with other layers; after an error they are shared again.

    Args:
        region: the model's.
        specs: the branches that are to be folded.
        tied: what was asked for.

    Raises:
        MergeError: when code that is no layer reads the weight, so that there is no second end to leave as it is.
    """
    specs, before = tuple(specs), dict[str, nn.Parameter]()
    try:
        while tied == "untie" and (path := _first_shared(region, specs)) is not None:
            parameter = parameter_at(region.module, path)
            assert parameter is not None
            before[path] = parameter
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            _register(region.module, path, own)
        yield
    except BaseException:
        for path, parameter in before.items():
            _register(region.module, path, parameter)
        raise


def names_of_their_own(region: Region, specs: Iterable[BranchSpec]) -> dict[str, str]:
    """The weights that `tied="untie"` would copy, by every name that their layers have.

    Raises:
        MergeError: as `weights_of_their_own`.
    """
    model = region.module
    modules = list(model.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    for site, sharing in shared_weights(region, tuple(specs)):
        _check_separable(site, sharing.uses)
        path = base_weight(model, site)[0]
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        names.update({f"{name}.{leaf}".lstrip("."): path for name, each in modules if each is module})
    return names


def has_parted_ties(model: nn.Module) -> bool:
    """Whether weights that a transformers model declares as tied are two parameters by now."""
    declared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return any(parameter_at(model, name) is not parameter_at(model, source) for name, source in declared.items())


def _first_shared(region: Region, specs: tuple[BranchSpec, ...]) -> str | None:
    for site, sharing in shared_weights(region, specs):
        _check_separable(site, sharing.uses)
        return base_weight(region.module, site)[0]
    return None


def _check_separable(site: str, uses: Iterable[str]) -> None:
    use = min(uses, default=None)
    if use is not None:
        raise MergeError(
            f"'{site}': its weight is also read by '{use}' of the graph, which cannot be given another one; use tied='both', "
            "or leave this layer out of the targets; nothing was changed"
        )


def _register(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = path.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter
