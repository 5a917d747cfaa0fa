"""`modules` capture: the model stays as it is, and each target layer gets a class whose forward is a rewritten graph.

All layers of one signature (class, adapters, dropout) share one template graph and one generated class, so that
Dynamo compiles equal blocks once. The base operation is the class's own forward, called from the template. The model
itself becomes an instance of a generated subclass of its class, which adds `LoraModel`'s methods.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import new_class
from typing import Any, cast

from torch import fx, nn

from fxlora._passes import (
    SELF_CALL,
    Branch,
    BranchDtype,
    BranchSpec,
    InsertBranches,
    Instance,
    Pipeline,
    Region,
    VerifyError,
)
from fxlora.capture.codegen import generate_forward
from fxlora.capture.graph_codec import EncodedGraph, decode, encode
from fxlora.capture.inputs import Example, undisturbed
from fxlora.errors import CaptureError
from fxlora.model import LoraModel


@dataclass(frozen=True, slots=True)
class Signature:
    """What a generated class depends on, beside the class that it extends."""

    branches: tuple[Branch, ...]
    dtype: BranchDtype


class ModulesHost(LoraModel):
    """Base of the generated classes of transformed models."""

    _base_class: type[nn.Module]

    def regions(self) -> list[Region]:
        """One template region for each class among the sites."""
        instances: dict[type[nn.Module], list[Instance]] = {}
        for site in dict.fromkeys(spec.site for spec in self._specs()):
            module = self.get_submodule(site)
            instances.setdefault(type(module), []).append(Instance(site, module))
        return [Region(current_template(cls), tuple(found)) for cls, found in instances.items()]

    def _sites_graph(self) -> fx.Graph:
        return fx.Graph()  # other uses of a weight show in the module tree only

    def verify(self) -> None:
        """See `LoraModel.verify`; also notices layers that were replaced since the transform."""
        active = self._lora.rendered
        for spec in self._specs():
            module = self.get_submodule(spec.site)
            signature = getattr(type(module), "_signature", None)
            adapters = [branch.adapter for branch in signature.branches] if signature else []
            if spec.adapter in active and spec.adapter not in adapters:
                raise VerifyError(
                    f"'{spec.site}' is a plain {type(module).__name__} now: it was replaced after the transform, and "
                    f"adapter '{spec.adapter}' has no effect there. Change the model first, then transform it"
                )
        super().verify()

    def _render(self, active: tuple[str, ...]) -> None:
        adapters: dict[str, list[Branch]] = {spec.site: [] for spec in self._specs()}
        for name in active:
            for spec in self._lora.adapters[name].branches:
                adapters[spec.site].append(Branch("", name, bool(spec.dropout)))
        groups: dict[tuple[type[nn.Module], Signature], list[Instance]] = {}
        plain: list[nn.Module] = []
        for site, branches in adapters.items():
            module = self.get_submodule(site)
            if branches:
                key = (original_class(module), Signature(tuple(branches), self._lora.branch_dtype))
                groups.setdefault(key, []).append(Instance(site, module))
            else:
                plain.append(module)
        regions = [Region(template(cls), tuple(instances)) for (cls, _), instances in groups.items()]
        verifier = self._verifier(active)
        self._lora.stages = []
        for region, (_, signature) in zip(regions, groups, strict=True):
            passes = (InsertBranches(signature.branches, signature.dtype),)
            self._lora.stages += Pipeline(passes, verifier).run([region])
        classes = [site_class(*key, region.graph) for key, region in zip(groups, regions, strict=True)]
        for cls, region in zip(classes, regions, strict=True):
            for instance in region.instances:
                instance.module.__class__ = cls
        for module in plain:
            module.__class__ = original_class(module)

    def _strip(self) -> nn.Module:
        del self.__dict__["_lora"]
        self.__class__ = self._base_class  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduce(self, _new_host, (self._base_class,))


_HOSTS: dict[type[nn.Module], type[ModulesHost]] = {}
_SITES: dict[tuple[type[nn.Module], Signature], type[nn.Module]] = {}


def host_class(base: type[nn.Module]) -> type[ModulesHost]:
    """The subclass of `base` and `LoraModel` that a transformed instance of `base` gets.

    It keeps the class's name, qualified name and module, by which other libraries recognise a model.
    """
    if base not in _HOSTS:
        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        cls = new_class(base.__name__, (ModulesHost, base), exec_body=lambda ns: ns.update(names, _base_class=base))
        _HOSTS[base] = cast("type[ModulesHost]", cls)
    return _HOSTS[base]


def site_class(base: type[nn.Module], signature: Signature, graph: fx.Graph) -> type[nn.Module]:
    """The subclass of `base` whose forward is a rewritten template graph; one for each signature."""
    key = (base, signature)
    if key not in _SITES:
        members = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "forward": generate_forward(graph),
            SELF_CALL: base.forward,
            "_base_class": base,
            "_signature": signature,
            "_template": encode(graph),
            "__reduce_ex__": _reduce_site,
        }
        _SITES[key] = new_class(f"Lora{base.__name__}", (base,), exec_body=lambda ns: ns.update(members))
    return _SITES[key]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was given a generated one."""
    return cast("type[nn.Module]", getattr(type(module), "_base_class", type(module)))


