"""`modules` capture: the model stays as it is, and each target layer gets a class whose forward is a rewritten graph.

All layers of one signature (class, adapters, dropout) share one template graph and one generated class, so that
Dynamo compiles equal blocks once. The base operation is the class's own forward, called from the template. Where a
module reads a weight without calling the layer, the class computes the adapted weight as a property of the parameter's
name. The model itself becomes an instance of a generated subclass of its class, which adds `LoraModel`'s methods.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from types import new_class
from typing import Any, cast

from torch import fx, nn

from fxlora._passes import (
    SELF_CALL,
    Branch,
    BranchDtype,
    BranchSpec,
    DropBranches,
    InsertBranches,
    Instance,
    Mode,
    Pipeline,
    Region,
    SavedModule,
    Stage,
    Switch,
    Verify,
    VerifyError,
    copy_graph,
    layer_of,
    lora_meta,
    original_forward,
    weight_path,
)
from fxlora.capture.blocks import block_class, block_classes, block_regions, is_block
from fxlora.capture.by_adapter import once_for_each_adapter
from fxlora.capture.codegen import generate_forward
from fxlora.capture.graph_codec import EncodedGraph, decode, encode
from fxlora.capture.inputs import Example, undisturbed
from fxlora.capture.redirected import Redirection, adapters_by_module, redirected_graph
from fxlora.errors import CaptureError
from fxlora.host.input_grads import CHECKPOINTING, caring_switch, end_care
from fxlora.host.saved_modules import plain_class
from fxlora.lowering import lowered_template
from fxlora.model import LoraModel
from fxlora.plan import Plan, by_weight
from fxlora.serving import add_switch, repeats


@dataclass(frozen=True, slots=True)
class Signature:
    """What a generated class depends on, beside the class that it extends.

    Attributes:
        branches: each at the site `""` if it is for the layer itself, at the parameter's name if it is for one.
        dtype: which side is cast where dtypes differ.
        mode: the form of the branches.
        bias: whether the layers have a bias, where that makes a difference to a branch.
        by_adapter: whether the rows of a batch are split by their adapters: see `fxlora.capture.by_adapter`.
        redirection: for a module that is trained whole: the copy that runs.
        optimized: whether the code has an operator in place of a branch, where it can; the graphs are the same.
    """

    branches: tuple[Branch, ...]
    dtype: BranchDtype
    mode: Mode = "plain"
    bias: bool = False
    by_adapter: bool = False
    redirection: Redirection | None = None
    optimized: bool = False

    def graphs(self) -> dict[str, tuple[Branch, ...]]:
        """The branches of each graph: of the forward at `""`, of each parameter at its name."""
        found: dict[str, list[Branch]] = {}
        for branch in self.branches:
            parameter = "" if branch.form == "output" else branch.site or "weight"
            found.setdefault(parameter, []).append(branch)
        return {parameter: tuple(branches) for parameter, branches in found.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a branch lives in `modules` capture: the module that gets a class, and the parameter if it is a weight's."""

    module: str
    parameter: str = ""

    @classmethod
    def of(cls, model: nn.Module, spec: BranchSpec) -> _Place:
        if spec.form == "output":
            return cls(spec.site)
        module, _, parameter = weight_path(model, spec.site).rpartition(".")
        return cls(module, parameter)


