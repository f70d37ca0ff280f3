"""Leaving functions out of graphs that `torch.compile` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """`torch.compiler.disable`, which to type checkers loses the `self` of methods.

    PyTorch's own lazy form of it: the compiler, a second of imports, is loaded by the first call and not with us.
    """
    return torch._disable_dynamo(function)  # pyright: ignore[reportReturnType, reportPrivateImportUsage]
