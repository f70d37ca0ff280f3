"""The two groups whose merge is best, exactly, without looking at every pair at every merge.

Two groups that are active together: every group has a *lower bound* on what merging it with its best partner changes.
Bounds only rise while `log2(k - 1)` falls, and where a merge makes a better pair the bound is lowered. The group with
the smallest bound is looked at again: is its value then still the smallest of all bounds, it is the best.

Two that never are: what a merge changes then depends on sizes and rates alone, so the best such pair is among the
least active groups of each size.
"""

from __future__ import annotations

import heapq
from math import log2

import numpy as np

from spd_lens.components.overlaps import Overlaps


class BestPairs:
    """Best merges of `overlaps`. What depends on the pair is counted, in units of events: `merge_change` times the
    number of events, without the term that is the same for all pairs.

    `apart`: pairs that are never active together count too.
    """

    def __init__(self, overlaps: Overlaps, alpha: float, n_groups: int, *, apart: bool) -> None:
        self.overlaps, self.alpha = overlaps, alpha
        n = overlaps.n
        self.bound = np.full(n, np.inf)  # of the best partner
        self.others = np.full(n, np.inf)  # of all other partners
        self.partner = np.full(n, -1)  # -1: not known
        self.both = np.zeros(n, np.int64)  # events with the partner
        self.at = log2(n_groups - 1) if n_groups > 1 else 0.0
        self.rare = _LeastActive(overlaps) if apart else None
        for i in np.flatnonzero(overlaps.sizes):
            self._look(int(i))

    def values(self, i: int, js: np.ndarray, both: np.ndarray) -> np.ndarray:
        """What depends on the pair of i and each of `js`, active together in `both` events."""
        r, n, alpha = self.overlaps.sizes, self.overlaps.counts, self.alpha
        return alpha * (n[i] * r[js] + n[js] * r[i]) - both * (self.at + alpha * (r[i] + r[js]))

    def best(self, n_groups: int) -> tuple[int, int, int] | None:
        """The best pair among `n_groups` groups and its events together; None if no pair may be merged."""
        self.at = log2(n_groups - 1)
        found = self._best_together()
        rare = None if self.rare is None else self.rare.best(self.alpha)
        if rare is not None and (found is None or rare[2] < self.bound[found[0]]):
            return rare[0], rare[1], 0
        return found

    def _best_together(self) -> tuple[int, int, int] | None:
        while True:
            i = int(self.bound.argmin())
            if self.bound[i] == np.inf:
                return None
            j = int(self.partner[i])
            value = np.inf if j < 0 else self.values(i, np.array([j]), self.both[i : i + 1])[0]
            if value <= self.others[i] and j >= 0:
                self.bound[i] = value
            else:
                self._look(i)
            if self.bound[i] < np.inf and self.bound[i] <= self.bound.min():
                return i, int(self.partner[i]), int(self.both[i])

    def _look(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Set group i's partner anew; returns all it is active with, in how many events, and the values."""
        together = self.overlaps.shared_with(i)
        js = np.flatnonzero(together)
        both = together[js]
        values = self.values(i, js, both)
        if not len(js):
            self.bound[i], self.others[i], self.partner[i], self.both[i] = np.inf, np.inf, -1, 0
        else:
            best = int(values.argmin())
            self.bound[i], self.partner[i], self.both[i] = values[best], js[best], both[best]
            self.others[i] = np.inf if len(js) == 1 else np.partition(values, 1)[1]
        return js, both, values

    def merged(self, i: int, j: int, kept: int, n_groups: int) -> None:
        """Groups i and j have become `kept`, one of the two; there are `n_groups` now."""
        self.at = log2(n_groups - 1) if n_groups > 1 else 0.0
        gone = j if kept == i else i
        self.bound[gone] = self.others[gone] = np.inf
        js, both, values = self._look(kept)
        if self.rare is not None:
            self.rare.add(kept)
        partner, bound, others = self.partner[js], self.bound[js], self.others[js]
        lost = (partner == i) | (partner == j)
        # All but the lost partner are known to be no better than `others`.
        rest = np.where(lost, others, bound)
        wins = np.where(lost, values <= others, values < bound)
        self.partner[js] = np.where(wins, kept, np.where(lost, -1, partner))
        self.both[js] = np.where(wins, both, self.both[js])
        self.bound[js] = np.where(wins, values, rest)
        self.others[js] = np.where(lost, others, np.where(wins, bound, np.minimum(others, values)))


class _LeastActive:
    """For every size the groups of that size, least active first."""

    def __init__(self, overlaps: Overlaps) -> None:
        self.overlaps = overlaps
        self.heaps: dict[int, list[tuple[int, int]]] = {}
        for i in np.flatnonzero(overlaps.sizes):
            self.add(int(i))

    def add(self, i: int) -> None:
        size = int(self.overlaps.sizes[i])
        heapq.heappush(self.heaps.setdefault(size, []), (int(self.overlaps.counts[i]), i))

    def best(self, alpha: float) -> tuple[int, int, float] | None:
        """The pair with the smallest `alpha (n_i r_j + n_j r_i)`, and that value; None with fewer than two groups."""
        first: list[tuple[int, int, int]] = []
        best: tuple[float, int, int] | None = None
        for size in sorted(self.heaps):
            heap = self.heaps[size]
            if (one := self._pop(size)) is None:
                del self.heaps[size]
                continue
            if (two := self._pop(size)) is not None:
                heapq.heappush(heap, two)
                best = min(best or (np.inf, 0, 0), (alpha * size * (one[0] + two[0]), one[1], two[1]))
            heapq.heappush(heap, one)
            first.append((size, *one))
        if len(first) > 1:
            r, n, ids = (np.array(column) for column in zip(*first, strict=True))
            costs = alpha * (n[:, None] * r[None, :] + n[None, :] * r[:, None])
            np.fill_diagonal(costs, np.inf)
            a, b = np.unravel_index(costs.argmin(), costs.shape)
            best = min(best or (np.inf, 0, 0), (float(costs[a, b]), int(ids[a]), int(ids[b])))
        return None if best is None else (best[1], best[2], best[0])

    def _pop(self, size: int) -> tuple[int, int] | None:
        heap = self.heaps[size]
        while heap:
            count, i = heapq.heappop(heap)
            # Entries of groups that have grown since, or are gone, are passed over.
            if self.overlaps.sizes[i] == size and self.overlaps.counts[i] == count:
                return count, i
        return None