class ModulesHost(LoraModel):
    """Base of the generated classes of transformed models."""

    _base_class: type[nn.Module]

    def regions(self) -> list[Region]:
        """One template region for each graph of each class among the sites."""
        return [
            Region(current_template(cls, parameter), tuple(found.values()))
            for (cls, parameter), found in self._instances().items()
        ]

    def _forwards(self) -> list[Callable[..., Any] | None]:
        return [getattr(cls, GENERATED, {}).get(parameter) for cls, parameter in self._instances()]

    def _instances(self) -> dict[tuple[type[nn.Module], str], dict[str, Instance]]:
        """The sites' modules by name, for each class and each parameter that has a graph (`""` for the forward)."""
        instances: dict[tuple[type[nn.Module], str], dict[str, Instance]] = {}
        shown = self._branches_of(self._shown(), self._lora.mode)
        for place in dict.fromkeys(_Place.of(self, spec) for spec in (*self._specs(), *shown)):
            module = self.get_submodule(place.module)
            found = instances.setdefault((type(module), place.parameter), {})
            found[place.module] = Instance(place.module, module)
        for name in adapters_by_module(self._saved()):
            module = self.get_submodule(name)
            if "_templates" in vars(type(module)):
                instances.setdefault((type(module), ""), {})[name] = Instance(name, module)
        return instances

    def lowered_regions(self) -> list[Region]:
        """See `LoraModel.lowered_regions`."""
        return [
            Region(lowered_template(region.graph, original_forward(region.module)), region.instances)
            for region in self.regions()
        ] + [Region(copy_graph(region.graph), region.instances) for region in block_regions(self)]

    def _place(self, plan: Plan) -> Plan:
        found = placed(self, plan)
        read = {spec.site for spec in self._specs() if spec.form == "weight"}  # as seen when the model was transformed
        why = "the model reads its weight and does not call it"
        moved = [
            by_weight(spec, why) if spec.site in read and spec.form == "output" else spec for spec in found.branches
        ]
        return replace(found, branches=tuple(moved))

    def _sites_graph(self) -> fx.Graph:
        return fx.Graph()  # other uses of a weight show in the module tree only

    def verify(self) -> None:
        """See `LoraModel.verify`; also notices layers that were replaced since the transform."""
        active = self._shown()
        for spec in self._specs():
            module = self.get_submodule(_Place.of(self, spec).module)
            signature = getattr(type(module), "_signature", None)
            adapters = [branch.adapter for branch in signature.branches] if signature else []
            if spec.adapter in active and spec.adapter not in adapters:
                raise VerifyError(
                    f"'{spec.site}' is a plain {type(module).__name__} now: it was replaced after the transform, and "
                    f"adapter '{spec.adapter}' has no effect there. Change the model first, then transform it"
                )
        running = {saved.module: saved.adapter for saved in self._lora.copies}
        for name in adapters_by_module(self._saved()):
            cls = type(self.get_submodule(name))
            redirection = getattr(getattr(cls, "_signature", None), "redirection", None)
            adapter = running.get(name, "")
            if adapter != (redirection.adapter if redirection else ""):
                raise VerifyError(
                    f"'{name}' is a {cls.__name__} that does not run the copy of '{adapter}'"
                    if adapter
                    else f"'{name}' still runs a copy, though no adapter that has one is active"
                )
        super().verify()

    def _rewrite(self, active: tuple[str, ...], mode: Mode) -> None:
        key = (mode, active, self._lora.copies)
        classes = self._lora.transient.renderings.get(key)
        if classes is None:
            classes = self._classes(active, mode)
            classes = self._lora.transient.renderings[key] = self._with_blocks(classes, active, mode)
        for module, cls in classes.items():
            _give_class(module, cls)

    def _with_blocks(
        self, classes: dict[nn.Module, type[nn.Module]], active: tuple[str, ...], mode: Mode
    ) -> dict[nn.Module, type[nn.Module]]:
        """Classes, with those of modules around sites that become one operator, or are none any more."""
        former = {each: plain_class(each) for each in self.modules() if is_block(each) and each not in classes}
        if not self._lora.optimized or mode != "plain":
            return former | classes
        shown = self._branches_of(active, mode)
        return former | classes | block_classes(self, shown, classes, self._lora.branch_dtype, _reduce_block)

    def _classes(self, active: tuple[str, ...], mode: Mode) -> dict[nn.Module, type[nn.Module]]:
        """The class of every module that has an adapter, of these or of others."""
        shown = self._branches_of(active, mode)
        branches: dict[str, list[Branch]] = {_Place.of(self, spec).module: [] for spec in (*self._specs(), *shown)}
        for spec in shown:
            place = _Place.of(self, spec)
            branches[place.module].append(Branch.of(spec, spec.site[len(place.module) :].removeprefix(".")))
        split = self._split_by_adapter(self._specs()) if mode != "plain" else set[str]()
        changed = [name for name, module in self.named_modules() if "_signature" in vars(type(module))]
        branches.update({name: [] for name in (*split, *changed) if name not in branches})
        groups: dict[tuple[type[nn.Module], Signature], list[Instance]] = {}
        for name, found in branches.items():
            module = self.get_submodule(name)
            bias = any(branch.variant for branch in found) and getattr(module, "bias", None) is not None
            overlooking = Redirection.of(module, "") if name in split and isinstance(module, nn.Sequential) else None
            optimized = self._lora.optimized and mode == "plain" and bool(found)
            signature = Signature(
                tuple(found), self._lora.branch_dtype, mode, bias, name in split, overlooking, optimized
            )
            key = (plain_class(module), signature)
            groups.setdefault(key, []).append(Instance(name, module))
        stages: list[Stage] = []
        classes: dict[tuple[type[nn.Module], Signature], type[nn.Module]] = {}
        for (cls, signature), instances in groups.items():
            graphs: dict[str, fx.Graph] = {}
            for parameter, chosen in signature.graphs().items():
                region = Region(template(cls, parameter), tuple(instances))
                passes = (InsertBranches(chosen, signature.dtype, mode),)
                stages += Pipeline(passes, self._verifier(region, active, mode), self._lora.traced).run([region])
                graphs[parameter] = region.graph
            if signature.redirection is None:
                stages += self._without_branches(instances, graphs)
            needed = graphs or signature.by_adapter
            classes[cls, signature] = site_class(cls, signature, graphs) if needed else cls
        self._note(stages)
        assigned = {each.module: classes[key] for key, instances in groups.items() for each in instances}
        return self._redirected_classes(assigned) | assigned if split else assigned | self._redirected_classes(assigned)

    def _without_branches(self, instances: Sequence[Instance], kept: Container[str]) -> list[Stage]:
        """Take the branches out of the graphs that modules run now and will not have any more; for the trace."""
        running: dict[type[nn.Module], list[Instance]] = {}
        for instance in instances:
            if "_templates" in vars(type(instance.module)):
                running.setdefault(type(instance.module), []).append(instance)
        regions = [
            Region(current_template(cls, parameter), tuple(found))
            for cls, found in running.items()
            for parameter, branches in cast(Any, cls)._signature.graphs().items()
            if branches and parameter not in kept
        ]
        return Pipeline((DropBranches(),), record=self._lora.traced).run(regions)

    def _split_by_adapter(self, specs: Sequence[BranchSpec]) -> set[str]:
        """The modules that are run once for each adapter of a batch: they read an adapted weight, or have copies."""
        readers = {reader(self, spec) for spec in specs if spec.form == "weight"}
        return readers | adapters_by_module(self._saved()).keys()

    def _register_rows(self, switch: Switch) -> None:
        for name in self._split_by_adapter(self._specs()):
            add_switch(self.get_submodule(name), switch)

    def _check_rows(self, plan: Plan, *, uniform: bool) -> None:
        """None is refused: see `_split_by_adapter`."""

    def _saved(self) -> tuple[SavedModule, ...]:
        return tuple(saved for plan in self._lora.adapters.values() for saved in plan.saved)

    def _redirected_classes(self, sites: Container[nn.Module]) -> dict[nn.Module, type[nn.Module]]:
        """The class of each module that has trained copies: one that runs the active adapter's, if there is one."""
        running = {saved.module: saved.adapter for saved in self._lora.copies}
        found: dict[nn.Module, type[nn.Module]] = {}
        for name, adapters in adapters_by_module(self._saved()).items():
            module, adapter = self.get_submodule(name), running.get(name, "")
            cls, redirection = plain_class(module), Redirection.of(module, adapter)
            graph, stages = redirected_graph(module, name, adapter, adapters, self._lora.traced)
            signature = Signature((), self._lora.branch_dtype, redirection=redirection)
            self._note(stages, more=True)
            if redirection.needed(cls):
                found[module] = site_class(cls, signature, {"": graph} if adapter else {})
            elif module not in sites:  # a site of another adapter has the class of its branches
                found[module] = cls
        return found

    def _verifier(self, region: Region, active: tuple[str, ...], mode: Mode) -> Verify:
        parameters = {str(node.target) for node in region.graph.nodes if node.op == "get_attr" and not lora_meta(node)}
        is_weight = not any(node.op == "placeholder" for node in region.graph.nodes)
        here = {(instance.name, parameter) for instance in region.instances for parameter in parameters}
        if not is_weight:
            here = {(instance.name, "") for instance in region.instances}
        verifier = super()._verifier(region, active, mode)
        places = {spec.site: _Place.of(self, spec) for spec in (*verifier.specs, *(verifier.shown or ()))}
        others = {site for site, place in places.items() if (place.module, place.parameter) not in here}
        return replace(verifier, elsewhere=frozenset(others))

    def _strip(self) -> nn.Module:
        end_care(self)
        del self.__dict__["_lora"]
        self.__class__ = self._base_class  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduce(self, _new_host, (self._base_class,))


