"""`extract_subgraph`: a piece of a graph as a module that runs by itself, for a bug report."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxlora._passes import Instance, Region, did_you_mean, find_sites, lora_meta
from fxlora.capture.inputs import Example, undisturbed
from fxlora.errors import GraphError
from fxlora.inspect.shapes import bind


class Piece(fx.GraphModule):
    """A piece of another graph module, over its parameters.

    Attributes:
        example_inputs: with what the piece is called inside the whole, if `extract_subgraph` was given inputs.
    """

    example_inputs: tuple[Any, ...] | None = None


def extract_subgraph(
    gm: nn.Module,
    between: tuple[str, str],
    *,
    example_inputs: object = None,
    open_inputs: bool = False,
) -> Piece:
    """Cut a piece out of a graph module: from what one node reads to what another one returns.

    The piece takes what `first` reads and returns what `last` returns. What depends on none of the model's inputs
    (weights, scales) comes along; parameters are shared with the whole. It computes the same numbers.

    Args:
        gm: a `torch.fx.GraphModule`, such as a `LoraModel` of `symbolic` or `export` capture; not changed.
        between: (first, last): names of nodes, or qualified names of layers, whose calls are meant.
        example_inputs: of the whole, as for `lora_transform`. It is run once on them in evaluation mode, and the piece
            has what goes into it there as `example_inputs`, so that the two can be sent together.
        open_inputs: make an input of whatever else the piece reads, where the cut is not closed.

    Raises:
        GraphError: when a name is unknown, when `first` does not lead to `last`, and when the cut is not closed: the
            piece reads something that comes from the model's inputs past `first`.
    """
    if not isinstance(gm, fx.GraphModule):
        raise GraphError(
            f"a {type(gm).__name__} has no graph of the whole model to cut from; capture one with "
            "lora_transform(..., capture='export', example_inputs=...), or with torch.fx.symbolic_trace"
        )
    first, last = (_node(gm, name) for name in between)
    live = _reached([node for node in gm.graph.nodes if node.op == "placeholder"])
    after = _reached([first])
    if last not in after:
        raise GraphError(f"'{first.name}' does not lead to '{last.name}', so that nothing lies between them")
    entries = [first] if first.op == "placeholder" else [each for each in first.all_input_nodes if each in live]
    members, loose = _members(last, set(entries))
    inside = {node for node in members if node in after}
    readers = {value: node for node in inside for value in node.all_input_nodes if value not in inside}
    odd = [node for node in gm.graph.nodes if node in readers and node in loose and node not in entries]
    if odd and not open_inputs:
        value = next((node for node in odd if isinstance(node.meta.get("val"), Tensor)), odd[0])
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise GraphError(
            f"the cut is not closed: '{readers[value].name}' also reads '{value.name}'{more}, which comes from the model's "
            f"inputs past '{first.name}'. Begin at a node before both, such as '{value.name}', or give open_inputs=True, "
            "which makes an input of it"
        )
    if odd:
        members, _ = _members(last, {*entries, *odd})
        entries = [*entries, *odd]
    piece = _build(gm, [node for node in gm.graph.nodes if node in members], entries, last)
    example = Example.of(example_inputs)
    if example is not None:
        piece.example_inputs = _values(gm, example, entries)
    return piece


def _node(gm: fx.GraphModule, name: str) -> fx.Node:
    for node in gm.graph.nodes:
        if node.name == name:
            return node
    sites = [s for s in find_sites(Region(gm.graph, (Instance("", gm),))) if lora_meta(s.node) is None]
    found = [site.node for site in sites if site.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        calls = ", ".join(node.name for node in found)
        raise GraphError(f"'{name}' is called {len(found)} times; name one of the nodes {calls}")
    known = [*(node.name for node in gm.graph.nodes), *(site.name for site in sites)]
    raise GraphError(f"no node or layer is called '{name}'.{did_you_mean(name, known)}")


def _reached(starts: Sequence[fx.Node], within: Container[fx.Node] | None = None) -> set[fx.Node]:
    """The nodes themselves and all that depend on them, by a path inside of a set of nodes if one is given."""
    found, waiting = set(starts), list(starts)
    while waiting:
        users = [user for user in waiting.pop().users if within is None or user in within]
        new = [user for user in users if user not in found]
        found.update(new)
        waiting += new
    return found


def _members(last: fx.Node, entries: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """All that `last` depends on up to the entries, and what of it depends on the model's inputs past the entries."""
    members, waiting, inputs = {last}, [last], set[fx.Node]()
    while waiting:
        for each in waiting.pop().all_input_nodes:
            if each in entries or each in members:
                continue
            if each.op == "placeholder":
                inputs.add(each)
                continue
            members.add(each)
            waiting.append(each)
    return members, _reached(list(inputs), within=members)


def _build(gm: fx.GraphModule, members: Sequence[fx.Node], entries: Sequence[fx.Node], last: fx.Node) -> Piece:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys(entries):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in members:
        if node not in copies:
            copies[node] = graph.node_copy(node, lambda each: copies[each])
    graph.output(copies[last])
    graph.lint()
    piece = Piece(gm, graph, "Piece")
    piece.training = gm.training
    return piece


def _values(gm: fx.GraphModule, example: Example, wanted: Sequence[fx.Node]) -> tuple[Any, ...]:
    bound = bind(gm.graph, example)
    if bound is None:
        names = ", ".join(str(node.target) for node in gm.graph.nodes if node.op == "placeholder")
        raise GraphError(f"example_inputs do not fit the graph, whose inputs are {names}")
    recorder = _Recorder(gm, set(wanted))
    with undisturbed(gm, training=False):
        recorder.run(*bound.values(), enable_io_processing=False)
    return tuple(recorder.seen[node] for node in dict.fromkeys(wanted))


class _Recorder(fx.Interpreter):
    """Keeps copies of some values, before anything writes into them."""

    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self._wanted = wanted
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As in torch; the result is noted."""
        result = super().run_node(n)
        if n in self._wanted:
            self.seen[n] = pytree.tree_map(_copied, result)
        return result


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value
