"""What `torch.compile` compiles and what it leaves out.

A whole pass breaks at every decomposed weight, because hook points are left out of graphs. What lies between two breaks
and is only tensors can be a region of its own (`region`); regions are compiled while `compiled_regions` is open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
Backend = Literal["none", "eager", "aot_eager", "inductor"]

# Of all threads: a backward pass computes regions again in a thread of autograd's own.
_open: list[Backend] = ["none"]


def not_compiled(function: F) -> F:
    """`torch.compiler.disable`, which to type checkers loses the `self` of methods.

    PyTorch's own lazy form of it: the compiler, a second of imports, is loaded by the first call and not with us.
    """
    return torch._disable_dynamo(function)  # pyright: ignore[reportReturnType, reportPrivateImportUsage]


@contextmanager
def compiled_regions(backend: Backend) -> Iterator[None]:
    """While open, every `region` is compiled with this backend of `torch.compile` when it is first called."""
    before, _open[0] = _open[0], backend
    try:
        yield
    finally:
        _open[0] = before


def region(plain: F) -> Callable[[F], F]:
    """The function that is decorated, compiled while regions are; `plain`, of the same arguments, otherwise.

    `plain` may be written for the eager mode (blocks, a gradient by hand); what is decorated is the formula.
    """

    def of(formula: F) -> F:
        made: dict[str, Callable[..., Any]] = {}

        @wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            backend = _open[0]
            if backend == "none":
                return plain(*args, **kwargs)
            if backend not in made:
                # Without the checks of types of a test run, through which the compiler does not look.
                made[backend] = torch.compile(inspect.unwrap(formula), backend=backend)
            return made[backend](*args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return of


def compilable(function: F) -> F:
    """A `region` whose formula is what the eager mode computes, too."""
    return region(function)(function)
