"""Ensembles: what runs agree on, against hand-made definitions, planted groups and the shuffled null."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spd_lens.components import adjusted_rand, ensemble
from spd_lens.statistics import CoActivation


def mechanisms(n_events: int = 600, n: int = 8, members: int = 3, seed: int = 0) -> NDArray[np.bool_]:
    """`n` independent mechanisms whose members each fire nine times of ten that the mechanism does."""
    rng = np.random.default_rng(seed)
    active = rng.random((n_events, n)) < 0.15
    return np.repeat(active, members, axis=1) & (rng.random((n_events, n * members)) < 0.9)


def test_the_adjusted_rand_index_is_that_of_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.integers(0, 4, 12), rng.integers(0, 3, 12)
        pairs = list(itertools.combinations(range(12), 2))
        a = np.array([one[i] == one[j] for i, j in pairs], float)
        b = np.array([other[i] == other[j] for i, j in pairs], float)
        expected = a.mean() * b.mean()
        index = ((a * b).mean() - expected) / ((a.mean() + b.mean()) / 2 - expected)
        assert adjusted_rand(one, other) == pytest.approx(index)
    assert adjusted_rand(np.arange(5), np.arange(5)) == 1.0


def test_planted_mechanisms_are_what_all_runs_agree_on() -> None:
    found = ensemble(CoActivation.of({"W": mechanisms()}), runs=5, seed=3)
    planted = {frozenset(("W", 3 * m + i) for i in range(3)) for m in range(8)}
    assert {frozenset(group) for group in found.groups} == planted
    assert found.stability.min() > 0.95
    assert found.agreement > 0.95
    assert found.null_agreement < 0.5 < found.agreement
    assert found.null_saved < 0.5 * found.saved
    active = mechanisms().reshape(-1, 8, 3).any(-1).mean(0)
    assert sorted(found.rates.tolist()) == pytest.approx(sorted(active.tolist()))


def test_noise_is_agreed_on_no_more_than_its_shuffle() -> None:
    noise = np.random.default_rng(1).random((400, 24)) < 0.1
    found = ensemble(CoActivation.of({"W": noise}), runs=6)
    assert found.agreement < 0.3
    assert abs(found.agreement - found.null_agreement) < 0.2


def test_runs_over_several_data_sets_take_each() -> None:
    sets = [CoActivation.of({"W": mechanisms(seed=s)}) for s in range(3)]
    found = ensemble(sets, runs=2)
    assert len(found.labels) == 3
    assert found.agreement > 0.95


def test_the_same_seed_gives_the_same_groups() -> None:
    together = CoActivation.of({"W": mechanisms()})
    one, two = ensemble(together, runs=3, seed=1), ensemble(together, runs=3, seed=1)
    np.testing.assert_array_equal(one.labels, two.labels)
    assert (one.agreement, one.null_agreement) == (two.agreement, two.null_agreement)


def test_stability_is_the_share_of_runs_in_which_pairs_are_together() -> None:
    rng = np.random.default_rng(0)
    # Weakly bound: runs disagree.
    active = rng.random((150, 4)) < 0.2
    fires = np.repeat(active, 4, axis=1) & (rng.random((150, 16)) < 0.55)
    found = ensemble(CoActivation.of({"W": fires}), runs=6, share=0.4)
    place = {member: i for i, member in enumerate(found.members)}
    assert sorted(member for group in found.groups for member in group) == sorted(found.members)
    for group, stable in zip(found.groups, found.stability, strict=True):
        own = [found.labels[:, place[member]] for member in group]
        if len(group) == 1:
            alone = [(run == label).sum() == 1 for run, label in zip(found.labels, own[0], strict=True) if label >= 0]
            assert stable == pytest.approx(np.mean(alone))
            continue
        shares = []
        for a, b in itertools.combinations(own, 2):
            both = (a >= 0) & (b >= 0)
            shares.append((a[both] == b[both]).mean() if both.any() else 0.0)
        assert stable == pytest.approx(np.mean(shares))
        assert stable >= 0.5 - 1e-9
    assert found.stability.min() < 1


def test_bad_arguments_are_named(without_type_checks: None) -> None:
    together: Any = CoActivation.of({"W": mechanisms()})
    with pytest.raises(ValueError, match="runs=1; expected at least 2: one has nothing to agree with"):
        ensemble(together, runs=1)
    with pytest.raises(ValueError, match="share=0; expected a number above 0"):
        ensemble(together, share=0)
    with pytest.raises(ValueError, match="was given no co-activations"):
        ensemble([])
    with pytest.raises(ValueError, match="or of other sites"):
        ensemble([together, CoActivation.of({"other": mechanisms()})])
