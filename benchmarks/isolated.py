"""An object in a process of its own, so that one variant of a benchmark can neither slow down, patch nor end another.

Compilers keep caches and peers replace parts of transformers: variants that are measured alternately must not share them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

log = logging.getLogger(__name__)

# Set before torch reads them. Each process compiles with few helpers, and torch's profiler says less of itself.
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "8", "KINETO_LOG_LEVEL": "9", "TRANSFORMERS_VERBOSITY": "error"}


class VariantFailed(Exception):
    """Why a variant has no figure: a sentence for its row."""


class Isolated:
    """What `factory(*args)` makes in a new process; its methods are called from here.

    The process starts at once, and makes the object at the first call: objects may be large.
    """

    def __init__(self, factory: Callable[..., Any], *args: Any) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("spawn")  # a fork could not use a GPU that its parent has used
        self._connection, theirs = context.Pipe()
        # Not a daemon: the compiler starts processes too.
        self._process = context.Process(target=_serve, args=(theirs, factory, args))
        self._process.start()
        theirs.close()

    def call(self, method: str, *args: Any, timeout: float = 900.0) -> Any:
        """The result of a method.

        Args:
            method: its name.
            args: its arguments.
            timeout: seconds after which the process is ended.

        Raises:
            VariantFailed: the object could not be made, the method raised, or the process is gone.
        """
        try:
            self._connection.send((method, args))
            if not self._connection.poll(timeout):
                self.close()
                raise VariantFailed(f"{method} took more than {timeout:g} s")
            succeeded, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise VariantFailed(f"its process ended with code {self._process.exitcode}") from error
        if not succeeded:
            raise VariantFailed(value)
        return value

    def release(self) -> None:
        """Let the process end by itself, without waiting for it."""
        self._connection.close()

    def close(self) -> None:
        """End the process, and give its memory back."""
        self.release()
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # what models, peers and compilers say of their own
    logging.disable(logging.WARNING)
    instance = None
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, OSError):
            return
        if instance is None:
            made, instance = _outcome(factory, args)
        connection.send(_outcome(getattr(instance, method), arguments) if made else (made, instance))


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether a call succeeded, and its result or a sentence; where it was is logged if it was unexpected."""
    try:
        return True, function(*args)
    except torch.OutOfMemoryError:
        return False, "out of memory"
    except (ModuleNotFoundError, NotImplementedError, ValueError) as error:  # what a variant refuses
        return False, _first_line(error)
    except Exception as error:
        log.exception("a variant failed")
        return False, f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line.strip()[:250] for line in str(error).splitlines() if line.strip()), type(error).__name__)