FORM = "_lora_form"
"""Attribute of a module that runs a generated class; another number for each change of class."""

GENERATED = "_lora_generated"
"""Attribute of a generated class: the functions of its graphs, by parameter as in its templates."""

_changes = itertools.count()


def _give_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change a module's class so that compiled code notices.

    Dynamo of torch 2.11 looks at a submodule's class again only where the `__dict__` of some module has changed.
    """
    if type(module) is cls:
        return
    module.__class__ = cls
    if "_site_base" in vars(cls):
        module.__dict__[FORM] = next(_changes)
    else:
        module.__dict__.pop(FORM, None)


_HOSTS: dict[type[nn.Module], type[ModulesHost]] = {}
_SITES: dict[tuple[type[nn.Module], Signature], type[nn.Module]] = {}


def _generating(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `generate`, to which `adapter_names` gives an adapter for each row of the batch, also with beams."""

    @functools.wraps(generate)
    def run(self: ModulesHost, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return generate(self, *args, **kwargs)
        with self.adapter_rows(adapter_names, copies=repeats(self, kwargs)):
            return generate(self, *args, **kwargs)

    return run


def host_class(base: type[nn.Module]) -> type[ModulesHost]:
    """The subclass of `base` and `LoraModel` that a transformed instance of `base` gets.

    It keeps the class's name, qualified name and module, by which other libraries recognise a model.
    """
    if base not in _HOSTS:
        names: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        if hasattr(base, "generate"):
            names["generate"] = _generating(cast(Any, base).generate)
        if hasattr(base, CHECKPOINTING):
            names[CHECKPOINTING] = caring_switch(getattr(base, CHECKPOINTING))
        cls = new_class(base.__name__, (ModulesHost, base), exec_body=lambda ns: ns.update(names, _base_class=base))
        _HOSTS[base] = cast("type[ModulesHost]", cls)
    return _HOSTS[base]


def site_class(base: type[nn.Module], signature: Signature, graphs: dict[str, fx.Graph]) -> type[nn.Module]:
    """The subclass of `base` that runs rewritten template graphs; one for each signature.

    Args:
        base: the layer's own class.
        signature: what the graphs were made for.
        graphs: of the forward at `""`, and of adapted weights at the names of their parameters.
    """
    key = (base, signature)
    if key in _SITES:
        return _SITES[key]
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        SELF_CALL: base.forward,
        "_site_base": base,
        "_signature": signature,
        "_templates": {parameter: encode(graph) for parameter, graph in graphs.items()},
        "__reduce_ex__": _reduce_site,
    }
    weights = [parameter for parameter in graphs if parameter]
    run = dict(graphs)
    if signature.optimized and "" in graphs:
        run[""] = lowered_template(graphs[""], base.forward)
    generated = {name: generate_forward(_with_input(graph) if name else graph) for name, graph in run.items()}
    members[GENERATED] = generated
    if "" in graphs:
        members["forward"] = generated[""]
    elif weights:
        members["forward"] = _computing_weights_once(base.forward)
    if signature.by_adapter:
        members["forward"] = once_for_each_adapter(members.get("forward", base.forward))
    if signature.redirection is not None:
        members.update(signature.redirection.members(base))
        if "" in graphs:
            members["forward"] = functools.wraps(base.forward)(members["forward"])
    members.update({parameter: adapted_weight(parameter, generated[parameter]) for parameter in weights})
    if issubclass(base, nn.RNNBase) and weights:
        members["_flat_weights"] = _flat_weights()
    name = base.__name__ if issubclass(base, LoraModel) else f"Lora{base.__name__}"
    if issubclass(base, LoraModel):
        members["__qualname__"] = base.__qualname__
    _SITES[key] = new_class(name, (base,), exec_body=lambda ns: ns.update(members))
    return _SITES[key]


