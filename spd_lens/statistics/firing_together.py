"""What fires together with one subcomponent, quickly for one after another: for pages of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from spd_lens.statistics.coactivations import CoActivation
from spd_lens.statistics.event_sample import slices_of

# (site, id) to the others, `(site, id, values)` with a value for each of the columns.
Cofiring: TypeAlias = Callable[[str, int], list[tuple[str, int, list[float]]]]

COFIRING_COLUMNS = ("P(it|this)", "P(this|it)", "Jaccard")


def cofiring(found: CoActivation, n: int = 10) -> Cofiring:
    """For each subcomponent the `n` that overlap most with it in when they fire, by Jaccard index.

    Values: the share of this one's events in which the other fires too, the share of the other's in which this one
    does, and the Jaccard index.
    """
    lengths, counts = np.diff(found.starts), found.counts
    order = np.argsort(found.ids, kind="stable")
    event_of = np.repeat(np.arange(found.n_events), lengths)[order]
    ends = np.cumsum(counts)

    def of(site: str, c: int) -> list[tuple[str, int, list[float]]]:
        number = found.number(site, c)
        events = event_of[ends[number] - counts[number] : ends[number]]
        together = np.bincount(
            found.ids[slices_of(found.starts[events], lengths[events])], minlength=found.n_subcomponents
        )
        together[number] = 0
        others = np.flatnonzero(together)
        both = together[others]
        jaccard = both / (counts[others] + counts[number] - both)
        best = np.argsort(-jaccard, kind="stable")[:n]
        chosen = others[best]
        values = np.stack([both[best] / counts[number], both[best] / counts[chosen], jaccard[best]], axis=1)
        return [(name, d, row) for (name, d), row in zip(found.members(chosen), values.tolist(), strict=True)]

    return of
