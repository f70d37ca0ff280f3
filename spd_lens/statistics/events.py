"""`EventSample`: a random sample of positions, and all that fires at each, in bounded memory.

The positions with the smallest random numbers stay ("bottom k"); the numbers depend on the row and the place alone, so
samples of parts of the data merge into that of the whole. Memory: 4 bytes for each firing of at most `2 n` positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EventSample:
    """At most `n` events; event e has the numbers `ids[starts[e]:starts[e + 1]]`, which count over all sites."""

    def __init__(self, n: int, n_subcomponents: int) -> None:
        self.n, self.n_subcomponents = n, n_subcomponents
        self.keys = torch.zeros(0, dtype=torch.float64)
        self.starts = torch.zeros(1, dtype=torch.int64)
        self.ids = torch.zeros(0, dtype=torch.int32)

    def largest(self) -> float:
        """Keys above this cannot enter."""
        if self.n == 0:
            return -float("inf")
        return float("inf") if len(self.keys) < self.n else float(self.keys.topk(self.n, largest=False).values.max())

    def add(self, keys: Tensor, lengths: Tensor, ids: Tensor) -> None:
        """Events with their keys, how many fire in each, and which, one event after the other."""
        self.keys = torch.cat([self.keys, keys])
        self.starts = torch.cat([self.starts, self.starts[-1] + lengths.cumsum(0)])
        self.ids = torch.cat([self.ids, ids.int()])
        if len(self.keys) > 2 * self.n:
            self.settle()

    def settle(self) -> None:
        """Drop what is over `n`, and order the rest by key."""
        order = self.keys.argsort()[: self.n]
        lengths = self.starts.diff()[order]
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        inside = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths)
        self.ids = self.ids[self.starts[order].repeat_interleave(lengths) + inside]
        self.keys, self.starts = self.keys[order], starts

    def merge(self, other: EventSample) -> None:
        """The sample of all that both have seen."""
        self.add(other.keys, other.starts.diff(), other.ids)
        self.settle()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it holds."""
        self.settle()
        return {"keys": self.keys, "starts": self.starts, "ids": self.ids}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave. Raises ValueError for what is no such sample."""
        keys, starts, ids = (saved[name] for name in ("keys", "starts", "ids"))
        fits = (
            (keys.dtype, starts.dtype, ids.dtype) == (torch.float64, torch.int64, torch.int32)
            and keys.ndim == starts.ndim == ids.ndim == 1
            and len(starts) == len(keys) + 1
            and len(keys) <= self.n
            and int(starts[0]) == 0
            and int(starts[-1]) == len(ids)
            and bool((starts.diff() >= 0).all())
        )
        if not fits or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.n_subcomponents):
            raise ValueError("the sample of events is not one of these sites and settings")
        self.keys, self.starts, self.ids = keys, starts, ids
