"""`export` capture: one ATen graph of a whole model by `torch.export`, right in training and evaluation.

The model is exported once in each mode and the two graphs are made one, or kept as two over the same parameters where
the modes compute different things. Weights are `get_attr` nodes under their original names. The result accepts the calling form of the example, with the dimensions that export found dynamic.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxlora._passes import NoteLayouts, copy_graph, resolve
from fxlora.capture.caches import refuse_caches, register_caches
from fxlora.capture.call_form import insert_check
from fxlora.capture.graph_module import LoraGraphModule, adopt_constants, shell_of
from fxlora.capture.inputs import Example, kept_attributes, same_outputs, training_mode
from fxlora.capture.side_effects import stateless
from fxlora.capture.unify import Mismatch, combine, unify
from fxlora.errors import CaptureError

aten = torch.ops.aten
log = logging.getLogger("fxlora")


def capture(model: nn.Module, example: Example | None, dynamic_shapes: Any = None) -> LoraGraphModule:
    """Export `model` in both modes into one graph over its own parameters, or two where the modes differ too much.

    Args:
        model: not changed.
        example: inputs to export with; needed.
        dynamic_shapes: as for `torch.export.export`; None lets every dimension vary that can.

    Returns:
        The captured model, without adapters yet.

    Raises:
        CaptureError: without example inputs, when export fails, or when a graph computes something else than the
            model.
    """
    if example is None:
        raise CaptureError("it needs example_inputs, on which torch.export runs the model")
    refuse_caches(example)
    register_caches(model)
    train, evaluation = (_export(model, example, dynamic_shapes, mode) for mode in (True, False))
    graphs, tree, reason = _combine(model, train, evaluation)
    for graph, source in zip(graphs, (train, evaluation), strict=False):
        insert_check([graph], tree, InputCheck.of(graph, example), "input_check")
        adopt_constants(tree, graph, source)
    captured = LoraGraphModule.build(tree, graphs, kept_attributes(model), reason)
    for region in captured.regions():
        NoteLayouts().run(region)
    captured._fixed_dtype = True
    if not any(p.is_meta for p in model.parameters()):
        same_outputs(model, captured, example)
    return captured


def _export(model: nn.Module, example: Example, dynamic_shapes: Any, training: bool) -> fx.GraphModule:
    if dynamic_shapes is None:
        dynamic_shapes = _all_dynamic(model, example)
    with training_mode(model, training), stateless(model), torch.enable_grad():
        try:
            program = torch.export.export(
                model, example.args, example.kwargs, dynamic_shapes=dynamic_shapes, strict=False
            )
            return program.module()
        except CaptureError:
            raise
        except Exception as error:  # export runs the user's code on fake tensors: anything can come out
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            raise CaptureError(f"torch.export refuses it: {type(error).__name__}: {lines[0]}") from error


def _all_dynamic(model: nn.Module, example: Example) -> Any:
    def dims(value: Any) -> Any:
        return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None

    names = list(inspect.signature(model.forward).parameters)
    positional = {name: pytree.tree_map(dims, value) for name, value in zip(names, example.args, strict=False)}
    return {**positional, **{name: pytree.tree_map(dims, value) for name, value in example.kwargs.items()}}


def _clean(module: fx.GraphModule) -> None:
    """Remove export's own checks, which hold dtypes as constants and cannot be pickled, and unread parameters."""
    graph = module.graph
    for node in reversed(graph.nodes):
        checks = node.target in (aten._assert_tensor_metadata.default, "_guards_fn")
        unread = node.op == "get_attr" and not node.users
        if checks or unread:
            graph.erase_node(node)
    for node in graph.nodes:
        nested = _nested(module, node)
        if nested is not None:
            _clean(nested)
            nested.recompile()


def _combine(
    model: nn.Module, train: fx.GraphModule, evaluation: fx.GraphModule
) -> tuple[list[fx.Graph], nn.Module, str]:
    """The exported graphs of both modes as one if they can be one, the module tree to run on, and why if they cannot."""
    for each in (train, evaluation):
        _clean(each)
    tree = shell_of(model, set())
    reason = _unify_nested(train, evaluation)
    graphs = [copy_graph(train.graph), copy_graph(evaluation.graph)]
    if not reason:
        graphs, reason = combine(graphs[0], graphs[1], tree)
    if reason:
        _rename_constants(graphs[1], evaluation, train, tree)
        log.info("training and evaluation stay two graphs, since %s", reason)
    return graphs, tree, reason


