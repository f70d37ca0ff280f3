"""Random numbers for the rows of a batch, the same however many processes share the batch.

Process `r` of `n` holds rows `r, r + n, ...` of every batch. With a `RowsGenerator` it draws for the whole batch
and keeps its own rows, so that masks, routing and adversaries are those that one process draws, and generators stand at
the same place in every process. Cost: every process draws the numbers of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowsGenerator(torch.Generator):
    """A generator that knows which rows of the batch are this process's: every `count`-th, from `rank` on.

    `rows`: how many the batch has, where that is no multiple of `count`.
    """

    rank: int = 0
    count: int = 1
    rows: int | None = None

    @classmethod
    def of(cls, device: torch.device | str, seed: int, *, rank: int, count: int) -> RowsGenerator:
        """A seeded generator on `device`; with `count` 1 it draws what a plain one draws."""
        generator = cls(device)
        generator.rank, generator.count = rank, count
        generator.manual_seed(seed)
        return generator


def uniform(
    shape: tuple[int, ...] | torch.Size,
    generator: torch.Generator,
    *,
    rows: int | None = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`U(0, 1)` on the generator's device; axis `rows` is that of the batch's rows (None: shared by all rows)."""
    whole = _whole(shape, generator, rows)
    return _own(torch.rand(whole, generator=generator, device=generator.device, dtype=dtype), generator, rows)


def integers(low: int, high: int, shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    """Whole numbers `low <= k < high`; the first axis is that of the batch's rows."""
    whole = _whole(shape, generator, 0)
    return _own(torch.randint(low, high, whole, generator=generator, device=generator.device), generator, 0)


def _count(generator: Any, rows: int | None) -> int:
    return generator.count if rows is not None and isinstance(generator, RowsGenerator) else 1


def _whole(shape: tuple[int, ...] | torch.Size, generator: torch.Generator, rows: int | None) -> tuple[int, ...]:
    count = _count(generator, rows)
    whole = getattr(generator, "rows", None)
    return tuple(
        (size * count if whole is None else whole) if axis == rows and count > 1 else size
        for axis, size in enumerate(shape)
    )


def _own(drawn: Tensor, generator: Any, rows: int | None) -> Tensor:
    count = _count(generator, rows)
    if count == 1 or rows is None:
        return drawn
    return drawn[(slice(None),) * rows + (slice(generator.rank, None, count),)].contiguous()
