"""Stand-ins for the blocks of a Hugging Face model: its own loop runs, and stops at a block or leaves out some."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spd_lens.hosts.site import argument

# One thread at a time puts stand-ins into the list of blocks; passes of others go on through them.
surgery = threading.RLock()


class Reached(Exception):
    """Ends a pass at a block; carries the residual stream that would have entered it."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


@dataclass(frozen=True)
class _StoodFor:
    """The block behind a stand-in: held here, it is no submodule of the stand-in."""

    block: nn.Module
    thread: int


class StopsHere(nn.Module):
    """Stands for a block at which one thread's pass ends; passes of other threads go on through it."""

    _stood_for: _StoodFor

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._stood_for = _StoodFor(block, threading.get_ident())

    def __getattr__(self, name: str) -> Any:
        # The loop around the blocks may ask a block which kind of attention it has.
        return getattr(self._stood_for.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._stood_for.thread:
            return self._stood_for.block(*args, **kwargs)
        return self.stand_in(args, kwargs)

    def stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the pass gets instead of the block's output."""
        raise Reached(argument(args, kwargs, name="hidden_states", index=0))


class SkippedBlock(StopsHere):
    """Stands for a block that is left out of one thread's pass; what it returns never reaches the entered block."""

    def __init__(self, block: nn.Module, unused: Any) -> None:
        super().__init__(block)
        self._unused = unused

    def stand_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._unused


def enter_with(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, residual: Tensor, thread: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook on a block: let `residual` enter it instead."""
    if threading.get_ident() != thread:
        return None
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": residual}
    return (residual, *args[1:]), kwargs


def ends_pass(module: nn.Module, args: tuple[Any, ...], output: Any, *, thread: int) -> None:
    """Forward hook on a block: one thread's pass ends behind it."""
    if threading.get_ident() == thread:
        raise Reached(output[0] if isinstance(output, tuple) else output)
