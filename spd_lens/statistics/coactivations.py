"""Which subcomponents fire together: `coactivation`, a sample of events as sparse lists of what fired in each.

An *event* is one position of the data (or a window of positions, or a whole row); a subcomponent fires in it where its
importance exceeds the threshold. All that can be asked about firing together follows from these lists: how often each
two do, and how often a whole group does, which counts of pairs cannot tell.

Memory is 4 bytes per firing that is kept and 16 per event, for at most `max_events` events, a uniform sample of all
that were seen ("bottom k": every event gets a random number, those with the smallest stay). Two such samples add up to
the sample of both. Cost: one clean pass and the gates per batch. Left out: how strongly anything fires.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from spd_lens.core.units import ALIVE_ABOVE
from spd_lens.statistics.event_sample import Collector, Part, chosen_events, joined, smallest_keys
from spd_lens.support.given import given_instance, given_number, shown
from spd_lens.support.names import near_names

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# Positions that one event spans: so many, the last of them its own; or the whole row.
Window: TypeAlias = int | Literal["row"]


@dataclass(frozen=True)
class CountedIn:
    """What co-activations were counted in: events of the sample, all that were seen, what fires above, and how many
    positions one event spans."""

    n_events: int
    n_seen: int
    threshold: float
    window: Window


@dataclass(frozen=True)
class Partner:
    """A subcomponent that fires together with another, in `together` events.

    With n, m the events of the asked one and of this one: `precision = together / m`, `recall = together / n`,
    `jaccard = together / (n + m - together)`, `pmi = log2(together * events / (n m))`.
    """

    site: str
    id: int
    together: int
    precision: float
    recall: float
    jaccard: float
    pmi: float


@dataclass(frozen=True, eq=False, repr=False)
class CoActivation:
    """A sample of events, and what fired in each; made by `coactivation`, or by `CoActivation.of` from one's own.

    Subcomponents are numbered over all sites: those of the first site in `sites` (`{site: C}`) from 0 on, then the
    next. Event e has `ids[starts[e]:starts[e + 1]]`, ascending.

    - `keys` `[events]`: the random numbers of the sample.
    - `found_in`: `subcomponent_hash` of every site, so that ids are not taken for those of other subcomponents; None:
      not known.
    - `fired` `[all C]`: events in which each fired, of all `n_seen` that were seen, not only of those that were kept.
    """

    sites: Mapping[str, int]
    starts: Int64[np.ndarray, " events_and_one"]
    ids: Integer[np.ndarray, " firings"]
    keys: Float[np.ndarray, " events"]
    fired: Int64[np.ndarray, " all_C"]
    n_seen: int
    max_events: int
    threshold: float
    window: Window = 1
    found_in: Mapping[str, str] | None = None

    @staticmethod
    def of(
        fires: Mapping[str, Bool[Tensor, "events _"] | Bool[np.ndarray, "events _"]],
        *,
        max_events: int = 1 << 16,
        threshold: float = ALIVE_ABOVE,
        window: Window = 1,
        generator: np.random.Generator | None = None,
    ) -> CoActivation:
        """From whether each subcomponent fires in each event, by site.

        >>> import torch
        >>> together = CoActivation.of({"W": torch.tensor([[True, True, False], [False, False, True]])})
        >>> together.pair_counts().toarray().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
        """
        if not isinstance(fires, Mapping):
            raise TypeError(f"fires={shown(fires)}; expected {{site: bool [events C]}}")
        arrays = {site: np.asarray(fired) for site, fired in fires.items()}
        for site, fired in arrays.items():
            if fired.ndim != 2:
                raise ValueError(f"what fires at {site} has shape {list(fired.shape)}; expected bool [events C]")
            if fired.dtype != bool and not np.isin(fired, (0, 1)).all():
                raise ValueError(
                    f"{site} holds other values than True and False; compare importances with a threshold first: "
                    f"importance > {threshold:g}"
                )
        lengths = {site: len(fired) for site, fired in arrays.items()}
        if not arrays or 0 in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(f"events per site: {lengths}; expected the same number, at least one, at every site")
        arrays = {site: fired.astype(bool) for site, fired in arrays.items()}
        sites = {site: fired.shape[1] for site, fired in arrays.items()}
        most = positive("max_events", max_events)
        collector = Collector(sum(sites.values()), most, generator or np.random.default_rng(0))
        collector.add(np.concatenate(list(arrays.values()), axis=1))
        return CoActivation(sites, **collector.found(), max_events=most, threshold=threshold, window=window)

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def n_events(self) -> int:
        """Events that were kept."""
        return len(self.starts) - 1

    @property
    def n_subcomponents(self) -> int:
        """All subcomponents of all sites, dead ones too."""
        return sum(self.sites.values())

    @property
    def counts(self) -> Int64[np.ndarray, " all_C"]:
        """Events of the sample in which each subcomponent fires."""
        return np.bincount(self.ids, minlength=self.n_subcomponents).astype(np.int64)

    @property
    def bytes(self) -> int:
        """Memory of the sample."""
        return sum(array.nbytes for array in (self.starts, self.ids, self.keys, self.fired))

    def counted_in(self) -> CountedIn:
        """The events that were counted."""
        return CountedIn(self.n_events, self.n_seen, self.threshold, self.window)

    def __repr__(self) -> str:
        alive, missed = int((self.counts > 0).sum()), int(((self.fired > 0) & (self.counts == 0)).sum())
        left = f", {missed} more fire outside the sample" if missed else ""
        window = "" if self.window == 1 else f", window {self.window}"
        return (
            f"CoActivation({self.n_events:,} of {self.n_seen:,} events{window}, {alive:,} of "
            f"{self.n_subcomponents:,} subcomponents fire{left}, {len(self.ids) / max(1, self.n_events):.1f} per event)"
        )

    # -- numbers and names ---------------------------------------------------------------------------------------

    def member(self, number: int) -> tuple[str, int]:
        """`(site, id)` of a subcomponent by its number over all sites."""
        for site, count in self.sites.items():
            if number < count:
                return site, int(number)
            number -= count
        raise ValueError(f"number {number} too large; expected one of 0..{self.n_subcomponents - 1}")

    def members(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[str, int]]:
        """`member` of each."""
        names, ends = list(self.sites), np.cumsum(list(self.sites.values()))
        where = np.searchsorted(ends, np.asarray(numbers, dtype=np.int64), side="right")
        offsets = np.concatenate([[0], ends])
        return [(names[s], int(c - offsets[s])) for s, c in zip(where, numbers, strict=True)]

    def number(self, site: str, c: int) -> int:
        """The number over all sites of subcomponent `c` at `site`. Raises ValueError if there is none."""
        if site not in self.sites:
            raise ValueError(f"no site {site!r} in these co-activations; near: {near_names(str(site), self.sites)}")
        if isinstance(c, bool) or not isinstance(c, Integral) or not 0 <= c < self.sites[site]:
            raise ValueError(f"subcomponent {c!r} of {site}; expected a whole number in 0..{self.sites[site] - 1}")
        names = list(self.sites)
        return sum(self.sites[name] for name in names[: names.index(site)]) + int(c)

    # -- what fires together -------------------------------------------------------------------------------------

    def pair_counts(self) -> csr_array:
        """Events in which both fire, `[all C, all C]`, sparse; on the diagonal the events of each."""
        fires = self._matrix(np.int32)
        return (fires.T @ fires).tocsr()

    def pair_counts_of(self, numbers: Sequence[int] | np.ndarray) -> csr_array:
        """`pair_counts` of some subcomponents, by their numbers, in that order; the others cost nothing."""
        fires = self._matrix(np.int32)[:, np.asarray(numbers, np.int64)]
        return (fires.T @ fires).tocsr()

    def partners(self, site: str, c: int, *, n: int = 10) -> list[Partner]:
        """The `n` subcomponents that overlap most with this one in when they fire (by Jaccard index)."""
        number, counts = self.number(site, c), self.counts
        fires = self._matrix(np.int32)
        together = np.asarray((fires.T @ fires[:, [number]]).todense()).ravel()
        together[number] = 0
        jaccard = together / np.maximum(counts + counts[number] - together, 1)
        found = []
        for other in np.argsort(-jaccard, kind="stable")[: positive("n", n)]:
            both = int(together[other])
            if not both:
                break
            name, own = self.member(int(other))
            pmi = float(np.log2(both * self.n_events / (counts[other] * counts[number])))
            of_other, of_own = float(both / counts[other]), float(both / counts[number])
            found.append(Partner(name, own, both, of_other, of_own, float(jaccard[other]), pmi))
        return found

    def _part(self) -> Part:
        return self.starts, self.ids, self.keys

    def _matrix(self, dtype: Any) -> Any:
        from scipy.sparse import csr_array

        shape = (self.n_events, self.n_subcomponents)
        return csr_array((np.ones(len(self.ids), dtype), self.ids, self.starts), shape=shape)

    # -- other samples -------------------------------------------------------------------------------------------

    def __add__(self, other: CoActivation) -> CoActivation:
        """The sample of both data sets together; `max_events` is the smaller of the two.

        Raises ValueError if sites, threshold, window, or V and U differ.
        """
        if not isinstance(other, CoActivation):
            return NotImplemented
        for name in ("sites", "threshold", "window"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"co-activations with {name} {ours!r} and {theirs!r} cannot be added; make both alike")
        check_same_subcomponents([self, other])
        most = min(self.max_events, other.max_events)
        parts = smallest_keys([self._part(), other._part()], most)
        n_seen, fired = self.n_seen + other.n_seen, self.fired + other.fired
        return replace(self, **joined(parts), n_seen=n_seen, fired=fired, max_events=most)

    def between(self, min_events: int, max_share: float | int = 1.0) -> CoActivation:
        """Without the subcomponents that fire in fewer events of the sample, or in a larger share of them.

        What is rare fires too seldom to tell with what; what is nearly always on meets everything by chance.
        """
        if isinstance(max_share, bool) or not isinstance(max_share, (int, float)) or not 0 < max_share <= 1:
            raise ValueError(f"max_share={max_share!r}; expected a share of the events, above 0, at most 1")
        counts = self.counts
        chosen = (counts >= positive("min_events", min_events)) & (counts <= max_share * self.n_events)
        stays = chosen[self.ids]
        lengths = np.bincount(np.repeat(np.arange(self.n_events), np.diff(self.starts))[stays], minlength=self.n_events)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return replace(self, starts=starts, ids=self.ids[stays], fired=np.where(chosen, self.fired, 0))

    def drawn(self, share: float, generator: np.random.Generator) -> CoActivation:
        """A random part of the events, without replacement."""
        share = given_number("share", share, above=0.0, most=1.0)
        given_instance("generator", generator, np.random.Generator, "numpy.random.default_rng(0)")
        chosen = generator.permutation(self.n_events)[: max(1, round(share * self.n_events))]
        starts, ids, keys = chosen_events(self._part(), np.sort(chosen))
        return replace(self, starts=starts, ids=ids, keys=keys)

    def shuffled(self, generator: np.random.Generator) -> CoActivation:
        """What chance gives: every subcomponent fires as often as before, in events drawn anew for each."""
        given_instance("generator", generator, np.random.Generator, "numpy.random.default_rng(0)")
        counts = self.counts
        alive = np.flatnonzero(counts)
        events = [generator.choice(self.n_events, counts[c], replace=False, shuffle=False) for c in alive]
        rows, columns = np.concatenate(events or [np.zeros(0, np.int64)]), np.repeat(alive, counts[alive])
        order = np.lexsort((columns, rows))
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self.n_events))]).astype(np.int64)
        return replace(self, starts=starts, ids=columns[order].astype(np.int32))


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r}; expected a whole number, at least 1")
    return int(value)


def check_same_subcomponents(sets: Sequence[CoActivation]) -> None:
    """Raise ValueError if co-activations were counted in different V and U, where that is known."""
    known = [one.found_in for one in sets if one.found_in is not None]
    for other in known[1:]:
        site = next((site for site in known[0] if known[0][site] != other.get(site)), None)
        if site is not None:
            raise ValueError(
                f"these co-activations were counted in different decompositions (V and U of {site} differ): ids of one "
                "mean other subcomponents in the other; count all of them in one"
            )
