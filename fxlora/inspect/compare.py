"""`compare`: run two graphs or models on the same inputs, and find the first place where they part.

Whole graphs are compared node by node, on the nodes that `diff` matches; other models module by module, by qualified
names. How far two right computations may differ is taken from the error that the first makes against float64.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import fx, nn

from fxlora._passes import lora_meta, print_node
from fxlora.capture.inputs import Example, undisturbed
from fxlora.errors import ConfigError
from fxlora.inspect.counterparts import Side, whole_side
from fxlora.inspect.diff import site_of_change
from fxlora.inspect.differences import ON_THE_WAY_BACK, SAFETY, Gap, Runs, size
from fxlora.inspect.matching import Matching, base_outputs, inputs_of, match
from fxlora.inspect.running import Record, run_graph, run_modules
from fxlora.model import LoraModel
from fxlora.rendering import Rendered, Section, json_data


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where two runs part.

    Attributes:
        a: the node's or module's name in the first.
        b: its name in the second.
        site: the call site, or the module, that it belongs to.
        where: the line of the model's code, if the graph knows it; else the module's class.
        error: the largest difference; infinite for other shapes, or NaN on one side.
        bound: the difference that dtype and float64 reference allow.
        position: index of the largest difference.
        values: the two values there, and the float64 reference's.
        equal_inputs: which inputs were still equal.
        other_inputs: which were not, or are others: `y → y_1`.
    """

    a: str
    b: str
    site: str
    where: str
    error: float
    bound: float
    position: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    equal_inputs: tuple[str, ...] = ()
    other_inputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What parts, how far, and from which inputs."""
        names = f"'{self.a}'" if self.a == self.b else f"'{self.a}' and '{self.b}'"
        place = f" at site '{self.site}'" if self.site and self.site not in (self.a, self.b) else ""
        lines = [f"{names}{place}: off by {self.error:.3g}, where {self.bound:.3g} is allowed"]
        if self.values:
            values = " and ".join(f"{value:.6g}" for value in self.values[:2])
            reference = f"; float64: {self.values[2]:.6g}" if len(self.values) > 2 else ""
            lines.append(f"  largest at {list(self.position)}: {values}{reference}")
        lines += [f"  {self.where}"] if self.where else []
        lines += [f"  inputs still equal: {', '.join(self.equal_inputs)}"] if self.equal_inputs else []
        lines += [f"  inputs that are others: {', '.join(self.other_inputs)}"] if self.other_inputs else []
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Comparison(Rendered):
    """What a comparison found.

    Attributes:
        by: `nodes` or `modules`.
        compared: number of nodes, or of calls of modules, that were compared.
        first: where outputs part first, in the order of the second's run; None if they do not.
        gradient: where gradients part first on the way back; None if they do not, or were not asked for.
        gradients: number of gradients that were compared.
        worst: the largest difference as a part of what is allowed.
        reference: whether float64 ran; without it the bound is from the dtype alone.
        why_not: why float64 did not run.
    """

    by: str
    compared: int
    first: Divergence | None
    gradient: Divergence | None = None
    gradients: int = 0
    worst: float = 0.0
    reference: bool = True
    why_not: str = ""

    @property
    def agrees(self) -> bool:
        """Whether nothing parts."""
        return self.first is None and self.gradient is None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON. What is infinite or NaN there is the text `"inf"` or `"nan"`; `float` reads it."""
        return json_data({"agrees": self.agrees, **asdict(self)})

    def __str__(self) -> str:
        """The verdict, then each place."""
        lines = [self.summary()]
        lines += [f"first to differ: {self.first}"] if self.first else []
        lines += [f"first gradient to differ, on the way back: {self.gradient}"] if self.gradient else []
        return "\n".join(lines)

    def summary(self) -> str:
        """The verdict in a sentence."""
        kind = "nodes" if self.by == "nodes" else "calls of modules"
        against = "with float64 as the reference" if self.reference else f"without float64 ({self.why_not})"
        counts = f"{self.compared:,} {kind}" + (f" and {self.gradients:,} gradients" if self.gradients else "")
        text = f"{counts} compared, {against}; the largest difference is {self.worst:.2g} of what is allowed"
        return f"no difference beyond rounding: {text}" if self.agrees else text

    def sections(self) -> list[Section]:
        """The verdict, then each place."""
        places = {"first to differ": self.first, "first gradient to differ, on the way back": self.gradient}
        return [
            Section(lines=(self.summary(),)),
            *(Section(name, "error", lines=tuple(str(each).splitlines())) for name, each in places.items() if each),
        ]