def _unify_nested(train: fx.GraphModule, evaluation: fx.GraphModule) -> str:
    """Check that graphs nested in training's do for evaluation too; the reason if they do not."""

    def no_flag(owner: str) -> str:
        raise Mismatch(f"a nested graph in '{owner}' depends on the mode")

    for node in train.graph.nodes:
        nested = _nested(train, node)
        if nested is None:
            continue
        other = getattr(evaluation, str(node.target), None)
        if not isinstance(other, fx.GraphModule):
            return f"training has a nested graph '{node.target}' that evaluation has not"
        try:
            unify(copy_graph(nested.graph), other.graph, no_flag)
        except Mismatch as mismatch:
            return str(mismatch)
    return ""


def _rename_constants(graph: fx.Graph, source: fx.GraphModule, other: fx.GraphModule, tree: nn.Module) -> None:
    """Give the constants and nested graphs of `graph` names of their own where `other` has something else by that name."""
    for node in graph.nodes:
        target = str(node.target)
        if node.op not in ("get_attr", "call_module") or _find(tree, target) is not None:
            continue
        value, taken = _find(source, target), _find(other, target)
        if taken is None or _same_constant(value, taken):
            continue
        name = f"evaluation_{target.replace('.', '_')}"
        while _find(other, name) is not None or _find(tree, name) is not None:
            name += "_"
        setattr(source, name, value)
        node.target = name


def _find(module: nn.Module, target: str) -> object:
    try:
        return resolve(module, target)
    except AttributeError:
        return None


def _same_constant(one: object, other: object) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.is_meta or other.is_meta:
        return one is other
    alike = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
    return alike and torch.equal(one, other)


def _nested(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    return value if isinstance(value, fx.GraphModule) else None


class InputCheck(nn.Module):
    """Refuses inputs that the exported graph was not made for; a leaf module at the start of the graph.

    Attributes:
        names: of the inputs.
        dtypes: dtype of each input, None where it is no tensor.
        shapes: sizes of each input: a number that is fixed, or a name that stands for one size everywhere.
        constants: values of the inputs that are no tensors.
    """

    def __init__(
        self,
        names: Sequence[str],
        dtypes: Sequence[torch.dtype | None],
        shapes: Sequence[tuple[int | str, ...]],
        constants: Sequence[object],
    ) -> None:
        super().__init__()
        self.names, self.dtypes, self.shapes, self.constants = names, dtypes, shapes, constants

    @classmethod
    def of(cls, graph: fx.Graph, example: Example) -> InputCheck:
        """From the placeholders of an exported graph."""
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        given = pytree.tree_leaves((example.args, example.kwargs))
        values = [node.meta.get("val") for node in inputs]
        dtypes = [value.dtype if isinstance(value, Tensor) else None for value in values]
        shapes = [tuple(map(_size, value.shape)) if isinstance(value, Tensor) else () for value in values]
        return cls(
            [node.name for node in inputs], dtypes, shapes, [None if isinstance(g, Tensor) else g for g in given]
        )

    def forward(self, *inputs: Any) -> None:
        """Compare the inputs with what the graph was made for.

        Raises:
            ValueError: names the input, what it is and what it must be.
        """
        sizes: dict[str, Any] = {}
        for name, dtype, shape, constant, value in zip(
            self.names, self.dtypes, self.shapes, self.constants, inputs, strict=True
        ):
            if dtype is None:
                if value != constant:
                    raise ValueError(f"'{name}' is {value!r}, but the model was exported with {constant!r}")
                continue
            if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(shape):
                found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"'{name}' is {found}, but the model was exported for {dtype} {shape}")
            for size, wanted in zip(value.shape, shape, strict=True):
                expected = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
                if isinstance(wanted, str) and not wanted.isidentifier():
                    continue  # a derived size, such as 2*s0: the graph itself relies on it
                if size != expected:
                    raise ValueError(
                        f"'{name}' has sizes {tuple(value.shape)}, but the model was exported for {shape}; give "
                        "example_inputs (or dynamic_shapes) in which that size can vary, at least 2 in each dimension"
                    )


def _size(size: int | torch.SymInt) -> int | str:
    """A fixed size as a number, also where export found only later that it is fixed; else its symbol."""
    return int(str(size)) if str(size).isdigit() else str(size)
