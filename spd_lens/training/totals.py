"""Sums over all rows of a batch in parts, for terms that are no mean over positions (the frequency term, L3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Totals:
    """Stands where the sum over processes stands (`StepView.sum_over_processes`), for the sum over parts as well.

    The parts' sums are collected first (`collect`, then `close`); then every part's own sum becomes that of all rows,
    with a gradient for its own rows. A term has to ask for its sums in the same order every time.
    """

    def __init__(self, over_processes: Callable[[Tensor], Tensor] | None, n_processes: int) -> None:
        self._over_processes, self._n_processes = over_processes, n_processes
        self._sums: list[Tensor] = []
        self._next = 0

    def collect(self, value: Tensor) -> Tensor:
        """Add one part's sum; returns it."""
        if self._next == len(self._sums):
            self._sums.append(value.detach().clone())
        else:
            self._sums[self._next] += value.detach()
        self._next += 1
        return value

    def start(self) -> None:
        """The next sum is the first one of a part."""
        self._next = 0

    @torch.no_grad()
    def close(self) -> None:
        """All parts have been collected."""
        if self._over_processes is not None:
            self._sums = [self._over_processes(value) for value in self._sums]

    def of_all(self, value: Tensor) -> Tensor:
        """One part's sum as that of all rows of all processes."""
        total = self._sums[self._next]
        self._next += 1
        return _Replaced.apply(value, total, self._n_processes)  # pyright: ignore[reportReturnType]


class _Replaced(torch.autograd.Function):
    """A value that is known otherwise; its gradient goes to what it is a summand of, times the number of processes.

    Gradients are averaged over processes afterwards, and each of them has the gradient of the whole.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, total: Tensor, count: int) -> Tensor:
        ctx.count = count
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.count, None, None
