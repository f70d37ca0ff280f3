"""Two decompositions side by side (E11)."""

from __future__ import annotations

import json
import math

import pytest
import torch

from spd_lens import Batch, Decomposition, decompose
from spd_lens.evaluation import compare
from tests.small_models import TiedAutoencoder, tiny_transformer, tokens

SITES: dict[str, int | None] = {"blocks.1.mlp.W_*": 20}
SITE = "blocks.1.mlp.W_in"


def _decomposition(seed: int, model_seed: int = 0) -> Decomposition:
    return decompose(tiny_transformer(model_seed), SITES, gate="shared", gate_width=8, seed=seed)


def test_shuffled_subcomponents_with_flipped_signs_are_found_again() -> None:
    a, b = _decomposition(1), _decomposition(2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    signs = torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0)
    with torch.no_grad():
        for name in a:
            b[name].V.copy_(a[name].V[:, order] * signs * 3.0)
            b[name].U.copy_(a[name].U[order] * signs[:, None])
    found = compare(a, b).sites[SITE]
    assert found.mmcs == {"V": pytest.approx(1), "U": pytest.approx(1), "rank_one": pytest.approx(1)}
    assert found.same == 1.0
    assert {(pair.a, pair.b) for pair in found.pairs} == {(int(order[i]), i) for i in range(20)}
    assert all(value < 0.9 for value in found.mmcs_random.values())


def test_mmcs_equals_loops_over_outer_products() -> None:
    a, b = _decomposition(1), _decomposition(2)
    subcomponents = [[torch.outer(d[SITE].V[:, c], d[SITE].U[c]).detach() for c in range(20)] for d in (a, b)]
    cosines = torch.tensor(
        [[float((p * q).sum() / p.norm() / q.norm()) for q in subcomponents[1]] for p in subcomponents[0]]
    )
    expected = (cosines.amax(1).mean() + cosines.amax(0).mean()) / 2
    found = compare(a, b).sites[SITE]
    assert found.mmcs["rank_one"] == pytest.approx(float(expected), abs=1e-5)
    best = max(sum(float(cosines[i, j]) for i, j in enumerate(p)) for p in [range(20), *_shuffles(50)])
    assert sum(pair.cosine for pair in found.pairs) >= best - 1e-5


def _shuffles(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(20, generator=generator).tolist() for _ in range(count)]


def test_unrelated_decompositions_are_as_close_as_random_ones() -> None:
    found = compare(_decomposition(1), _decomposition(2)).sites[SITE]
    for what in ("V", "U", "rank_one"):
        assert math.isclose(found.mmcs[what], found.mmcs_random[what], abs_tol=0.12), what
    assert found.same == 0.0


def test_only_what_is_alive_on_the_data_is_compared() -> None:
    a, b = _decomposition(1), _decomposition(2)
    with torch.no_grad():
        for weight in a.values():
            assert weight.gate is not None
            weight.gate.b_out.fill_(-100.0)  # pyright: ignore[reportCallIssue]
            weight.gate.b_out[3:7] = 100.0  # pyright: ignore[reportIndexIssue]
    found = compare(a, b, [tokens(4)])
    alive = int((b.importance(tokens(4))[SITE] >= 0.01).flatten(0, 1).any(0).sum())
    assert found.sites[SITE].alive == (4, alive)
    assert {pair.a for pair in found.sites[SITE].pairs} == {3, 4, 5, 6}
    assert "importance above 0.01 somewhere in the data" in str(found)


def test_positions_that_do_not_count_keep_nothing_alive() -> None:
    """M5, as in `evaluate`: what is on at BOS alone is not alive."""
    a, b = _decomposition(1), _decomposition(2)
    words, counts = tokens(4), torch.zeros(tokens(4).shape, dtype=torch.bool)
    counts[1, 2] = True
    found = compare(a, b, [Batch(words, position_mask=counts)]).sites[SITE].alive
    assert found == tuple(int((d.importance(words)[SITE][1, 2] > 0.01).sum()) for d in (a, b))
    assert found != compare(a, b, [words]).sites[SITE].alive


def test_tied_sites_count_once_and_the_comparison_is_plain_data() -> None:
    a, b = (decompose(TiedAutoencoder(), {"*": 3}, seed=seed) for seed in (0, 1))
    found = compare(a, b)
    assert list(found.sites) == ["encoder.W"]
    assert json.loads(json.dumps(found.to_json()))["sites"]["encoder.W"]["alive"] == [3, 3]
    assert repr(found).startswith("Comparison(MMCS")
    assert "<table>" in found._repr_html_()


def test_other_weights_and_other_sites_are_refused() -> None:
    with pytest.raises(ValueError, match="other weights in the two models"):
        compare(_decomposition(1), _decomposition(1, model_seed=5))
    other = decompose(tiny_transformer(), {"blocks.1.mlp.W_in": 20})
    with pytest.raises(ValueError, match="different sites"):
        compare(_decomposition(1), other)