WEIGHTS = "_lora_weights"
"""Attribute in which a module keeps the adapted weights while its forward runs."""


def adapted_weight(parameter: str, compute: Callable[..., Any]) -> property:
    """A property that computes an adapted weight by a graph's function; within one forward of its module only once.

    Reading the attribute gives the adapted weight to whatever code uses it; the parameter itself stays registered.
    """

    def read(self: nn.Module) -> Any:
        cache = self.__dict__.get(WEIGHTS)
        if cache is None:
            return compute(self, self._parameters[parameter])
        if parameter not in cache:
            cache[parameter] = compute(self, self._parameters[parameter])
        return cache[parameter]

    return property(read)


def _with_input(graph: fx.Graph) -> fx.Graph:
    """The graph of a weight with the registered parameter as its input, since the attribute is the result's name."""
    copied = copy_graph(graph)
    for node in copied.nodes:
        if node.op == "get_attr" and lora_meta(node) is None:
            with copied.inserting_before(next(iter(copied.nodes))):
                node.replace_all_uses_with(copied.placeholder("base_weight"))
            copied.erase_node(node)
            break
    return copied


def _computing_weights_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outer = self.__dict__.get(WEIGHTS)
        self.__dict__[WEIGHTS] = {}
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.__dict__[WEIGHTS] = outer

    return run


