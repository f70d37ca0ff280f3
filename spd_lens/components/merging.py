"""Merging subcomponents into components while the description length falls: `merge_subcomponents`.

Every subcomponent that fires begins as a group of its own. The merge that lowers the description length most is done,
again and again (or, with `sampled`, the best of a few pairs drawn at random); the grouping at the lowest point is the
result. What such a group claims is that its members are active together often enough that naming them once is shorter.
It does not claim that they do one thing: see `spd_lens.components.causal`.

Memory: 16 bytes per firing and 32 per group; no table of pairs. Cost: the sum over events of the square of what fires
in it, a few times over. Left out: groups that overlap; a subcomponent has one component.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import log2
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, Int64

from spd_lens.components.best_pairs import BestPairs
from spd_lens.components.bits import check_alpha
from spd_lens.components.overlaps import Overlaps
from spd_lens.statistics.coactivations import CoActivation, CountedIn
from spd_lens.support.given import given_number, given_whole, shown
from spd_lens.support.pages import shortened
from spd_lens.support.progress import tqdm

# How groups were found, as it stands in files: names, numbers and settings.
How: TypeAlias = dict[str, str | int | float | bool | None]
# Which pairs may be merged: those that are active together in some event, or all.
Pairs: TypeAlias = Literal["together", "all"]
# How often `sampled` draws again when no pair of a draw lowers the description length, before it looks at all pairs.
PATIENCE = 20


@dataclass(frozen=True, eq=False, repr=False)
class Merging:
    """The merges in order, and what each made of the description length.

    - `members`: `(site, id)` of every subcomponent that fires, the groups 0, 1, ... of the beginning.
    - `merges` `[merges 2]`: which two groups were merged; merge m makes group `len(members) + m` (as scipy's linkage).
    - `description_lengths` `[merges + 1]`: bits per event, before the first merge and after each.
    - `overlaps` `[merges]`: of the events in which either of the two was active, the share in which both were.
    - `rates` `[members + merges]`: share of events in which each group is active.
    - `counted_in`: what the co-activations were counted in; `found_in`: of which V and U (see `CoActivation`).
    """

    members: tuple[tuple[str, int], ...]
    merges: Int64[np.ndarray, "merges 2"]
    description_lengths: Float[np.ndarray, " merges_and_one"]
    overlaps: Float[np.ndarray, " merges"]
    rates: Float[np.ndarray, " members_and_merges"]
    alpha: float
    counted_in: CountedIn
    found_in: Mapping[str, str] | None = None

    @property
    def n_merges(self) -> int:
        """How many merges lead to the lowest description length."""
        return int(self.description_lengths.argmin())

    @property
    def groups(self) -> list[tuple[tuple[str, int], ...]]:
        """The groups at the lowest description length, the largest first."""
        return self.groups_after(self.n_merges)

    @property
    def labels(self) -> Int64[np.ndarray, " members"]:
        """For every member the number of its group in `groups`."""
        return self._labels(self.n_merges)

    def groups_after(self, n_merges: int) -> list[tuple[tuple[str, int], ...]]:
        """The groups after so many merges, the largest first, members in order."""
        n_merges = given_whole("n_merges", n_merges, least=0, most=len(self.merges))
        return members_by_label(self.members, self._labels(n_merges))

    def known(self) -> list[tuple[float, None]]:
        """For every group the share of events in which it is active; stability is not known (`ensemble`)."""
        tops, labels = self._tops(self.n_merges), self.labels
        rates = np.zeros(labels.max() + 1)
        rates[labels] = self.rates[tops]
        return [(float(rate), None) for rate in rates]

    def how(self) -> How:
        """How the groups were found, as plain values."""
        bits = float(self.description_lengths.min())
        return {"method": "description length", "alpha": self.alpha, "bits_per_event": bits, **asdict(self.counted_in)}

    def _tops(self, n_merges: int) -> Int64[np.ndarray, " members"]:
        """For every member the group, by its number in `merges`, that it is in after so many merges."""
        n = len(self.members)
        top = np.arange(n + n_merges)
        for m in range(n_merges - 1, -1, -1):
            top[self.merges[m]] = top[n + m]
        return top[:n]

    def _labels(self, n_merges: int) -> Int64[np.ndarray, " members"]:
        return labels_by_size(self._tops(n_merges))

    def __repr__(self) -> str:
        lengths, sizes = self.description_lengths, [len(group) for group in self.groups]
        several = [size for size in sizes if size > 1]
        return (
            f"Merging({len(self.members):,} subcomponents, alpha {self.alpha:g}: {len(sizes):,} groups, "
            f"{len(several):,} of several ({shortened(', '.join(map(str, several)), 40) or 'none'}); "
            f"{lengths[0]:.4g} -> {lengths.min():.4g} bits per event)"
        )


def labels_by_size(labels: np.ndarray) -> Int64[np.ndarray, " members"]:
    """The same groups, numbered from the largest on, equal sizes by their first member."""
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    first = np.full(len(counts), len(labels))
    np.minimum.at(first, labels, np.arange(len(labels)))
    order = np.lexsort((first, -counts))
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return number[labels]


def members_by_label(
    members: Sequence[tuple[str, int]], labels: Int64[np.ndarray, " members"]
) -> list[tuple[tuple[str, int], ...]]:
    """The members of group 0, of group 1, ..., in their order."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels))[:-1]
    return [tuple(members[m] for m in own) for own in np.split(order, ends)]


def merge_subcomponents(
    together: CoActivation,
    *,
    alpha: float = 3.0,
    pairs: Pairs = "together",
    sampled: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    beyond: int | None = None,
) -> Merging:
    """Groups of the subcomponents that fire in `together`, at the minimum of the description length.

    - `alpha`: bits to say what an active member is; small values make few large groups (`description_length`).
    - `pairs`: with `"together"` two groups that are never active together are never merged; `"all"` merges them too
      where that is shorter, which throws what is rare into one group whatever it does.
    - `sampled`: instead of the best of all pairs, the best of so many that are drawn at random from what fires
      together; or, with a `temperature` (bits per event), one of these with probability `~ 2^(-change / temperature)`.
      From where a draw finds nothing that gets shorter, the best of all pairs is merged again.
    - `beyond`: how many merges to go on for where none makes it shorter any more, to see whether a lower point lies
      behind; None: until nothing can be merged. The result is the lowest point on the way.

    Raises ValueError where nothing fires and for numbers out of range, TypeError for wrong types.

    >>> import torch
    >>> on, off = [True, True, False], [False, False, True]
    >>> together = CoActivation.of({"W": torch.tensor([on, off, on, off])})
    >>> merge_subcomponents(together).groups
    [(('W', 0), ('W', 1)), (('W', 2),)]
    """
    check_merging(together, alpha, pairs, sampled, temperature, beyond, seed)
    alive, ids = np.unique(together.ids, return_inverse=True)
    state = _State(Overlaps(together.starts, ids, len(alive)), float(alpha))
    limit = len(alive) if beyond is None else int(beyond)
    with tqdm(total=len(alive) - 1, desc="merging", leave=False) as bar:
        if sampled is not None:
            _merge_sampled(state, int(sampled), float(temperature), np.random.default_rng(seed), bar.update)
        _merge_best(state, limit, pairs == "all", bar.update)
    found = state.result(tuple(together.members(alive)), together.counted_in())
    return replace(found, found_in=together.found_in)


def check_merging(
    together: Any, alpha: Any, pairs: Any, sampled: Any, temperature: Any, beyond: Any, seed: Any
) -> None:
    """Raise TypeError or ValueError for what `merge_subcomponents` cannot take."""
    if not isinstance(together, CoActivation):
        raise TypeError(
            f"merge_subcomponents was given a {type(together).__name__}; expected co-activations: "
            "coactivation(decomposition, batches)"
        )
    if not len(together.ids):
        raise ValueError("nothing fires in these co-activations, so there is nothing to merge; give other data")
    check_alpha(alpha)
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs={shown(pairs)}; expected 'together' (those that are ever active together) or 'all'")
    for name, value, least in (("sampled", sampled, 1), ("beyond", beyond, 0)):
        if value is not None:
            given_whole(name, value, least=least, or_none=True)
    given_number("temperature", temperature, least=0.0)
    given_whole("seed", seed, least=0)
    if temperature and sampled is None:
        raise ValueError(f"temperature={temperature!r} chooses among sampled pairs; give sampled=32, for example")


class _State:
    """Groups, the merges that made them, and the description length as whole numbers of events."""

    def __init__(self, overlaps: Overlaps, alpha: float) -> None:
        self.overlaps, self.alpha = overlaps, alpha
        self.n_groups = overlaps.n
        self.active = self.member_events = int(overlaps.counts.sum())  # sum of s_i, of s_i r_i
        self.cluster = np.arange(overlaps.n)  # the number of every group in `Merging`
        self.counts = overlaps.counts.tolist()
        self.merges: list[tuple[int, int]] = []
        self.shared: list[float] = []
        self.lengths = [self.length()]

    def length(self) -> float:
        bits = log2(self.n_groups) * self.active + self.alpha * self.member_events
        return bits / self.overlaps.n_events

    def change(self, i: int, j: int, both: int) -> float:
        """What a merge of i and j, active together in `both` events, does to the description length."""
        n, r, k = self.overlaps.counts, self.overlaps.sizes, self.n_groups
        pair = self.alpha * int(n[i] * r[j] + n[j] * r[i]) - both * (log2(k - 1) + self.alpha * int(r[i] + r[j]))
        return (pair - self.active * log2(k / (k - 1))) / self.overlaps.n_events

    def merge(self, i: int, j: int, both: int) -> int:
        n, r = self.overlaps.counts, self.overlaps.sizes
        either = int(n[i] + n[j]) - both
        self.active -= both
        self.member_events += either * int(r[i] + r[j]) - int(n[i] * r[i]) - int(n[j] * r[j])
        kept = self.overlaps.merge(i, j)
        assert int(n[kept]) == either, "the count of shared events was stale"
        first, second = sorted((int(self.cluster[i]), int(self.cluster[j])))
        self.merges.append((first, second))
        self.cluster[kept] = len(self.cluster) + len(self.merges) - 1
        self.counts.append(either)
        self.shared.append(both / either)
        self.n_groups -= 1
        self.lengths.append(self.length())
        return kept

    def result(self, members: tuple[tuple[str, int], ...], counted_in: CountedIn) -> Merging:
        return Merging(
            members,
            np.array(self.merges, np.int64).reshape(-1, 2),
            np.array(self.lengths),
            np.array(self.shared, np.float64),
            np.array(self.counts) / self.overlaps.n_events,
            self.alpha,
            counted_in,
        )


def _merge_best(state: _State, beyond: int, apart: bool, merged: Callable[[], Any]) -> None:
    best_pairs = BestPairs(state.overlaps, state.alpha, state.n_groups, apart=apart)
    since = 0
    while state.n_groups > 1 and (pair := best_pairs.best(state.n_groups)) is not None:
        i, j, both = pair
        since = 0 if state.change(i, j, both) < 0 else since + 1
        if since > beyond:
            return
        kept = state.merge(i, j, both)
        best_pairs.merged(i, j, kept, state.n_groups)
        merged()


def _merge_sampled(
    state: _State, n_pairs: int, temperature: float, generator: np.random.Generator, merged: Callable[[], Any]
) -> None:
    in_vain = 0
    while state.n_groups > 1 and in_vain < PATIENCE:
        drawn = _drawn_pairs(state.overlaps, n_pairs, generator)
        options = [(i, j, state.overlaps.shared(i, j)) for i, j in drawn]
        changes = np.array([state.change(*option) for option in options])
        options = [option for option, change in zip(options, changes, strict=True) if change < 0]
        changes = changes[changes < 0]
        in_vain = 0 if options else in_vain + 1
        if not options:
            continue
        if temperature:
            weights = np.exp2(-(changes - changes.min()) / temperature)
            chosen = int(generator.choice(len(options), p=weights / weights.sum()))
        else:
            chosen = int(changes.argmin())
        state.merge(*options[chosen])
        merged()


def _drawn_pairs(overlaps: Overlaps, n_pairs: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """At most so many different pairs, each of two groups that are active in a random event."""
    one = generator.integers(len(overlaps.labels), size=n_pairs)
    events = overlaps.event_of[one]
    first = overlaps.starts[events]
    other = first + (generator.random(n_pairs) * (overlaps.starts[events + 1] - first)).astype(np.int64)
    a, b = overlaps.labels[one], overlaps.labels[other]
    fits = (a != b) & (a != overlaps.n) & (b != overlaps.n)
    low, high = np.minimum(a, b)[fits], np.maximum(a, b)[fits]
    return sorted({(int(i), int(j)) for i, j in zip(low, high, strict=True)})
