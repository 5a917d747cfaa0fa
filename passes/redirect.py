"""`redirect-saved`: run the trained copies of whole modules in place of these, or the modules themselves again.

The copy of module `M` for an adapter is at `M.modules_to_save.<adapter>`, with everything that `M` has one level
deeper. So the pass only changes paths. It knows nothing of how copies are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, fx, nn

from passes.base import SELF_CALL, PassResult, Region, resolve
from passes.errors import PassError, VerifyError
from passes.leaves import SAVED
from passes.operands import owning_path

REDIRECTED = "redirected"
"""Key of a node's metadata: `("target", path before)`, or `("split", name of the node whose uses it took over)`."""


@dataclass(frozen=True, slots=True)
class SavedModule:
    """A module of which an adapter has a copy that is trained whole.

    Attributes:
        module: qualified name of the original.
        adapter: the adapter's name.
        parameters: names of the parameters that are trained, relative to the module.
        tensors: names of all that files hold: parameters and persistent buffers.
        entries: number of entries of the parameters.
    """

    module: str
    adapter: str
    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    entries: int = 0

    @property
    def path(self) -> str:
        """Qualified name of the copy."""
        return copy_path(self.module, self.adapter)


def copy_path(module: str, adapter: str, rest: str = "") -> str:
    """Path of an adapter's copy of a module, or of something in it."""
    return ".".join(part for part in (module, SAVED, adapter, rest) if part)