def _flat_weights() -> property:
    """A recurrent layer's list of weights, which it keeps in an attribute: read from the parameters' names instead."""

    def read(self: nn.RNNBase) -> list[Any]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def ignore(self: nn.RNNBase, value: object) -> None:
        del self, value  # torch renews its list after conversions

    return property(read, ignore)


def template(cls: type[nn.Module], parameter: str = "") -> fx.Graph:
    """The graph `y = self.base_forward(x, …)` with the parameters of `cls.forward` as inputs, or that of a parameter.

    Raises:
        CaptureError: when the forward takes `*args` or `**kwargs`, or nothing.
    """
    graph = fx.Graph()
    if parameter:
        graph.output(graph.get_attr(parameter))
        return graph
    arguments: list[fx.Node] = []
    keywords: dict[str, Any] = {}
    for each in list(inspect.signature(cls.forward).parameters.values())[1:]:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            raise CaptureError(f"{cls.__name__}.forward takes *{each.name}; `modules` capture needs named inputs")
        default = inspect.Signature.empty if each.default is each.empty else each.default
        node = graph.placeholder(each.name, default_value=default)
        if each.kind is each.KEYWORD_ONLY:
            keywords[each.name] = node
        else:
            arguments.append(node)
    if not arguments:
        raise CaptureError(f"{cls.__name__}.forward takes no input")
    y = graph.call_module(SELF_CALL, tuple(arguments), keywords)
    graph.output(y)
    return graph


def current_template(cls: type[nn.Module], parameter: str = "") -> fx.Graph:
    """The graph that instances of a class run now, whether it is a generated class or an original one."""
    encoded = getattr(cls, "_templates", {}).get(parameter)
    return template(cls, parameter) if encoded is None else decode(encoded)


def _reduce(module: nn.Module, make: Callable[..., nn.Module], args: tuple[object, ...]) -> tuple[Any, ...]:
    """How to pickle an instance of a generated class: by the class it extends."""
    reduced = cast("tuple[Any, ...]", object.__reduce_ex__(module, 2))
    if reduced[0] is not copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        raise TypeError(f"{type(module).__name__} has a pickling of its own, which fxlora cannot extend")
    return (make, args, *reduced[2:])


