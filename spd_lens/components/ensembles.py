"""How much a grouping depends on the sample and the seed: `ensemble`, with a consensus and a shuffled null.

Every run merges another random part of the events, or another data set, with another seed. *Agreement* is the adjusted
Rand index, mean over pairs of runs: 1 for equal groupings, 0 for what chance gives with groups of these sizes and for
runs that merge nothing. The
*null* are the same runs on shuffled co-activations, in which each subcomponent fires as often as before but on its own;
what the null agrees on, or saves in description length, is not knowledge about the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int64

from spd_lens.components.merging import (
    How,
    Merging,
    Pairs,
    check_merging,
    labels_by_size,
    members_by_label,
    merge_subcomponents,
)
from spd_lens.statistics.coactivations import CoActivation, CountedIn, check_same_subcomponents
from spd_lens.support.given import given_list, given_number, given_whole
from spd_lens.support.progress import tqdm


@dataclass(frozen=True)
class EnsembleSettings:
    """What `ensemble` was called with; `share` is 1 where every run had a data set of its own."""

    runs: int
    share: float
    seed: int
    alpha: float
    pairs: Pairs
    sampled: int | None
    temperature: float


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """Groupings of several runs, what they agree on, and the same for shuffled co-activations.

    - `members`: what fires in any run; `labels` `[runs members]`: its group in each, -1 where it does not fire.
    - `groups`: the consensus, the largest first: two groups are joined while their members are together in at least
      half of the runs, on average over pairs.
    - `stability`: for each of them the mean, over pairs of its members, of the share of runs in which the two are
      together; for a single subcomponent the share of runs in which it is alone.
    - `agreement`, `null_agreement`: mean adjusted Rand index over pairs of runs.
    - `saved`, `null_saved`: the share by which merging shortens the description, mean over runs.
    """

    members: tuple[tuple[str, int], ...]
    labels: Int64[np.ndarray, "runs members"]
    groups: list[tuple[tuple[str, int], ...]]
    stability: Float[np.ndarray, " groups"]
    rates: Float[np.ndarray, " groups"]
    agreement: float
    null_agreement: float
    saved: float
    null_saved: float
    settings: EnsembleSettings
    counted_in: CountedIn
    found_in: Mapping[str, str] | None = None

    def known(self) -> list[tuple[float, float]]:
        """Rate and stability of every group."""
        return [(float(rate), float(stable)) for rate, stable in zip(self.rates, self.stability, strict=True)]

    def how(self) -> How:
        """How the groups were found, as plain values."""
        figures = ("agreement", "null_agreement", "saved", "null_saved")
        made: How = {"method": "consensus", **asdict(self.settings), **asdict(self.counted_in)}
        return {**made, **{name: getattr(self, name) for name in figures}}

    def __repr__(self) -> str:
        several = sum(1 for group in self.groups if len(group) > 1)
        return (
            f"Ensemble({len(self.labels)} runs: {len(self.groups):,} groups, {several:,} of several; agreement "
            f"{self.agreement:.3f} (shuffled {self.null_agreement:.3f}), shorter by {self.saved:.1%} (shuffled "
            f"{self.null_saved:.1%}))"
        )


def ensemble(
    together: CoActivation | Sequence[CoActivation],
    *,
    runs: int = 8,
    share: float = 0.5,
    alpha: float = 3.0,
    pairs: Pairs = "together",
    sampled: int | None = 32,
    temperature: float = 0.0,
    seed: int = 0,
    beyond: int | None = 0,
) -> Ensemble:
    """Merge `runs` times and see what stays.

    Each run has a random `share` of the events, or the whole of the next data set where several are given (then there
    are at least as many runs as data sets), and its own seed for the sampled pairs. `alpha`, `pairs`, `sampled`,
    `temperature` and `beyond` are those of `merge_subcomponents`. Cost: twice `runs` merges; that of the consensus
    grows with the square of the subcomponents that some run puts into one group.

    Raises ValueError and TypeError as `merge_subcomponents`, and for fewer than two runs.
    """
    sets = [together] if isinstance(together, CoActivation) else given_list("together", together, "co-activations")
    odd = [one for one in sets if not isinstance(one, CoActivation)]
    if odd:
        raise TypeError(f"the ensemble was given a {type(odd[0]).__name__}; expected co-activations: coactivation(...)")
    if not sets or any(one.sites != sets[0].sites for one in sets):
        raise ValueError("the ensemble was given no co-activations, or of other sites; expected those of one model")
    check_same_subcomponents(sets)
    share = given_number("share", share, above=0.0, most=1.0)
    for one in sets:
        check_merging(one, alpha, pairs, sampled, temperature, beyond, seed)
    runs = max(given_whole("runs", runs, least=2, of=": one has nothing to agree with"), len(sets))
    share = share if len(sets) == 1 else 1.0
    settings = EnsembleSettings(runs, share, seed, alpha, pairs, sampled, temperature)
    found: list[Merging] = []
    null: list[Merging] = []
    for run in tqdm(range(runs), desc="ensemble", leave=False):
        generator = np.random.default_rng([seed, run])
        data = sets[run % len(sets)]
        drawn = data if len(sets) > 1 else data.drawn(share, generator)
        for results, events in ((found, drawn), (null, drawn.shuffled(generator))):
            merging = merge_subcomponents(
                events,
                alpha=alpha,
                pairs=pairs,
                sampled=sampled,
                temperature=temperature,
                seed=seed + run,
                beyond=beyond,
            )
            results.append(merging)
    members, labels = _labels_of_all(found)
    consensus = labels_by_size(_consensus(labels))
    groups = members_by_label(members, consensus)
    return Ensemble(
        members,
        labels,
        groups,
        _stability(labels, consensus),
        _rates(sets, groups),
        _agreement(labels),
        _agreement(_labels_of_all(null)[1]),
        _saved(found),
        _saved(null),
        settings,
        sets[0].counted_in(),
        sets[0].found_in,
    )


def adjusted_rand(one: Int64[np.ndarray, " n"], other: Int64[np.ndarray, " n"]) -> float:
    """How far two groupings of the same things agree: 1 fully, 0 as by chance.

    `(both - expected) / ((pairs_1 + pairs_2) / 2 - expected)`, where `both` counts the pairs that are together in both,
    and `expected = pairs_1 pairs_2 / all pairs`.

    >>> adjusted_rand(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    1.0
    """
    one, other = np.asarray(one), np.asarray(other)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(
            f"groupings of shapes {one.shape} and {other.shape}; expected a label for each of the same things"
        )
    _, one = np.unique(one, return_inverse=True)
    _, other = np.unique(other, return_inverse=True)
    cells = np.unique(one.astype(np.int64) * (int(other.max(initial=0)) + 1) + other, return_counts=True)[1]
    both, pairs_1, pairs_2 = (_n_pairs(counts) for counts in (cells, np.bincount(one), np.bincount(other)))
    every = len(one) * (len(one) - 1) / 2
    expected = pairs_1 * pairs_2 / every if every else 0.0
    largest = (pairs_1 + pairs_2) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def _n_pairs(counts: np.ndarray) -> float:
    counts = counts.astype(np.float64)
    return float((counts * (counts - 1)).sum() / 2)


def _labels_of_all(found: Sequence[Merging]) -> tuple[tuple[tuple[str, int], ...], Int64[np.ndarray, "runs members"]]:
    members = tuple(dict.fromkeys(member for merging in found for member in merging.members))
    place = {member: i for i, member in enumerate(members)}
    labels = np.full((len(found), len(members)), -1, np.int64)
    for own, merging in zip(labels, found, strict=True):
        own[[place[member] for member in merging.members]] = merging.labels
    return members, labels


def _agreement(labels: Int64[np.ndarray, "runs members"]) -> float:
    values = []
    for one, other in combinations(labels, 2):
        fires = (one >= 0) & (other >= 0)
        one, other = one[fires], other[fires]
        # Groupings without a pair are equal, and agree on nothing.
        empty = min(_n_pairs(np.bincount(own)) for own in (one, other)) == 0
        values.append(0.0 if empty else adjusted_rand(one, other))
    return float(np.mean(values))


def _saved(found: Sequence[Merging]) -> float:
    lengths = [merging.description_lengths for merging in found]
    return float(np.mean([1 - own.min() / own[0] if own[0] else 0.0 for own in lengths]))


def _rates(sets: Sequence[CoActivation], groups: Sequence[Sequence[tuple[str, int]]]) -> Float[np.ndarray, " groups"]:
    label = np.full(sets[0].n_subcomponents, -1)
    for i, group in enumerate(groups):
        label[[sets[0].number(*member) for member in group]] = i
    active = np.zeros(len(groups))
    for data in sets:
        events = np.repeat(np.arange(data.n_events), np.diff(data.starts))
        own = label[data.ids]
        pairs = np.unique(events[own >= 0] * len(groups) + own[own >= 0]) % len(groups)
        active += np.bincount(pairs, minlength=len(groups))
    return active / sum(data.n_events for data in sets)


# -- consensus -------------------------------------------------------------------------------------------------------


def _consensus(labels: Int64[np.ndarray, "runs members"]) -> Int64[np.ndarray, " members"]:
    """Average linkage on the share of runs in which two are together, while that is at least one half.

    What has the same groups in every run is one from the start; what shares a group with others in no run, and whole
    blocks that share none, never meet.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    patterns, pattern_of, sizes = np.unique(labels, axis=1, return_inverse=True, return_counts=True)
    pattern_of = pattern_of.reshape(-1)
    n, largest = patterns.shape[1], int(labels.max()) + 1
    # A node for every pattern and one for every group of every run.
    runs, columns = np.nonzero(patterns >= 0)
    ends = n + runs * largest + patterns[runs, columns]
    size = n + len(labels) * largest
    links = coo_array((np.ones(len(runs)), (columns, ends)), shape=(size, size))
    block_of = connected_components(links, directed=False)[1][:n]
    top = np.arange(n)
    order = np.argsort(block_of, kind="stable")
    for block in np.split(order, np.cumsum(np.bincount(block_of))[:-1]):
        if len(block) > 1:
            top[block] = block[_linked(shares_together(patterns[:, block]), sizes[block])]
    return top[pattern_of]


def shares_together(labels: Int64[np.ndarray, "runs n"]) -> Float[np.ndarray, "n n"]:
    """For each two the share of the runs in which both fire where they are in one group; 0 where they never do."""
    same, runs = (np.zeros((labels.shape[1],) * 2) for _ in range(2))
    for own in labels:
        fires = own >= 0
        same += (own[:, None] == own[None, :]) & fires[:, None]
        runs += fires[:, None] & fires[None, :]
    return np.divide(same, runs, out=np.zeros_like(same), where=runs > 0)


def _linked(together: Float[np.ndarray, "n n"], sizes: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """For every one of n the number of the group it ends in (that of some member)."""
    sizes, top = sizes.astype(np.float64), np.arange(len(sizes))
    together = together.copy()
    np.fill_diagonal(together, -1)
    best = together.max(1)
    while best.max() >= 0.5:
        i = int(best.argmax())
        j = int(together[i].argmax())
        merged = (sizes[i] * together[i] + sizes[j] * together[j]) / (sizes[i] + sizes[j])
        together[i] = together[:, i] = merged
        together[j] = together[:, j] = together[i, i] = -1
        sizes[i], sizes[j] = sizes[i] + sizes[j], 0
        top[top == j] = i
        best = together.max(1)
    return top


def _stability(
    labels: Int64[np.ndarray, "runs members"], consensus: Int64[np.ndarray, " members"]
) -> Float[np.ndarray, " groups"]:
    sizes = np.array([np.where(own >= 0, np.bincount(own[own >= 0])[own], 0) for own in labels])
    order = np.argsort(consensus, kind="stable")
    values = []
    for group in np.split(order, np.cumsum(np.bincount(consensus))[:-1]):
        if len(group) == 1:
            fires = labels[:, group[0]] >= 0
            values.append((sizes[fires, group[0]] == 1).mean())
            continue
        patterns, counts = np.unique(labels[:, group], axis=1, return_counts=True)
        shares = shares_together(patterns)
        # Mean over pairs: those between patterns, and those within one, which are together in all runs they fire in.
        between = counts @ (shares - np.diag(np.diag(shares))) @ counts
        within = (counts * (counts - 1) * np.diag(shares)).sum()
        values.append((between + within) / (len(group) * (len(group) - 1)))
    return np.array(values)
