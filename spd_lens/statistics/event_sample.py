"""A uniform sample of events of bounded size, each a sparse list of what fired in it ("bottom k").

Every event gets a random number, and those with the smallest stay. Two samples that were drawn so add up to the sample
of both, in whatever order.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool

# Some events: where each begins in the list, what fires, the random number of each.
Part: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


class Collector:
    """Keeps the `max_events` events with the smallest random numbers of all that are added."""

    def __init__(self, n_subcomponents: int, max_events: int, generator: np.random.Generator) -> None:
        self.max_events, self.generator = max_events, generator
        self.parts: list[Part] = []
        self.fired = np.zeros(n_subcomponents, np.int64)
        self.n_seen = self.n_held = 0
        self.largest = np.inf

    def add(self, fires: Bool[np.ndarray, "events all_C"]) -> None:
        """More events."""
        self.fired += fires.sum(0)
        self.n_seen += len(fires)
        keys = self.generator.random(len(fires))
        stays = keys < self.largest
        fires, keys = fires[stays], keys[stays]
        rows, columns = np.nonzero(fires)
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(fires)))]).astype(np.int64)
        self.parts.append((starts, columns.astype(np.int32), keys))
        self.n_held += len(keys)
        if self.n_held >= 2 * self.max_events:
            self._drop()

    def _drop(self) -> None:
        self.parts = smallest_keys(self.parts, self.max_events)
        self.n_held = sum(len(keys) for _, _, keys in self.parts)
        if self.n_held == self.max_events:
            self.largest = max(float(keys.max(initial=0)) for _, _, keys in self.parts)

    def found(self) -> dict[str, Any]:
        """The sample: `starts`, `ids`, `keys`, and of all events seen `fired` by subcomponent and `n_seen`."""
        self._drop()
        return {**joined(self.parts), "fired": self.fired, "n_seen": self.n_seen}


def smallest_keys(parts: list[Part], n: int) -> list[Part]:
    """The n events with the smallest random numbers; all, if there are no more."""
    keys = np.concatenate([keys for _, _, keys in parts])
    if len(keys) <= n:
        return parts
    stays = np.zeros(len(keys), bool)
    stays[np.argpartition(keys, n - 1)[:n]] = True
    ends = np.cumsum([len(keys) for _, _, keys in parts])[:-1]
    return [chosen_events(part, np.flatnonzero(own)) for part, own in zip(parts, np.split(stays, ends), strict=True)]


def chosen_events(part: Part, events: np.ndarray) -> Part:
    """Some events of a part, by number."""
    starts, ids, keys = part
    lengths = np.diff(starts)[events]
    own = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return own, ids[slices_of(starts[events], lengths)], keys[events]


def slices_of(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices `starts[0]..starts[0] + lengths[0] - 1`, then those of the next, in one array."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def joined(parts: list[Part]) -> dict[str, np.ndarray]:
    """Parts one behind the other."""
    lengths = np.concatenate([np.diff(starts) for starts, _, _ in parts])
    return {
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "ids": np.concatenate([ids for _, ids, _ in parts]),
        "keys": np.concatenate([keys for _, _, keys in parts]),
    }
