"""What happens to gradients in one forward pass: every operation on a tensor that requires them, and where it is.

A `TorchFunctionMode` sees the operations, hooks see in which module they are. Together with autograd's graph this tells
for any parameter the last operation that took something computed from it and gave back something without a gradient:
there the path to the loss is cut. It works for any capture, as it knows nothing of sites.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_HERE = str(Path(__file__).parent)
_LIBRARIES = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[2]),
    str(Path(__file__).parents[3] / "passes"),
)
_CHECKPOINT, _FUNCTION = torch.utils.checkpoint.__file__, torch.autograd.function.__file__

_NO_VALUES = {
    *("size", "dim", "numel", "stride", "element_size", "__len__", "__hash__", "__format__", "__repr__"),
    *("ones_like", "zeros_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("result_type", "promote_types", "can_cast", "requires_grad_", "register_hook", "retain_grad"),
}
"""Operations that read no values of their tensors, or have no result."""
_OF_THE_FIRST = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Operations that read the values of their first tensor only."""
_TO_PYTHON = {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__"}


@dataclass(frozen=True, slots=True)
class Cut:
    """An operation whose result has no gradient, though something that it reads has one.

    Attributes:
        operation: its name, such as `detach`.
        module: name of the module whose forward it is in; where gradients are off, of the one that switches them off.
        reason: `no_grad`, `inference_mode`, `checkpoint`, `detached`, `not differentiable` or `opaque`.
        line: file and line of the code, if it is not torch's own or generated.
    """

    operation: str
    module: str
    reason: str
    line: str


class Trace(TorchFunctionMode):
    """The record of one forward pass.

    Args:
        model: that runs.
        watched: weights of which it is noted who reads them.

    Attributes:
        saved_bytes: what operations saved for the backward pass, parameters and buffers left out.
        read_elsewhere: by id of a watched weight, the first operation and module that read it in a forward that is not of a
            module with this weight.
    """

    def __init__(self, model: nn.Module, watched: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._model = model
        self._watched = {id(each) for each in watched}
        self._stack: list[tuple[str, bool]] = [("", True)]
        self._outputs: list[Any] = []
        self._kept: dict[int, Any] = {}
        self._readers: dict[int, list[int]] = {}
        self._cuts: list[Cut | None] = []
        self._consumers: dict[int, list[int]] | None = None
        self._last: dict[int, int] = {}
        self._own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, int] = {}
        self.read_elsewhere: dict[int, tuple[str, str]] = {}

    @property
    def saved_bytes(self) -> int:
        """See the class."""
        return sum(self._storages.values())

    @contextmanager
    def recording(self) -> Generator[None]:
        """Record what runs within."""
        handles: list[Any] = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave, always_call=True, with_kwargs=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note it."""
        kwargs = kwargs or {}
        name = _name_of(func)
        operands = pytree.tree_leaves((args[:1], {}) if name in _OF_THE_FIRST else (args, kwargs))
        before, reads_values = _gradients(operands), name not in _NO_VALUES and not name.startswith(("is_", "new_"))
        if reads_values:
            self._note_readers(name, operands)
        out = func(*args, **kwargs)
        if before and reads_values:
            tensors = _tensors(args[0] if name == "__setitem__" else out)
            if tensors or name in _TO_PYTHON:
                self._note(before, tensors, lambda: self._cut(name, tensors))
        return out

    def reads(self, parameters: Iterable[Tensor]) -> bool:
        """Whether some operation read one of these parameters."""
        return any(id(parameter) in self._readers for parameter in parameters)

    def cut_after(self, parameters: Iterable[Tensor]) -> Cut | None:
        """The last operation that cut the way from one of these parameters; None if nothing did."""
        found = max((self._last_cut(id(parameter)) for parameter in parameters), default=-1)
        return None if found < 0 else self._cuts[self._index(found)]

    def _note_readers(self, operation: str, operands: Iterable[object]) -> None:
        for each in operands:
            if id(each) in self._watched and len(self._stack) > 1:  # the loss may read what it likes
                running = (self._model.get_submodule(name)._parameters.values() for name, _ in self._stack)
                if not any(parameter is each for own in running for parameter in own):
                    self.read_elsewhere.setdefault(id(each), (operation, self._stack[-1][0]))

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            del module, args
            self._stack.append((name, torch.is_grad_enabled()))

        return hook

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        del module
        if len(self._stack) > 1:
            name, _ = self._stack.pop()
            before, tensors = _gradients(pytree.tree_leaves((args, kwargs))), _tensors(out)
            if (
                before and tensors and not _gradients(tensors)
            ):  # what torch's functions do not show, such as an extension
                self._note(before, tensors, lambda: Cut("forward", name, "opaque", ""))

    def _saved(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _note(self, before: list[Any], tensors: list[Tensor], cut: Callable[[], Cut]) -> None:
        after, index = _gradients(tensors), len(self._cuts)
        self._cuts.append(None if after else cut())
        self._outputs += after
        for each in before:
            self._kept[id(each)] = each
            self._readers.setdefault(id(each), []).append(index)

    def _cut(self, name: str, tensors: list[Tensor]) -> Cut:
        frames = _Frames.of(sys._getframe(4))
        inside = self._stack[-1][0]
        if frames.function and not frames.checkpointed:
            return Cut(frames.function, inside, "opaque", frames.line)
        if not torch.is_grad_enabled():
            if frames.checkpointed:
                return Cut(name, inside, "checkpoint", frames.line)
            module = next(each for each, enabled in reversed(self._stack) if enabled)
            reason = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
            return Cut(f"torch.{reason}()", module, reason, _line_in(self._model.get_submodule(module)) or frames.line)
        differentiable = any(each.is_floating_point() or each.is_complex() for each in tensors)
        return Cut(name, inside, "detached" if differentiable else "not differentiable", frames.line)

    def _index(self, key: int) -> int:
        return key % len(self._cuts)

    def _key(self, index: int) -> int:
        """A number that is larger for later cuts.

        Those with integers as results, such as masks, come before all others, and what cannot be looked into before these.
        """
        cut = self._cuts[index]
        if cut is None:
            return -1
        rank = 0 if cut.operation == "forward" else {"opaque": 1, "not differentiable": 2}.get(cut.reason, 3)
        return index + rank * len(self._cuts)

    def _last_cut(self, start: int) -> int:
        """The key of the last cut of anything that is computed from a node or leaf."""
        consumers = self._consumers if self._consumers is not None else self._graph()
        stack = [start]
        while stack:
            node = stack[-1]
            waiting = [each for each in consumers.get(node, ()) if each not in self._last]
            if node in self._last or not waiting:
                own = [self._key(index) for index in self._readers.get(node, ())]
                self._last[node] = max([*own, *(self._last[each] for each in consumers.get(node, ()))], default=-1)
                stack.pop()
            else:
                stack += waiting
        return self._last[start]

    def _graph(self) -> dict[int, list[int]]:
        """By node of autograd's graph, or leaf, the nodes that are computed from it."""
        consumers: dict[int, list[int]] = {}
        seen: set[int] = set()
        todo = [each for each in self._outputs if not isinstance(each, Tensor)]
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            self._kept[id(node)] = node
            for below, _ in node.next_functions:
                if below is not None:
                    leaf = getattr(below, "variable", None)
                    consumers.setdefault(id(below if leaf is None else leaf), []).append(id(node))
                    todo += [below] if leaf is None else []
        self._consumers = consumers
        return consumers


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(values) if isinstance(each, Tensor)]