def _reduce_site(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    cls = cast(Any, type(self))
    host = issubclass(cls, ModulesHost)
    base = cls._base_class if host else cls._site_base
    return _reduce(self, _new_site, (base, host, cls._signature, cls._templates))


def _reduce_block(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    cls = cast(Any, type(self))
    parts = [(name, getattr(part, "_site_base", part), *_encoded(part)) for name, part in cls._parts]
    return _reduce(self, _new_block, (cls._site_base, parts, encode(cls._block)))


def _encoded(cls: Any) -> tuple[Signature, dict[str, EncodedGraph]] | tuple[()]:
    return (cls._signature, cls._templates) if "_signature" in vars(cls) else ()


def _new_block(base: type[nn.Module], parts: list[tuple[Any, ...]], encoded: EncodedGraph) -> nn.Module:
    own = tuple((name, _site_class(cls, *rest) if rest else cls) for name, cls, *rest in parts)
    cls = block_class(base, own, decode(encoded), _reduce_block)
    return cls.__new__(cls)


def _new_host(base: type[nn.Module]) -> nn.Module:
    cls = host_class(base)
    return cls.__new__(cls)


def _new_site(base: type[nn.Module], host: bool, signature: Signature, encoded: dict[str, EncodedGraph]) -> nn.Module:
    cls = _site_class(host_class(base) if host else base, signature, encoded)
    return cls.__new__(cls)


def _site_class(base: type[nn.Module], signature: Signature, encoded: dict[str, EncodedGraph]) -> type[nn.Module]:
    cls = _SITES.get((base, signature))
    if cls is None:
        cls = site_class(base, signature, {parameter: decode(graph) for parameter, graph in encoded.items()})
    return cls


# ---- soundness ----

_READ_BY_PARENT: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("torch.nn.MultiheadAttention", ("out_proj",), "the attention reads its weight and never calls it"),
    (
        "torch.nn.TransformerEncoderLayer",
        ("linear1", "linear2"),
        "the encoder layer reads its weight in the fast path of evaluation",
    ),
    *(
        (f"transformers.{name}", ("out_proj", "conv1d"), "fused kernels of the mixer read its weight")
        for name in ("MambaMixer", "Mamba2Mixer", "FalconMambaMixer", "FalconH1Mixer", "JambaMambaMixer", "BambaMixer",
                     "Zamba2MambaMixer", "ZambaMambaMixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer")
    ),
)  # fmt: skip
"""Modules that use the weights of their children without calling these: (class, children, what happens)."""


def reader(model: nn.Module, spec: BranchSpec) -> str:
    """The module whose code reads a weight that is adapted: the layer, or where that is never called the one around it."""
    layer = layer_of(model.get_submodule(spec.site)) if not spec.is_parameter else None
    if layer is not None and layer.form == "output":
        return spec.site.rpartition(".")[0]
    return _Place.of(model, spec).module


def placed(model: nn.Module, found: Plan) -> Plan:
    """The plan with the branches of layers that are read and not called moved into the weights.

    Raises:
        CaptureError: when a site's forward was replaced; names it and says what to do.
    """
    for saved in found.saved:
        _check_own_forward(model, saved.module)
    return replace(found, branches=tuple(_placed(model, spec) for spec in found.branches))


def _placed(model: nn.Module, spec: BranchSpec) -> BranchSpec:
    if spec.calls:
        raise CaptureError(
            f"call_sites chooses calls of '{spec.site}', which only a whole graph can tell apart; use capture='symbolic', or "
            "'export' with example_inputs"
        )
    if spec.is_parameter or spec.form == "weight":
        return by_weight(spec, "its weight is adapted where it is read")
    _check_own_forward(model, spec.site)
    owner, _, leaf = spec.site.rpartition(".")
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(model.get_submodule(owner)).__mro__}
    names |= {name.replace("torch.", "torch.nn.") for name in names}
    for cls, children, why in _READ_BY_PARENT:
        if cls in names and leaf in children:
            return by_weight(spec, why)
    return spec


def _check_own_forward(model: nn.Module, site: str) -> None:
    if "forward" in vars(model.get_submodule(site)):
        raise CaptureError(
            f"'{site}': its forward was replaced on the instance (an offload hook does this), which would "
            "bypass LoRA silently; remove the hook, transform the model, and attach the hook again"
        )


