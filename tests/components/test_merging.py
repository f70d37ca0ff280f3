"""Merging by description length against a brute-force search that shares no code with it, and toys' right answers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from experiments.paper import EXPERIMENTS
from experiments.reproduce import read_run
from spd_lens.components import Merging, description_length, merge_change, merge_subcomponents
from spd_lens.statistics import CoActivation, coactivation
from spd_lens.toys import ONE_HOT_ALIVE, one_hot_inputs

Groups = list[list[int]]


def bits(fires: NDArray[np.bool_], groups: Groups, alpha: float) -> float:
    """The description length, written out over events."""
    total = 0.0
    for event in fires:
        for group in groups:
            if any(event[c] for c in group):
                total += math.log2(len(groups)) + alpha * len(group)
    return total / len(fires)


def planted(seed: int, n_events: int = 40) -> NDArray[np.bool_]:
    """A few mechanisms whose members mostly fire together, and noise; every column fires."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 10))
    mechanism = rng.random((n_events, 4)) < 0.5 * rng.random(4)
    fires = (mechanism[:, rng.integers(0, 4, n)] & (rng.random((n_events, n)) < 0.8)) | (
        rng.random((n_events, n)) < 0.05
    )
    fires[0] |= ~fires.any(0)
    return fires


@pytest.mark.parametrize("pairs", ["together", "all"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 6.0])
def test_every_merge_is_the_best_of_all_by_brute_force(alpha: float, pairs: Any) -> None:
    for seed in range(8):
        fires = planted(seed)
        found = merge_subcomponents(CoActivation.of({"W": fires}), alpha=alpha, pairs=pairs)
        groups = {c: [c] for c in range(fires.shape[1])}
        assert found.description_lengths[0] == pytest.approx(bits(fires, list(groups.values()), alpha))
        for m, (a, b) in enumerate(found.merges.tolist()):
            options = []
            for i, j in itertools.combinations(groups, 2):
                if pairs == "together" and not (fires[:, groups[i]].any(1) & fires[:, groups[j]].any(1)).any():
                    continue
                rest = [group for key, group in groups.items() if key not in (i, j)]
                options.append(bits(fires, [*rest, groups[i] + groups[j]], alpha))
            groups[fires.shape[1] + m] = groups.pop(a) + groups.pop(b)
            now = bits(fires, list(groups.values()), alpha)
            assert now == pytest.approx(min(options), abs=1e-9)
            assert now == pytest.approx(found.description_lengths[m + 1], abs=1e-9)
        # To the end, where all is one group, or nothing is left that is ever active together.
        assert len(groups) == 1 or pairs == "together"


def test_the_result_is_the_lowest_point_of_the_curve() -> None:
    fires = planted(3)
    found = merge_subcomponents(CoActivation.of({"W": fires}), alpha=1.0)
    lengths = [
        bits(fires, [[c for _, c in group] for group in found.groups_after(m)], 1.0)
        for m in range(len(found.merges) + 1)
    ]
    np.testing.assert_allclose(lengths, found.description_lengths)
    assert 0 < found.n_merges < len(found.merges)
    assert bits(fires, [[c for _, c in group] for group in found.groups], 1.0) == pytest.approx(min(lengths))
    stopped = merge_subcomponents(CoActivation.of({"W": fires}), alpha=1.0, beyond=0)
    assert len(stopped.merges) == stopped.n_merges
    assert stopped.groups == found.groups


def test_the_change_of_a_merge_is_that_of_the_description_length() -> None:
    fires = planted(5)
    groups = [[0], [1, 2], *([c] for c in range(3, fires.shape[1]))]
    for i, j in itertools.combinations(range(len(groups)), 2):
        merged = [*(g for n, g in enumerate(groups) if n not in (i, j)), groups[i] + groups[j]]
        active = [fires[:, group].any(1) for group in groups]
        rates = [a.mean() for a in active]
        change = merge_change(
            rates[i], rates[j], (active[i] & active[j]).mean(), len(groups[i]), len(groups[j]),
            total=sum(rates), k=len(groups), alpha=0.7,
        )  # fmt: skip
        assert change == pytest.approx(bits(fires, merged, 0.7) - bits(fires, groups, 0.7))
        assert description_length(rates, list(map(len, groups)), 0.7) == pytest.approx(bits(fires, groups, 0.7))


def test_sampled_pairs_end_where_no_merge_makes_it_shorter() -> None:
    fires = planted(11, n_events=200)
    together = CoActivation.of({"W": fires})
    for temperature in (0.0, 0.5):
        found = merge_subcomponents(together, alpha=1.0, sampled=3, temperature=temperature, seed=4)
        again = merge_subcomponents(together, alpha=1.0, sampled=3, temperature=temperature, seed=4)
        assert found.merges.tolist() == again.merges.tolist()
        groups = [[c for _, c in group] for group in found.groups]
        lowest = bits(fires, groups, 1.0)
        assert lowest == pytest.approx(found.description_lengths.min())
        for i, j in itertools.combinations(range(len(groups)), 2):
            merged = [*(g for n, g in enumerate(groups) if n not in (i, j)), groups[i] + groups[j]]
            ever = (fires[:, groups[i]].any(1) & fires[:, groups[j]].any(1)).any()
            assert bits(fires, merged, 1.0) >= lowest - 1e-9 or not ever
    # What is drawn makes a difference: not every seed merges in the same order.
    together = CoActivation.of({"W": np.concatenate([planted(s, n_events=200) for s in range(4)], axis=1)})
    orders = {str(merge_subcomponents(together, sampled=1, seed=s).merges.tolist()) for s in range(5)}
    assert len(orders) > 1


