"""Groups of subcomponents while they are merged: in which events each is active, and in how many two of them both are.

Nothing is kept per pair. The events are lists of the groups active in each; how often a group is active together with
every other is counted from the lists of its own events when it is asked for. Merging two groups removes one entry from
the list of every event in which both were active, so all merges together cost no more than the lists are long.

Memory: 12 bytes per firing.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from spd_lens.statistics.event_sample import slices_of

# Entries that are looked at in one go: bounds the memory of `shared_with`.
_BLOCK = 1 << 22


class Overlaps:
    """Groups `0..n-1`, of one member each at first; `ids[starts[e]:starts[e + 1]]` are those active in event e."""

    def __init__(self, starts: np.ndarray, ids: np.ndarray, n_groups: int) -> None:
        self.n = n_groups
        self.n_events = len(starts) - 1
        self.starts = starts
        # The group of every entry; `n` where an event already has an entry of that group.
        self.labels = ids.astype(np.int32)
        self.event_of = np.repeat(np.arange(self.n_events, dtype=np.int32), np.diff(starts))
        self.counts: Int64[np.ndarray, " n"] = np.bincount(ids, minlength=n_groups).astype(np.int64)
        self.sizes = np.ones(n_groups, np.int64)
        order = np.argsort(ids, kind="stable").astype(np.int32 if len(ids) < 2**31 else np.int64)
        self.entries = np.split(order, np.cumsum(self.counts)[:-1])
        self.n_dead = 0
        self._marked = np.zeros(self.n_events, bool)

    def shared_with(self, i: int) -> Int64[np.ndarray, " n"]:
        """In how many events each group is active together with group i; 0 for itself."""
        events = self.event_of[self.entries[i]]
        lengths = self.starts[events + 1] - self.starts[events]
        together = np.zeros(self.n + 1, np.int64)
        ends = np.cumsum(lengths)
        cuts = np.searchsorted(ends, np.arange(_BLOCK, ends[-1], _BLOCK))
        for own, sizes in zip(np.split(events, cuts), np.split(lengths, cuts), strict=True):
            labels = self.labels[slices_of(self.starts[own], sizes)]
            together += np.bincount(labels, minlength=self.n + 1)
        together[i] = 0
        return together[: self.n]

    def shared(self, i: int, j: int) -> int:
        """In how many events both are active."""
        few, many = (i, j) if self.counts[i] < self.counts[j] else (j, i)
        marked = self._marked
        events = self.event_of[self.entries[many]]
        marked[events] = True
        both = int(marked[self.event_of[self.entries[few]]].sum())
        marked[events] = False
        return both

    def merge(self, i: int, j: int) -> int:
        """Put both into one group, which keeps the number of the more active one; returns that number."""
        kept, gone = (i, j) if self.counts[i] >= self.counts[j] else (j, i)
        events = self.event_of[self.entries[kept]]
        self._marked[events] = True
        moved = self.entries[gone]
        twice = self._marked[self.event_of[moved]]
        self._marked[events] = False
        self.labels[moved[twice]] = self.n
        moved, n_twice = moved[~twice], int(twice.sum())
        self.labels[moved] = kept
        self.entries[kept] = np.concatenate([self.entries[kept], moved])
        self.entries[gone] = moved[:0]
        self.counts[kept] += len(moved)
        self.sizes[kept] += self.sizes[gone]
        self.counts[gone] = self.sizes[gone] = 0
        self.n_dead += n_twice
        if self.n_dead > len(self.labels) // 2:
            self._forget_dead()
        return kept

    def _forget_dead(self) -> None:
        """Shorten the lists: entries of groups that an event has already are left out."""
        lives = self.labels != self.n
        place = (np.cumsum(lives) - 1).astype(self.entries[0].dtype)
        self.entries = [place[own] for own in self.entries]
        lengths = np.bincount(self.event_of[lives], minlength=self.n_events)
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.labels, self.event_of, self.n_dead = self.labels[lives], self.event_of[lives], 0
