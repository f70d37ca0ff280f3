"""What fires together, from a harvest's own sample, against all positions at once."""

from __future__ import annotations

import numpy as np
import torch

from spd_lens.statistics import cofiring
from tests.statistics.browser_cases import ROWS, SITES, small_decomposition, small_harvest


def fires_of_all() -> torch.Tensor:
    importances = small_decomposition().importance(ROWS)
    return torch.cat([importances[name] > 0.3 for name in SITES], dim=-1).flatten(0, 1)


def test_with_room_for_all_positions_pairs_are_counted_exactly() -> None:
    found, fires = small_harvest().coactivation(), fires_of_all().int()
    assert np.array_equal(found.pair_counts().toarray(), (fires.T @ fires).numpy())
    assert np.array_equal(found.fired, fires.sum(0).numpy())
    assert found.n_seen == found.n_events == ROWS.numel()


def test_without_room_a_uniform_sample_of_the_positions_stays() -> None:
    found, fires = small_harvest(n_events=40).coactivation(), fires_of_all()
    assert (found.n_events, found.n_seen) == (40, ROWS.numel())
    every = {tuple(row.nonzero().flatten().tolist()) for row in fires}
    for e in range(40):
        assert tuple(found.ids[found.starts[e] : found.starts[e + 1]].tolist()) in every
    keys = np.sort(small_harvest().coactivation().keys)
    assert np.array_equal(np.sort(found.keys), keys[:40])
    share = np.mean([small_harvest(n_events=40, seed=s).coactivation().counts for s in range(20)], axis=0) / 40
    assert np.abs(share - fires.float().mean(0).numpy()).max() < 5 * 0.5 / np.sqrt(800)


def test_partners_are_those_of_the_largest_jaccard_index() -> None:
    found = small_harvest().coactivation()
    of = cofiring(found, n=6)
    for site, c in [(site, c) for site in SITES for c in (0, 3, 11)]:
        expected = found.partners(site, c, n=6)
        assert [(p.site, p.id) for p in expected] == [(s, d) for s, d, _ in of(site, c)]
        for partner, (_, _, values) in zip(expected, of(site, c), strict=True):
            np.testing.assert_allclose(values, [partner.recall, partner.precision, partner.jaccard])