def compare(a: object, b: object, inputs: object, *, backward: bool = False) -> Comparison:
    """Run two graphs or models on the same inputs, and find the first node or module that differs beyond rounding.

    Both run in evaluation and in their own dtypes, and the first also in float64. All that they compute is kept, so the
    inputs should be small. A site that has branches in one of them alone is compared by its result, so that a model
    with branches can be compared with the merged one.

    Args:
        a: a graph module or model; what `b` should equal.
        b: another.
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        backward: compare gradients too, of a fixed weighting of all outputs.

    Returns:
        What was compared, and where the two part first.

    Raises:
        ConfigError: without inputs, or when a model is on the meta device.

    Example:
        >>> import copy
        >>> import torch
        >>> import fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> lora = fxlora.lora_transform(model, fxlora.LoraConfig(target_modules=["0"]))
        >>> merged = copy.deepcopy(lora).merge_and_unload()
        >>> fxlora.compare(lora, merged, torch.randn(3, 8)).agrees
        True
    """
    example = Example.of(inputs)
    if example is None:
        raise ConfigError("compare runs both: give it inputs")
    for model in (a, b):
        if isinstance(model, nn.Module) and any(p.is_meta for p in model.parameters()):
            raise ConfigError("a model on the meta device has no values to compare; diff compares structures")
    with _evaluation(a), _evaluation(b):
        sides = whole_side(a), whole_side(b)
        if sides[0] is not None and sides[1] is not None:
            return compare_graphs(sides[0], sides[1], example, backward=backward)
        if not isinstance(a, nn.Module) or not isinstance(b, nn.Module):
            raise ConfigError("a graph without its module cannot be run; pass the graph module or the model")
        return _compare_modules(a, b, example, backward=backward)


def _evaluation(model: object) -> Any:
    return undisturbed(model if isinstance(model, nn.Module) else nn.Identity(), training=False)


def compare_graphs(a: Side, b: Side, example: Example, *, backward: bool = False) -> Comparison:
    """Compare two graphs with their modules, node by node."""
    matching = match(a.graph, b.graph)
    pairs, exact = _comparable(a, b, matching)

    def run(side: Side, wide: bool) -> Record:
        return run_graph(side, example, wide=wide)

    runs = Runs.of(run, a, b, backward)
    order = {node: index for index, node in enumerate(b.graph.nodes)}
    bases = [base_outputs(side.graph) for side in (a, b)]

    def told(p: Any, q: Any, gap: Gap, bound: float) -> Divergence:
        one: Any = bases[0].get(p, p) if lora_meta(q) is None else p  # a result with branches, and one without
        other: Any = bases[1].get(q, q) if lora_meta(p) is None else q
        equal, others = _inputs(one, other, runs)
        rewired = [pair for pair in zip(inputs_of(one), inputs_of(other), strict=False) if not runs.agree(*pair)]
        site = site_of_change(p, q, rewired)
        return Divergence(p.name, q.name, site, _where(q), gap.error, bound, gap.position, gap.values, equal, others)

    points = [(p, q, order[q], p in exact) for p, q in sorted(pairs, key=lambda pair: order[pair[1]])]
    return _compared("nodes", points, runs, told, backward)


def _comparable(a: Side, b: Side, matching: Matching) -> tuple[list[tuple[fx.Node, fx.Node]], set[fx.Node]]:
    """Pairs of nodes that should have equal values, and those that should have them to the bit."""
    results = [{base: result for result, base in base_outputs(side.graph).items()} for side in (a, b)]
    sites = [{(m.site, m.call) for node in side.graph.nodes if (m := lora_meta(node))} for side in (a, b)]
    pairs: list[tuple[fx.Node, fx.Node]] = []
    parted: set[fx.Node] = set()
    weights = _of_weights(a.graph)
    for p, q in matching.forth.items():
        one, other = results[0].get(p), results[1].get(q)
        if one is not None and other is None and _site(one) not in sites[1]:
            pairs.append((one, q))
            parted.update(_behind(p, weights))
        elif other is not None and one is None and _site(other) not in sites[0]:
            pairs.append((p, other))
            parted.update(_behind(p, weights))
        else:
            pairs.append((p, q))
    pairs = [(p, q) for p, q in pairs if p not in parted]
    return pairs, {p for p, q in pairs if p.op == q.op == "get_attr"}


def _of_weights(graph: fx.Graph) -> set[fx.Node]:
    """The reads of tensors, and what is computed of these alone, such as a transpose."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = inputs_of(node)
        if node.op == "get_attr" or (inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def _behind(site: fx.Node, weights: set[fx.Node]) -> set[fx.Node]:
    """The weights that a site's own operation uses, with all that they are computed of."""
    found: set[fx.Node] = set()
    open_ends = [site]
    while open_ends:
        node = open_ends.pop()
        if node in weights:
            found.add(node)
        open_ends += [each for each in inputs_of(node) if each in weights and each not in found]
    return found


def _site(node: fx.Node) -> tuple[str, int] | None:
    meta = lora_meta(node)
    return None if meta is None else (meta.site, meta.call)