def test_what_never_fires_together_is_merged_only_where_all_pairs_may_be() -> None:
    fires = np.zeros((1000, 12), bool)
    for c in range(10):
        fires[100 * c : 100 * c + 100, c] = True  # ten features of equal rate
    fires[:2] = False
    fires[0, 10] = fires[1, 11] = True  # and two rare ones, alone
    together = CoActivation.of({"W": fires})
    assert all(len(group) == 1 for group in merge_subcomponents(together, alpha=1.0).groups)
    largest = merge_subcomponents(together, alpha=1.0, pairs="all").groups[0]
    assert {("W", 10), ("W", 11)} <= set(largest)


def test_lists_are_shortened_without_a_trace() -> None:
    # Always-on columns merge at once, so most entries of the lists die: counts must still be exact (asserted inside).
    rng = np.random.default_rng(0)
    fires = np.concatenate([np.ones((60, 30), bool), rng.random((60, 20)) < 0.2], axis=1)
    found = merge_subcomponents(CoActivation.of({"W": fires}), alpha=1.0)
    assert len(found.groups[0]) >= 30
    groups = [[c for _, c in group] for group in found.groups]
    assert bits(fires, groups, 1.0) == pytest.approx(found.description_lengths.min())


def test_bad_arguments_are_named(without_type_checks: None) -> None:
    together: Any = CoActivation.of({"W": planted(0)})
    for arguments, message in (
        ({"alpha": -1.0}, "alpha=-1; expected a number at least 0"),
        ({"alpha": math.nan}, "alpha=nan; expected a number at least 0"),
        ({"pairs": "most"}, "pairs='most'; expected 'together'"),
        ({"sampled": 0}, "sampled=0; expected at least 1, or None"),
        ({"beyond": -1}, "beyond=-1; expected at least 0, or None"),
        ({"sampled": 4, "temperature": -1.0}, "temperature=-1; expected a number at least 0"),
        ({"temperature": 1.0}, "chooses among sampled pairs; give sampled=32"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_subcomponents(together, **arguments)
    with pytest.raises(TypeError, match="alpha='big'; expected a number"):
        merge_subcomponents(together, alpha="big")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"was given a list; expected co-activations: coactivation\(decomposition"):
        merge_subcomponents([1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="nothing fires in these co-activations"):
        merge_subcomponents(CoActivation.of({"W": np.zeros((4, 3), bool)}))
    with pytest.raises(ValueError, match="n_merges=99; expected at most "):
        merge_subcomponents(together).groups_after(99)


def test_one_subcomponent_is_one_group() -> None:
    found = merge_subcomponents(CoActivation.of({"W": np.ones((3, 1), bool)}))
    assert found.groups == [(("W", 0),)]
    assert found.n_merges == 0


# -- right answers ---------------------------------------------------------------------------------------------------


def merged_toy(name: str) -> tuple[Merging, dict[str, NDArray[np.float32]]]:
    """The groups in a trained toy (run 0 of `reproduce.py`), and its importances on one-hot inputs."""
    experiment = EXPERIMENTS[name]
    decomposition = read_run(experiment, Path("experiments/results") / name, 0)
    data = experiment.features(123)
    together = coactivation(decomposition, [data.batch(i) for i in range(16)], threshold=ONE_HOT_ALIVE)
    importances = decomposition.importance(one_hot_inputs(data.n_features))
    return merge_subcomponents(together), {site: g.numpy() for site, g in importances.items()}


def alive_on_one_hot(importances: dict[str, NDArray[np.float32]]) -> set[tuple[str, int]]:
    return {(site, int(c)) for site, g in importances.items() for c in np.flatnonzero((g > ONE_HOT_ALIVE).any(0))}


@pytest.mark.parametrize("name", ["tms_5-2", "tms_5-2_id", "tms_40-10", "tms_40-10_id"])
def test_tms_has_one_component_per_feature_and_the_identity_is_one(name: str) -> None:
    found, importances = merged_toy(name)
    wanted: list[set[tuple[str, int]]] = []
    for feature in range(len(importances["W_enc"])):
        wanted.append({(site, int(importances[site][feature].argmax())) for site in ("W_enc", "W_dec")})
    if "W_id" in importances:
        rank = {"tms_5-2_id": 2, "tms_40-10_id": 10}[name]
        strongest = np.argsort(-importances["W_id"].mean(0))[:rank]
        wanted.append({("W_id", int(c)) for c in strongest})
    alive = alive_on_one_hot(importances)
    got = [set(group) & alive for group in found.groups]
    assert sorted(map(sorted, filter(None, got))) == sorted(map(sorted, wanted))
    # What else is there fires on no feature alone, and is in groups of its own.
    assert all(group <= alive or not group & alive for group in map(set, found.groups))


def test_a_residual_mlp_has_one_component_per_feature_and_one_dense_block() -> None:
    found, importances = merged_toy("resid_mlp_1")
    W_in, W_out = "blocks.0.mlp.W_in", "blocks.0.mlp.W_out"
    features = {frozenset({(W_in, int(c))}) for c in importances[W_in].argmax(1)}
    assert len(features) == 100
    groups = {frozenset(group) for group in found.groups}
    assert features <= groups
    block = max(groups, key=len)
    strongest = np.argsort(-importances[W_out].mean(0))[:50]
    assert block == {(W_out, int(c)) for c in strongest}
    # The rest are single subcomponents that fire on no feature alone.
    assert all(len(group) == 1 for group in groups - {block})