def _gradients(values: Iterable[object]) -> list[Any]:
    """For each tensor that requires a gradient its node in autograd's graph, or itself if it is a leaf."""
    return [
        value if value.grad_fn is None else value.grad_fn
        for value in values
        if isinstance(value, Tensor) and value.requires_grad
    ]


def _name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if attribute in ("data", "T", "mT", "H", "mH", "real", "imag") else "size"
    return name


@dataclass(frozen=True, slots=True)
class _Frames:
    """What the Python stack tells of an operation.

    Attributes:
        checkpointed: whether reentrant checkpointing runs it.
        function: name of the `torch.autograd.Function` that it is a part of, if it is.
        line: file and line of the innermost code that is not a library's.
    """

    checkpointed: bool
    function: str
    line: str

    @classmethod
    def of(cls, frame: FrameType | None) -> _Frames:
        """Of the frame that called the operation, up to the start of the recording."""
        checkpointed, function, line = False, "", ""
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(_HERE) and code.co_name == "recording_run":
                break
            checkpointed |= code.co_filename == _CHECKPOINT and code.co_name == "forward"
            if code.co_filename == _FUNCTION and code.co_name == "apply" and not function:
                function = getattr(frame.f_locals.get("cls"), "__name__", "")
            if not line and not code.co_filename.startswith((*_LIBRARIES, "<")):
                line = f"{Path(code.co_filename).name}:{frame.f_lineno}"
            frame = frame.f_back
        return cls(checkpointed, function, line)


def _line_in(module: nn.Module) -> str:
    """File and line at which a module's own code stands now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if frame.f_locals.get("self") is module and not code.co_filename.startswith((*_LIBRARIES, "<")):
            return f"{Path(code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