def checked_on(model: nn.Module, found: Plan, example: Example) -> Plan:
    """The plan with the branches of layers that the example does not call, but whose weight it reads, in the weights.

    Raises:
        CaptureError: for a site that is neither called nor read, in training or in evaluation.
        ConfigError: for a branch that cannot be in the weight.
    """
    uses = [_uses(model, found, example, training) for training in (True, False)]
    families: dict[str, list[str]] = {}
    for spec in found.branches:
        families.setdefault(spec.tied_to or spec.site, []).append(spec.site)
    used = {site for site in families if all(any(each in use for each in families[site]) for use in uses)}
    unused = [spec.site for spec in found.branches if (spec.tied_to or spec.site) not in used]
    if unused:
        raise CaptureError(
            f"'{unused[0]}' is a target, but the model neither calls it nor reads its weight on the example inputs"
            f"{f' ({len(unused)} such layers)' if len(unused) > 1 else ''}. Leave it out of the targets, or give example "
            "inputs that use it"
        )
    read = {spec.site for spec in found.branches if any(use.get(spec.site) == "read" for use in uses)}
    why = "the model reads its weight and does not call it"
    branches = [
        by_weight(spec, why) if spec.form == "output" and spec.site in read else spec for spec in found.branches
    ]
    return replace(found, branches=tuple(branches))


def _uses(model: nn.Module, found: Plan, example: Example, training: bool) -> dict[str, str]:
    """How the model uses each site on the example in one mode: `called`, `read` (its weight), or not at all.

    Uses are counted by a change of class, since hooks would switch off the very fast paths that this looks for.
    """
    uses: dict[str, str] = {}
    watched: dict[nn.Module, dict[str, str]] = {}
    for spec in found.branches:
        module, _, parameter = weight_path(model, spec.site).rpartition(".")
        watched.setdefault(model.get_submodule(module), {})[parameter] = spec.site
    classes = {module: type(module) for module in watched}
    try:
        for module, parameters in watched.items():
            module.__class__ = _watching(classes[module], parameters, uses)
        with undisturbed(model, training):
            example.run(model)
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
    return uses


def _watching(cls: type[nn.Module], parameters: dict[str, str], uses: dict[str, str]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        result = cls.forward(self, *args, **kwargs)
        if "weight" in parameters:
            uses[parameters["weight"]] = "called"
        return result

    def reading(parameter: str) -> property:
        def read(self: nn.Module) -> object:
            uses.setdefault(parameters[parameter], "read")
            return self._parameters[parameter]

        return property(read)

    members: dict[str, Any] = {"forward": forward, **{parameter: reading(parameter) for parameter in parameters}}
    if issubclass(cls, nn.RNNBase):
        members["_flat_weights"] = _flat_weights()
    return new_class(cls.__name__, (cls,), exec_body=lambda ns: ns.update(members))


def _check_names(model: nn.Module) -> None:
    """Refuse a model that has something of its own under a name that the added methods use.

    Public methods stand in front of the class's own ones: see docs/names.md.
    """
    added = {name for cls in ModulesHost.__mro__ for name in vars(cls) if cls not in nn.Module.__mro__}
    added = {name for name in added - set(dir(nn.Module)) if not name.startswith("__")}
    own = {*vars(model), *model._modules, *model._parameters, *model._buffers}
    own |= {name for name in dir(type(model)) if name.startswith("_")}
    clashes = sorted(added & own)
    if clashes:
        raise CaptureError(
            f"{type(model).__name__} has '{clashes[0]}' of its own, a name that fxlora's methods on the model use; rename it, or "
            "use capture='symbolic' or 'export', which leave the class alone"
        )


def build(model: nn.Module) -> ModulesHost:
    """Give the model its generated class. The caller then registers adapters, and undoes this on failure.

    Raises:
        CaptureError: when the model's class cannot be extended.
    """
    _check_names(model)
    cls = host_class(type(model))
    try:
        model.__class__ = cls
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__} cannot be extended ({error}); use capture='export'") from error
    return cast(ModulesHost, model)