def template(cls: type[nn.Module]) -> fx.Graph:
    """The graph `y = self.base_forward(x, …)` with the parameters of `cls.forward` as inputs.

    Raises:
        CaptureError: when the forward takes `*args` or `**kwargs`, or nothing.
    """
    graph = fx.Graph()
    names: list[str] = []
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    arguments: list[fx.Node] = []
    keywords: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise CaptureError(f"{cls.__name__}.forward takes *{parameter.name}; `modules` capture needs named inputs")
        default = inspect.Signature.empty if parameter.default is parameter.empty else parameter.default
        node = graph.placeholder(parameter.name, default_value=default)
        names.append(parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            keywords[parameter.name] = node
        else:
            arguments.append(node)
    if not arguments:
        raise CaptureError(f"{cls.__name__}.forward takes no input")
    y = graph.call_module(SELF_CALL, tuple(arguments), keywords)
    graph.output(y)
    return graph


def current_template(cls: type[nn.Module]) -> fx.Graph:
    """The graph that instances of a class run now, whether it is a generated class or an original one."""
    encoded = getattr(cls, "_template", None)
    return template(cls) if encoded is None else decode(encoded)


def _reduce(module: nn.Module, make: Callable[..., nn.Module], args: tuple[object, ...]) -> tuple[Any, ...]:
    """How to pickle an instance of a generated class: by the class it extends."""
    reduced = cast("tuple[Any, ...]", object.__reduce_ex__(module, 2))
    if reduced[0] is not copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        raise TypeError(f"{type(module).__name__} has a pickling of its own, which fxlora cannot extend")
    return (make, args, *reduced[2:])


def _reduce_site(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    cls = cast(Any, type(self))
    return _reduce(self, _new_site, (cls._base_class, cls._signature, cls._template))


def _new_host(base: type[nn.Module]) -> nn.Module:
    cls = host_class(base)
    return cls.__new__(cls)


def _new_site(base: type[nn.Module], signature: Signature, encoded: EncodedGraph) -> nn.Module:
    cls = _SITES.get((base, signature)) or site_class(base, signature, decode(encoded))
    return cls.__new__(cls)


# ---- soundness ----

_BYPASSING: tuple[tuple[type[nn.Module], tuple[str, ...], str], ...] = (
    (nn.MultiheadAttention, ("out_proj",), "reads its weight and never calls it"),
    (nn.TransformerEncoderLayer, ("linear1", "linear2"), "reads its weight in the fast path of evaluation"),
)
"""Modules that use the weights of their layers without calling these: (class, children, what happens)."""


def check_sites(model: nn.Module, specs: Sequence[BranchSpec]) -> None:
    """Refuse sites whose forward would not be called, or would be bypassed.

    Raises:
        CaptureError: names the site, says why and which capture can hold it.
    """
    for spec in specs:
        if spec.is_parameter:
            raise CaptureError(
                f"'{spec.site}' is a bare parameter; only a whole graph (symbolic, export) shows its use"
            )
        module = model.get_submodule(spec.site)
        if "forward" in vars(module):
            raise CaptureError(
                f"'{spec.site}': its forward was replaced on the instance (an offload hook does this), which would "
                "bypass LoRA silently; remove the hook, transform the model, and attach the hook again"
            )
        parent = model.get_submodule(spec.site.rpartition(".")[0])
        for cls, children, what in _BYPASSING:
            if isinstance(parent, cls) and spec.site.rpartition(".")[2] in children:
                raise CaptureError(
                    f"'{spec.site}': {type(parent).__name__} {what}, which would bypass LoRA silently; leave it out of "
                    "the targets, or use capture='export' with example_inputs"
                )


def uncalled_sites(model: nn.Module, sites: Iterable[str], example: Example) -> list[str]:
    """Names of the layers that are not called when the model runs on the example, in training or in evaluation.

    Calls are counted by a change of class, since hooks would switch off the very fast paths that this looks for.
    """
    modules = {name: model.get_submodule(name) for name in sites}
    classes = {name: type(module) for name, module in modules.items()}
    called: set[str] = set()
    missing: set[str] = set()
    try:
        for name, module in modules.items():
            module.__class__ = _counting(classes[name], name, called)
        for training in (True, False):
            called.clear()
            with undisturbed(model, training):
                example.run(model)
            missing |= set(modules) - called
    finally:
        for name, module in modules.items():
            module.__class__ = classes[name]
    return [name for name in modules if name in missing]


def _counting(cls: type[nn.Module], name: str, called: set[str]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        called.add(name)
        return cls.forward(self, *args, **kwargs)

    return new_class(cls.__name__, (cls,), exec_body=lambda ns: ns.update(forward=forward))


def build(model: nn.Module) -> ModulesHost:
    """Give the model its generated class. The caller then registers adapters, and undoes this on failure.

    Raises:
        CaptureError: when the model's class cannot be extended.
    """
    cls = host_class(type(model))
    try:
        model.__class__ = cls
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__} cannot be extended ({error}); use capture='export'") from error
    return cast(ModulesHost, model)
