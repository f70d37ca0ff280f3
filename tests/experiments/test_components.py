"""The experiment on components: its toy, its figures, and what it says about evidence."""

from __future__ import annotations

import pytest
import torch

from experiments.components import achieved
from experiments.relay import READ, WRITE, Relay, RelayFeatures, known_decomposition
from spd_lens.components import coeffects, merge_subcomponents
from spd_lens.statistics import coactivation


def test_the_relay_is_what_it_says_and_its_decomposition_is_exact() -> None:
    model = Relay(6, 6, threshold=0.8)
    x = torch.zeros(2, 6)
    x[0, 2], x[1, 2] = 0.7, 0.9
    expected = torch.zeros(2, 6)
    expected[1, 2] = 0.5  # (0.9 - 0.8) / (1 - 0.8)
    torch.testing.assert_close(model(x), expected)
    decomposition = known_decomposition(model)
    for weight in decomposition.values():
        torch.testing.assert_close(weight.V @ weight.U, weight.target_weight)
    g = decomposition.importance(x)
    assert g[READ].tolist() == (x > 0).float().tolist()
    assert g[WRITE].tolist() == (expected > 0).float().tolist()


def test_joining_and_separating_are_counted_by_mechanism() -> None:
    mechanism = {("a", 0): 0, ("b", 0): 0, ("a", 1): 1, ("b", 1): 1, ("a", 2): 2, ("b", 2): 2}
    groups = [[("a", 0), ("b", 0)], [("a", 1), ("b", 1), ("a", 2)], [("b", 2)], [("x", 9)]]
    found = achieved(groups, mechanism)
    assert (found["joined"], found["separate"], found["exact"]) == (2 / 3, 1 / 3, 1 / 3)
    # Of 12 pairs of different mechanisms two are in one group.
    assert found["apart"] == pytest.approx(10 / 12)
    assert achieved([list(mechanism)], mechanism)["apart"] == 0
    assert achieved([[member] for member in mechanism], mechanism)["joined"] == 0


def test_effects_join_and_separate_where_no_alpha_does_by_co_activation() -> None:
    n = 16
    decomposition = known_decomposition(Relay(n, n, threshold=0.95))
    batches = list(RelayFeatures(n).batches(8))
    mechanism = {(site, f): f for site in (READ, WRITE) for f in range(n)}
    together = coactivation(decomposition, batches)
    effects = coeffects(decomposition, batches, threshold=0.05, max_batches=None, max_events=1 << 20)
    for alpha in (0.03, 0.3, 1.0, 3.0, 30.0):
        by_firing = achieved(merge_subcomponents(together, alpha=alpha).groups, mechanism)
        assert min(by_firing["joined"], by_firing["separate"]) < 0.5
        by_effects = achieved(merge_subcomponents(effects, alpha=alpha).groups, mechanism)
        assert (by_effects["joined"], by_effects["separate"]) == (1.0, 1.0)
