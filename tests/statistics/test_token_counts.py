"""`TokenCounts`: exact where memory allows, bounded where it does not, and the same however the data was cut."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spd_lens.statistics import TokenCounts

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=120)


def counted(pairs: list[tuple[int, int]], kept: int, *, cuts: int = 1) -> TokenCounts:
    """The pairs, put together in `cuts` parts."""
    found = TokenCounts(4, 10, kept)
    for part in torch.tensor(pairs).chunk(cuts):
        found.add(part[:, 0], part[:, 1])
        found.settle()
    return found


def table(counts: TokenCounts) -> dict[tuple[int, int], int]:
    counts.settle()
    return {(k // 10, k % 10): n for k, n in zip(counts.keys.tolist(), counts.counts.tolist(), strict=True)}


@given(pairs=PAIRS, cuts=st.integers(1, 5))
def test_with_room_for_every_token_counts_are_exact(pairs: list[tuple[int, int]], cuts: int) -> None:
    found = counted(pairs, 10, cuts=cuts)
    assert table(found) == Counter(pairs)
    assert not found.lost.any()


@given(pairs=PAIRS, kept=st.integers(1, 5), cuts=st.integers(1, 5))
def test_without_room_counts_are_too_small_by_at_most_what_is_said(
    pairs: list[tuple[int, int]], kept: int, cuts: int
) -> None:
    found, exact = counted(pairs, kept, cuts=cuts), Counter(pairs)
    kept_counts = table(found)
    for group in range(4):
        lost = int(found.lost[group])
        total = sum(n for (g, _), n in exact.items() if g == group)
        assert lost * (kept + 1) <= total
        assert sum(1 for g, _ in kept_counts if g == group) <= kept
    for pair, n in exact.items():
        assert n - int(found.lost[pair[0]]) <= kept_counts.get(pair, 0) <= n


@given(pairs=PAIRS, kept=st.integers(1, 5), at=st.integers(0, 120))
def test_merging_keeps_the_bound(pairs: list[tuple[int, int]], kept: int, at: int) -> None:
    one, two = (counted(part, kept) if part else TokenCounts(4, 10, kept) for part in (pairs[:at], pairs[at:]))
    one.merge(two)
    for pair, n in Counter(pairs).items():
        assert n - int(one.lost[pair[0]]) <= table(one).get(pair, 0) <= n


def test_precision_recall_and_pmi_are_those_of_their_definitions() -> None:
    # Fires at 4 of 20 positions, 3 of them token 7, which occurs 5 times.
    counts = TokenCounts(1, 10, 10)
    counts.add(torch.zeros(4, dtype=torch.int64), torch.tensor([7, 7, 7, 2]))
    totals = torch.tensor([0, 0, 9, 0, 0, 0, 0, 5, 6, 0])
    seven, two = counts.statistics(0, n_group=4, totals=totals, n_positions=20)
    assert (seven.token, seven.count, seven.precision, seven.recall) == (7, 3, 0.75, 0.6)
    assert seven.pmi == pytest.approx(math.log((3 / 20) / ((4 / 20) * (5 / 20))))
    assert (two.token, two.precision, two.recall) == (2, 0.25, 1 / 9)
    assert counts.statistics(0, n_group=4, totals=totals, n_positions=20, least=2) == [seven]
    assert counts.most_frequent().tolist() == [7]