def spread(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(*args, **kwargs)`: how a template calls a module whatever inputs it takes."""
    return function(*args, **kwargs)


def spread_template() -> fx.Graph:
    """The graph of a module that passes all its inputs on: `forward(*args, **kwargs)`."""
    graph = fx.Graph()
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    function = graph.create_node("get_attr", SELF_CALL)
    graph.output(graph.call_function(spread, (function, args, kwargs)))
    return graph


@dataclass(frozen=True)
class RedirectSaved:
    """Make the graph use these copies, and the originals of all other modules.

    Attributes:
        copies: (path of the module relative to the region's instance, adapter); the path `""` is the instance itself.
    """

    name: ClassVar[str] = "redirect-saved"
    copies: tuple[tuple[str, str], ...] = ()

    def run(self, region: Region) -> PassResult:
        """Redirect every use.

        Raises:
            PassError: when the graph does not use one of the modules.
        """
        before = _redirected(region.graph)
        _restore(region.graph)
        for module, adapter in self.copies:
            if not _redirect(region, module, adapter):
                raise PassError(
                    f"modules_to_save: the captured graph never uses '{module}': it is hidden inside a module that is "
                    "kept whole, or unused. Leave it out, or use capture='modules'"
                )
        after = _redirected(region.graph)
        return PassResult(before != after, f"{len(after)} uses of {len(self.copies)} copies")


@dataclass(frozen=True)
class VerifySaved:
    """Check that a graph uses exactly the copies that it should; changes nothing.

    Attributes:
        copies: as in `RedirectSaved`.
        registered: (path, adapter) of every copy that there is.
    """

    name: ClassVar[str] = "verify-saved"
    copies: tuple[tuple[str, str], ...]
    registered: tuple[tuple[str, str], ...]

    def run(self, region: Region) -> PassResult:
        """Raise at the first violation.

        Raises:
            VerifyError: names the module.
        """
        used = {str(node.target) for node in region.graph.nodes if node.op in ("call_module", "get_attr")}
        for module, adapter in self.registered:
            path = copy_path(module, adapter)
            where = region.instances[0].qualify(module)
            runs = any(target == path or target.startswith(f"{path}.") for target in used)
            if runs and (module, adapter) not in self.copies:
                raise VerifyError(f"'{where}': the graph runs the copy of adapter '{adapter}', which is not active")
            if not runs and (module, adapter) in self.copies:
                raise VerifyError(f"'{where}': the graph does not run the copy of adapter '{adapter}'")
        for module, adapter in self.copies:
            _check_all_redirected(region, module, adapter)
        return PassResult(False)


def _check_all_redirected(region: Region, module: str, adapter: str) -> None:
    for node, _ in _uses(region, module):
        raise VerifyError(
            f"'{region.instances[0].qualify(module)}': '{node.name}' uses the original, not the copy of '{adapter}'"
        )


def _redirected(graph: fx.Graph) -> list[tuple[str, str]]:
    return [(node.name, str(node.target)) for node in graph.nodes if REDIRECTED in node.meta]


def _restore(graph: fx.Graph) -> None:
    """Give redirected nodes their own paths back, and split ones back to the node that they came from."""
    by_name = {node.name: node for node in graph.nodes}
    for node in list(graph.nodes):
        how, value = node.meta.pop(REDIRECTED, (None, ""))
        if how == "target":
            node.target = value
        elif how == "split":
            node.replace_all_uses_with(by_name[value])
            graph.erase_node(node)


def _redirect(region: Region, module: str, adapter: str) -> int:
    found = list(_uses(region, module))
    for node, rest in found:
        users = _inside(node, region, module)
        path = copy_path(module, adapter, rest)
        if users is None or len(users) == len(node.users):
            node.meta[REDIRECTED] = ("target", node.target)
            node.target = path
            continue
        with region.graph.inserting_after(node):
            split = region.graph.create_node("get_attr", path)
        split.meta = {**node.meta, REDIRECTED: ("split", node.name)}
        for user in users:
            user.replace_input_with(node, split)
    return len(found)


def _uses(region: Region, module: str) -> Iterator[tuple[fx.Node, str]]:
    """(node, path relative to the module) of every node that uses a module or something in it."""
    if not module:
        yield from ((node, "") for node in region.graph.nodes if node.target == SELF_CALL)
        return
    names = _names(region.module, module)
    tensors = {id(tensor): name for name, tensor in tensors_of(cast(nn.Module, region.resolve(module)))}
    for node in list(region.graph.nodes):
        if node.op not in ("call_module", "get_attr") or REDIRECTED in node.meta:
            continue
        target = str(node.target)
        rest = next((target[len(name) + 1 :] for name in names if f"{target}.".startswith(f"{name}.")), None)
        if rest is None and node.op == "get_attr":  # a tied parameter may be spelled by its other name
            rest = tensors.get(id(region.resolve(target)))
        if rest is None or rest.partition(".")[0] == SAVED:
            continue
        users = _inside(node, region, module)
        if users is None or users:
            yield node, rest


def _names(root: nn.Module, module: str) -> list[str]:
    """All names under which a module is registered."""
    wanted = resolve(root, module)
    return [name for name, each in root.named_modules(remove_duplicate=False) if each is wanted]


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters and buffers of a module, without what adapters added."""
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        if SAVED not in name.split("."):
            yield name, tensor


def _inside(node: fx.Node, region: Region, module: str) -> list[fx.Node] | None:
    """The users of a tensor that use it as the module's; None if all do.

    A tensor that another module has too is the module's where the module's own code uses it, or, for code of neither
    module, where the graph spells it so.
    """
    if node.op != "get_attr" or not module:
        return None
    names = _names(region.module, module)
    others = _other_owners(region.module, names, region.resolve(str(node.target)))
    if not others:
        return None
    spelled = any(f"{node.target}.".startswith(f"{name}.") for name in names)
    return [user for user in node.users if _belongs(owning_path(user), names, others, spelled)]


def _belongs(path: str, names: list[str], others: set[str], spelled: bool) -> bool:
    if any(f"{path}.".startswith(f"{name}.") for name in names):
        return True
    return spelled and path not in others


def _other_owners(root: nn.Module, names: list[str], tensor: object) -> set[str]:
    """Modules outside of a module, given by its names, that have a tensor too."""
    found: set[str] = set()
    for owner, each in root.named_modules(remove_duplicate=False):
        inside = any(f"{owner}.".startswith(f"{name}.") for name in names)
        if not inside and any(own is tensor for own in (*each._parameters.values(), *each._buffers.values())):
            found.add(owner)
    return found