def _inputs(p: fx.Node, q: fx.Node, runs: Runs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    equal: list[str] = []
    others: list[str] = []
    for one, other in zip(inputs_of(p), inputs_of(q), strict=False):
        name = one.name if one.name == other.name else f"{one.name} → {other.name}"
        (equal if runs.agree(one, other) else others).append(name)
    return tuple(equal), tuple(others)


def _where(node: fx.Node) -> str:
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    files = [index for index, line in enumerate(lines) if line.startswith("File ")]
    if files:
        return " ".join(lines[files[-1] : files[-1] + 2])
    return print_node(node)


def _compare_modules(a: nn.Module, b: nn.Module, example: Example, *, backward: bool) -> Comparison:
    """Compare two models by the calls of modules that both have."""

    def run(model: nn.Module, wide: bool) -> Record:
        return run_modules(model, example, wide=wide)

    runs = Runs.of(run, a, b, backward)
    order = {key: index for index, key in enumerate(runs.b.values)}

    def told(p: Any, q: Any, gap: Gap, bound: float) -> Divergence:
        del q
        name, call = p
        shown = f"{name or 'the whole model'}" + (f", call {call}" if call else "")
        equal: list[str] = []
        others: list[str] = []
        inputs = runs.a.inputs[p], runs.b.inputs[p]
        for index, (one, other) in enumerate(zip(*inputs, strict=False)):
            difference = Gap.of([one], [other])
            fine = difference.error <= SAFETY * runs.unit * size([one])
            (equal if fine else others).append(f"input {index}")
        cls = type(b.get_submodule(name))
        where = f"{getattr(cls, '_site_base', cls).__module__}.{getattr(cls, '_site_base', cls).__qualname__}"
        return Divergence(
            shown, shown, name, where, gap.error, bound, gap.position, gap.values, tuple(equal), tuple(others)
        )

    base_alone = _without_branches(a) | _without_branches(b)
    keys = [key for key in order if key in runs.a.values and key[0] not in base_alone]
    return _compared("modules", [(key, key, order[key], False) for key in keys], runs, told, backward)


def _without_branches(model: nn.Module) -> set[str]:
    """The layers whose own results lack the branches, since a graph of the whole adds them."""
    if not isinstance(model, LoraModel) or model.capture == "modules":
        return set()
    return {spec.site for plan in model._lora.adapters.values() for spec in plan.branches}


def _compared(by: str, points: list[tuple[Any, Any, int, bool]], runs: Runs, told: Any, backward: bool) -> Comparison:
    first: Divergence | None = None
    worst, compared = 0.0, 0
    for p, q, _, exact in points:
        if p not in runs.a.values or q not in runs.b.values:
            continue
        compared += 1
        gap, bound = runs.gap(p, q)
        same_dtype = [t.dtype for t in runs.a.values[p]] == [t.dtype for t in runs.b.values[q]]
        bound = 0.0 if exact and same_dtype else bound
        worst = max(worst, gap.error / bound if bound else float(gap.error > 0) * float("inf") if gap.error else 0.0)
        if gap.error > bound and first is None:
            first = told(p, q, gap, bound)
    gradient, count = _first_gradient(points, runs, told) if backward else (None, 0)
    return Comparison(by, compared, first, gradient, count, worst, runs.reference is not None, runs.why_not)


def _first_gradient(points: list[tuple[Any, Any, int, bool]], runs: Runs, told: Any) -> tuple[Divergence | None, int]:
    """The first gradient to part on the way back, and how many were compared."""
    found = [record.gradients for record in (runs.a, runs.b)]
    wide = runs.reference.gradients if runs.reference is not None else {}
    count = 0
    activations = [(p, q) for p, q, _, _ in sorted(points, key=lambda point: -point[2])]
    names = [(name, name) for name in runs.b.parameters if name in runs.a.parameters and name not in runs.apart]
    for p, q in [*activations, *names]:
        compared = isinstance(p, str) or (p in runs.a.values and q in runs.b.values)
        if compared and (p in found[0]) != (q in found[1]):
            missing = f"no gradient in {'the first' if p not in found[0] else 'the second'}"
            if isinstance(p, str):
                return Divergence(p, q, p.rpartition(".")[0], missing, float("inf"), 0.0), count
            return replace(told(p, q, Gap(float("inf")), 0.0), where=missing), count
        if p not in found[0] or q not in found[1]:
            continue
        count += 1
        reference = [wide[p]] if p in wide else None
        gap = Gap.of([found[0][p]], [found[1][q]], reference)
        bound = ON_THE_WAY_BACK * runs.bound([found[0][p]], reference)
        if gap.error <= bound:
            continue
        if isinstance(p, str):
            owner = p.rpartition(".")[0]
            return Divergence(p, q, owner, "", gap.error, bound, gap.position, gap.values), count
        return told(p, q, gap, bound), count
    return None, count
